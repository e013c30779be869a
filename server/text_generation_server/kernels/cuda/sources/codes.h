// From packed codes to the fragments of a matrix product: CODING says which codes this module knows.
//
// A chunk is 16 OUT features (a strip) by 64 places. In it, lane l (g = l / 4, t = l % 4) owns rows g and g + 8 and places
// 16t to 16t + 15, as four steps of a product with 16 places each: step s has places 16t + 4s to 16t + 4s + 3. The order
// of places within a chunk is free, since activations are read in the same order; with this one, everything that a lane
// needs of a row of activations is 32 bytes that follow each other. (Where groups end within a chunk: see FINE in linear.cu.)
//
// The 8 codes of a step are numbered (row g: the four places: 0, 1, 4, 5; row g + 8: 2, 3, 6, 7), so that codes 2j and
// 2j + 1 make fragment register j. Words of a lane are laid out by `pack.py`.
#pragma once

#include "ptx.h"

#define DENSE 16
#define TABLE 5
#define E4M3 6
#define E5M2 7

#if CODING == 2
constexpr int BITS = 2;
#elif CODING == 3
constexpr int BITS = 3;
#elif CODING == 4 || CODING == TABLE
constexpr int BITS = 4;
#elif CODING == DENSE
constexpr int BITS = 16;
#else
constexpr int BITS = 8;
#endif

// 32-bit words that a lane owns of a chunk.
constexpr int WORDS = BITS;

constexpr u32 ONE = BF16 ? 0x3f803f80u : 0x3c003c00u;
constexpr u32 MINUS_ZERO = 0x80008000u;

struct Words { u32 w[WORDS]; };

// A chunk's words of this lane: vectors of 16 bytes, 32 lanes after each other; of 2 and 3 bits smaller ones.
DEVICE Words load_words(const u32* chunk, int lane) {
    Words words;
    if constexpr (BITS == 2 || BITS == 3) {
        uint2 v = load_once(reinterpret_cast<const uint2*>(chunk) + lane);
        words.w[0] = v.x, words.w[1] = v.y;
        if constexpr (BITS == 3) words.w[WORDS - 1] = load_once(chunk + 64 + lane);
    } else {
#pragma unroll
        for (int i = 0; i < WORDS / 4; i++) {
            uint4 v = load_once(reinterpret_cast<const uint4*>(chunk) + 32 * i + lane);
            words.w[4 * i] = v.x, words.w[4 * i + 1] = v.y, words.w[4 * i + 2] = v.z, words.w[4 * i + 3] = v.w;
        }
    }
    return words;
}

// What rows g and g + 8 need to become numbers: minus (zero point + the base of the code's disguise), twice in a register;
// of 8-bit integers in bfloat16, as float32.
struct Zeros { u32 low, high; };

// A code is put into the lowest bits of a float's fraction, which makes it BASE + code; subtracting BASE + zero point is exact.
constexpr float BASE = CODING == 8 && BF16 ? 8388608.0f : BF16 ? 128.0f : 1024.0f;
constexpr u32 DISGUISE = BF16 ? 0x43004300u : 0x64006400u;

DEVICE Zeros zeros_of(float low, float high) {
    if constexpr (CODING == 8 && BF16) return {bits_of(-(BASE + low)), bits_of(-(BASE + high))};
    return {pack2(-(BASE + low), -(BASE + low)), pack2(-(BASE + high), -(BASE + high))};
}

#if CODING == TABLE
// The 16 numbers of a table by bytes: the low ones, then the high ones.
struct Numbers { u32 low[4], high[4]; };

DEVICE Numbers load_numbers(const u16* table) {
    Numbers n;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        n.low[i] = n.high[i] = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 bits = load_global(table + 4 * i + j);
            n.low[i] |= (bits & 0xff) << 8 * j;
            n.high[i] |= bits >> 8 << 8 * j;
        }
    }
    return n;
}

