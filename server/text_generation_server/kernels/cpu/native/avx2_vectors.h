// Vectors of 8 numbers. Included by each source that is compiled with -mavx2 -mfma -mf16c, before what computes with them.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <immintrin.h>
#include <utility>

#define INLINE inline __attribute__((always_inline))

namespace kernels {
namespace {

constexpr int kWidth = 8, kBlocks = 2, kRows = 6;
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
INLINE I shift_right(I value, int64_t bits) { return {_mm256_srl_epi32(value.v, _mm_cvtsi64_si128(bits))}; }
template <int N>
INLINE I shift_left(I value) { return {_mm256_slli_epi32(value.v, N)}; }

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

// 16 numbers, looked up a byte at a time: of 32 codes the four bytes of each number, which are then brought together. Half
// the work of looking up 8 whole numbers at a time, which no instruction does for more than 8 of them. `kTable4Bytes`: a
// vector of bytes holds the 32 columns of place j in its low and of place j + 4 in its high halves, and where its bytes end
// up decides which column each is.
#define TABLE TableBytes
struct TableBytes {
    static constexpr bool kByPlace = true, kSubtracts = false;
    struct Numbers { __m256i byte[4]; };
    static INLINE Numbers prepare(const float *table) {
        const __m256i gather = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
                                                0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        __m128i quarter[4];
        for (int i = 0; i < 4; i++)
            quarter[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(table + 4 * i)), _mm256_castsi256_si128(gather));
        const __m128i a = _mm_unpacklo_epi32(quarter[0], quarter[1]), b = _mm_unpacklo_epi32(quarter[2], quarter[3]);
        const __m128i c = _mm_unpackhi_epi32(quarter[0], quarter[1]), d = _mm_unpackhi_epi32(quarter[2], quarter[3]);
        return {{_mm256_broadcastsi128_si256(_mm_unpacklo_epi64(a, b)), _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(a, b)),
                 _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(c, d)), _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(c, d))}};
    }
    template <int J, class Function>
    static INLINE void expand(const uint8_t *step, const Numbers &numbers, Function &&function) {
        __m256i codes = _mm256_loadu_si256((const __m256i *)(step + J % 4 * 32));
        if (J >= 4) codes = _mm256_srli_epi16(codes, 4);
        codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));
        __m256i byte[4];
        for (int i = 0; i < 4; i++) byte[i] = _mm256_shuffle_epi8(numbers.byte[i], codes);
        const __m256i a = _mm256_unpacklo_epi8(byte[0], byte[1]), b = _mm256_unpacklo_epi8(byte[2], byte[3]);
        const __m256i c = _mm256_unpackhi_epi8(byte[0], byte[1]), d = _mm256_unpackhi_epi8(byte[2], byte[3]);
        function(std::integral_constant<int, 0>{}, _mm256_castsi256_ps(_mm256_unpacklo_epi16(a, b)));
        function(std::integral_constant<int, 1>{}, _mm256_castsi256_ps(_mm256_unpackhi_epi16(a, b)));
        function(std::integral_constant<int, 2>{}, _mm256_castsi256_ps(_mm256_unpacklo_epi16(c, d)));
        function(std::integral_constant<int, 3>{}, _mm256_castsi256_ps(_mm256_unpackhi_epi16(c, d)));
    }
    static constexpr float gain(int) { return 1.0f; }
};

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
INLINE I bytes_to_integers(const uint8_t *at) { return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)at))}; }
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

INLINE F minimum(F a, F b) { return _mm256_min_ps(a, b); }
INLINE F maximum(F a, F b) { return _mm256_max_ps(a, b); }
INLINE F less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
INLINE bool all_less(F a, F b) { return _mm256_movemask_ps(less(a, b)) == 0xFF; }
INLINE F choose(F condition, F a, F b) { return _mm256_blendv_ps(b, a, condition); }
// Of the lowest bits, one for each number: a where it is set, b elsewhere.
INLINE F where_set(uint32_t bits, F a, F b) {
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int32_t(bits)), each), each);
    return choose(_mm256_castsi256_ps(set), a, b);
}
INLINE F round_to_whole(F value) { return _mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE I to_integer(F value) { return {_mm256_cvtps_epi32(value)}; }
INLINE I operator-(I a, I b) { return {_mm256_sub_epi32(a.v, b.v)}; }
template <int N>
INLINE I shift_right_signed(I value) { return {_mm256_srai_epi32(value.v, N)}; }
INLINE F power_of_two(I value) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(value.v, _mm256_set1_epi32(127)), 23));
}
INLINE float first_of(F value) { return _mm256_cvtss_f32(value); }
INLINE float add_up(F value) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
INLINE float highest_of(F value) {
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}
