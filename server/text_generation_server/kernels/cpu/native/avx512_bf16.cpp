// Products of bfloat16 activations by dot instructions. Compiled with -mavx512bf16 -mavx512vnni -mavx512vbmi, and all of
// AVX-512's.
//
// A unit is 4 bytes of one column: 2 places in bfloat16, or 4 in 8 bits; an instruction adds the products of a unit of
// weights and a unit of activations, for 16 columns. Two kinds of weights:
//
//   numbers  (bfloat16, tables, 8-bit floats): a chain over the units of a group, in float32, as the processor's instruction adds.
//   codes    (2, 3, 4, 8 bits): activations become 8-bit integers, a block of at most kBlockSteps at a time, each block with
//            a scale of its own, which follows from the row alone. Sums within a block are exact; then a chain over the
//            blocks of a group, in float32.
//
// After that a chain over the groups, as everywhere. One row goes through many columns in registers; several rows share
// units, which are made in registers for each tile or, of numbers and many rows, once in memory. All walk the same chains.
#include "layer.h"

#include "avx512_vectors.h"
#include "linear_parts.h"
#include "units_variant.h"

INLINE F add_dot(F sum, I weights, I x) { return _mm512_dpbf16_ps(sum, (__m512bh)weights.v, (__m512bh)x.v); }
INLINE I add_dot(I sum, I weights, I x) { return {_mm512_dpbusd_epi32(sum.v, weights.v, x.v)}; }

// The same. Of many sums, given the instruction's function, gcc 12 moves each from register to register in every round of a loop.
INLINE I add_dot_in_place(I sum, I weights, I x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(weights.v), "v"(x.v));
    return sum;
}

// The sum of products of codes begins with what the middle of the codes takes away from it.
template <class C>
INLINE typename C::Sum begin_sum(const int32_t *offset) {
    if constexpr (C::kExact) return {_mm512_set1_epi32(*offset)};
    else return zeros();
}

// The `R` rows of a tile with `Panels` panels: units are made in registers.
template <class C, int R, int Panels>
__attribute__((noinline)) void multiply_few(const Weight &weight, const Tile &tile, I table, int64_t panel) {
    const int64_t panel_bytes = weight.steps * C::kStep;
    const uint8_t *codes = weight.codes + panel * panel_bytes;
    auto each = [](auto &&function) {
        repeat<R>([&](auto m) { repeat<Panels>([&](auto p) { repeat<kVectors>([&](auto v) { function(m, p, v); }); }); });
    };
    // Exact sums may be added up in any order: of few, each has a chain for each unit of a step, so that none waits for itself,
    // and units are taken as they are.
    constexpr bool kRaw = C::kExact && R * Panels <= 2;
    constexpr int kChains = kRaw ? C::kUnits : 1;
    F totals[R][Panels][kVectors];
    each([&](auto m, auto p, auto v) { totals[m][p][v] = zeros(); });
    int64_t step = 0, block = 0;
    for (int64_t group = 0; group < weight.groups; group++) {
        F partial[R][Panels][kVectors];
        each([&](auto m, auto p, auto v) { partial[m][p][v] = zeros(); });
        const int64_t end = weight.group_ends[group];
        while (step < end) {
            const int64_t last = C::kExact ? std::min(step + kBlockSteps, end) : end;
            typename C::Sum sum[R][Panels][kVectors][kChains];
            each([&](auto m, auto p, auto v) {
                sum[m][p][v][0] = begin_sum<C>(tile.offsets(block) + m);
                if constexpr (kRaw) sum[m][p][v][1] = {_mm512_setzero_si512()};
            });
            const uint32_t *x = tile.x(step * C::kUnits);
            for (; step < last; step++, x += C::kUnits * R) {
                repeat<Panels>([&](auto p) {
                    const uint8_t *at = codes + p * panel_bytes + step * C::kStep;
                    // Of few rows, memory is all that a step waits for.
                    if constexpr (R <= 2) prefetch_page<C::kStep>(at);
                    else
                        for (int64_t line = 0; line < C::kStep; line += 64) prefetch(at + line);
                    typename C::Words words[kVectors];
                    repeat<kVectors>([&](auto v) { words[v] = C::load(at, v, table); });
                    repeat<C::kUnits>([&](auto u) {
                        I unit[kVectors];
                        repeat<kVectors>([&](auto v) {
                            if constexpr (kRaw) unit[v] = C::template raw<u>(words[v]);
                            else unit[v] = C::template unit<u>(words[v]);
                        });
                        repeat<R>([&](auto m) {
                            const I value = broadcast_unit(x + u * R + m);
                            repeat<kVectors>([&](auto v) { sum[m][p][v][u % kChains] = add_dot(sum[m][p][v][u % kChains], unit[v], value); });
                        });
                    });
                });
            }
            each([&](auto m, auto p, auto v) {
                if constexpr (kRaw) sum[m][p][v][0] = sum[m][p][v][0] + shift_right_signed<C::kRawShift>(sum[m][p][v][1]);
                if constexpr (C::kExact)
                    partial[m][p][v] = add_product(to_float(sum[m][p][v][0]), all_floats(tile.scales(block)[m]), partial[m][p][v]);
                else partial[m][p][v] = sum[m][p][v][0];
            });
            block++;
        }
        each([&](auto m, auto p, auto v) {
            Group here{weight, ((panel + p) * weight.groups + group) * kColumns};
            const float *x_sum = tile.units.sums ? tile.sums(group) + m : nullptr;
            if (weight.scale_type == kNone) totals[m][p][v] = partial[m][p][v];
            else totals[m][p][v] = here.add(totals[m][p][v], partial[m][p][v], v * kWidth, x_sum);
        });
    }
    const Rows rows{R, 0, nullptr, nullptr, nullptr, tile.units.y};
    each([&](auto m, auto p, auto v) {
        const F total = finished<C>(weight, tile.units, tile.row + m, panel + p, v, totals[m][p][v]);
        put(rows, weight, tile.row + m, (panel + p) * kColumns + v * kWidth, total);
    });
}

