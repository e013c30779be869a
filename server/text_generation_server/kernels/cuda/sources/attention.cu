// Causal attention of a step's queries over the paged cache, for decoding and for chunks of prompts alike.
//
// Query rows are the tokens of a sequence times the query heads that share a key/value head, 16 to a warp. Keys are walked
// in tiles from position 0 with a running maximum (Milakov and Gimelshein 2018, arXiv:1805.02867), and cut every SPLIT
// positions: what splits gave is joined from the first to the last by one formula, here (`join`) or in `attention_join`.
// What a row does not see adds exact zeros. So its bits depend neither on the other rows of a tile, nor on whether splits
// are computed by one block or by many.
//
// BF16; HEAD_DIM, a multiple of 8. Caches: [blocks][kv_heads][block_size][HEAD_DIM].
#include "ptx.h"

constexpr int DIM = (HEAD_DIM + 31) / 32 * 32;
constexpr int PIECES = DIM / 8;  // of 16 bytes in a row
constexpr int KEYS = DIM > 128 ? 16 : 32;  // of a tile
constexpr int SPLIT = 256;
constexpr float LOG2_E = 1.44269504f;

struct Sequence {
    int table, first_token, tokens, context, first_row, first_partial;
};

struct Attention {
    const u16* q;
    const u16* k_cache;
    const u16* v_cache;
    const float* slopes;  // [heads], or null: none
    const i64* tables;
    const int* items;
    u16* y;
    float* partial;
    i64 q_stride, table_width;
    int heads, kv_heads, block_size, window;  // window 0: none
    float scale, cap;  // cap 0: none
};

// Where 16 bytes of a key or value lie: so that the 8 that banks serve at a time are spread over all of them.
DEVICE int key_place(int key, int piece) { return key * PIECES + (PIECES % 8 ? piece : piece ^ (key & 1) << 2); }
DEVICE int value_place(int key, int piece) { return key * PIECES + (piece ^ (PIECES % 8 ? key >> 1 & 3 : key & 7)); }

template <int WARPS>
DEVICE void fetch_tile(uint4* stage, const Attention& a, const Sequence& s, int kv_head, int tile, int last_position) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Lane i finds key i of the tile.
    int position = tile * KEYS + lane % KEYS;
    bool written = position <= last_position;
    i64 block = written ? load_global(a.tables + s.table * a.table_width + position / a.block_size) : 0;
    u32 row = written ? static_cast<u32>((block * a.kv_heads + kv_head) * a.block_size + position % a.block_size) : 0;
#pragma unroll 4
    for (int i = warp; i < KEYS * PIECES / 32; i += WARPS) {
        int unit = i * 32 + lane, key = unit / PIECES, piece = unit % PIECES;
        i64 from = static_cast<i64>(shuffle_from(row, key)) * HEAD_DIM + piece * 8;
        bool exists = tile * KEYS + key <= last_position && piece * 8 < HEAD_DIM;
        copy_async(stage + key_place(key, piece), a.k_cache + (exists ? from : 0), exists);
        copy_async(stage + KEYS * PIECES + value_place(key, piece), a.v_cache + (exists ? from : 0), exists);
    }
}

// Joins what a split gave into what came before: sums are relative to the maxima.
DEVICE void join(float& maximum, float& sum, float split_maximum, float split_sum, float& keep, float& add) {
    float together = fmax(maximum, split_maximum);
    keep = exp2_fast(maximum - together);
    add = exp2_fast(split_maximum - together);
    sum = fused(sum, keep, split_sum * add);
    maximum = together;
}

// Rows g and g + 8 of a warp within a split.
struct Running {
    float maximum[2], sum[2], values[DIM / 8][4];

    DEVICE void begin() {
#pragma unroll
        for (int i = 0; i < DIM / 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) values[i][j] = 0.0f;
        maximum[0] = maximum[1] = MINUS_INFINITY;
        sum[0] = sum[1] = 0.0f;
    }
};

DEVICE void attend_tile(Running& r, const uint4* stage, const u32 (&q)[DIM / 16][4], const Attention& a, int tile, const int (&position)[2],
                        const float (&slope)[2]) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float scores[KEYS / 8][4];
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
        scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.0f;
