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
// After that a chain over the groups, as everywhere. One row goes through many columns in registers; several rows share a
// chunk of units that is made once. Both walk the same chains.
#include "layer.h"

#include "avx512_vectors.h"
#include "linear_parts.h"

constexpr int64_t kBlockSteps = 8;

INLINE I load_units(const uint32_t *at) { return {_mm512_loadu_si512(at)}; }
INLINE I broadcast_unit(const uint32_t *at) { return {_mm512_set1_epi32(int32_t(*at))}; }

// How units are made of a step: `load` takes what it holds for one vector of columns, `unit<U>` makes unit U of that.
// `place(u, k)`: the place within the step of part k of unit u.
template <int Bits>
struct Codes {
    static constexpr int kBits = Bits, kUnits = 2, kStep = kColumns * Bits;
    static constexpr bool kExact = true, kInMemory = false;
    using Sum = I;
    struct Words { I codes; };
    static INLINE Words load(const uint8_t *step, int vector, I) { return {load_words<Bits>(step + vector * kWidth * Bits)}; }
    template <int U>
    static INLINE I unit(Words words) {
        constexpr uint64_t low = uint64_t(Bits) * (4 * U), lane = low | (low + Bits) << 8 | (low + 2 * Bits) << 16 | (low + 3 * Bits) << 24;
        constexpr uint64_t both = lane | (lane + 0x20202020) << 32;
        const __m512i taken = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(int64_t(both)), words.codes.v);
        return {_mm512_and_si512(taken, _mm512_set1_epi8((1 << Bits) - 1))};
    }
    static constexpr int place(int u, int k) { return 4 * u + k; }
};

template <>
struct Codes<8> {
    static constexpr int kBits = 8, kUnits = 2, kStep = kColumns * 8;
    static constexpr bool kExact = true, kInMemory = true;
    using Sum = I;
    using Words = const uint8_t *;
    static INLINE Words load(const uint8_t *step, int vector, I) { return step + vector * kWidth * 4; }
    template <int U>
    static INLINE I unit(Words at) { return load_integers(at + U * kColumns * 4); }
    static constexpr int place(int u, int k) { return 4 * u + k; }
};

struct TableOfBrain {
    static constexpr int kUnits = 4, kStep = kColumns * 4;
    static constexpr bool kExact = false, kInMemory = false;
    using Sum = F;
    struct Words { I codes, table; };
    static INLINE Words load(const uint8_t *step, int vector, I table) {
        return {load_integers(step + vector * kWidth * 4), table};
    }
    // A permutation of 32 words looks at 5 bits; the table stands in it twice.
    template <int U>
    static INLINE I unit(Words words) {
        return {_mm512_permutexvar_epi16(_mm512_srli_epi16(words.codes.v, 4 * U), words.table.v)};
    }
    static constexpr int place(int u, int k) { return u + 4 * k; }
};

struct Brain {
    static constexpr int kUnits = 4, kStep = kColumns * 16;
    static constexpr bool kExact = false, kInMemory = true;
    using Sum = F;
    using Words = const uint8_t *;
    static INLINE Words load(const uint8_t *step, int vector, I) { return step + vector * kWidth * 4; }
    template <int U>
    static INLINE I unit(Words at) { return load_integers(at + U * kColumns * 4); }
    static constexpr int place(int u, int k) { return 2 * u + k; }
};

// 8-bit floats have fewer digits than bfloat16: the upper half of a float32 is all of it.
template <bool E5m2>
struct Float8 {
    static constexpr int kUnits = 4, kStep = kColumns * 8;
    static constexpr bool kExact = false, kInMemory = false;
    using Sum = F;
    using Words = const uint8_t *;
    static INLINE Words load(const uint8_t *step, int vector, I) { return step + vector * kWidth; }
    template <int U>
    static INLINE I unit(Words at) {
        const __m512i low = _mm512_castps_si512(widen_float8<E5m2>(at + 2 * U * kColumns));
        const __m512i high = _mm512_castps_si512(widen_float8<E5m2>(at + (2 * U + 1) * kColumns));
        return {_mm512_mask_mov_epi16(_mm512_srli_epi32(low, 16), 0xAAAAAAAA, high)};
    }
    static constexpr int place(int u, int k) { return 2 * u + k; }
};