// Rows of codes from which on each tile has `multiply_codes`.
constexpr int kManyCodes = 3;

// A stream of bytes that will be needed later: read into a core's second cache while something else is computed, so much in each step.
struct Ahead {
    const uint8_t *at;
    int64_t stride;
};

// Exact kinds. The next steps of a block, until `end`.
template <class C, int R>
INLINE void add_steps(const uint8_t *codes, const uint8_t *end, I table, const uint32_t *x, Ahead &ahead, I (&sum)[R][kVectors]) {
    do {
        for (int64_t line = 0; line < C::kStep; line += 64) prefetch(codes + line);
        for (int64_t line = 0; line < C::kStep / 2; line += 64) _mm_prefetch((const char *)ahead.at + line, _MM_HINT_T1);
        ahead.at += ahead.stride;
        typename C::Words words[kVectors];
        repeat<kVectors>([&](auto v) { words[v] = C::load(codes, v, table); });
        repeat<C::kUnits>([&](auto u) {
            I unit[kVectors];
            repeat<kVectors>([&](auto v) { unit[v] = C::template unit<u>(words[v]); });
            repeat<R>([&](auto m) {
                const I value = broadcast_unit(x + u * R + m);
                repeat<kVectors>([&](auto v) { sum[m][v] = add_dot_in_place(sum[m][v], unit[v], value); });
            });
        });
        codes += C::kStep, x += C::kUnits * R;
    } while (codes != end);
}

// Exact kinds: the `R` rows of a tile with one panel. Making units anew for each tile costs nothing, as a processor does so beside the
// products; so all that matters is that the sums of both kinds stay in registers.
template <class C, int R>
__attribute__((noinline)) void multiply_codes(const Weight &weight, const Tile &tile, I table, int64_t panel, Ahead ahead) {
    const uint8_t *codes = weight.codes + panel * weight.steps * C::kStep;
    auto each = [](auto &&function) {
        repeat<R>([&](auto m) { repeat<kVectors>([&](auto v) { function(m, v); }); });
    };
    alignas(64) float memory[R * kColumns];
    float *totals = memory;
    asm("" : "+r"(totals) : : "memory");  // else gcc has them in registers, and others in memory
    each([&](auto m, auto v) { store_floats(totals + m * kColumns + v * kWidth, zeros()); });
    const uint32_t *x = tile.x(0);
    const int32_t *offsets = tile.offsets(0);
    const float *scales = tile.scales(0);
    int64_t step = 0;
    for (int64_t group = 0; group < weight.groups; group++) {
        F partial[R][kVectors];
        each([&](auto m, auto v) { partial[m][v] = zeros(); });
        const int64_t end = weight.group_ends[group];
        while (step < end) {
            const int64_t steps = std::min(kBlockSteps, end - step);
            I sum[R][kVectors];
            each([&](auto m, auto v) { sum[m][v] = begin_sum<C>(offsets + m); });
            add_steps<C, R>(codes, codes + steps * C::kStep, table, x, ahead, sum);
            each([&](auto m, auto v) { partial[m][v] = add_product(to_float(sum[m][v]), all_floats(scales[m]), partial[m][v]); });
            step += steps, codes += steps * C::kStep, x += steps * C::kUnits * R;
            offsets += R, scales += R;
        }
        const Group here{weight, (panel * weight.groups + group) * kColumns};
        if (const float *x_sums = tile.sums(group))
            repeat<kVectors>([&](auto v) {
                const F zero = here.zero(v * kWidth);
                repeat<R>([&](auto m) { partial[m][v] = subtract_product(zero, all_floats(x_sums[m]), partial[m][v]); });
            });
        repeat<kVectors>([&](auto v) {
            const F scale = here.scale(v * kWidth);
            repeat<R>([&](auto m) {
                float *total = totals + m * kColumns + v * kWidth;
                store_floats(total, add_product(scale, partial[m][v], load_floats(total)));
            });
        });
    }
    const Rows rows{R, 0, nullptr, nullptr, nullptr, tile.units.y};
    for (int64_t m = 0; m < R; m++)
        repeat<kVectors>([&](auto v) {
            const F total = finished<C>(weight, tile.units, tile.row + m, panel, v, load_floats(totals + m * kColumns + v * kWidth));
            put(rows, weight, tile.row + m, panel * kColumns + v * kWidth, total);
        });
}

