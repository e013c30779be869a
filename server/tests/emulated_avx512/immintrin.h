// AVX-512 (F, BW, DQ, VL, VBMI, VNNI, BF16) for processors that have AVX2 alone: the functions of <immintrin.h> that our sources
// use, after the operations in Intel's manual (volume 2). For tests: in the place of the compiler's own header. A function that is
// missing here does not compile.
#pragma once

#include_next <immintrin.h>

#include <cstdint>

#define EMULATED inline __attribute__((always_inline))

namespace emulated_avx512 {

struct Floats { __m256 low, high; };
struct Integers { __m256i low, high; };
static_assert(sizeof(Floats) == 64 && sizeof(Integers) == 64);

EMULATED Floats halves(__m512 a) { return __builtin_bit_cast(Floats, a); }
EMULATED Integers halves(__m512i a) { return __builtin_bit_cast(Integers, a); }
EMULATED __m512 whole(__m256 low, __m256 high) { return __builtin_bit_cast(__m512, Floats{low, high}); }
EMULATED __m512i whole(__m256i low, __m256i high) { return __builtin_bit_cast(__m512i, Integers{low, high}); }

// What AVX2 does to a half, to both.
#define OF_ONE(name, Result, A) \
    EMULATED Result name(A a) { \
        const auto x = halves(a); \
        return whole(_mm256_##name(x.low), _mm256_##name(x.high)); \
    }
#define OF_TWO(name, A) \
    EMULATED A name(A a, A b) { \
        const auto x = halves(a), y = halves(b); \
        return whole(_mm256_##name(x.low, y.low), _mm256_##name(x.high, y.high)); \
    }
#define OF_THREE(name, A) \
    EMULATED A name(A a, A b, A c) { \
        const auto x = halves(a), y = halves(b), z = halves(c); \
        return whole(_mm256_##name(x.low, y.low, z.low), _mm256_##name(x.high, y.high, z.high)); \
    }
#define OF_ONE_BY(name, A, By) \
    EMULATED A name(A a, By by) { \
        const auto x = halves(a); \
        return whole(_mm256_##name(x.low, by), _mm256_##name(x.high, by)); \
    }
OF_ONE(cvtepi32_ps, __m512, __m512i)
OF_ONE(cvtps_epi32, __m512i, __m512)
OF_TWO(add_ps, __m512)
OF_TWO(max_ps, __m512)
OF_TWO(min_ps, __m512)
OF_TWO(add_epi32, __m512i)
OF_TWO(sub_epi32, __m512i)
OF_TWO(shuffle_epi8, __m512i)
OF_THREE(fmadd_ps, __m512)
OF_THREE(fnmadd_ps, __m512)
OF_ONE_BY(slli_epi32, __m512i, int)
OF_ONE_BY(srli_epi32, __m512i, int)
OF_ONE_BY(srai_epi32, __m512i, int)
OF_ONE_BY(srli_epi16, __m512i, int)
OF_ONE_BY(srl_epi32, __m512i, __m128i)
// Without a scale (the upper 4 bits of `how`), VRNDSCALEPS is VROUNDPS.
OF_ONE_BY(round_ps, __m512, const int)
#undef OF_ONE
#undef OF_TWO
#undef OF_THREE
#undef OF_ONE_BY

EMULATED __m512i and_si512(__m512i a, __m512i b) { return a & b; }
EMULATED __m512 castsi512_ps(__m512i a) { return (__m512)a; }
EMULATED __m512i castps_si512(__m512 a) { return (__m512i)a; }
EMULATED __m512 set1_ps(float a) { return whole(_mm256_set1_ps(a), _mm256_set1_ps(a)); }
EMULATED __m512i set1_epi8(char a) { return whole(_mm256_set1_epi8(a), _mm256_set1_epi8(a)); }
EMULATED __m512i set1_epi32(int a) { return whole(_mm256_set1_epi32(a), _mm256_set1_epi32(a)); }
EMULATED __m512i set1_epi64(long long a) { return whole(_mm256_set1_epi64x(a), _mm256_set1_epi64x(a)); }
EMULATED __m512 setzero_ps() { return set1_ps(0); }
EMULATED __m512i setzero_si512() { return set1_epi32(0); }
EMULATED __m512 abs_ps(__m512 a) { return castsi512_ps(castps_si512(a) & set1_epi32(0x7FFFFFFF)); }
EMULATED float cvtss_f32(__m512 a) { return a[0]; }
EMULATED __m512i broadcast_i64x4(__m256i a) { return whole(a, a); }
EMULATED __m512i broadcast_i32x4(__m128i a) { return broadcast_i64x4(_mm256_broadcastsi128_si256(a)); }

// Memory at an address that is no multiple of 64 ends the program where the instruction does.
EMULATED void demand_aligned(const void *at) {
    if (reinterpret_cast<uintptr_t>(at) % 64) __builtin_trap();
}
EMULATED __m512i loadu_si512(const void *at) {
    __m512i a;
    __builtin_memcpy(&a, at, sizeof a);
    return a;
}
EMULATED void storeu_si512(void *at, __m512i a) { __builtin_memcpy(at, &a, sizeof a); }
EMULATED __m512 loadu_ps(const void *at) { return castsi512_ps(loadu_si512(at)); }
EMULATED void storeu_ps(void *at, __m512 a) { storeu_si512(at, castps_si512(a)); }
EMULATED __m512i load_si512(const void *at) { return demand_aligned(at), loadu_si512(at); }
EMULATED void store_si512(void *at, __m512i a) { demand_aligned(at), storeu_si512(at, a); }
EMULATED __m512 load_ps(const void *at) { return demand_aligned(at), loadu_ps(at); }
EMULATED void store_ps(void *at, __m512 a) { demand_aligned(at), storeu_ps(at, a); }

EMULATED __m512i inserti32x4(__m512i a, __m128i b, int quarter) {
    __builtin_memcpy(reinterpret_cast<char *>(&a) + 16 * (quarter & 3), &b, sizeof b);
    return a;
}
// What the manual leaves undefined is something that shows.
EMULATED __m512i castsi128_si512(__m128i a) { return inserti32x4(set1_epi8(0x55), a, 0); }

// All bits of each number whose bit of a mask is set.
EMULATED __m256i numbers8(unsigned mask) {
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(mask)), bits), bits);
}
EMULATED __m512i numbers(__mmask16 mask) { return whole(numbers8(mask), numbers8(mask >> 8)); }
EMULATED __m256i words16(unsigned mask) {
    const __m256i bits = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, short(0x8000));
    return _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(short(mask)), bits), bits);
}
EMULATED __m512i chosen(__m512i which, __m512i a, __m512i b) { return (which & a) | (~which & b); }
EMULATED __m512i mask_mov_epi32(__m512i other, __mmask16 mask, __m512i a) { return chosen(numbers(mask), a, other); }
EMULATED __m512i mask_mov_epi16(__m512i other, __mmask32 mask, __m512i a) {
    return chosen(whole(words16(mask), words16(mask >> 16)), a, other);
}
EMULATED __m512 mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) {
    return castsi512_ps(mask_mov_epi32(castps_si512(a), mask, castps_si512(b)));
}
EMULATED __m512 maskz_mov_ps(__mmask16 mask, __m512 a) { return mask_blend_ps(mask, setzero_ps(), a); }
EMULATED __m512 mask3_fmadd_ps(__m512 a, __m512 b, __m512 c, __mmask16 mask) { return mask_blend_ps(mask, c, fmadd_ps(a, b, c)); }
// Nothing is read where the mask is not set.
EMULATED __m512 maskz_loadu_ps(__mmask16 mask, const void *at) {
    const float *from = static_cast<const float *>(at);
    return whole(_mm256_maskload_ps(from, numbers8(mask)), _mm256_maskload_ps(from + 8, numbers8(mask >> 8)));
}
EMULATED __mmask16 cmp_ps_mask(__m512 a, __m512 b, const int how) {
    const Floats x = halves(a), y = halves(b);
    const int low = _mm256_movemask_ps(_mm256_cmp_ps(x.low, y.low, how)), high = _mm256_movemask_ps(_mm256_cmp_ps(x.high, y.high, how));
    return __mmask16(low | high << 8);
}
EMULATED __mmask16 mask_cmp_ps_mask(__mmask16 mask, __m512 a, __m512 b, const int how) { return mask & cmp_ps_mask(a, b, how); }

