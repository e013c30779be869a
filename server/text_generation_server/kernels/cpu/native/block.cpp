// A block of a decoder as one call: what a step computes between two residual sums, in the order and with the rounding of the
// single operations. Buffers are kept from call to call.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "exchange.h"
#include "pool.h"

namespace kernels {
namespace {

// Rows whose feed-forward layer is computed at once: the widest activations of a model stay small.
constexpr int64_t kRowsAtOnce = 256;

// Rows that are worth a thread of their own, where they are only added up.
int64_t add_grain(const Block &block) { return std::max<int64_t>(1, (1 << 16) / block.hidden); }

int64_t element_size(int32_t type) { return type == kF32 ? 4 : 2; }

char *elements(Buffer &of, int64_t count, int64_t size) { return reinterpret_cast<char *>(of.floats((count * size + 3) / 4)); }

// attention(norm(x)), of this rank's heads, to `to`.
void attend(const Block &block, const BlockStep &step, char *to, int32_t variant, int32_t threads) {
    static thread_local Buffer normed_buffer, qkv_buffer, rotated_buffer, attended_buffer, head_buffer;
    const LayerVariant &use = *variant_of(variant).layer;
    const int64_t rows = step.rows, hidden = block.hidden, dim = block.head_dim, type = step.type, size = element_size(step.type);
    const int64_t heads = block.heads, kv_heads = block.kv_heads, all_heads = heads + 2 * kv_heads;
    char *normed = elements(normed_buffer, rows * hidden, size), *qkv = elements(qkv_buffer, rows * all_heads * dim, size);
    char *rotated = elements(rotated_buffer, rows * (heads + kv_heads) * dim, size);
    char *attended = elements(attended_buffer, rows * heads * dim, size);

    kernels_rms_norm(variant, step.x, block.attention_norm, normed, type, rows, hidden, 1, block.attention_eps, threads);
    kernels_multiply(block.qkv, variant, normed, type, rows, qkv, threads);
    const int64_t stride = all_heads * dim, both = heads + kv_heads;
    char *rotated_from = qkv;
    if (block.head_norm) rotated_from = elements(head_buffer, rows * both * dim, size);
    const int64_t from_stride = block.head_norm ? both * dim : stride;
    const int64_t token_grain = std::max<int64_t>(1, (1 << 16) / stride);
    Pool::shared().run(threads, rows, token_grain, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            char *heads_of_row = qkv + row * stride * size;
            if (block.qkv_bias) use.add(heads_of_row, block.qkv_bias, type, 0, stride);
            if (block.head_norm)
                use.rms_norm(heads_of_row, block.head_norm, rotated_from + row * from_stride * size, type, dim, both, block.head_eps,
                             0, both);
        }
        const int64_t tables = first * dim, from = first * from_stride * size, to = first * both * dim * size;
        use.rotate(rotated_from + from, step.cos + tables, step.sin + tables, rotated + to, type, both, dim, from_stride, 0,
                   last - first);
    });
    kernels_store_kv(rotated + heads * dim * size, qkv + (heads + kv_heads) * dim * size, step.keys, step.values, step.slots, type,
                     rows, (heads + kv_heads) * dim, stride, kv_heads, dim, step.block_size);
    const Attention attention{rotated, attended, step.keys, step.values, step.starts, step.lengths, step.block_tables,
                              (heads + kv_heads) * dim, step.table_stride, step.sequences, heads, kv_heads, dim,
                              step.block_size, block.window, block.slopes, block.scale, block.cap, int32_t(type)};
    kernels_attend(variant, &attention, threads);
    kernels_multiply(block.output, variant, attended, type, rows, to, threads);
}

// x += delta, then mlp(norm(x)), of this rank's features, to where delta was.
void feed_forward(const Block &block, const BlockStep &step, char *delta, int32_t variant, int32_t threads) {
    static thread_local Buffer normed_buffer, wide_buffer, narrow_buffer;
    const LayerVariant &use = *variant_of(variant).layer;
    const int64_t rows = step.rows, hidden = block.hidden, inner = block.down->in_features, type = step.type;
    const int64_t size = element_size(step.type);
    char *normed = elements(normed_buffer, rows * hidden, size);
    Pool::shared().run(threads, rows, add_grain(block), [&](int64_t first, int64_t last) {
        use.add(step.x, delta, type, first * hidden, last * hidden);
        use.rms_norm(step.x, block.mlp_norm, normed, type, hidden, 1, block.mlp_eps, first, last);
    });
    for (int64_t begin = 0; begin < rows; begin += kRowsAtOnce) {
        const int64_t count = std::min(kRowsAtOnce, rows - begin);
        char *wide = elements(wide_buffer, count * 2 * inner, size), *narrow = elements(narrow_buffer, count * inner, size);
        kernels_multiply(block.gate_up, variant, normed + begin * hidden * size, type, count, wide, threads);
        kernels_silu_and_mul(variant, wide, narrow, type, count, inner, threads);
        kernels_multiply(block.down, variant, narrow, type, count, delta + begin * hidden * size, threads);
    }
}

void add_up(const Block &block, const BlockStep &step, const char *delta, int32_t variant, int32_t threads) {
    Pool::shared().run(threads, step.rows, add_grain(block), [&](int64_t first, int64_t last) {
        variant_of(variant).layer->add(step.x, delta, step.type, first * block.hidden, last * block.hidden);
    });
}

}  // namespace
}  // namespace kernels

using namespace kernels;

extern "C" {

// Blocks one after another, which have keys and values of their own. exchange: of blocks that are split over ranks, else null.
// Not 0: the ranks could not sum up, and x is void.
EXPORT int32_t kernels_blocks(const Block *const *blocks, void *const *keys, void *const *values, int64_t count, const BlockStep *step,
                              Exchange *exchange, int32_t variant, int32_t threads) {
    static thread_local Buffer delta_buffer;
    const int64_t elements_of_step = step->rows * blocks[0]->hidden;
    char *delta = elements(delta_buffer, elements_of_step, element_size(step->type));
    const auto sum = [&] {
        return exchange == nullptr || sum_over_ranks(*exchange, delta, elements_of_step, step->type, variant, threads);
    };
    BlockStep own = *step;
    for (int64_t i = 0; i < count; i++) {
        own.keys = keys[i], own.values = values[i];
        attend(*blocks[i], own, delta, variant, threads);
        if (!sum()) return 1;
        feed_forward(*blocks[i], own, delta, variant, threads);
        if (!sum()) return 1;
        add_up(*blocks[i], own, delta, variant, threads);
    }
    return 0;
}

// y: [rows][hidden] of `weight`, whose `owned` rows from `first` on this rank has. Not 0: the ranks could not sum up.
EXPORT int32_t kernels_embed_share(Exchange *exchange, const void *weight, int32_t type, int64_t first, int64_t owned, int64_t hidden,
                                   const int64_t *ids, int64_t rows, void *y, int32_t variant, int32_t threads) {
    const int64_t bytes = hidden * element_size(type);
    for (int64_t row = 0; row < rows; row++) {
        const int64_t local = ids[row] - first;
        char *to = static_cast<char *>(y) + row * bytes;
        if (local >= 0 && local < owned) std::memcpy(to, static_cast<const char *>(weight) + local * bytes, bytes);
        else std::memset(to, 0, bytes);
    }
    return sum_over_ranks(*exchange, y, rows * hidden, type, variant, threads) ? 0 : 1;
}
}