// What a tile of rows does with a chunk of units of one panel and one group.
struct Chunk {
    const uint8_t *numbers;  // [units][kColumns] units
    int64_t units;
    bool begins, ends;       // its group
    float scales[kColumns];  // where the group ends
};

constexpr int64_t kFewTiles = 4;
// Bytes of a panel from which on two of them are streams that are long enough for a processor to read ahead; shorter ones
// are read one after the other, which is one stream.
constexpr int64_t kLongPanel = 40 << 10;

// Rows of a tile, at most.
template <class C>
constexpr int kTile = C::kExact ? kTileOfEight : kTileOfBrain;

// The same of many rows. Five of codes have all they need in registers, but the fewer tiles, the less often codes of 2 or 3 bits,
// which take longest, become units. Six rows are one tile in any case, since what they wait for is memory.
template <class C>
constexpr int64_t tile_for(int64_t rows) {
    if constexpr (C::kExact)
        if (C::kBits >= 4 && rows > kTile<C>) return kTile<C> - 1;
    return kTile<C>;
}

// The other kinds; the group may be none.
template <class C, int R>
__attribute__((noinline)) void multiply_brains(const Chunk &chunk, bool scaled, const uint32_t *x, float *partials,
                                               float *totals) {
    F sum[R][kVectors];
    repeat<R>([&](auto m) {
        repeat<kVectors>([&](auto v) { sum[m][v] = chunk.begins ? zeros() : load_floats(partials + m * kColumns + v * kWidth); });
    });
    const uint8_t *numbers = chunk.numbers;
    for (int64_t unit = 0; unit < chunk.units; unit++, x += R, numbers += kColumns * 4) {
        if constexpr (C::kInMemory) prefetch(numbers), prefetch(numbers + 64);
        const I a = load_integers(numbers), b = load_integers(numbers + kWidth * 4);
        repeat<R>([&](auto m) {
            const I value = broadcast_unit(x + m);
            sum[m][0] = add_dot(sum[m][0], a, value);
            sum[m][1] = add_dot(sum[m][1], b, value);
        });
    }
    repeat<R>([&](auto m) {
        repeat<kVectors>([&](auto v) {
            float *total = totals + m * kColumns + v * kWidth;
            if (!chunk.ends) store_floats(partials + m * kColumns + v * kWidth, sum[m][v]);
            else if (!scaled) store_floats(total, sum[m][v]);
            else store_floats(total, add_product(load_floats(chunk.scales + v * kWidth), sum[m][v], load_floats(total)));
        });
    });
}

