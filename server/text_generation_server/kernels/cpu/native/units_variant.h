// Units of 4 bytes, of weights and of activations, for products that add up units: included by each source that has such, after
// linear_parts.h. See few_rows_variant.h.

INLINE I load_units(const uint32_t *at) { return {_mm512_loadu_si512(at)}; }
INLINE I broadcast_unit(const uint32_t *at) { return {_mm512_set1_epi32(int32_t(*at))}; }

// How units are made of a step: `load` takes what it holds for one vector of columns, `unit<U>` makes unit U of that.
// `place(u, k)`: the place within the step of part k of unit u. Exact kinds have `raw<U>` too: unit U of numbers that are
// `1 << kRawShift * U` times as large, where making it so is cheaper.
template <int Bits>
struct Codes {
    static constexpr int kBits = Bits, kUnits = 2, kStep = kColumns * Bits;
    static constexpr int kRawShift = 0;
    static constexpr bool kExact = true, kInMemory = false;
    using Sum = I;
    struct Words { I codes; };
    static INLINE Words load(const uint8_t *step, int vector, I) {
        const uint8_t *at = step + vector * kWidth * Bits;
        if constexpr (Bits == 3) {
            // Each column's 3 bytes and one that nobody looks at.
            alignas(64) static constexpr std::array<uint8_t, 64> kSpread = [] {
                std::array<uint8_t, 64> from{};
                for (int i = 0; i < 64; i++) from[i] = uint8_t(i / 4 * 3 + i % 4);
                return from;
            }();
            return {{_mm512_permutexvar_epi8(_mm512_load_si512(kSpread.data()), load_integers(at).v)}};
        } else {
            return {load_words<Bits>(at)};
        }
    }
    template <int U>
    static INLINE I raw(Words words) { return unit<U>(words); }
    template <int U>
    static INLINE I unit(Words words) {
        constexpr uint64_t low = uint64_t(Bits) * (4 * U), lane = low | (low + Bits) << 8 | (low + 2 * Bits) << 16 | (low + 3 * Bits) << 24;
        constexpr uint64_t both = lane | (lane + 0x20202020) << 32;
        const __m512i taken = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(int64_t(both)), words.codes.v);
        return {_mm512_and_si512(taken, _mm512_set1_epi8((1 << Bits) - 1))};
    }
    static constexpr int place(int u, int k) { return 4 * u + k; }
};

// The lower halves of an integer's bytes are one unit, the upper ones the other, which stand where they are 16 times as much.
template <>
struct Codes<4> {
    static constexpr int kBits = 4, kUnits = 2, kStep = kColumns * 4, kRawShift = 4;
    static constexpr bool kExact = true, kInMemory = false;
    using Sum = I;
    struct Words { I codes; };
    static INLINE Words load(const uint8_t *step, int vector, I) { return {load_integers(step + vector * kWidth * 4)}; }
    template <int U>
    static INLINE I raw(Words words) { return {_mm512_and_si512(words.codes.v, _mm512_set1_epi8(int8_t(0xF << 4 * U)))}; }
    template <int U>
    static INLINE I unit(Words words) {
        return {_mm512_and_si512(U ? _mm512_srli_epi16(words.codes.v, 4) : words.codes.v, _mm512_set1_epi8(0xF))};
    }
    static constexpr int place(int u, int k) { return 2 * k + u; }
};

template <>
struct Codes<8> {
    static constexpr int kBits = 8, kUnits = 2, kStep = kColumns * 8, kRawShift = 0;
    static constexpr bool kExact = true, kInMemory = true;
    using Sum = I;
    using Words = const uint8_t *;
    static INLINE Words load(const uint8_t *step, int vector, I) { return step + vector * kWidth * 4; }
    template <int U>
    static INLINE I raw(Words at) { return unit<U>(at); }
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

#ifdef __AVX512BF16__
// The 16 numbers of a table, twice.
INLINE I load_table(const Weight &weight) {
    if (!weight.table) return all(0);
    return {_mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(weight.table)))};
}
#endif

#include "rows_variant.h"

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
    __m512i bytes = _mm512_setzero_si512();
    repeat<kParts>([&](auto i) {
        bytes = _mm512_inserti32x4(bytes, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(value[i] * inverse)), i);
        if (!there[i]) return;
        const __mmask16 noted = there[i] & __mmask16(~kept[i]);
        outliers[2 * i] = uint8_t(noted);
        if (size > i * kWidth + 8) outliers[2 * i + 1] = uint8_t(noted >> 8);
        *num_outliers += __builtin_popcount(noted);
    });
    // Whole, since what is loaded in larger pieces than it was stored in has to wait.
    _mm512_storeu_si512(to, bytes);
    // An instruction adds up four bytes.
    *sum = _mm512_reduce_add_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), bytes));
    return odd ? NAN : largest / 127.0f;
}

