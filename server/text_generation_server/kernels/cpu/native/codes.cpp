// From words of a checkpoint to codes, and from numbers to codes: what loading a quantized weight consists of besides reading.
// Compiled with -mavx2 -mbmi2: what is needed of a processor for anything here.
#include <algorithm>
#include <cstring>
#include <immintrin.h>

#include "block.h"
#include "pool.h"

namespace kernels {
namespace {

constexpr int64_t kValuesAtOnce = 1 << 16;

// Eight values of `Bits` bits are in `Bits` bytes, low bits first.
template <int Bits>
void spread_bits(const uint8_t *from, uint8_t *to, int64_t eights) {
    constexpr uint64_t kMask = 0x0101010101010101 * ((1 << Bits) - 1);
    for (int64_t i = 0; i < eights; i++, from += Bits, to += 8) {
        uint64_t packed = 0;
        std::memcpy(&packed, from, Bits);
        const uint64_t values = _pdep_u64(packed, kMask);
        std::memcpy(to, &values, 8);
    }
}

// 16 numbers at a time: the code of the highest bound below each, as a sum of differences modulo 256.
void climb(const float *values, const float *bounds, const int32_t *steps, int64_t num_bounds, uint8_t *to, int64_t count) {
    for (int64_t at = 0; at < count; at += 16) {
        float some[16] = {};
        const int64_t there = std::min<int64_t>(16, count - at);
        std::memcpy(some, values + at, there * sizeof(float));
        const __m256 a = _mm256_loadu_ps(some), b = _mm256_loadu_ps(some + 8);
        __m256i code_a = _mm256_setzero_si256(), code_b = code_a;
        for (int64_t i = 0; i < num_bounds; i++) {
            const __m256 bound = _mm256_set1_ps(bounds[i]);
            const __m256i step = _mm256_set1_epi32(steps[i]);
            code_a = _mm256_add_epi32(code_a, _mm256_and_si256(_mm256_castps_si256(_mm256_cmp_ps(a, bound, _CMP_GT_OQ)), step));
            code_b = _mm256_add_epi32(code_b, _mm256_and_si256(_mm256_castps_si256(_mm256_cmp_ps(b, bound, _CMP_GT_OQ)), step));
        }
        int32_t codes[16];
        _mm256_storeu_si256((__m256i *)codes, code_a);
        _mm256_storeu_si256((__m256i *)(codes + 8), code_b);
        for (int64_t k = 0; k < there; k++) to[at + k] = uint8_t(codes[k]);
    }
}

}  // namespace
}  // namespace kernels

using namespace kernels;

extern "C" {

// count: a multiple of 8. to: [count]; from: [count * bits / 8] bytes, of 2, 3 or 4 bits.
EXPORT void kernels_spread_bits(const uint8_t *from, int32_t bits, uint8_t *to, int64_t count, int32_t threads) {
    Pool::shared().run(threads, count / 8, kValuesAtOnce / 8, [&](int64_t first, int64_t last) {
        const uint8_t *begin = from + first * bits;
        if (bits == 2) spread_bits<2>(begin, to + first * 8, last - first);
        else if (bits == 3) spread_bits<3>(begin, to + first * 8, last - first);
        else spread_bits<4>(begin, to + first * 8, last - first);
    });
}

// to[i]: the sum, modulo 256, of the steps whose bounds are below values[i].
EXPORT void kernels_climb(const float *values, const float *bounds, const int32_t *steps, int64_t num_bounds, uint8_t *to,
                          int64_t count, int32_t threads) {
    Pool::shared().run(threads, count, kValuesAtOnce, [&](int64_t first, int64_t last) {
        climb(values + first, bounds, steps, num_bounds, to + first, last - first);
    });
}
}
