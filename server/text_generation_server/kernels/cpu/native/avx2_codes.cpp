// Products of codes with bfloat16 activations, which become 8-bit integers as for few_rows_variant.h, for processors without dot
// instructions. Compiled with -mavx2 -mfma -mf16c.
//
// A unit is 4 bytes of one column. Of codes of 2 to 4 bits it has 4 places, in a byte each: an instruction adds up the products of each
// two, in 16 bits, in which the sum over a block stays. A sum that has begun with what the middle of the codes takes away ends as one
// of codes from -8 to 7, which at most is 32 places x 8 x 127 = 32,512, whatever overflowed in between. Of codes of 8 bits a unit has 2
// places of 16 bits, and sums have 32.
#include "layer.h"

#include "avx2_vectors.h"
#include "linear_parts.h"

INLINE I add_products(I sum, I codes, I x) {
    __m256i product;
    // Given functions of the instructions, gcc 12 moves sums from register to register in every round of a loop.
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum.v), "=&x"(product) : "x"(codes.v), "x"(x.v));
    return sum;
}
INLINE I add_wide_products(I sum, I codes, I x) {
    __m256i product;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum.v), "=&x"(product) : "x"(codes.v), "x"(x.v));
    return sum;
}

INLINE I low_bits(I words, int bits) { return {_mm256_and_si256(words.v, _mm256_set1_epi8(int8_t((1 << bits) - 1)))}; }

// How units are made of a step: `load` takes what it holds for one vector of columns, `unit<U>` makes unit U of that. `place(u, k)`: the
// place within the step of part k of unit u.
template <int Bits>
struct Codes {
    static constexpr int kBits = Bits, kUnits = 2, kStep = kColumns * Bits;
    static constexpr bool kExact = true;
    struct Words { I codes; };
    static INLINE Words load(const uint8_t *step, int vector) {
        const uint8_t *at = step + vector * kWidth * Bits;
        if constexpr (Bits == 4) {
            return {load_integers(at)};
        } else if constexpr (Bits == 2) {
            // A column's 16 bits, and once more 14 bits further on: of each byte the lowest 2 bits are a place of unit 0, those
            // 4 further up one of unit 1.
            const I words = load_words<2>(at);
            return {{_mm256_or_si256(words.v, _mm256_slli_epi32(words.v, 14))}};
        } else {
            // A column's places 0 to 3, from bit 4 on, and 4 to 7 likewise in the upper 16 bits.
            const __m256i spread = _mm256_setr_epi8(0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11,
                                                    0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11);
            __m256i both = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)at));
            both = _mm256_inserti128_si256(both, _mm_loadu_si128((const __m128i *)(at + 12)), 1);
            return {{_mm256_mullo_epi16(_mm256_shuffle_epi8(both, spread), _mm256_set1_epi32(1 << 16 | 1 << 4))}};
        }
    }
    template <int U>
    static INLINE I unit(Words words) {
        if constexpr (Bits == 3) {
            const __m256i low = _mm256_and_si256(_mm256_srli_epi16(words.codes.v, 4 + 3 * U), _mm256_set1_epi16(0x0007));
            return {_mm256_or_si256(low, _mm256_and_si256(_mm256_srli_epi16(words.codes.v, 2 + 3 * U), _mm256_set1_epi16(0x0700)))};
        } else {
            return low_bits(U ? I{_mm256_srli_epi16(words.codes.v, 4)} : words.codes, Bits);
        }
    }
    static constexpr int place(int u, int k) { return Bits == 2 ? 2 * u + k / 2 + k % 2 * 4 : 2 * k + u; }
    static INLINE I add(I sum, I codes, I x) { return add_products(sum, codes, x); }
    static INLINE F whole(I sum) { return _mm256_cvtepi32_ps(_mm256_madd_epi16(sum.v, _mm256_set1_epi16(1))); }
};

template <>
struct Codes<8> {
    static constexpr int kBits = 8, kUnits = 4, kStep = kColumns * 8;
    static constexpr bool kExact = true;
    using Words = const uint8_t *;
    static INLINE Words load(const uint8_t *step, int vector) { return step + vector * kWidth * 4; }
    template <int U>
    static INLINE I unit(Words at) {
        const I words = load_integers(at + U / 2 * kColumns * 4);
        return {U % 2 ? _mm256_srli_epi16(words.v, 8) : _mm256_and_si256(words.v, _mm256_set1_epi16(0xFF))};
    }
    static constexpr int place(int u, int k) { return u / 2 * 4 + u % 2 + 2 * k; }
    static INLINE I add(I sum, I codes, I x) { return add_wide_products(sum, codes, x); }
    static INLINE F whole(I sum) { return to_float(sum); }
};

#include "rows_variant.h"

INLINE I broadcast_unit(const uint32_t *at) { return all(int32_t(*at)); }