EMULATED __m512i cvtepu8_epi32(__m128i a) { return whole(_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8))); }
EMULATED __m512i cvtepu16_epi32(__m256i a) {
    return whole(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}
EMULATED __m512 cvtph_ps(__m256i a) {
    return whole(_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}
// The lower half of each integer.
EMULATED __m128i half_cvtepi32_epi16(__m256i a) {
    const __m256i lower = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1, 0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1,
                                           -1, -1, -1, -1, -1);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_shuffle_epi8(a, lower), _MM_SHUFFLE(3, 1, 2, 0)));
}
EMULATED __m256i cvtepi32_epi16(__m512i a) {
    const Integers x = halves(a);
    return _mm256_set_m128i(half_cvtepi32_epi16(x.high), half_cvtepi32_epi16(x.low));
}
// What is too large becomes the largest, by way of 16 bits as at once.
EMULATED __m128i cvtsepi32_epi8(__m512i a) {
    const Integers x = halves(a);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.low, x.high), _MM_SHUFFLE(3, 1, 2, 0));
    return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

// Of an index, the bits that can name an element are looked at, by gcc's shuffle as by the instructions.
typedef char Bytes __attribute__((vector_size(64)));
typedef short Words __attribute__((vector_size(64)));
EMULATED __m512i permutexvar_epi8(__m512i index, __m512i a) { return (__m512i)__builtin_shuffle((Bytes)a, (Bytes)index); }
EMULATED __m512i permutexvar_epi16(__m512i index, __m512i a) { return (__m512i)__builtin_shuffle((Words)a, (Words)index); }
EMULATED __m256 half_permutexvar_ps(__m256i index, Floats a) {
    const __m256 low = _mm256_permutevar8x32_ps(a.low, index), high = _mm256_permutevar8x32_ps(a.high, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
EMULATED __m512 permutexvar_ps(__m512i index, __m512 a) {
    const Integers at = halves(index);
    return whole(half_permutexvar_ps(at.low, halves(a)), half_permutexvar_ps(at.high, halves(a)));
}
// Byte k of each 64 bits: the 8 bits of `a` from the one on that byte k of `from` names, and after the last bit the first.
EMULATED __m256i half_multishift_epi64_epi8(__m256i from, __m256i a) {
    __m256i all = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int k = 0; k < 64; k += 8) {
        const __m256i first = _mm256_and_si256(_mm256_srli_epi64(from, k), _mm256_set1_epi64x(63));
        const __m256i before = _mm256_sub_epi64(_mm256_set1_epi64x(64), first);
        const __m256i turned = _mm256_or_si256(_mm256_srlv_epi64(a, first), _mm256_sllv_epi64(a, before));
        all = _mm256_or_si256(all, _mm256_slli_epi64(_mm256_and_si256(turned, _mm256_set1_epi64x(255)), k));
    }
    return all;
}
EMULATED __m512i multishift_epi64_epi8(__m512i from, __m512i a) {
    const Integers x = halves(from), y = halves(a);
    return whole(half_multishift_epi64_epi8(x.low, y.low), half_multishift_epi64_epi8(x.high, y.high));
}

// In gcc's order: what AVX-512 calls a function here is a sequence of instructions.
EMULATED float reduce_add_ps(__m512 a) {
    const Floats x = halves(a);
    const __m256 eight = x.high + x.low;
    const __m128 four = _mm256_extractf128_ps(eight, 1) + _mm256_castps256_ps128(eight), two = four + _mm_movehl_ps(four, four);
    return two[0] + two[1];
}
EMULATED float reduce_max_ps(__m512 a) {
    const Floats x = halves(a);
    const __m256 eight = _mm256_max_ps(x.high, x.low);
    const __m128 four = _mm_max_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_max_ps(two, _mm_movehdup_ps(two))[0];
}
EMULATED int reduce_add_epi32(__m512i a) {
    const Integers x = halves(a);
    const __m256i eight = _mm256_add_epi32(x.low, x.high);
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    const __m128i two = _mm_add_epi32(four, _mm_srli_si128(four, 8));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_srli_si128(two, 4)));
}