INLINE F add_dot(F sum, I weights, I x) { return _mm512_dpbf16_ps(sum, (__m512bh)weights.v, (__m512bh)x.v); }
INLINE I add_dot(I sum, I weights, I x) { return {_mm512_dpbusd_epi32(sum.v, weights.v, x.v)}; }

// Of several rows, where those of one tile begin in x, scales, offsets and sums; see Units.
struct Tile {
    const Units &units;
    int64_t row, count;
    const uint32_t *x(int64_t unit) const { return units.x + row * units.units + unit * count; }
    const float *scales(int64_t block) const { return units.scales + row * units.blocks + block * count; }
    const int32_t *offsets(int64_t block) const { return units.offsets + row * units.blocks + block * count; }
    const float *sums(int64_t group) const { return units.sums ? units.sums + row * units.groups + group * count : nullptr; }
};

// The sum of products of codes begins with what the middle of the codes takes away from it.
template <class C>
INLINE typename C::Sum begin_sum(const int32_t *offset) {
    if constexpr (C::kExact) return {_mm512_set1_epi32(*offset)};
    else return zeros();
}

// A row's outliers with the codes of one vector of columns, in the order of the places, on top of `total`.
template <int Bits>
__attribute__((noinline)) F with_outliers(const Weight &weight, const Outliers &outliers, int64_t row, int64_t panel, int vector,
                                          F total) {
    const uint8_t *codes = weight.codes + panel * weight.steps * Codes<Bits>::kStep;
    int64_t group = 0;
    for (int64_t word = 0; word < outliers.words; word++) {
        for (uint64_t left = outliers.places[row * outliers.words + word]; left; left &= left - 1) {
            const int64_t place = word * 64 + __builtin_ctzll(left), step = place / kStepPlaces, at = place % kStepPlaces;
            while (weight.group_ends[group] <= step) group++;
            const Group here{weight, (panel * weight.groups + group) * kColumns};
            const int64_t feature = weight.places ? weight.places[place] : place;
            const F x = all_floats(from_bfloat16(outliers.x[row * weight.in_features + feature]));
            const uint8_t *from = codes + step * Codes<Bits>::kStep;
            I words;
            int64_t shift;
            if constexpr (Bits == 8) {
                words = load_integers(from + (at / 4 * kColumns + vector * kWidth) * 4);
                shift = at % 4 * 8;
            } else {
                words = load_words<Bits>(from + vector * kWidth * Bits);
                shift = at * Bits;
            }
            const __m512i code = _mm512_and_si512(_mm512_srl_epi32(words.v, _mm_cvtsi64_si128(shift)), _mm512_set1_epi32((1 << Bits) - 1));
            const F number = here.scale(vector * kWidth) * (to_float({code}) - here.zero(vector * kWidth));
            total = add_product(number, x, total);
        }
    }
    return total;
}

template <class C>
INLINE F finished(const Weight &weight, const Units &units, int64_t row, int64_t panel, int vector, F total) {
    if constexpr (C::kExact)
        if (units.outliers.counts[row]) return with_outliers<C::kBits>(weight, units.outliers, row, panel, vector, total);
    return total;
}