INLINE int32_t add_up(__m256i integers) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(integers), _mm256_extracti128_si256(integers, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
}

// A block of activations as 8-bit integers, of which there are always 64, and what each of them stands for; not a number if one of
// them is none. What stands out, or is at least `threshold` if there is one, becomes 0 and is noted, a byte for each step.
INLINE float quantize_block(const float *x, int64_t size, float threshold, __m256i (&bytes)[2], uint8_t *noted, int32_t *num_outliers) {
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
    auto absolute = [&](F value) { return _mm256_and_ps(value, _mm256_castsi256_ps(magnitude)); };
    const int64_t steps = size / kStepPlaces;
    static_assert(kStepPlaces == kWidth);
    F value[kBlockSteps], kept[kBlockSteps], odd = zeros();
    repeat<kBlockSteps>([&](auto i) {
        value[i] = i < steps ? load_floats(x + i * kWidth) : zeros();
        odd = _mm256_or_ps(odd, _mm256_cmp_ps(value[i], value[i], _CMP_UNORD_Q));
        kept[i] = threshold > 0 ? _mm256_cmp_ps(absolute(value[i]), all_floats(threshold), _CMP_NGE_UQ) : as_float(all(-1));
    });
    // What is taken away lowers the mean of the rest, beside which more may stand out.
    for (bool changed = true; changed;) {
        F squares[2] = {zeros(), zeros()}, any = zeros();
        repeat<kBlockSteps>([&](auto i) {
            const F left = _mm256_and_ps(value[i], kept[i]);
            squares[i % 2] = add_product(left, left, squares[i % 2]);
        });
        const F most = all_floats(add_up(squares[0] + squares[1]) * (outstanding(size) / float(size)));
        repeat<kBlockSteps>([&](auto i) {
            const F beyond = _mm256_and_ps(kept[i], _mm256_cmp_ps(value[i] * value[i], most, _CMP_GT_OQ));
            kept[i] = _mm256_andnot_ps(beyond, kept[i]);
            any = _mm256_or_ps(any, beyond);
        });
        changed = _mm256_movemask_ps(any) != 0;
    }
    F most = zeros();
    repeat<kBlockSteps>([&](auto i) {
        value[i] = _mm256_and_ps(value[i], kept[i]);
        most = maximum(most, absolute(value[i]));
        if (i >= steps) return;
        noted[i] = uint8_t(~_mm256_movemask_ps(kept[i]));
        *num_outliers += __builtin_popcount(noted[i]);
    });
    const float largest = highest_of(most);
    const F inverse = all_floats(largest > 0 ? 127.0f / largest : 0.0f);
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    repeat<2>([&](auto half) {
        auto integers = [&](int i) { return _mm256_cvtps_epi32(value[4 * half + i] * inverse); };
        const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(integers(0), integers(1)), _mm256_packs_epi32(integers(2), integers(3)));
        bytes[half] = _mm256_permutevar8x32_epi32(packed, in_order);
    });
    return _mm256_movemask_ps(odd) ? NAN : largest / 127.0f;
}

// Units of a block. They begin with what the middle of all codes takes away: of 16 bits, for each of the two sums that a column has.
template <class C>
INLINE Block make_block(const Weight &weight, const float *x, int64_t size, uint32_t *units, uint8_t *noted, int32_t *num_outliers) {
    __m256i bytes[2], pairs = _mm256_setzero_si256();
    Block block;
    block.scale = quantize_block(x, size, weight.outlier_threshold, bytes, noted, num_outliers);
    alignas(32) int8_t order[32];
    for (int i = 0; i < 32; i++) {
        const int part = C::kBits == 8 ? 2 : 4;
        order[i] = int8_t(i / 8 % 2 * 8 + C::place(i % 8 / part, i % part));
    }
    repeat<2>([&](auto half) {
        const __m256i ordered = _mm256_shuffle_epi8(bytes[half], _mm256_load_si256((const __m256i *)order));
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(_mm256_set1_epi8(1), ordered));
        auto *to = reinterpret_cast<__m256i *>(units + half * kBlockSteps / 2 * C::kUnits);
        if constexpr (C::kBits == 8) {
            _mm256_storeu_si256(to, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(ordered)));
            _mm256_storeu_si256(to + 1, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(ordered, 1)));
        } else {
            _mm256_storeu_si256(to, ordered);
        }
    });
    block.sum = add_up(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    if constexpr (C::kBits == 8) {
        block.offset = -int32_t(weight.middle) * block.sum;
    } else {
        __m128i both = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        both = _mm_add_epi16(both, _mm_shuffle_epi32(both, 0x4E));
        both = _mm_add_epi16(both, _mm_shuffle_epi32(both, 0xB1));
        block.offset = _mm_cvtsi128_si32(_mm_mullo_epi16(both, _mm_set1_epi16(int16_t(-weight.middle))));
    }
    return block;
}