// Bytes without sign times bytes with one, four products to an integer; modulo 2^32, and no product or pair of them is cut off.
EMULATED __m256i half_dpbusd_epi32(__m256i sum, __m256i a, __m256i b) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
EMULATED __m512i dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
    const Integers s = halves(sum), x = halves(a), y = halves(b);
    return whole(half_dpbusd_epi32(s.low, x.low, y.low), half_dpbusd_epi32(s.high, x.high, y.high));
}

// Fused multiply-adds of the odd places, then of the even ones. MXCSR has no say: to the nearest even, subnormal numbers are zero on
// both sides. All in one asm, so that the compiler computes nothing else in that mode.
EMULATED __m256 half_dpbf16_ps(__m256 sum, __m256i a, __m256i b) {
    const __m256i upper = _mm256_set1_epi32(int(0xFFFF0000));
    const __m256i a_odd = _mm256_and_si256(a, upper), b_odd = _mm256_and_si256(b, upper);
    const __m256i a_even = _mm256_slli_epi32(a, 16), b_even = _mm256_slli_epi32(b, 16);
    const unsigned kept = _mm_getcsr(), zeros = 0x9FC0;
    asm("vldmxcsr %5\n\tvfmadd231ps %2, %1, %0\n\tvfmadd231ps %4, %3, %0\n\tvldmxcsr %6"
        : "+&x"(sum) : "x"(a_odd), "x"(b_odd), "x"(a_even), "x"(b_even), "m"(zeros), "m"(kept));
    return sum;
}
EMULATED __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    const Floats s = halves(sum);
    const Integers x = halves((__m512i)a), y = halves((__m512i)b);
    return whole(half_dpbf16_ps(s.low, x.low, y.low), half_dpbf16_ps(s.high, x.high, y.high));
}

