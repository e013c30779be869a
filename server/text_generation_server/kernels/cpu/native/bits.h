// Codes of 2, 3 or 4 bits, low bits first: one to a byte, and back. Needs AVX2 and BMI2.
#pragma once

#include <cstdint>
#include <cstring>
#include <immintrin.h>

namespace kernels {
namespace {

// Eight codes, a byte each, as 8 * Bits bits.
template <int Bits>
inline uint64_t gathered(uint64_t codes) {
    codes = (codes | codes >> (8 - Bits)) & 0x0001000100010001 * ((1 << 2 * Bits) - 1);
    codes = (codes | codes >> (16 - 2 * Bits)) & 0x0000000100000001 * ((uint64_t(1) << 4 * Bits) - 1);
    return (codes | codes >> (32 - 4 * Bits)) & ((uint64_t(1) << 8 * Bits) - 1);
}

template <int Bits>
inline uint64_t spread(uint64_t packed) {
    return _pdep_u64(packed, 0x0101010101010101 * ((1 << Bits) - 1));
}

// count codes to a byte each.
template <int Bits>
inline void spread_row(const uint8_t *from, uint8_t *to, int64_t count) {
    int64_t i = 0;
    if constexpr (Bits == 4) {
        const __m128i low = _mm_set1_epi8(15);
        for (; i + 32 <= count; i += 32) {
            const __m128i both = _mm_loadu_si128((const __m128i *)(from + i / 2));
            const __m128i even = _mm_and_si128(both, low), odd = _mm_and_si128(_mm_srli_epi16(both, 4), low);
            _mm_storeu_si128((__m128i *)(to + i), _mm_unpacklo_epi8(even, odd));
            _mm_storeu_si128((__m128i *)(to + i + 16), _mm_unpackhi_epi8(even, odd));
        }
    }
    for (; i < count; i += 8) {
        const int64_t there = count - i < 8 ? count - i : 8;
        uint64_t packed = 0;
        std::memcpy(&packed, from + i / 8 * Bits, (there * Bits + 7) / 8);
        const uint64_t codes = spread<Bits>(packed);
        std::memcpy(to + i, &codes, there);
    }
}

// The inverse. Bits behind the last code are 0.
template <int Bits>
inline void gather_row(const uint8_t *from, uint8_t *to, int64_t count) {
    int64_t i = 0;
    if constexpr (Bits == 4) {
        const __m256i weights = _mm256_set1_epi16(16 << 8 | 1);
        for (; i + 32 <= count; i += 32) {
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_loadu_si256((const __m256i *)(from + i)), weights);
            const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
            _mm_storeu_si128((__m128i *)(to + i / 2), bytes);
        }
    }
    for (; i < count; i += 8) {
        const int64_t there = count - i < 8 ? count - i : 8;
        uint64_t codes = 0;
        std::memcpy(&codes, from + i, there);
        const uint64_t packed = gathered<Bits>(codes);
        std::memcpy(to + i / 8 * Bits, &packed, (there * Bits + 7) / 8);
    }
}

}  // namespace
}  // namespace kernels
