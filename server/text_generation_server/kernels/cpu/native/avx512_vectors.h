// Vectors of 16 numbers. Included by each source that is compiled for AVX-512 (F, BW, DQ, VL), before what computes with them.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <immintrin.h>
#include <limits>
#include <utility>

#define INLINE inline __attribute__((always_inline))

namespace kernels {
namespace {

constexpr int kWidth = 16, kBlocks = 2, kRows = 12;
using F = __m512;
struct I {
    __m512i v;
    friend INLINE I operator&(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
};

INLINE F zeros() { return _mm512_setzero_ps(); }
INLINE F all_floats(float value) { return _mm512_set1_ps(value); }
INLINE I all(int32_t value) { return {_mm512_set1_epi32(value)}; }
INLINE F broadcast(const float *at) { return _mm512_set1_ps(*at); }
INLINE F load_floats(const float *at) { return _mm512_loadu_ps(at); }
INLINE void store_floats(float *at, F value) { _mm512_storeu_ps(at, value); }
INLINE F add_product(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
INLINE F subtract_product(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
INLINE I load_integers(const uint8_t *at) { return {_mm512_loadu_si512(at)}; }
INLINE F to_float(I value) { return _mm512_cvtepi32_ps(value.v); }
INLINE F as_float(I value) { return _mm512_castsi512_ps(value.v); }
template <int N>
INLINE I shift_right(I value) { return {_mm512_srli_epi32(value.v, N)}; }
INLINE I shift_right(I value, int64_t bits) { return {_mm512_srl_epi32(value.v, _mm_cvtsi64_si128(bits))}; }
template <int N>
INLINE I shift_left(I value) { return {_mm512_slli_epi32(value.v, N)}; }

// Each column's 8 codes of `Bits` bits, as the low bits of an integer.
template <int Bits>
INLINE I load_words(const uint8_t *at) {
    if constexpr (Bits == 2) return {_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at))};
    else if constexpr (Bits == 4) return load_integers(at);
    else {
        const __m512i spread = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
        __m512i four = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)at));
        four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(at + 12)), 1);
        four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(at + 24)), 2);
        four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(at + 36)), 3);
        return {_mm512_shuffle_epi8(four, spread)};
    }
}

struct Numbers16 { F all; };
INLINE Numbers16 load_numbers(const float *table) { return {load_floats(table)}; }
// The number that the 4 bits from `Shift` on name. A permutation looks at 4 bits alone.
template <int Shift>
INLINE F look_up(const Numbers16 &table, I codes) {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(codes.v, Shift), table.all);
}

template <bool E5m2>
INLINE F widen_float8(const uint8_t *at) {
    const __m128i bytes = _mm_loadu_si128((const __m128i *)at);
    if constexpr (E5m2) return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8));
    else return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7), _mm256_set1_epi16(int16_t(0xBF80))));
}
INLINE F widen_float16(const uint16_t *at) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at)); }
INLINE F widen_bfloat16(const uint16_t *at) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)), 16));
}
INLINE I bytes_to_integers(const uint8_t *at) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at))}; }
INLINE F widen_bytes(const uint8_t *at) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at)));
}

// Rounded to the nearest, ties to even; what is not a number stays so.
INLINE void store_bfloat16(uint16_t *at, F value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
    _mm256_storeu_si256((__m256i *)at, _mm512_cvtepi32_epi16(rounded));
}

INLINE F minimum(F a, F b) { return _mm512_min_ps(a, b); }
INLINE F maximum(F a, F b) { return _mm512_max_ps(a, b); }
INLINE __mmask16 less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE bool all_less(F a, F b) { return less(a, b) == 0xFFFF; }
INLINE F choose(__mmask16 condition, F a, F b) { return _mm512_mask_blend_ps(condition, b, a); }
// Of the lowest bits, one for each number: a where it is set, b elsewhere.
INLINE F where_set(uint32_t bits, F a, F b) { return choose(__mmask16(bits), a, b); }
INLINE F round_to_whole(F value) { return _mm512_roundscale_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE I to_integer(F value) { return {_mm512_cvtps_epi32(value)}; }
INLINE I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
INLINE I operator-(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
template <int N>
INLINE I shift_right_signed(I value) { return {_mm512_srai_epi32(value.v, N)}; }
INLINE F power_of_two(I value) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(value.v, _mm512_set1_epi32(127)), 23));
}
INLINE float first_of(F value) { return _mm512_cvtss_f32(value); }
INLINE float add_up(F value) { return _mm512_reduce_add_ps(value); }
INLINE float highest_of(F value) { return _mm512_reduce_max_ps(value); }