// To the nearest even; subnormal numbers become zeros with their sign, and what is not a number stays so, with the bit that makes it
// quiet.
EMULATED __m256i half_cvtneps_pbh(__m256 a) {
    const __m256i bits = _mm256_castps_si256(a), upper = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i nearest = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
    const __m256i exponent = _mm256_and_si256(bits, _mm256_set1_epi32(0x7F800000));
    const __m256i no_number = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i zero = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
    const __m256i made = _mm256_blendv_epi8(nearest, _mm256_or_si256(upper, _mm256_set1_epi32(0x40)), no_number);
    return _mm256_blendv_epi8(made, _mm256_and_si256(upper, _mm256_set1_epi32(0x8000)), zero);
}
EMULATED __m256bh cvtneps_pbh(__m512 a) {
    const Floats x = halves(a);
    return (__m256bh)cvtepi32_epi16(whole(half_cvtneps_pbh(x.low), half_cvtneps_pbh(x.high)));
}

}  // namespace emulated_avx512

#undef EMULATED

#define __AVX512BF16__ 1

#define _mm512_abs_ps ::emulated_avx512::abs_ps
#define _mm512_add_epi32 ::emulated_avx512::add_epi32
#define _mm512_add_ps ::emulated_avx512::add_ps
#define _mm512_and_si512 ::emulated_avx512::and_si512
#define _mm512_broadcast_i32x4 ::emulated_avx512::broadcast_i32x4
#define _mm512_broadcast_i64x4 ::emulated_avx512::broadcast_i64x4
#define _mm512_castps_si512 ::emulated_avx512::castps_si512
#define _mm512_castsi128_si512 ::emulated_avx512::castsi128_si512
#define _mm512_castsi512_ps ::emulated_avx512::castsi512_ps
#define _mm512_cmp_ps_mask ::emulated_avx512::cmp_ps_mask
#define _mm512_cvtepi32_epi16 ::emulated_avx512::cvtepi32_epi16
#define _mm512_cvtepi32_ps ::emulated_avx512::cvtepi32_ps
#define _mm512_cvtepu16_epi32 ::emulated_avx512::cvtepu16_epi32
#define _mm512_cvtepu8_epi32 ::emulated_avx512::cvtepu8_epi32
#define _mm512_cvtneps_pbh ::emulated_avx512::cvtneps_pbh
#define _mm512_cvtph_ps ::emulated_avx512::cvtph_ps
#define _mm512_cvtps_epi32 ::emulated_avx512::cvtps_epi32
#define _mm512_cvtsepi32_epi8 ::emulated_avx512::cvtsepi32_epi8
#define _mm512_cvtss_f32 ::emulated_avx512::cvtss_f32
#define _mm512_dpbf16_ps ::emulated_avx512::dpbf16_ps
#define _mm512_dpbusd_epi32 ::emulated_avx512::dpbusd_epi32
#define _mm512_fmadd_ps ::emulated_avx512::fmadd_ps
#define _mm512_fnmadd_ps ::emulated_avx512::fnmadd_ps
#define _mm512_inserti32x4 ::emulated_avx512::inserti32x4
#define _mm512_load_ps ::emulated_avx512::load_ps
#define _mm512_load_si512 ::emulated_avx512::load_si512
#define _mm512_loadu_ps ::emulated_avx512::loadu_ps
#define _mm512_loadu_si512 ::emulated_avx512::loadu_si512
#define _mm512_mask3_fmadd_ps ::emulated_avx512::mask3_fmadd_ps
#define _mm512_mask_blend_ps ::emulated_avx512::mask_blend_ps
#define _mm512_mask_cmp_ps_mask ::emulated_avx512::mask_cmp_ps_mask
#define _mm512_mask_mov_epi16 ::emulated_avx512::mask_mov_epi16
#define _mm512_mask_mov_epi32 ::emulated_avx512::mask_mov_epi32
#define _mm512_maskz_loadu_ps ::emulated_avx512::maskz_loadu_ps
#define _mm512_maskz_mov_ps ::emulated_avx512::maskz_mov_ps
#define _mm512_max_ps ::emulated_avx512::max_ps
#define _mm512_min_ps ::emulated_avx512::min_ps
#define _mm512_multishift_epi64_epi8 ::emulated_avx512::multishift_epi64_epi8
#define _mm512_permutexvar_epi16 ::emulated_avx512::permutexvar_epi16
#define _mm512_permutexvar_epi8 ::emulated_avx512::permutexvar_epi8
#define _mm512_permutexvar_ps ::emulated_avx512::permutexvar_ps
#define _mm512_reduce_add_epi32 ::emulated_avx512::reduce_add_epi32
#define _mm512_reduce_add_ps ::emulated_avx512::reduce_add_ps
#define _mm512_reduce_max_ps ::emulated_avx512::reduce_max_ps
#define _mm512_roundscale_ps ::emulated_avx512::round_ps
#define _mm512_set1_epi32 ::emulated_avx512::set1_epi32
#define _mm512_set1_epi64 ::emulated_avx512::set1_epi64
#define _mm512_set1_epi8 ::emulated_avx512::set1_epi8
#define _mm512_set1_ps ::emulated_avx512::set1_ps
#define _mm512_setzero_ps ::emulated_avx512::setzero_ps
#define _mm512_setzero_si512 ::emulated_avx512::setzero_si512
#define _mm512_shuffle_epi8 ::emulated_avx512::shuffle_epi8
#define _mm512_slli_epi32 ::emulated_avx512::slli_epi32
#define _mm512_srai_epi32 ::emulated_avx512::srai_epi32
#define _mm512_srl_epi32 ::emulated_avx512::srl_epi32
#define _mm512_srli_epi16 ::emulated_avx512::srli_epi16
#define _mm512_srli_epi32 ::emulated_avx512::srli_epi32
#define _mm512_store_ps ::emulated_avx512::store_ps
#define _mm512_store_si512 ::emulated_avx512::store_si512
#define _mm512_storeu_ps ::emulated_avx512::storeu_ps
#define _mm512_storeu_si512 ::emulated_avx512::storeu_si512
#define _mm512_sub_epi32 ::emulated_avx512::sub_epi32
#define _mm256_cvtepi32_epi16 ::emulated_avx512::half_cvtepi32_epi16
