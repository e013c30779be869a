// Products of codes with bfloat16 activations, which become 8-bit integers, by dot instructions (see few_rows_variant.h). Compiled
// with -mavx512vnni -mavx512vbmi, and all of AVX-512's.
#include "layer.h"

#include "avx512_vectors.h"
#include "linear_parts.h"
#include "units_variant.h"

INLINE I add_dot(I sum, I weights, I x) { return {_mm512_dpbusd_epi32(sum.v, weights.v, x.v)}; }

// The same. Of many sums, given the instruction's function, gcc 12 moves each from register to register in every round of a loop.
INLINE I add_dot_in_place(I sum, I weights, I x) {
#ifdef KERNELS_EMULATE_AVX512
    return add_dot(sum, weights, x);
#else
    asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(weights.v), "v"(x.v));
    return sum;
#endif
}

#include "few_rows_variant.h"

// Rows of a tile whose units are made in registers, beside its sums within a block and those over the blocks of a group.
constexpr int kTileInRegisters = 6;

// Steps of a panel that every tile goes through before the next ones: their units stay in a core's first cache meanwhile.
constexpr int64_t kChunkOfCodes = 64;
struct Made : Codes<8> {};  // units in memory lie as codes of 8 bits do
static_assert(kChunkOfCodes * Made::kStep <= kChunkSteps * kStepPlaces * kColumns * int64_t(sizeof(float)));

// Adds the products of a unit of each vector of columns with activations `x` of each row.
template <int R>
INLINE void add_unit(const I (&unit)[kVectors], const uint32_t *x, I (&sum)[R][kVectors]) {
    repeat<R>([&](auto m) {
        const I value = broadcast_unit(x + m);
        repeat<kVectors>([&](auto v) { sum[m][v] = add_dot_in_place(sum[m][v], unit[v], value); });
    });
}

// `function(m, v, i)` for each vector of a tile of `R` rows, which is the `i`th number on of [R][kColumns].
template <int R, class Function>
INLINE void each_vector_of(Function &&function) {
    repeat<R>([&](auto m) { repeat<kVectors>([&](auto v) { function(m, v, m * kColumns + v * kWidth); }); });
}

// Adds to `totals` of a tile what a group has: its scale, times the sums over its blocks, less those of zero points.
template <int R, class Partial>
INLINE void add_group(const Weight &weight, const Tile &tile, int64_t panel, int64_t group, Partial &&partial, float *totals) {
    const Group here{weight, (panel * weight.groups + group) * kColumns};
    F scale[kVectors];
    repeat<kVectors>([&](auto v) { scale[v] = here.scale(v * kWidth); });
    auto add = [&](auto v, auto i, F sum) { store_floats(totals + i, add_product(scale[v], sum, load_floats(totals + i))); };
    if (const float *x_sums = tile.sums(group)) {
        F zero[kVectors];
        repeat<kVectors>([&](auto v) { zero[v] = here.zero(v * kWidth); });
        each_vector_of<R>([&](auto m, auto v, auto i) { add(v, i, subtract_product(zero[v], all_floats(x_sums[m]), partial(m, v, i))); });
    } else {
        each_vector_of<R>([&](auto m, auto v, auto i) { add(v, i, partial(m, v, i)); });
    }
}

// Exact kinds: the `R` rows of a tile with a panel, whose units are made in registers.
template <class C, int R>
__attribute__((noinline)) void multiply_in_registers(const Weight &weight, const Tile &tile, int64_t panel, Ahead ahead, float *totals) {
    const uint8_t *at = weight.codes + panel * weight.steps * C::kStep;
    const uint32_t *x = tile.x(0);
    const int32_t *offsets = tile.offsets(0);
    const float *scales = tile.scales(0);
    int64_t step = 0;
    for (int64_t group = 0; group < weight.groups; group++) {
        const int64_t group_end = weight.group_ends[group];
        if (step == group_end) continue;  // a group without features
        F partial[R][kVectors];
        each_vector_of<R>([&](auto m, auto v, auto) { partial[m][v] = zeros(); });
        while (step < group_end) {
            const int64_t end = std::min(step + kBlockSteps, group_end);
            I sum[R][kVectors];
            each_vector_of<R>([&](auto m, auto v, auto) { sum[m][v] = begin_sum<C>(offsets + m); });
            do {
                prefetch(at, C::kStep);
                ahead.ask(C::kStep);
                typename C::Words words[kVectors];
                repeat<kVectors>([&](auto v) { words[v] = C::load(at, v, I{}); });
                repeat<C::kUnits>([&](auto u) {
                    I unit[kVectors];
                    repeat<kVectors>([&](auto v) { unit[v] = C::template unit<u>(words[v]); });
                    add_unit<R>(unit, x + u * R, sum);
                });
                at += C::kStep, x += C::kUnits * R;
            } while (++step != end);
            each_vector_of<R>([&](auto m, auto v, auto) {
                partial[m][v] = add_product(to_float(sum[m][v]), all_floats(scales[m]), partial[m][v]);
            });
            offsets += R, scales += R;
        }
        add_group<R>(weight, tile, panel, group, [&](auto m, auto v, auto) { return partial[m][v]; }, totals);
    }
}

