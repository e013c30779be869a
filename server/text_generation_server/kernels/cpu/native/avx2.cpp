// Compiled with -mavx2 -mfma -mf16c.
#include "linear.h"

#include <algorithm>
#include <cstring>
#include <immintrin.h>
#include <utility>

#define INLINE inline __attribute__((always_inline))

namespace kernels {
namespace {

constexpr int kWidth = 8, kBlocks = 1, kRows = 6;
using F = __m256;
struct I {
    __m256i v;
    friend INLINE I operator&(I a, I b) { return {_mm256_and_si256(a.v, b.v)}; }
};

INLINE F zeros() { return _mm256_setzero_ps(); }
INLINE F all_floats(float value) { return _mm256_set1_ps(value); }
INLINE I all(int32_t value) { return {_mm256_set1_epi32(value)}; }
INLINE F broadcast(const float *at) { return _mm256_broadcast_ss(at); }
INLINE F load_floats(const float *at) { return _mm256_loadu_ps(at); }
INLINE void store_floats(float *at, F value) { _mm256_storeu_ps(at, value); }
INLINE F add_product(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
INLINE F subtract_product(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE I load_integers(const uint8_t *at) { return {_mm256_loadu_si256((const __m256i *)at)}; }
INLINE F to_float(I value) { return _mm256_cvtepi32_ps(value.v); }
INLINE F as_float(I value) { return _mm256_castsi256_ps(value.v); }
template <int N>
INLINE I shift_right(I value) { return {_mm256_srli_epi32(value.v, N)}; }
template <int N>
INLINE I shift_left(I value) { return {_mm256_slli_epi32(value.v, N)}; }
INLINE void prefetch(const uint8_t *at) { _mm_prefetch((const char *)at + 2048, _MM_HINT_T0); }
INLINE float from_bfloat16(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// Each column's 8 codes of `Bits` bits, as the low bits of an integer.
template <int Bits>
INLINE I load_words(const uint8_t *at) {
    if constexpr (Bits == 2) return {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at))};
    else if constexpr (Bits == 4) return load_integers(at);
    else {
        const __m256i spread = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,
                                                0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
        __m256i both = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)at));
        both = _mm256_inserti128_si256(both, _mm_loadu_si128((const __m128i *)(at + 12)), 1);
        return {_mm256_shuffle_epi8(both, spread)};
    }
}

struct Numbers16 { F low, high; };
INLINE Numbers16 load_numbers(const float *table) { return {load_floats(table), load_floats(table + 8)}; }
// The number that the 4 bits from `Shift` on name. A permutation looks at 3 bits; the fourth chooses between two.
template <int Shift>
INLINE F look_up(const Numbers16 &table, I codes) {
    const __m256i place = _mm256_srli_epi32(codes.v, Shift);
    const F low = _mm256_permutevar8x32_ps(table.low, place), high = _mm256_permutevar8x32_ps(table.high, place);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes.v, 28 - Shift)));
}

template <bool E5m2>
INLINE F widen_float8(const uint8_t *at) {
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)at);
    if constexpr (E5m2) return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(bytes), 8));
    else return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7), _mm_set1_epi16(int16_t(0xBF80))));
}
INLINE F widen_float16(const uint16_t *at) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at)); }
INLINE F widen_bfloat16(const uint16_t *at) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at)), 16));
}
INLINE F widen_bytes(const uint8_t *at) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)at)));
}

// Rounded to the nearest, ties to even; what is not a number stays so.
INLINE void store_bfloat16(uint16_t *at, F value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
    const __m128i low = _mm256_castsi256_si128(rounded), high = _mm256_extracti128_si256(rounded, 1);
    _mm_storeu_si128((__m128i *)at, _mm_packus_epi32(low, high));
}

#include "linear_variant.h"

}  // namespace

const Variant kAvx2{"avx2", spread, multiply};

}  // namespace kernels
