// Tiles for processors without AMX, after the operations in Intel's manual (volume 2: LDTILECFG, TILELOADD, TILESTORED, TILEZERO,
// TDPBF16PS, TDPBSUD). Included by tiles.h. What the manual makes an exception ends the program.
#pragma once

#include <atomic>
#include <cstdlib>

namespace kernels::emulated {

struct Tiles {
    bool configured = false;
    int rows[8], bytes[8];
    alignas(64) uint8_t data[8][16][64];
};

inline Tiles &tiles() {
    static thread_local Tiles all;
    return all;
}

// Products of two tiles so far, of all threads.
inline std::atomic<int64_t> products{0};

inline void demand(bool holds) {
    if (!holds) std::abort();
}

inline Tiles &with(int tile) {
    demand(tiles().configured && tiles().rows[tile] > 0);
    return tiles();
}

inline void configure(const TileShapes *shapes) {
    Tiles &all = tiles();
    demand(shapes->palette == 1 && shapes->start_row == 0);
    for (uint8_t byte : shapes->reserved) demand(byte == 0);
    for (int tile = 0; tile < 16; tile++) {
        const int rows = shapes->rows[tile], bytes = shapes->row_bytes[tile];
        demand(rows <= 16 && bytes <= 64 && (rows == 0) == (bytes == 0) && (tile < 8 || rows == 0));
        if (tile < 8) all.rows[tile] = rows, all.bytes[tile] = bytes;
    }
    std::memset(all.data, 0, sizeof all.data);
    all.configured = true;
}

inline void release() { tiles().configured = false; }

inline void zero(int tile) { std::memset(with(tile).data[tile], 0, sizeof tiles().data[tile]); }

inline void load(int tile, const void *at, int64_t stride) {
    zero(tile);
    for (int row = 0; row < tiles().rows[tile]; row++)
        std::memcpy(tiles().data[tile][row], static_cast<const uint8_t *>(at) + row * stride, tiles().bytes[tile]);
}

inline void store(int tile, void *at, int64_t stride) {
    const Tiles &all = with(tile);
    for (int row = 0; row < all.rows[tile]; row++)
        std::memcpy(static_cast<uint8_t *>(at) + row * stride, all.data[tile][row], all.bytes[tile]);
}

// What all products demand of their tiles.
inline Tiles &with_three(int to, int a, int b) {
    const Tiles &all = with(to);
    with(a), with(b);
    products++;
    demand(to != a && to != b && a != b);
    demand(all.rows[to] == all.rows[a] && all.bytes[to] == all.bytes[b] && all.bytes[a] == 4 * all.rows[b]);
    return tiles();
}

// Each column has a chain of fused multiply-adds over the even and one over the odd places, both from zero; their sum is added to
// the tile. Called while the processor takes subnormal numbers for zero.
__attribute__((noinline)) inline void add_brains_row(float *to, const uint8_t *a, const uint8_t (*b)[64], int pairs) {
    const __m512i upper = _mm512_set1_epi32(int32_t(0xFFFF0000));
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int k = 0; k < pairs; k++) {
        int32_t pair;
        std::memcpy(&pair, a + 4 * k, 4);
        const __m512i x = _mm512_set1_epi32(pair), y = _mm512_load_si512(b[k]);
        even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), even);
        odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, upper)), _mm512_castsi512_ps(_mm512_and_si512(y, upper)), odd);
    }
    _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), _mm512_add_ps(even, odd)));
}

inline void add_brains(int to, int a, int b) {
    Tiles &all = with_three(to, a, b);
    const unsigned kept = _mm_getcsr();
    // No exceptions, to the nearest even, subnormal numbers are zero on both sides.
    _mm_setcsr(0x9FC0);
    for (int m = 0; m < all.rows[to]; m++)
        add_brains_row(reinterpret_cast<float *>(all.data[to][m]), all.data[a][m], all.data[b], all.bytes[a] / 4);
    _mm_setcsr(kept);
}

inline void add_bytes(int to, int a, int b) {
    Tiles &all = with_three(to, a, b);
    for (int m = 0; m < all.rows[to]; m++)
        for (int k = 0; k < all.bytes[a] / 4; k++)
            for (int n = 0; n < all.bytes[to] / 4; n++) {
                uint32_t sum;
                std::memcpy(&sum, &all.data[to][m][4 * n], 4);
                for (int i = 0; i < 4; i++) sum += uint32_t(int8_t(all.data[a][m][4 * k + i]) * int32_t(all.data[b][k][4 * n + i]));
                std::memcpy(&all.data[to][m][4 * n], &sum, 4);
            }
}

}  // namespace kernels::emulated
