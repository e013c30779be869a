// A block of a decoder, and the functions of the C interface that it is made of.
#pragma once

#include <cstdint>
#include <vector>

#include "layer.h"

#define EXPORT __attribute__((visibility("default")))

namespace kernels {

// x + attention(norm(x)), then x + mlp(norm(x)). Mirrored by `block.py`.
//   qkv_bias   [(heads + 2 * kv_heads) * head_dim], or null
//   head_norm  [heads + kv_heads][head_dim], or null: of queries and keys before they are rotated
struct Block {
    const Weight *qkv, *output, *gate_up, *down;
    const void *attention_norm, *mlp_norm;  // [hidden]
    const void *qkv_bias, *head_norm;
    const float *slopes;                    // see Attention
    int64_t hidden, heads, kv_heads, head_dim, window;
    float attention_eps, mlp_eps, head_eps, scale, cap;
};

// What a step brings. See Attention.
struct BlockStep {
    void *x;                       // [rows][hidden], and the result
    void *keys, *values;
    const float *cos, *sin;        // [rows][head_dim]
    const int64_t *slots, *starts, *lengths, *block_tables;
    int64_t rows, sequences, table_stride, block_size;
    int32_t type;
};

// Memory that grows, is not set to zero, and is kept: fresh pages cost more than the work on them.
struct Buffer {
    std::vector<char> bytes;
    float *floats(int64_t count) {
        const size_t wanted = size_t(count) * sizeof(float) + 64;
        if (bytes.size() < wanted) bytes = std::vector<char>(wanted);
        return reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(bytes.data()) + 63) / 64 * 64);
    }
};

const Variant &variant_of(int32_t index);

}  // namespace kernels

extern "C" {
EXPORT void kernels_multiply(const kernels::Weight *weight, int32_t variant, const void *x, int32_t x_type, int64_t rows, void *y,
                             int32_t threads);
EXPORT void kernels_rms_norm(int32_t variant, const void *x, const void *weight, void *y, int32_t type, int64_t rows,
                             int64_t size, int64_t weight_rows, float eps, int32_t threads);
EXPORT void kernels_silu_and_mul(int32_t variant, const void *x, void *y, int32_t type, int64_t rows, int64_t size,
                                 int32_t threads);
EXPORT void kernels_rotate(int32_t variant, const void *x, const float *cos, const float *sin, void *y, int32_t type,
                           int64_t tokens, int64_t heads, int64_t dim, int64_t stride, int32_t threads);
EXPORT void kernels_store_kv(const void *k, const void *v, void *keys, void *values, const int64_t *slots, int32_t type,
                             int64_t tokens, int64_t k_stride, int64_t v_stride, int64_t heads, int64_t dim,
                             int64_t block_size);
EXPORT void kernels_attend(int32_t variant, const kernels::Attention *step, int32_t threads);
}