// The `R` rows of a tile with `Panels` panels: units are made in registers.
template <class C, int R, int Panels>
__attribute__((noinline)) void multiply_few(const Weight &weight, const Tile &tile, I table, int64_t panel) {
    const int64_t panel_bytes = weight.steps * C::kStep;
    const uint8_t *codes = weight.codes + panel * panel_bytes;
    auto each = [](auto &&function) {
        repeat<R>([&](auto m) { repeat<Panels>([&](auto p) { repeat<kVectors>([&](auto v) { function(m, p, v); }); }); });
    };
    F totals[R][Panels][kVectors];
    each([&](auto m, auto p, auto v) { totals[m][p][v] = zeros(); });
    int64_t step = 0, block = 0;
    for (int64_t group = 0; group < weight.groups; group++) {
        F partial[R][Panels][kVectors];
        each([&](auto m, auto p, auto v) { partial[m][p][v] = zeros(); });
        const int64_t end = weight.group_ends[group];
        while (step < end) {
            const int64_t last = C::kExact ? std::min(step + kBlockSteps, end) : end;
            typename C::Sum sum[R][Panels][kVectors];
            each([&](auto m, auto p, auto v) { sum[m][p][v] = begin_sum<C>(tile.offsets(block) + m); });
            const uint32_t *x = tile.x(step * C::kUnits);
            for (; step < last; step++, x += C::kUnits * R) {
                repeat<Panels>([&](auto p) {
                    const uint8_t *at = codes + p * panel_bytes + step * C::kStep;
                    for (int64_t line = 0; line < C::kStep; line += 64) prefetch(at + line);
                    typename C::Words words[kVectors];
                    repeat<kVectors>([&](auto v) { words[v] = C::load(at, v, table); });
                    repeat<C::kUnits>([&](auto u) {
                        I unit[kVectors];
                        repeat<kVectors>([&](auto v) { unit[v] = C::template unit<u>(words[v]); });
                        repeat<R>([&](auto m) {
                            const I value = broadcast_unit(x + u * R + m);
                            repeat<kVectors>([&](auto v) { sum[m][p][v] = add_dot(sum[m][p][v], unit[v], value); });
                        });
                    });
                });
            }
            each([&](auto m, auto p, auto v) {
                if constexpr (C::kExact)
                    partial[m][p][v] = add_product(to_float(sum[m][p][v]), all_floats(tile.scales(block)[m]), partial[m][p][v]);
                else partial[m][p][v] = sum[m][p][v];
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

// Places of a panel that become units at once, for all rows: they stay in a core's first cache.
constexpr int64_t kChunkBlocks = 64 / kBlockSteps;

// What a tile of rows does with a chunk of units of one panel. Exact kinds: of several blocks, else of one group.
struct Chunk {
    const uint8_t *numbers;  // [units][kColumns] units
    int64_t first, units;    // of the row
    int64_t block, blocks;   // exact kinds
    bool begins, ends;       // its first group, its last
    struct Block { int64_t units, group; bool ends; } list[kChunkBlocks];  // `ends`: its group
    float scales[kChunkBlocks][kColumns], zeros[kChunkBlocks][kColumns];   // of the group that ends with a block
};

constexpr int64_t kFewTiles = 4;

// Rows whose sums in both kinds of numbers fit into registers.
template <class C>
constexpr int kTile = C::kExact ? kTileOfEight : kTileOfBrain;

// Exact kinds. `partials`, `totals`: [R][kColumns].
template <class C, int R>
__attribute__((noinline)) void multiply_codes(const Chunk &chunk, const Tile &tile, float *partials, float *totals) {
    auto each = [](auto &&function) {
        repeat<R>([&](auto m) { repeat<kVectors>([&](auto v) { function(m, v); }); });
    };
    F partial[R][kVectors];
    each([&](auto m, auto v) { partial[m][v] = chunk.begins ? zeros() : load_floats(partials + m * kColumns + v * kWidth); });
    const uint32_t *x = tile.x(chunk.first);
    const uint8_t *numbers = chunk.numbers;
    for (int64_t i = 0; i < chunk.blocks; i++) {
        const Chunk::Block &block = chunk.list[i];
        const int32_t *offsets = tile.offsets(chunk.block + i);
        I sum[R][kVectors];
        each([&](auto m, auto v) { sum[m][v] = begin_sum<C>(offsets + m); });
        for (int64_t unit = 0; unit < block.units; unit++, x += R, numbers += kColumns * 4) {
            if constexpr (C::kInMemory) prefetch(numbers), prefetch(numbers + 64);
            const I a = load_integers(numbers), b = load_integers(numbers + kWidth * 4);
            repeat<R>([&](auto m) {
                const I value = broadcast_unit(x + m);
                sum[m][0] = add_dot(sum[m][0], a, value);
                sum[m][1] = add_dot(sum[m][1], b, value);
            });
        }
        const float *scales = tile.scales(chunk.block + i);
        each([&](auto m, auto v) { partial[m][v] = add_product(to_float(sum[m][v]), all_floats(scales[m]), partial[m][v]); });
        if (!block.ends) continue;
        const float *x_sums = tile.sums(block.group);
        each([&](auto m, auto v) {
            F value = partial[m][v];
            if (x_sums) value = subtract_product(load_floats(chunk.zeros[i] + v * kWidth), all_floats(x_sums[m]), value);
            float *total = totals + m * kColumns + v * kWidth;
            store_floats(total, add_product(load_floats(chunk.scales[i] + v * kWidth), value, load_floats(total)));
            partial[m][v] = zeros();
        });
    }
    if (!chunk.ends) each([&](auto m, auto v) { store_floats(partials + m * kColumns + v * kWidth, partial[m][v]); });
}

// The other kinds, of one group that may be none.
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
            else store_floats(total, add_product(load_floats(chunk.scales[0] + v * kWidth), sum[m][v], load_floats(total)));
        });
    });
}

