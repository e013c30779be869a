// From bits to codes, from codes to bits, and from numbers to codes: what decoding and rounding a weight consist of.
// Compiled with -mavx2 -mbmi2: what is needed of a processor for anything here.
#include <algorithm>
#include <cstring>
#include <immintrin.h>
#include <utility>
#include <vector>

#include "bits.h"
#include "block.h"
#include "pool.h"

namespace kernels {
namespace {

constexpr int64_t kValuesAtOnce = 1 << 16;

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

// 8 rows of 8 bytes, each the columns of the other.
void transpose_bytes(uint64_t *rows) {
    auto swap = [&](int distance, int shift, uint64_t low) {
        for (int i = 0; i < 8; i++) {
            if (i & distance) continue;
            uint64_t &a = rows[i], &b = rows[i + distance];
            const uint64_t moved = (a >> shift ^ b) & low;
            b ^= moved, a ^= moved << shift;
        }
    };
    swap(4, 32, 0x00000000FFFFFFFF);
    swap(2, 16, 0x0000FFFF0000FFFF);
    swap(1, 8, 0x00FF00FF00FF00FF);
}

// `codes` and `ordered`: room for a row each.
template <int Bits>
void reorder_row(const uint8_t *from, const int32_t *__restrict order, uint8_t *to, int64_t columns, uint8_t *__restrict codes,
                 uint8_t *__restrict ordered) {
    spread_row<Bits>(from, codes, columns);
    for (int64_t i = 0; i < columns; i++) ordered[i] = codes[order[i]];
    gather_row<Bits>(ordered, to, columns);
}

// `function(bits)` with a number that the compiler knows.
template <class Function>
void of_bits(int32_t bits, Function &&function) {
    if (bits == 2) function(std::integral_constant<int, 2>{});
    else if (bits == 3) function(std::integral_constant<int, 3>{});
    else function(std::integral_constant<int, 4>{});
}

template <class Function>
void each_row_of(int32_t threads, int64_t rows, int64_t columns, Function &&function) {
    const int64_t grain = std::max<int64_t>(1, kValuesAtOnce / std::max<int64_t>(1, columns));
    Pool::shared().run(threads, rows, grain, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) function(row);
    });
}

}  // namespace
}  // namespace kernels

using namespace kernels;

extern "C" {

// codes: [rows][columns], a byte each; packed: rows of `stride` bytes, `bits` bits each, low bits first. bits: 2, 3 or 4.
EXPORT void kernels_gather_bits(const uint8_t *codes, int64_t rows, int64_t columns, int32_t bits, uint8_t *packed, int64_t stride,
                                int32_t threads) {
    each_row_of(threads, rows, columns, [&](int64_t row) {
        of_bits(bits, [&](auto known) { gather_row<known>(codes + row * columns, packed + row * stride, columns); });
    });
}

// The inverse.
EXPORT void kernels_spread_bits(const uint8_t *packed, int64_t stride, int64_t rows, int64_t columns, int32_t bits, uint8_t *codes,
                                int32_t threads) {
    each_row_of(threads, rows, columns, [&](int64_t row) {
        of_bits(bits, [&](auto known) { spread_row<known>(packed + row * stride, codes + row * columns, columns); });
    });
}

// packed and to: rows of `stride` and `to_stride` bytes. order: the column of `packed` at each column of `to`.
EXPORT void kernels_reorder_bits(const uint8_t *packed, int64_t stride, int64_t rows, int64_t columns, int32_t bits,
                                 const int32_t *order, uint8_t *to, int64_t to_stride, int32_t threads) {
    each_row_of(threads, rows, columns, [&](int64_t row) {
        static thread_local std::vector<uint8_t> room;
        room.resize(2 * columns);
        const uint8_t *from = packed + row * stride;
        uint8_t *at = to + row * to_stride, *codes = room.data(), *ordered = codes + columns;
        if (bits < 8) of_bits(bits, [&](auto known) { reorder_row<known>(from, order, at, columns, codes, ordered); });
        else for (int64_t i = 0; i < columns; i++) at[i] = from[order[i]];
    });
}

// words: [rows][columns], 8 codes of 4 bits each; to: [8 * columns][ceil(rows / 2)] bytes, of codes of 4 bits. Code i of a word
// becomes column 8 * (the word's) + place[i].
EXPORT void kernels_transpose_words(const uint32_t *words, int64_t rows, int64_t columns, const int32_t *place, uint8_t *to,
                                    int32_t threads) {
    const int64_t to_stride = (rows + 1) / 2;
    // Words that lie in a line of a cache, and rows of which so many lines stay in the first one.
    constexpr int64_t kColumnsAtOnce = 16, kRowsAtOnce = 64;
    Pool::shared().run(threads, (columns + kColumnsAtOnce - 1) / kColumnsAtOnce, 1, [&](int64_t first, int64_t last) {
        const int64_t end = std::min(columns, last * kColumnsAtOnce);
        for (int64_t begin = first * kColumnsAtOnce; begin < end; begin += kColumnsAtOnce)
            for (int64_t top = 0; top < rows; top += kRowsAtOnce)
                for (int64_t column = begin; column < std::min(end, begin + kColumnsAtOnce); column++)
                    for (int64_t row = top; row < std::min(rows, top + kRowsAtOnce); row += 8) {
                        const int64_t there = std::min<int64_t>(8, rows - row);
                        uint64_t codes[8] = {};
                        for (int64_t i = 0; i < there; i++) codes[i] = spread<4>(words[(row + i) * columns + column]);
                        transpose_bytes(codes);
                        for (int i = 0; i < 8; i++) {
                            const uint64_t packed = gathered<4>(codes[i]);
                            std::memcpy(to + (8 * column + place[i]) * to_stride + row / 2, &packed, (there + 1) / 2);
                        }
                    }
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