// Rows of a tile; up to so many, units are made in registers.
constexpr int kTileOfCodes = 6;
// Rows that go through all columns of a panel at once.
constexpr int kWideRows = 2;

constexpr int64_t kUnitBytes = kColumns * 4;  // of a panel

// Steps of a panel whose units are made in memory before rows go through them: they stay in a core's first cache meanwhile.
template <class C>
constexpr int64_t kStepsAtOnce = 128 / C::kUnits;
static_assert(128 * kUnitBytes <= kChunkSteps * kStepPlaces * kColumns * int64_t(sizeof(float)));

// The `R` rows of a tile with `V` vectors of columns of a chunk, from `first` on. Units begin at `made` if they lie in memory.
// `partials`, of a group, and `totals`: [R][kColumns].
template <class C, int R, int V, bool InMemory>
__attribute__((noinline)) void multiply_chunk(const Weight &weight, const Tile &tile, const ChunkOfSteps &chunk, int64_t panel, int first,
                                              const uint8_t *made, Ahead ahead, float *partials, float *totals) {
    alignas(32) static constexpr float kNothing[R * kColumns] = {};
    const uint8_t *at = weight.codes + (panel * weight.steps + chunk.first) * C::kStep;
    const uint32_t *x = tile.x(chunk.first * C::kUnits);
    const int32_t *offsets = tile.offsets(chunk.block);
    const float *scales = tile.scales(chunk.block);
    const int64_t column = first * kWidth;
    made += column * 4, partials += column, totals += column;
    auto each = [](auto &&function) {
        repeat<R>([&](auto m) { repeat<V>([&](auto v) { function(m, v, m * kColumns + v * kWidth); }); });
    };
    int64_t step = chunk.first;
    for (int64_t group = chunk.group; step < chunk.last; group++) {
        const int64_t group_end = weight.group_ends[group], end = std::min(group_end, chunk.last);
        if (step == group_end) continue;  // a group without features
        const float *before = step == (group ? weight.group_ends[group - 1] : 0) ? kNothing : partials;
        I sum[R][V];
        auto scaled = [&](auto m, auto v, auto i) { return add_product(C::whole(sum[m][v]), all_floats(scales[m]), load_floats(before + i)); };
        while (true) {
            each([&](auto m, auto v, auto) { sum[m][v] = all(offsets[m]); });
            const int64_t steps = std::min(kBlockSteps, end - step);
            step += steps;
            auto add_unit = [&](const I (&unit)[V]) __attribute__((always_inline)) {
                repeat<R>([&](auto m) {
                    const I value = broadcast_unit(x + m);
                    repeat<V>([&](auto v) { sum[m][v] = C::add(sum[m][v], unit[v], value); });
                });
                x += R;
            };
            if constexpr (InMemory) {
                // Unit by unit: of more than one in a round, gcc 12 has each sum in two registers, and there are not so many.
                for (const uint8_t *last = made + steps * C::kUnits * kUnitBytes; made != last; made += kUnitBytes) {
                    ahead.ask(C::kStep / C::kUnits);
                    I unit[V];
                    repeat<V>([&](auto v) { unit[v] = load_integers(made + v * kWidth * 4); });
                    add_unit(unit);
                }
            } else {
                for (const uint8_t *last = at + steps * C::kStep; at != last; at += C::kStep) {
                    if (R > kWideRows || kAsksForLines) prefetch(at, C::kStep);
                    else prefetch_page<C::kStep>(at);
                    typename C::Words words[V];
                    repeat<V>([&](auto v) { words[v] = C::load(at, first + v); });
                    repeat<C::kUnits>([&](auto u) {
                        I unit[V];
                        repeat<V>([&](auto v) { unit[v] = C::template unit<u>(words[v]); });
                        add_unit(unit);
                    });
                }
            }
            if (step == group_end) break;
            each([&](auto m, auto v, auto i) { store_floats(partials + i, scaled(m, v, i)); });
            before = partials, offsets += R, scales += R;
            if (step == end) return;
        }
        const Group here{weight, (panel * weight.groups + group) * kColumns + column};
        F scale[V];
        repeat<V>([&](auto v) { scale[v] = here.scale(v * kWidth); });
        auto add = [&](auto v, auto i, F partial) { store_floats(totals + i, add_product(scale[v], partial, load_floats(totals + i))); };
        if (const float *x_sums = tile.sums(group)) {
            F zero[V];  // less what the sums have begun with
            repeat<V>([&](auto v) { zero[v] = here.zero(v * kWidth) - all_floats(weight.middle); });
            each([&](auto m, auto v, auto i) { add(v, i, subtract_product(zero[v], all_floats(x_sums[m]), scaled(m, v, i))); });
        } else {
            each([&](auto m, auto v, auto i) { add(v, i, scaled(m, v, i)); });
        }
        offsets += R, scales += R;
    }
}