// Units of the steps [first, last), at `made` or where they lie already.
template <class C>
INLINE const uint8_t *make_units(const uint8_t *codes, I table, int64_t first, int64_t last, uint8_t *made) {
    const uint8_t *at = codes + first * C::kStep;
    if constexpr (C::kInMemory) {
        return at;
    } else {
        uint8_t *to = made;
        for (int64_t step = first; step < last; step++, at += C::kStep, to += C::kUnits * kColumns * 4) {
            prefetch(at), prefetch(at + 64);
            repeat<kVectors>([&](auto v) {
                const auto words = C::load(at, v, table);
                repeat<C::kUnits>([&](auto u) {
                    _mm512_store_si512(to + (u * kColumns + v * kWidth) * 4, C::template unit<u>(words).v);
                });
            });
        }
        return made;
    }
}

// Any number of rows with one panel.
template <class C>
void multiply_many(const Weight &weight, const Units &units, I table, int64_t panel, float *scratch) {
    const uint8_t *codes = weight.codes + panel * weight.steps * C::kStep;
    uint8_t *made = (uint8_t *)scratch;
    float *totals = scratch + kChunkSteps * kStepPlaces * kColumns, *partials = totals + units.count * kColumns;
    std::fill(totals, totals + units.count * kColumns, 0.0f);
    auto each_tile = [&](auto &&function) {
        units.each_tile([&](int64_t row, int64_t count) {
            repeat<kTile<C>>([&](auto m) {
                if (count == m + 1) function(Tile{units, row, count}, m, partials + row * kColumns, totals + row * kColumns);
            });
        });
    };
    Chunk chunk;
    int64_t step = 0, block = 0, group = 0;
    while (step < weight.steps) {
        const int64_t first = step;
        chunk.first = first * C::kUnits, chunk.block = block, chunk.blocks = 0;
        while (weight.group_ends[group] <= step) group++;
        chunk.begins = step == (group ? weight.group_ends[group - 1] : 0);
        const int64_t most = C::kExact ? kChunkBlocks : 1;
        while (chunk.blocks < most && step < weight.steps) {
            while (weight.group_ends[group] <= step) group++;
            const int64_t last = std::min(step + (C::kExact ? kBlockSteps : kChunkSteps), int64_t(weight.group_ends[group]));
            chunk.ends = last == weight.group_ends[group];
            chunk.list[chunk.blocks] = {(last - step) * C::kUnits, group, chunk.ends};
            if (chunk.ends && weight.scale_type != kNone) {
                Group here{weight, (panel * weight.groups + group) * kColumns};
                repeat<kVectors>([&](auto v) {
                    store_floats(chunk.scales[chunk.blocks] + v * kWidth, here.scale(v * kWidth));
                    if (units.sums) store_floats(chunk.zeros[chunk.blocks] + v * kWidth, here.zero(v * kWidth));
                });
            }
            chunk.blocks++, block++;
            step = last;
        }
        chunk.units = (step - first) * C::kUnits;
        chunk.numbers = make_units<C>(codes, table, first, step, made);
        each_tile([&](const Tile &tile, auto m, float *partial, float *total) {
            if constexpr (C::kExact) multiply_codes<C, m + 1>(chunk, tile, partial, total);
            else multiply_brains<C, m + 1>(chunk, weight.scale_type != kNone, tile.x(chunk.first), partial, total);
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
    I table = all(0);
    if (weight.table) {
        const __m512 numbers = _mm512_loadu_ps(weight.table);
        table = {_mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(numbers))};
    }
    int64_t panel = first;
    // Few rows: a panel stays in a core's second cache while each tile goes through it.
    if (units.count <= kFewTiles * kTile<C>) {
        for (; panel < last; panel += 2)
            units.each_tile([&](int64_t row, int64_t count) {
                const Tile tile{units, row, count};
                repeat<kTile<C>>([&](auto m) {
                    if (count != m + 1) return;
                    // Enough sums that each need not wait for itself.
                    constexpr int kPanels = m < 2 ? 2 : 1;
                    int64_t at = panel;
                    const int64_t end = std::min(panel + 2, last);
                    for (; at + kPanels <= end; at += kPanels) multiply_few<C, m + 1, kPanels>(weight, tile, table, at);
                    for (; at < end; at++) multiply_few<C, m + 1, 1>(weight, tile, table, at);
                });
            });
        return;
    }
    for (; panel < last; panel++) multiply_many<C>(weight, units, table, panel, scratch);
}

// A row of activations in float32 and by place, of which there are whole vectors.
INLINE void gather_row(const Weight &weight, const uint16_t *from, float *to) {
    const int64_t places = weight.steps * kStepPlaces;
    int64_t place = 0;
    if (!weight.places) {
        for (; place + kWidth <= places; place += kWidth) store_floats(to + place, widen_bfloat16(from + place));
        for (; place < places; place++) to[place] = from_bfloat16(from[place]);
    } else {
        for (; place < places; place++) {
            const int32_t feature = weight.places[place];
            to[place] = feature < 0 ? 0.0f : from_bfloat16(from[feature]);
        }
    }
    for (; place % kWidth; place++) to[place] = 0;
}

// What stands out of a block: what has more than 16 times the mean square of what does not. Of numbers that are normally
// distributed one in 16,000. What is left has errors of 4 / (127 sqrt(12)) of itself at most, less than 1 %. In a short block even a
// number beside zeros has not 16 times the mean.
INLINE float outstanding(int64_t size) { return std::min(16.0f, float(size) / 2); }

// A block of activations as 8-bit integers, and what each of them stands for; not a number if one of them is none. What stands
// out, or is at least `threshold` if there is one, becomes 0 and is noted in `outliers`, a byte for each step.
INLINE float quantize_block(const float *x, int64_t size, float threshold, int8_t *to, int32_t *sum, uint8_t *outliers,
                            int32_t *num_outliers) {
    constexpr int kParts = kBlockSteps * kStepPlaces / kWidth;
    F value[kParts];
    __mmask16 there[kParts], kept[kParts], odd = 0;
    repeat<kParts>([&](auto i) {
        const int64_t left = std::max<int64_t>(0, size - i * kWidth);
        there[i] = __mmask16(left >= kWidth ? 0xFFFF : (1 << left) - 1);
        value[i] = _mm512_maskz_loadu_ps(there[i], x + i * kWidth);
        odd |= _mm512_cmp_ps_mask(value[i], value[i], _CMP_UNORD_Q);
        kept[i] = threshold > 0 ? _mm512_cmp_ps_mask(_mm512_abs_ps(value[i]), all_floats(threshold), _CMP_NGE_UQ) : __mmask16(0xFFFF);
    });
    // What is taken away lowers the mean of the rest, beside which more may stand out.
    for (bool changed = true; changed;) {
        F squares = zeros();
        repeat<kParts>([&](auto i) { squares = _mm512_mask3_fmadd_ps(value[i], value[i], squares, kept[i]); });
        const F most = all_floats(_mm512_reduce_add_ps(squares) * (outstanding(size) / float(size)));
        changed = false;
        repeat<kParts>([&](auto i) {
            const __mmask16 beyond = _mm512_mask_cmp_ps_mask(kept[i], value[i] * value[i], most, _CMP_GT_OQ);
            kept[i] &= __mmask16(~beyond);
            changed |= beyond != 0;
        });
    }
    F most = zeros();
    repeat<kParts>([&](auto i) {
        value[i] = _mm512_maskz_mov_ps(kept[i], value[i]);
        most = maximum(most, _mm512_abs_ps(value[i]));
    });
    const float largest = highest_of(most);
    const F inverse = all_floats(largest > 0 ? 127.0f / largest : 0.0f);
    int32_t total = 0;
    repeat<kParts>([&](auto i) {
        if (!there[i]) return;
        const __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(value[i] * inverse));
        _mm_mask_storeu_epi8(to + i * kWidth, there[i], bytes);
        total += _mm512_reduce_add_epi32(_mm512_cvtepi8_epi32(bytes));
        const __mmask16 noted = there[i] & __mmask16(~kept[i]);
        outliers[2 * i] = uint8_t(noted);
        if (size > i * kWidth + 8) outliers[2 * i + 1] = uint8_t(noted >> 8);
        *num_outliers += __builtin_popcount(noted);
    });
    *sum = total;
    return odd ? NAN : largest / 127.0f;
}

template <class C>
void prepare_units_of(const Weight &weight, const void *activations, int64_t row, int64_t count, float *scratch,
                      const WritableUnits &to) {
    const int64_t units = to.units;
    int8_t *bytes = (int8_t *)(scratch + weight.steps * kStepPlaces + 64);
    for (int64_t m = 0; m < count; m++) {
        gather_row(weight, (const uint16_t *)activations + (row + m) * weight.in_features, scratch);
        uint32_t *x = to.x + row * units + m;
        if constexpr (C::kExact) {
            const Outliers &outliers = to.outliers;
            uint64_t *noted = outliers.places + (row + m) * outliers.words;
            noted[outliers.words - 1] = 0;
            outliers.counts[row + m] = 0;
            int64_t step = 0, block = 0;
            for (int64_t group = 0; group < weight.groups; group++) {
                float sum = 0;
                while (step < weight.group_ends[group]) {
                    const int64_t last = std::min<int64_t>(step + kBlockSteps, weight.group_ends[group]);
                    int32_t whole;
                    const float scale =
                        quantize_block(scratch + step * kStepPlaces, (last - step) * kStepPlaces, weight.outlier_threshold, bytes,
                                       &whole, reinterpret_cast<uint8_t *>(noted) + step, &outliers.counts[row + m]);
                    for (int64_t unit = 0; unit < (last - step) * C::kUnits; unit++)
                        std::memcpy(x + (step * C::kUnits + unit) * count, bytes + unit * 4, 4);
                    const int64_t at = row * to.blocks + block * count + m;
                    to.scales[at] = scale;
                    to.offsets[at] = to.sums ? 0 : -int32_t(weight.middle) * whole;
                    sum = std::fma(scale, float(whole), sum);
                    step = last, block++;
                }
                if (to.sums) to.sums[row * weight.groups + group * count + m] = sum;
            }
        } else {
            uint16_t *parts = (uint16_t *)bytes;
            for (int64_t step = 0; step < weight.steps; step++) {
                const __m256 values = _mm256_loadu_ps(scratch + step * kStepPlaces);
                // Exact: they were bfloat16.
                _mm_storeu_si128((__m128i *)parts, _mm256_cvtepi32_epi16(_mm256_srli_epi32(_mm256_castps_si256(values), 16)));
                repeat<C::kUnits>([&](auto u) {
                    x[(step * C::kUnits + u) * count] = uint32_t(parts[C::place(u, 0)]) | uint32_t(parts[C::place(u, 1)]) << 16;
                });
            }
        }
    }
}

template <class Function>
bool with_units(int32_t coding, Function &&function) {
    switch (coding) {
        case kBfloat16: function(Brain{}); return true;
        case kInt2: function(Codes<2>{}); return true;
        case kInt3: function(Codes<3>{}); return true;
        case kInt4: function(Codes<4>{}); return true;
        case kInt8: function(Codes<8>{}); return true;
        case kTable4: function(TableOfBrain{}); return true;
        case kE4m3: function(Float8<false>{}); return true;
        case kE5m2: function(Float8<true>{}); return true;
        default: return false;
    }
}

bool units_of(const Weight &weight, UnitCounts *counts) {
    return with_units(weight.coding, [&](auto coding) {
        using C = decltype(coding);
        *counts = {weight.steps * C::kUnits, 0, C::kExact, kTile<C>};
        int64_t step = 0;
        for (int64_t group = 0; group < weight.groups && C::kExact; step = weight.group_ends[group++])
            counts->blocks += (weight.group_ends[group] - step + kBlockSteps - 1) / kBlockSteps;
    });
}

void prepare_units(const Weight &weight, const void *activations, int64_t row, int64_t count, float *scratch,
                   const WritableUnits &to) {
    with_units(weight.coding, [&](auto coding) {
        prepare_units_of<decltype(coding)>(weight, activations, row, count, scratch, to);
    });
}

void multiply_units(const Weight &weight, const Units &units, int64_t first, int64_t last, float *scratch) {
    with_units(weight.coding, [&](auto coding) { multiply_units_of<decltype(coding)>(weight, units, first, last, scratch); });
}

}  // namespace

const Dots kDotsAvx512{units_of, prepare_units, multiply_units};

}  // namespace kernels
