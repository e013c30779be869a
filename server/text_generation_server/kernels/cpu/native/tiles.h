// The instructions for tiles that our products use. A tile has up to 16 rows of up to 64 bytes; its number is a literal.
//
// With KERNELS_EMULATE_TILES they are functions of our own instead, of the same effect, for tests on processors without AMX.
#pragma once

#include <cstdint>
#include <cstring>
#include <immintrin.h>

namespace kernels {

// What ldtilecfg reads: Intel's manual, volume 1, chapter 18.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

}  // namespace kernels

#ifdef KERNELS_EMULATE_TILES

#include "tiles_emulated.h"

#define TILE_SHAPES(shapes) ::kernels::emulated::configure(shapes)
#define TILE_RELEASE() ::kernels::emulated::release()
#define TILE_ZERO(tile) ::kernels::emulated::zero(tile)
#define TILE_LOAD(tile, at, stride) ::kernels::emulated::load(tile, at, stride)
#define TILE_STORE(tile, at, stride) ::kernels::emulated::store(tile, at, stride)
#define TILE_ADD_BRAINS(to, a, b) ::kernels::emulated::add_brains(to, a, b)
#define TILE_ADD_BYTES(to, a, b) ::kernels::emulated::add_bytes(to, a, b)

#else

// gcc does not know what these read; what was written before must be in memory, and the addresses have left the compiler's sight.
#define TILE_MEMORY(at) asm volatile("" : : "r"(at) : "memory")

#define TILE_SHAPES(shapes) do { TILE_MEMORY(shapes); _tile_loadconfig(shapes); } while (0)
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_LOAD(tile, at, stride) do { TILE_MEMORY(at); _tile_loadd(tile, at, stride); } while (0)
#define TILE_STORE(tile, at, stride) _tile_stored(tile, at, stride)
// to.f32[m][n] += a.bf16[m][2k] * b.bf16[k][2n] + a.bf16[m][2k + 1] * b.bf16[k][2n + 1].
#define TILE_ADD_BRAINS(to, a, b) _tile_dpbf16ps(to, a, b)
// The same of four signed bytes of a and four unsigned ones of b, exactly, modulo 2^32.
#define TILE_ADD_BYTES(to, a, b) _tile_dpbsud(to, a, b)

#endif
