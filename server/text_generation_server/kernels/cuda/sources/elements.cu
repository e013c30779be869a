// What a decoder does to each token between its products: norms, rotation, activation, storing keys and values. Every
// row is computed by threads whose number depends on its size alone, in one order.
#include "ptx.h"

// y[row][place] = x[row][places[place]], 0 where there is no feature.
KERNEL __launch_bounds__(256) gather(const u16* x, int row_stride, int stride, const int* places, int num_places, u16* y) {
    int place = blockIdx.x * blockDim.x + threadIdx.x;
    if (place >= num_places) return;
    int feature = load_global(places + place);
    i64 row = blockIdx.y;
    u16 value = feature < 0 ? 0 : load_global(x + row * row_stride + static_cast<i64>(feature) * stride);
    store_global(y + row * num_places + place, value);
}

// The sum over a block of whole warps, in every thread; `memory`: a float for each warp. Always in the same order.
DEVICE float block_sum(float value, float* memory) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    int warps = blockDim.x / 32;
    if (warps == 1) return value;
    if (threadIdx.x % 32 == 0) store_shared(memory + threadIdx.x / 32, value);
    sync_block();
    float sum = load_shared(memory);
    for (int warp = 1; warp < warps; warp++) sum += load_shared(memory + warp);
    return sum;
}

// y = x / sqrt(mean(x^2) + eps) * weight. Grid [rows]; row i of x is token i / per_token, at token * token_stride +
// (i % per_token) * size; weights repeat after `weights` rows. y: [rows][size].
KERNEL __launch_bounds__(256) rms_norm(const u16* x, const u16* weight, u16* y, int token_stride, int per_token, int size,
                                       int weights, float eps) {
    SHARED_MEMORY(memory);
    int row = blockIdx.x, inner = row % per_token;
    const u16* from = x + static_cast<i64>(row / per_token) * token_stride + inner * size;
    const u16* by = weight + row % weights * size;
    float squares = 0.0f;
    for (int i = 2 * threadIdx.x; i < size; i += 2 * blockDim.x) {
        u32 pair = load_global(reinterpret_cast<const u32*>(from + i));
        float first = low_of(pair), second = high_of(pair);
        squares = fused(second, second, fused(first, first, squares));
    }
    float factor = inverse_root(divide(block_sum(squares, reinterpret_cast<float*>(memory)), static_cast<float>(size)) + eps);
    u16* to = y + static_cast<i64>(row) * size;
    for (int i = 2 * threadIdx.x; i < size; i += 2 * blockDim.x) {
        u32 pair = load_global(reinterpret_cast<const u32*>(from + i));
        u32 weight_pair = load_global(reinterpret_cast<const u32*>(by + i));
        float first = low_of(pair) * factor * low_of(weight_pair), second = high_of(pair) * factor * high_of(weight_pair);
        store_global(reinterpret_cast<u32*>(to + i), pack2(first, second));
    }
}

// The pair (i, i + size / 2) of every head turned by the token's angles. cos, sin: [tokens][size]; the first half of sin
// is negated. Grid [tokens, heads]; y: [tokens][heads][size].
KERNEL __launch_bounds__(128) rotate(const u16* x, const float* cos, const float* sin, u16* y, int token_stride, int size) {
    i64 token = blockIdx.x;
    const u16* from = x + token * token_stride + blockIdx.y * size;
    u16* to = y + (token * gridDim.y + blockIdx.y) * size;
    int half = size / 2;
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        float first = to_float(load_global(from + i)), second = to_float(load_global(from + half + i));
        float c = load_global(cos + token * size + i), s = load_global(sin + token * size + i);
        float c2 = load_global(cos + token * size + half + i), s2 = load_global(sin + token * size + half + i);
        store_global(to + i, from_float(first * c + second * s));
        store_global(to + half + i, from_float(second * c2 + first * s2));
    }
}

// y = silu(gate) * up. gate_up: [rows][2 * size], gate first. Pairs of features.
KERNEL __launch_bounds__(256) silu_and_mul(const u16* gate_up, u16* y, int size) {
    int i = 2 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= size) return;
    i64 row = blockIdx.y;
    u32 gate = load_global(reinterpret_cast<const u32*>(gate_up + row * 2 * size + i));
    u32 up = load_global(reinterpret_cast<const u32*>(gate_up + row * 2 * size + size + i));
    float first = divide(low_of(gate), 1.0f + exp_exact(-low_of(gate))) * low_of(up);
    float second = divide(high_of(gate), 1.0f + exp_exact(-high_of(gate))) * high_of(up);
    store_global(reinterpret_cast<u32*>(y + row * size + i), pack2(first, second));
}

// Keys and values of a step to their slots, but for those whose slot is negative; caches are [blocks][heads][block_size][size]. Grid [tokens, heads]. Strides in
// numbers, one for each token.
KERNEL __launch_bounds__(128) store_kv(const u16* k, const u16* v, u16* k_cache, u16* v_cache, const i64* slots, int k_stride,
                                       int v_stride, int block_size, int size) {
    i64 token = blockIdx.x, slot = load_global(slots + token);
    if (slot < 0) return;
    int head = blockIdx.y;
    i64 to = ((slot / block_size * gridDim.y + head) * block_size + slot % block_size) * size;
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        store_global(k_cache + to + i, load_global(k + token * k_stride + head * size + i));
        store_global(v_cache + to + i, load_global(v + token * v_stride + head * size + i));
    }
}