// Four codes in the low half of `codes` to two registers of two numbers.
DEVICE void look_up(const Numbers& n, u32 codes, u32& first, u32& second) {
    u32 place = codes & 0x7777u;
    // Bytes of ones where a code names the second half of the table: the sign of 0x80, else of 0x00.
    u32 second_half = pick_bytes(0x00008000u, 0, (codes >> 3 & 0x1111u) | 0x8888u);
    u32 low = (pick_bytes(n.low[0], n.low[1], place) & ~second_half) | (pick_bytes(n.low[2], n.low[3], place) & second_half);
    u32 high = (pick_bytes(n.high[0], n.high[1], place) & ~second_half) | (pick_bytes(n.high[2], n.high[3], place) & second_half);
    first = pick_bytes(low, high, 0x5140);
    second = pick_bytes(low, high, 0x7362);
}
#else
struct Numbers {};
DEVICE Numbers load_numbers(const u16*) { return {}; }
#endif

// Two 8-bit codes, bytes `at` and `at` + 1 of a word.
DEVICE u32 two_bytes(u32 word, int at, u32 minus_zero) {
#if CODING == E4M3
    // As a float with a larger exponent it is smaller by the difference of the biases.
    u32 wide = pick_bytes(word, 0, at ? 0x3424u : 0x1404u);
    u32 size = wide & 0x7f007f00u, sign = wide & 0x80008000u;
    return fma2((size >> (BF16 ? 4 : 1)) | sign, BF16 ? 0x7b807b80u : 0x5c005c00u, MINUS_ZERO);  // 2^120, 2^8
#elif CODING == E5M2
    u32 wide = pick_bytes(word, 0, at ? 0x3424u : 0x1404u);
    if constexpr (!BF16) return wide;
    return fma2(((wide & 0x7f007f00u) >> 3) | (wide & 0x80008000u), 0x77807780u, MINUS_ZERO);  // 2^112
#else
    if constexpr (!BF16) return fma2(pick_bytes(word, 0x64646464u, at ? 0x4342u : 0x4140u), ONE, minus_zero);
    float first = float_of(pick_bytes(word, 0x4b000000u, at ? 0x7542u : 0x7540u)) + float_of(minus_zero);
    float second = float_of(pick_bytes(word, 0x4b000000u, at ? 0x7543u : 0x7541u)) + float_of(minus_zero);
    // Whole numbers below 256 have no bits in the half that is cut off.
    return pick_bytes(bits_of(first), bits_of(second), 0x7632);
#endif
}

// Fragment of step `step` (0 to 3).
DEVICE void fragment(const Words& words, int step, const Zeros& zeros, const Numbers& numbers, u32 (&a)[4]) {
#if CODING == DENSE
#pragma unroll
    for (int j = 0; j < 4; j++) a[j] = words.w[4 * step + j];
#elif CODING == TABLE
    look_up(numbers, words.w[step], a[0], a[1]);
    look_up(numbers, words.w[step] >> 16, a[2], a[3]);
#elif CODING == 2 || CODING == 3 || CODING == 4
#pragma unroll
    for (int j = 0; j < 4; j++) {
        u32 code;
        if constexpr (BITS == 4) {
            code = and_or(words.w[step] >> 4 * j, 0x000f000fu, DISGUISE);
        } else {
            code = and_or(words.w[step / 2] >> (8 * (step % 2) + 2 * j), 0x00030003u, DISGUISE);
            if constexpr (BITS == 3) {
                u32 top = words.w[WORDS - 1];
                int shift = 4 * step + j;
                code = and_or(shift < 2 ? top << (2 - shift) : top >> (shift - 2), 0x00040004u, code);
            }
        }
        a[j] = fma2(code, ONE, j % 2 ? zeros.high : zeros.low);
    }
#else
#pragma unroll
    for (int j = 0; j < 4; j++) a[j] = two_bytes(words.w[2 * step + j / 2], j % 2 * 2, j % 2 ? zeros.high : zeros.low);
#endif
}