#pragma unroll
        for (int c = 0; c < DIM / 32; c++) {
            uint4 k = load_shared(stage + key_place(n * 8 + g, c * 4 + t));
            mma(scores[n], q[2 * c], k.x, k.y);
            mma(scores[n], q[2 * c + 1], k.z, k.w);
        }
    }
    float most[2] = {r.maximum[0], r.maximum[1]};
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int key = tile * KEYS + n * 8 + 2 * t + i % 2, at = position[i / 2];
            float score;
            if (a.cap == 0.0f) {
                score = scores[n][i] * (a.scale * LOG2_E);
            } else {
                // cap * tanh(score / cap)
                float e = exp_exact(divide(2.0f * a.scale * scores[n][i], a.cap));
                score = a.cap * LOG2_E * (1.0f - divide(2.0f, e + 1.0f));
            }
            if (a.slopes) score = fused(slope[i / 2], static_cast<float>(key - at), score);
            bool visible = key <= at && (a.window == 0 || key > at - a.window);
            scores[n][i] = visible ? score : MINUS_INFINITY;
            most[i / 2] = fmax(most[i / 2], scores[n][i]);
        }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        most[half] = fmax(most[half], shuffle_xor(most[half], 1));
        most[half] = fmax(most[half], shuffle_xor(most[half], 2));
        float base = most[half] == MINUS_INFINITY ? 0.0f : most[half];
        float keep = exp2_fast(r.maximum[half] - base);
        r.maximum[half] = most[half];
        most[half] = base;
        r.sum[half] *= keep;
#pragma unroll
        for (int i = 0; i < DIM / 8; i++) r.values[i][2 * half] *= keep, r.values[i][2 * half + 1] *= keep;
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            scores[n][i] = exp2_fast(scores[n][i] - most[i / 2]);
            r.sum[i / 2] += scores[n][i];
        }
    const uint4* values = stage + KEYS * PIECES;
    int matrix = lane / 8, row = lane % 8 + matrix % 2 * 8;
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
        // Sums of a product lie in registers as its left side is wanted.
        u32 p[4] = {pack2(scores[2 * k][0], scores[2 * k][1]), pack2(scores[2 * k][2], scores[2 * k][3]),
                    pack2(scores[2 * k + 1][0], scores[2 * k + 1][1]), pack2(scores[2 * k + 1][2], scores[2 * k + 1][3])};
#pragma unroll
        for (int d = 0; d < DIM / 16; d++) {
            u32 v[4];
            load_transposed(v, values + value_place(16 * k + row, 2 * d + matrix / 2));
            mma(r.values[2 * d], p, v[0], v[1]);
            mma(r.values[2 * d + 1], p, v[2], v[3]);
        }
    }
}

DEVICE Sequence load_item(const int* items, int i) {
    const int* at = items + 6 * i;
    return {load_global(at), load_global(at + 1), load_global(at + 2), load_global(at + 3), load_global(at + 4), load_global(at + 5)};
}