// Units of a chunk, in memory: [units][kColumns].
template <class C>
void make_chunk(const uint8_t *codes, const ChunkOfSteps &chunk, uint8_t *made) {
    const uint8_t *at = codes + chunk.first * C::kStep;
    for (int64_t step = chunk.first; step < chunk.last; step++, at += C::kStep, made += C::kUnits * kUnitBytes) {
        prefetch(at, C::kStep);
        repeat<kVectors>([&](auto v) {
            const auto words = C::load(at, v);
            repeat<C::kUnits>([&](auto u) {
                _mm256_storeu_si256((__m256i *)(made + (u * kColumns + v * kWidth) * 4), C::template unit<u>(words).v);
            });
        });
    }
}

// A tile with a chunk.
template <class C, bool InMemory>
void multiply_tile(const Weight &weight, const Tile &tile, const ChunkOfSteps &chunk, int64_t panel, const uint8_t *made, Ahead ahead,
                   float *partials, float *totals) {
    with_rows<1, kTileOfCodes>(tile.count, [&](auto rows) {
        constexpr int kVectorsAtOnce = rows <= kWideRows ? kVectors : kVectors / 2;
        for (int first = 0; first < kVectors; first += kVectorsAtOnce, ahead.stride = 0)
            multiply_chunk<C, rows, kVectorsAtOnce, InMemory>(weight, tile, chunk, panel, first, made, ahead, partials, totals);
    });
}

template <class C>
void multiply_panel(const Weight &weight, const Units &units, int64_t panel, float *scratch) {
    uint8_t *made = reinterpret_cast<uint8_t *>(scratch);
    float *totals = scratch + kChunkSteps * kStepPlaces * kColumns, *partials = totals + units.count * kColumns;
    std::fill(totals, partials, 0.0f);
    const uint8_t *codes = weight.codes + panel * weight.steps * C::kStep;
    const int64_t tiles = (units.count + units.tile - 1) / units.tile;
    if (tiles == 1) {
        const ChunkOfSteps whole{0, weight.steps, 0, 0, units.blocks};
        multiply_tile<C, false>(weight, Tile{units, 0, units.count}, whole, panel, nullptr, Ahead{codes, 0}, partials, totals);
    } else {
        for (ChunkOfSteps chunk{}; chunk.last < weight.steps;) {
            chunk = next_chunk(weight, chunk, kStepsAtOnce<C>);
            make_chunk<C>(codes, chunk, made);
            const bool more = chunk.last < weight.steps || (panel + 1) * kColumns < weight.out_features;
            units.each_tile([&, tile = int64_t(0)](int64_t row, int64_t count) mutable {
                const Ahead ahead = share_of<C>(codes + chunk.last * C::kStep, more ? chunk.last - chunk.first : 0, C::kUnits, tile++, tiles);
                const int64_t at = row * kColumns;
                multiply_tile<C, true>(weight, Tile{units, row, count}, chunk, panel, made, ahead, partials + at, totals + at);
            });
        }
    }
    put_rows<C>(weight, units, 0, units.count, panel, totals);
}

bool units_of(const Weight &weight, int64_t, UnitCounts *counts) {
    return with_codes(weight.coding, [&](auto coding) {
        *counts = {weight.steps * decltype(coding)::kUnits, 0, runs_of(weight, kBlockSteps), true, kTileOfCodes};
    });
}

void prepare_units(const Weight &weight, const void *activations, int64_t row, int64_t count, float *scratch, const WritableUnits &to) {
    with_codes(weight.coding, [&](auto coding) {
        using C = decltype(coding);
        uint32_t *x = to.x + row * to.units;
        auto quantize = [&](const float *from, int64_t size, uint32_t *units, uint8_t *noted, int32_t *num_outliers) {
            return make_block<C>(weight, from, size, units, noted, num_outliers);
        };
        prepare_codes<C>(weight, activations, row, count, scratch, to, quantize,
                         [&](int64_t m, int64_t step, int64_t, const uint32_t *units, auto size) {
                             uint32_t *at = x + step * C::kUnits * count + m;
                             for (int64_t unit = 0; unit < size; unit++) at[unit * count] = units[unit];
                         });
    });
}

void multiply_units(const Weight &weight, const Units &units, int64_t first, int64_t last, float *scratch) {
    with_codes(weight.coding, [&](auto coding) {
        for (int64_t panel = first; panel < last; panel++) multiply_panel<decltype(coding)>(weight, units, panel, scratch);
    });
}

}  // namespace

const Dots kPairsOfCodes{units_of, prepare_units, multiply_units, scratch_floats};

}  // namespace kernels
