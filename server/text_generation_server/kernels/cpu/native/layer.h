// What a layer computes besides its products, for every instruction set: what callers and variants agree on.
//
// All of it in float32, from and to float32 or bfloat16. An element's bits depend on its own row alone: sums of a row are
// taken in one order, and every element goes through whole vectors, the last ones too.
#pragma once

#include <cstdint>

#include "linear.h"

namespace kernels {

// Keys that are weighed against each other at once; sums go over such tiles in ascending order, from the first that a
// query sees, and tiles begin at multiples of this position.
constexpr int64_t kTileKeys = 64;
// Keys of a tile that are scored at once, and stand in one block of the cache.
constexpr int64_t kScoredKeys = 16;
// Query rows of one tile: tokens of a sequence times the query heads of a key head; more than these only if the heads alone
// are more.
constexpr int64_t kTileRows = 64;

// One layer's cache and the step that reads it.
//   keys    [blocks][kv_heads][head_dim][block_size]: a vector of keys for each dimension
//   values  [blocks][kv_heads][block_size][head_dim]
struct Attention {
    const void *queries;          // [tokens][query_stride]: heads * head_dim of them, the heads of a key head together
    void *output;                 // [tokens][heads * head_dim]
    const void *keys, *values;
    const int64_t *starts;        // [sequences + 1]: tokens of each
    const int64_t *lengths;       // [sequences]: positions in the cache, this step's included
    const int64_t *block_tables;  // [sequences][table_stride]
    int64_t query_stride, table_stride, sequences, heads, kv_heads, head_dim, block_size, window;  // window 0: none
    const float *slopes;          // [heads]: of the distance to a key; null: none
    float scale, cap;             // cap 0: none
    int32_t type;                 // of queries, output, keys and values
};

// Tokens [token, token + count) of a sequence, and one key head.
struct AttentionTile { int64_t sequence, token, count, kv_head; };

constexpr int64_t attention_scratch_floats(int64_t head_dim, int64_t rows) {
    return rows * (2 * head_dim + kTileKeys + 2) + 2 * head_dim * kScoredKeys + 64;
}

// Columns that are rounded one after another at most, and outputs whose columns one thread goes through at a time.
constexpr int64_t kMostColumns = 32, kColumnOutputs = 64;

// A run of GPTQ's loop: weight [num][outputs], of which a row is a column; scale, zero: [num][outputs], `grid_stride` from one
// to the next. upper: [num][num] with `upper_stride`. codes, errors: [num][outputs].
struct Columns {
    float *weight;
    const float *upper, *scale, *zero;
    uint8_t *codes;
    float *errors;
    int64_t num, outputs, upper_stride, grid_stride;
    float most;
};

struct LayerVariant {
    // y[row] = x[row] / sqrt(mean(x[row]^2) + eps) * weight[row % weight_rows]; rows of `size`. Rows [first, last).
    void (*rms_norm)(const void *x, const void *weight, void *y, int32_t type, int64_t size, int64_t weight_rows, float eps,
                     int64_t first, int64_t last);
    // y[row] = silu(x[row][0:size]) * x[row][size:2*size].
    void (*silu_and_mul)(const void *x, void *y, int32_t type, int64_t size, int64_t first, int64_t last);
    // Tokens [first, last) of [tokens][heads][dim], `stride` elements from one token to the next; y is dense.
    void (*rotate)(const void *x, const float *cos, const float *sin, void *y, int32_t type, int64_t heads, int64_t dim,
                   int64_t stride, int64_t first, int64_t last);
    // to = parts[0] + ... + parts[count - 1] in that order, elements [first, last), rounded to the type at the end.
    void (*sum)(const void *const *parts, int64_t count, void *to, int32_t type, int64_t first, int64_t last);
    // x += y, elements [first, last), rounded to the type.
    void (*add)(void *x, const void *y, int32_t type, int64_t first, int64_t last);
    // `next`: what this thread attends to next, or null; its keys and values are read ahead. `scratch`: of `rows` rows, which
    // are enough for every tile.
    void (*attend)(const Attention &, const AttentionTile &, const AttentionTile *next, float *scratch, int64_t rows);
    // Outputs [first, last): what each column would have been, its codes, and its errors / upper[i][i].
    void (*round_columns)(const Columns &, int64_t first, int64_t last);
};

extern const LayerVariant kLayerAvx2, kLayerAvx512;

}  // namespace kernels