// Exact kinds: the `R` rows of a tile with a chunk of one panel, whose units begin at `made`. Sums within a block stay in registers, of
// which there are enough for none to wait for itself; those over the blocks of a group lie in memory.
template <class C, int R>
__attribute__((noinline)) void multiply_made(const Weight &weight, const Tile &tile, const ChunkOfSteps &chunk, int64_t panel,
                                             const uint8_t *made, Ahead ahead, float *partials, float *totals) {
    alignas(64) static constexpr float kNothing[R * kColumns] = {};
    constexpr int64_t kUnit = kColumns * 4;
    const uint32_t *x = tile.x(chunk.first * Made::kUnits);
    const int32_t *offsets = tile.offsets(chunk.block);
    const float *scales = tile.scales(chunk.block);
    int64_t step = chunk.first;
    for (int64_t group = chunk.group; step < chunk.last; group++) {
        const int64_t group_end = weight.group_ends[group], end = std::min(group_end, chunk.last);
        if (step == group_end) continue;  // a group without features
        const float *before = step == (group ? weight.group_ends[group - 1] : 0) ? kNothing : partials;
        I sum[R][kVectors];
        auto scaled = [&](auto m, auto v, auto i) { return add_product(to_float(sum[m][v]), all_floats(scales[m]), load_floats(before + i)); };
        while (true) {
            const int64_t steps = std::min(kBlockSteps, end - step);
            each_vector_of<R>([&](auto m, auto v, auto) { sum[m][v] = begin_sum<C>(offsets + m); });
            // Unit by unit: of more than one in a round, gcc 12 has each sum in two registers, and for many sums there are not so many.
            for (const uint8_t *last = made + steps * Made::kStep; made != last; made += kUnit, x += R) {
                ahead.ask(C::kStep / 2);
                I unit[kVectors];
                repeat<kVectors>([&](auto v) { unit[v] = load_integers(made + v * kWidth * 4); });
                add_unit<R>(unit, x, sum);
            }
            step += steps;
            if (step == group_end) break;
            each_vector_of<R>([&](auto m, auto v, auto i) { store_floats(partials + i, scaled(m, v, i)); });
            before = partials, offsets += R, scales += R;
            if (step == end) return;
        }
        add_group<R>(weight, tile, panel, group, scaled, totals);
        offsets += R, scales += R;
    }
}

// A panel with each tile.
template <class C>
void multiply_panel(const Weight &weight, const Units &units, int64_t panel, float *scratch) {
    uint8_t *made = reinterpret_cast<uint8_t *>(scratch);
    float *totals = scratch + kChunkSteps * kStepPlaces * kColumns, *partials = totals + units.count * kColumns;
    std::fill(totals, partials, 0.0f);
    const uint8_t *codes = weight.codes + panel * weight.steps * C::kStep;
    const int64_t tiles = (units.count + units.tile - 1) / units.tile;
    // What comes after the steps [first, last), here or in the next panel.
    auto ahead_of = [&](int64_t first, int64_t last, int64_t asks, int64_t tile) {
        const bool more = last < weight.steps || (panel + 1) * kColumns < weight.out_features;
        return share_of<C>(codes + last * C::kStep, more ? last - first : 0, asks, tile, tiles);
    };
    if (units.tile == kTileInRegisters) {
        units.each_tile([&, tile = int64_t(0)](int64_t row, int64_t count) mutable {
            const Ahead ahead = ahead_of(0, weight.steps, 1, tile++);
            with_rows<2, kTileInRegisters>(count, [&](auto rows) {
                multiply_in_registers<C, rows>(weight, Tile{units, row, count}, panel, ahead, totals + row * kColumns);
            });
        });
    } else {
        for (ChunkOfSteps chunk{}; chunk.last < weight.steps;) {
            chunk = next_chunk(weight, chunk, kChunkOfCodes);
            const uint8_t *at = make_units<C>(codes, I{}, chunk.first, chunk.last, made);
            units.each_tile([&, tile = int64_t(0)](int64_t row, int64_t count) mutable {
                const Ahead ahead = ahead_of(chunk.first, chunk.last, C::kUnits, tile++);
                with_rows<kTileOfEight / 2, kTileOfEight>(count, [&](auto rows) {
                    multiply_made<C, rows>(weight, Tile{units, row, count}, chunk, panel, at, ahead, partials + row * kColumns,
                                           totals + row * kColumns);
                });
            });
        }
    }
    put_rows<C>(weight, units, 0, units.count, panel, totals);
}

template <class C>
void multiply_units_of(const Weight &weight, const Units &units, int64_t first, int64_t last, float *scratch) {
    if (units.count == 1) multiply_pairs<C, 1>(weight, units, all(0), first, last);
    else
        for (int64_t panel = first; panel < last; panel++) multiply_panel<C>(weight, units, panel, scratch);
}

// In tiles whose units are made in registers up to `RowsInRegisters` rows.
template <int64_t RowsInRegisters>
bool units_of(const Weight &weight, int64_t rows, UnitCounts *counts) {
    return with_codes(weight.coding, [&](auto coding) {
        using C = decltype(coding);
        *counts = {weight.steps * C::kUnits, 0, runs_of(weight, kRunSteps<C>), true, rows <= RowsInRegisters ? kTileInRegisters : kTileOfEight};
    });
}

void prepare_units(const Weight &weight, const void *activations, int64_t row, int64_t count, float *scratch,
                   const WritableUnits &to) {
    with_codes(weight.coding, [&](auto coding) { prepare_tile<decltype(coding)>(weight, activations, row, count, scratch, to); });
}

void multiply_units(const Weight &weight, const Units &units, int64_t first, int64_t last, float *scratch) {
    with_codes(weight.coding, [&](auto coding) { multiply_units_of<decltype(coding)>(weight, units, first, last, scratch); });
}

}  // namespace

const Dots kDotsOfCodes{units_of<std::numeric_limits<int64_t>::max()>, prepare_units, multiply_units, scratch_floats};
const Dots kDotsOfMadeCodes{units_of<3 * kTileInRegisters>, prepare_units, multiply_units, scratch_floats};

}  // namespace kernels
