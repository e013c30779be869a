// From words of a checkpoint to codes, from numbers to codes, and between codes and their planes: what loading a quantized
// weight consists of besides reading.
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

// to[i] |= (from[i] >> right & mask) << left, which leaves nothing beyond a byte; `first` to set instead.
void move_bits(const uint8_t *from, uint8_t *to, int64_t count, int right, int left, int mask, bool first) {
    const __m256i kept = _mm256_set1_epi8(char(mask));
    const __m128i down = _mm_cvtsi32_si128(right), up = _mm_cvtsi32_si128(left);
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m256i codes = _mm256_loadu_si256((const __m256i *)(from + i));
        __m256i moved = _mm256_sll_epi16(_mm256_and_si256(_mm256_srl_epi16(codes, down), kept), up);
        if (!first) moved = _mm256_or_si256(moved, _mm256_loadu_si256((const __m256i *)(to + i)));
        _mm256_storeu_si256((__m256i *)(to + i), moved);
    }
    for (; i < count; i++) to[i] = uint8_t((from[i] >> right & mask) << left | (first ? 0 : to[i]));
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

// codes: [rows][features]. plane: [rows][ceil(features / slots)], slots = 8 / width of `width` bits each, `stride` bytes from
// one row to the next: the bits of a code from `shift` on. Of byte j, slot s is feature j + s * bytes; a short row leaves the
// last slots 0.
EXPORT void kernels_fold_plane(const uint8_t *codes, int64_t rows, int64_t features, int32_t width, int32_t shift,
                               uint8_t *plane, int64_t stride, int32_t threads) {
    const int64_t slots = 8 / width, bytes = (features + slots - 1) / slots;
    Pool::shared().run(threads, rows, std::max<int64_t>(1, kValuesAtOnce / std::max<int64_t>(1, features)),
                       [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            uint8_t *to = plane + row * stride;
            for (int64_t slot = 0; slot < slots; slot++) {
                const int64_t begin = slot * bytes, count = std::min(bytes, features - begin);
                if (count <= 0) break;
                move_bits(codes + row * features + begin, to, count, shift, int(slot) * width, (1 << width) - 1, slot == 0);
            }
        }
    });
}

// The inverse: sets the codes where `shift` is 0, and adds bits to them elsewhere.
EXPORT void kernels_unfold_plane(const uint8_t *plane, int64_t stride, int64_t rows, int64_t features, int32_t width,
                                 int32_t shift, uint8_t *codes, int32_t threads) {
    const int64_t slots = 8 / width, bytes = (features + slots - 1) / slots;
    Pool::shared().run(threads, rows, std::max<int64_t>(1, kValuesAtOnce / std::max<int64_t>(1, features)),
                       [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            for (int64_t slot = 0; slot < slots; slot++) {
                const int64_t begin = slot * bytes, count = std::min(bytes, features - begin);
                if (count <= 0) break;
                move_bits(plane + row * stride, codes + row * features + begin, count, int(slot) * width, shift,
                          (1 << width) - 1, shift == 0);
            }
        }
    });
}

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