// Grid [items, kv_heads, 1 or splits]: 16 * WARPS rows of a sequence. With one block for each split, sums go to `partial`
// [rows][splits][HEAD_DIM + 2], else results to y [tokens][heads * HEAD_DIM].
template <int WARPS> DEVICE void attend(const Attention& a) {
    SHARED_MEMORY(memory);
    uint4* stages = reinterpret_cast<uint4*>(memory);
    constexpr int STAGE = 2 * KEYS * PIECES;
    float* totals = reinterpret_cast<float*>(memory + 2 * STAGE * 16);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int kv_head = blockIdx.y, group = a.heads / a.kv_heads;
    Sequence s = load_item(a.items, blockIdx.x);
    int rows = s.tokens * group, past = s.context - s.tokens;
    int end_row = s.first_row + 16 * WARPS < rows ? s.first_row + 16 * WARPS : rows;
    int last_position = past + (end_row - 1) / group;
    int first_key = 0;
    if (a.window > 0 && past + s.first_row / group - a.window + 1 > 0) first_key = past + s.first_row / group - a.window + 1;
    bool whole = gridDim.z == 1;
    int begin = first_key, end = last_position + 1;
    if (!whole) {
        int split = blockIdx.z;
        begin = begin > split * SPLIT ? begin : split * SPLIT;
        end = end < (split + 1) * SPLIT ? end : (split + 1) * SPLIT;
        if (begin >= end) return;
    }
    int position[2], token[2], head[2];
    float slope[2];  // of scores that are exponents of 2
    bool exists[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = s.first_row + warp * 16 + g + 8 * half;
        exists[half] = row < rows;
        row = exists[half] ? row : rows - 1;
        token[half] = row / group, head[half] = kv_head * group + row % group;
        position[half] = past + token[half];
        slope[half] = a.slopes ? load_global(a.slopes + head[half]) * LOG2_E : 0.0f;
    }
    u32 q[DIM / 16][4];
#pragma unroll
    for (int c = 0; c < DIM / 32; c++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint4 v = make_uint4(0, 0, 0, 0);
            int at = c * 32 + t * 8;
            if (at < HEAD_DIM)
                v = load_global(reinterpret_cast<const uint4*>(a.q + (s.first_token + token[half]) * a.q_stride + head[half] * HEAD_DIM + at));
            q[2 * c][half] = v.x, q[2 * c][2 + half] = v.y, q[2 * c + 1][half] = v.z, q[2 * c + 1][2 + half] = v.w;
        }
    float maximum[2] = {MINUS_INFINITY, MINUS_INFINITY}, sum[2] = {0.0f, 0.0f};
    Running r;
    r.begin();
    int tile = begin / KEYS, last_tile = (end - 1) / KEYS, stage = 0;
    bool is_first_split = true;
    fetch_tile<WARPS>(stages, a, s, kv_head, tile, last_position);
    copy_commit();
    for (; tile <= last_tile; tile++) {
        if (tile < last_tile) fetch_tile<WARPS>(stages + (stage ^ 1) * STAGE, a, s, kv_head, tile + 1, last_position);
        copy_commit();
        copy_wait<1>();
        sync_block();
        attend_tile(r, stages + stage * STAGE, q, a, tile, position, slope);
        sync_block();
        stage ^= 1;
        if (tile < last_tile && (tile + 1) * KEYS % SPLIT) continue;
        // The end of a split.
#pragma unroll
        for (int half = 0; half < 2; half++) {
            r.sum[half] += shuffle_xor(r.sum[half], 1);
            r.sum[half] += shuffle_xor(r.sum[half], 2);
            bool seen = r.maximum[half] != MINUS_INFINITY;
            if (!whole) {
                if (!exists[half]) continue;
                i64 row = static_cast<i64>(s.first_partial + token[half]) * a.heads + head[half];
                float* to = a.partial + (row * gridDim.z + blockIdx.z) * (HEAD_DIM + 2);
                if (t == 0) store_global(to + HEAD_DIM, r.maximum[half]), store_global(to + HEAD_DIM + 1, r.sum[half]);
#pragma unroll
                for (int i = 0; i < HEAD_DIM / 8; i++) {
                    store_global(to + i * 8 + 2 * t, r.values[i][2 * half]);
                    store_global(to + i * 8 + 2 * t + 1, r.values[i][2 * half + 1]);
                }
                continue;
            }
            float keep = 1.0f, add = 0.0f;
            if (seen) join(maximum[half], sum[half], r.maximum[half], r.sum[half], keep, add);
            bool last = tile == last_tile;
#pragma unroll
            for (int i = 0; i < DIM / 8; i++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    // A thread reads what it wrote itself: nothing to wait for.
                    float* total = totals + ((half * (DIM / 8) + i) * 2 + j) * (WARPS * 32) + threadIdx.x;
                    float value = is_first_split ? 0.0f : load_shared(total);
                    if (seen) value = fused(value, keep, r.values[i][2 * half + j] * add);
                    if (!last) {
                        store_shared(total, value);
                    } else if (exists[half] && i < HEAD_DIM / 8) {
                        i64 row = static_cast<i64>(s.first_token + token[half]) * a.heads + head[half];
                        store_global(a.y + row * HEAD_DIM + i * 8 + 2 * t + j, from_float(divide(value, sum[half])));
                    }
                }
        }
        is_first_split = false;
        r.begin();
    }
}

KERNEL __launch_bounds__(32) attention_16(Attention a) { attend<1>(a); }
constexpr int MANY = DIM > 128 ? 2 : 4;
KERNEL __launch_bounds__(MANY * 32) attention_many(Attention a) { attend<MANY>(a); }

// Joins splits: grid [rows of `places`, heads], a thread for each dimension. places: of each row of `partial` its token and
// position.
KERNEL __launch_bounds__(256) attention_join(const float* partial, const int* places, u16* y, int heads, int splits, int window) {
    int row = blockIdx.x, head = blockIdx.y, i = threadIdx.x;
    int token = load_global(places + 2 * row), position = load_global(places + 2 * row + 1);
    int first = window > 0 && position - window + 1 > 0 ? (position - window + 1) / SPLIT : 0;
    if (i >= HEAD_DIM) return;
    float maximum = MINUS_INFINITY, sum = 0.0f, value = 0.0f;
    for (int split = first; split <= position / SPLIT; split++) {
        const float* from = partial + ((static_cast<i64>(row) * heads + head) * splits + split) * (HEAD_DIM + 2);
        float split_maximum = load_global(from + HEAD_DIM);
        if (split_maximum == MINUS_INFINITY) continue;
        float keep, add;
        join(maximum, sum, split_maximum, load_global(from + HEAD_DIM + 1), keep, add);
        value = fused(value, keep, load_global(from + i) * add);
    }
    store_global(y + (static_cast<i64>(token) * heads + head) * HEAD_DIM + i, from_float(divide(value, sum)));
}