// Units of a row that a tile takes at once, and the steps that they are made of: for codes, those of a block.
constexpr int kRunUnits = 16;
template <class C>
constexpr int64_t kRunSteps = kRunUnits / C::kUnits;
static_assert(kRunSteps<Codes<4>> == kBlockSteps);

// The bytes of a block's steps, which stand as places do, as units want them.
template <class C>
INLINE void order_units(uint32_t *units) {
    static_assert(sizeof(uint32_t) * kRunUnits == 64);
    alignas(16) uint8_t from[16];
    for (int i = 0; i < 16; i++) from[i] = uint8_t(i / 8 * 8 + C::place(i % 8 / 4, i % 4));
    const __m512i order = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i *>(from)));
    _mm512_storeu_si512(units, _mm512_shuffle_epi8(_mm512_loadu_si512(units), order));
}

// The units of a step, of numbers that were bfloat16.
template <class C>
INLINE void brain_units(const float *step, uint32_t *units) {
    uint16_t parts[kStepPlaces];
    const __m256i upper = _mm256_srli_epi32(_mm256_castps_si256(_mm256_loadu_ps(step)), 16);
    _mm_storeu_si128((__m128i *)parts, _mm256_cvtepi32_epi16(upper));
    repeat<C::kUnits>([&](auto u) { units[u] = uint32_t(parts[C::place(u, 0)]) | uint32_t(parts[C::place(u, 1)]) << 16; });
}

// Makes units of the rows [row, row + count), group by group and in runs of at most kRunSteps: `put(m, step, run, units, size)`
// takes those of the row + m, `size` of them, which begin with this step and are the `run`th.
template <class C, class Put>
INLINE void prepare_numbers(const Weight &weight, const void *activations, int64_t row, int64_t count, float *scratch, Put &&put) {
    uint32_t *brains = reinterpret_cast<uint32_t *>(scratch + weight.steps * kStepPlaces + 64);
    for (int64_t m = 0; m < count; m++) {
        gather_row(weight, (const uint16_t *)activations + (row + m) * weight.in_features, scratch);
        for (int64_t step = 0; step < weight.steps; step++) brain_units<C>(scratch + step * kStepPlaces, brains + step * C::kUnits);
        int64_t step = 0, run = 0;
        for (int64_t group = 0; group < weight.groups; group++) {
            while (step < weight.group_ends[group]) {
                const int64_t first = step, last = std::min<int64_t>(step + kRunSteps<C>, weight.group_ends[group]);
                const uint32_t *made = brains + first * C::kUnits;
                if (last - first == kRunSteps<C>) put(m, first, run, made, std::integral_constant<int, kRunUnits>{});
                else put(m, first, run, made, (last - first) * C::kUnits);
                step = last, run++;
            }
        }
    }
}

// The same of codes too.
template <class C, class Put>
INLINE void prepare_runs(const Weight &weight, const void *activations, int64_t row, int64_t count, float *scratch,
                         const WritableUnits &to, Put &&put) {
    if constexpr (C::kExact) {
        auto quantize = [&](const float *x, int64_t size, uint32_t *units, uint8_t *noted, int32_t *num_outliers) {
            int32_t sum;
            const float scale = quantize_block(x, size, weight.outlier_threshold, reinterpret_cast<int8_t *>(units), &sum, noted, num_outliers);
            order_units<C>(units);
            return Block{scale, sum, to.sums ? 0 : -int32_t(weight.middle) * sum};
        };
        prepare_codes<C>(weight, activations, row, count, scratch, to, quantize, put);
    } else {
        prepare_numbers<C>(weight, activations, row, count, scratch, put);
    }
}

template <class Function>
bool with_numbers(int32_t coding, Function &&function) {
    switch (coding) {
        case kBfloat16: function(Brain{}); return true;
        case kTable4: function(TableOfBrain{}); return true;
        case kE4m3: function(Float8<false>{}); return true;
        case kE5m2: function(Float8<true>{}); return true;
        default: return false;
    }
}

template <class Function>
bool with_units(int32_t coding, Function &&function) {
    return with_codes(coding, function) || with_numbers(coding, function);
}