// The other kinds: any number of rows with one panel.
template <class C>
void multiply_many(const Weight &weight, const Units &units, I table, int64_t panel, float *scratch) {
    const uint8_t *codes = weight.codes + panel * weight.steps * C::kStep;
    uint8_t *made = (uint8_t *)scratch;
    float *totals = scratch + kChunkSteps * kStepPlaces * kColumns, *partials = totals + units.count * kColumns;
    std::fill(totals, totals + units.count * kColumns, 0.0f);
    const bool scaled = weight.scale_type != kNone;
    Chunk chunk;
    int64_t step = 0, group = 0;
    while (step < weight.steps) {
        const int64_t first = step;
        while (weight.group_ends[group] <= step) group++;
        chunk.begins = step == (group ? weight.group_ends[group - 1] : 0);
        step = std::min(step + kChunkSteps, int64_t(weight.group_ends[group]));
        chunk.ends = step == weight.group_ends[group];
        if (chunk.ends && scaled) {
            Group here{weight, (panel * weight.groups + group) * kColumns};
            repeat<kVectors>([&](auto v) { store_floats(chunk.scales + v * kWidth, here.scale(v * kWidth)); });
        }
        chunk.units = (step - first) * C::kUnits;
        chunk.numbers = make_units<C>(codes, table, first, step, made);
        units.each_tile([&](int64_t row, int64_t count) {
            const uint32_t *x = Tile{units, row, count}.x(first * C::kUnits);
            repeat<kTile<C>>([&](auto m) {
                if (count == m + 1) multiply_brains<C, m + 1>(chunk, scaled, x, partials + row * kColumns, totals + row * kColumns);
            });
        });
    }
    const Rows rows{units.count, 0, nullptr, nullptr, nullptr, units.y};
    for (int64_t row = 0; row < units.count; row++)
        repeat<kVectors>([&](auto v) {
            const F total = finished<C>(weight, units, row, panel, v, load_floats(totals + row * kColumns + v * kWidth));
            put(rows, weight, row, panel * kColumns + v * kWidth, total);
        });
}

template <class C>
void multiply_units_of(const Weight &weight, const Units &units, int64_t first, int64_t last, float *scratch) {
    const I table = load_table(weight);
    int64_t panel = first;
    if constexpr (C::kExact) {
        // A panel stays in a core's second cache while each tile goes through it, and the next one comes there meanwhile.
        const int64_t tiles = (units.count + units.tile - 1) / units.tile, bytes = weight.steps * C::kStep;
        for (; units.count >= kManyCodes && panel < last; panel++)
            units.each_tile([&, tile = int64_t(0)](int64_t row, int64_t count) mutable {
                const uint8_t *at = weight.codes + panel * bytes;
                Ahead ahead{at, 0};
                if (tiles > 1 && panel + 1 < last) ahead = {at + bytes + bytes * tile / tiles, (C::kStep + tiles - 1) / tiles};
                tile++;
                repeat<kTile<C>>([&](auto m) {
                    if constexpr (m + 1 >= kManyCodes)
                        if (count == m + 1) multiply_codes<C, m + 1>(weight, Tile{units, row, count}, table, panel, ahead);
                });
            });
    } else {
        for (; units.count > kFewTiles * kTile<C> && panel < last; panel++) multiply_many<C>(weight, units, table, panel, scratch);
    }
    // Few rows: a panel stays in a core's second cache while each tile goes through it.
    for (; panel < last; panel += 2)
        units.each_tile([&](int64_t row, int64_t count) {
            const Tile tile{units, row, count};
            repeat<C::kExact ? kManyCodes - 1 : kTile<C>>([&](auto m) {
                if (count != m + 1) return;
                // Enough sums that each need not wait for itself.
                constexpr int kPanels = m < 2 ? 2 : 1;
                int64_t at = panel;
                const int64_t end = std::min(panel + 2, last);
                const bool alone = C::kExact && m == 0 && weight.steps * C::kStep < kLongPanel;
                for (; !alone && at + kPanels <= end; at += kPanels) multiply_few<C, m + 1, kPanels>(weight, tile, table, at);
                for (; at < end; at++) multiply_few<C, m + 1, 1>(weight, tile, table, at);
            });
        });
}

bool units_of(const Weight &weight, int64_t rows, UnitCounts *counts) {
    return with_units(weight.coding, [&](auto coding) {
        using C = decltype(coding);
        *counts = {weight.steps * C::kUnits, 0, C::kExact ? runs_of<C>(weight) : 0, C::kExact, tile_for<C>(rows)};
    });
}

void prepare_units(const Weight &weight, const void *activations, int64_t row, int64_t count, float *scratch,
                   const WritableUnits &to) {
    with_units(weight.coding, [&](auto coding) {
        using C = decltype(coding);
        uint32_t *x = to.x + row * to.units;
        prepare_runs<C>(weight, activations, row, count, scratch, to,
                        [&](int64_t m, int64_t step, int64_t, const uint32_t *units, auto size) {
                            uint32_t *at = x + step * C::kUnits * count + m;
                            for (int64_t unit = 0; unit < size; unit++) at[unit * count] = units[unit];
                        });
    });
}

void multiply_units(const Weight &weight, const Units &units, int64_t first, int64_t last, float *scratch) {
    with_units(weight.coding, [&](auto coding) { multiply_units_of<decltype(coding)>(weight, units, first, last, scratch); });
}

}  // namespace

const Dots kDotsAvx512{units_of, prepare_units, multiply_units, scratch_floats};

}  // namespace kernels
