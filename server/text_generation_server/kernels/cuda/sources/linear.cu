// y[row, out] = x[row, in] W[out, in] for a packed W and any number of rows. Weights are the 16-row side of a product of
// matrices, rows of x its 8 columns.
//
// A result is computed in one order, whatever the number of rows and the kernel: places are cut into `slices`, each a
// chain of products of 16 places; where a group ends, the chain's sum is multiplied by the group's scale and added to the
// slice's; slices are added from the first to the last. `linear_few` gives each slice to a warp; `linear_many_*` walks
// through them, or gives each to a block of its own. So a row's bits depend on the row alone.
//
// CODING, BF16, SCALES (1: float32, 2: float16, 3: bfloat16), ZEROS (1: there are zero points), FINE (1: a group may end at
// any 16 places, else at any 64; step s of a lane then has places 16s + 4t to 16s + 4t + 3, so that a step is in one group).
//
// codes: [strips][chunks][words] as in codes.h. scales, zeros: [strips][groups][8][2], the second for rows 8 further.
// group_of: the group of each 16 or 64 places. x: [rows][64 * chunks], y: [rows][out].
#include "codes.h"

constexpr int CHUNK = 64;  // places
constexpr int CHUNK_BYTES = 128 * WORDS;
// Chunks whose words a lane has under way: 16 words, half of them while it computes on the others.
constexpr int AHEAD = WORDS >= 16 ? 1 : 16 / WORDS < 8 ? 16 / WORDS : 8;

struct Weight {
    const u32* codes;
    const void* scales;
    const u8* zeros;
    const int* group_of;
    const u16* table;
    float middle;
    int groups, chunks;
};

struct Scales { float low, high; };

DEVICE Scales load_scales(const Weight& w, int strip, int group, int g) {
    i64 at = (static_cast<i64>(strip) * w.groups + group) * 8 + g;
#if SCALES == 1
    float2 pair = load_global(static_cast<const float2*>(w.scales) + at);
    return {pair.x, pair.y};
#else
    u32 pair = load_global(static_cast<const u32*>(w.scales) + at);
    u16 low = static_cast<u16>(pair), high = static_cast<u16>(pair >> 16);
    return SCALES == 2 ? Scales{half_to_float(low), half_to_float(high)} : Scales{bf16_to_float(low), bf16_to_float(high)};
#endif
}

DEVICE Zeros load_zeros(const Weight& w, int strip, int group, int g) {
#if ZEROS
    i64 at = (static_cast<i64>(strip) * w.groups + group) * 8 + g;
    u16 pair = load_global(reinterpret_cast<const u16*>(w.zeros) + at);
    return zeros_of(static_cast<float>(pair & 0xff), static_cast<float>(pair >> 8));
#else
    return zeros_of(w.middle, w.middle);
#endif
}

DEVICE int slice_begin(int chunks, int slices, int slice) {
    return static_cast<int>(static_cast<i64>(chunks) * slice / slices);
}

// The sums of one strip and N times 8 rows of x while places go by.
template <int N> struct Sums {
    float slice[N][4], group[N][4];
    Scales scales;
    Zeros zeros;
    int current;

    DEVICE void begin_slice() {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) slice[n][i] = group[n][i] = 0.0f;
        scales = {0.0f, 0.0f};
        current = -1;
    }
    DEVICE void end_group() {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                slice[n][i] = fused(group[n][i], i < 2 ? scales.low : scales.high, slice[n][i]);
                group[n][i] = 0.0f;
            }
    }
    DEVICE void enter(const Weight& w, int strip, int unit, int g) {
        int group_id = load_global(w.group_of + unit);
        if (group_id == current) return;
        end_group();
        current = group_id;
        scales = load_scales(w, strip, group_id, g);
        zeros = load_zeros(w, strip, group_id, g);
    }
};

// Half a chunk of a strip. x: for each 8 rows, what the lane needs of its row.
template <int N>
DEVICE void multiply(Sums<N>& sums, const Weight& w, const Numbers& numbers, const Words& words, const uint4 (&x)[N],
                     int strip, int chunk, int half, int g) {
    if (!FINE && half == 0) sums.enter(w, strip, chunk, g);
#pragma unroll
    for (int step = 2 * half; step < 2 * half + 2; step++) {
        if (FINE) sums.enter(w, strip, 4 * chunk + step, g);
        u32 a[4];
        fragment(words, step, sums.zeros, numbers, a);
#pragma unroll
        for (int n = 0; n < N; n++) {
            const uint4& v = x[n];
            mma(sums.group[n], a, step % 2 ? v.z : v.x, step % 2 ? v.w : v.y);
        }
    }
}

// At most 8 rows: grid [strips], a warp for each slice.
KERNEL __launch_bounds__(512) linear_few(Weight w, const u16* x, u16* y, int rows, int out) {
    SHARED_MEMORY(memory);
    int lane = threadIdx.x % 32, slice = threadIdx.x / 32, slices = blockDim.x / 32, g = lane / 4, t = lane % 4;
    int strip = blockIdx.x;
    int begin = slice_begin(w.chunks, slices, slice), end = slice_begin(w.chunks, slices, slice + 1);
    const u32* codes = w.codes + (static_cast<i64>(strip) * w.chunks + begin) * (CHUNK_BYTES / 4);
    const u16* mine = x + static_cast<i64>(g) * w.chunks * CHUNK + (FINE ? 4 : 16) * t;
    Numbers numbers = load_numbers(w.table);
    Words next[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (begin + i < end) next[i] = load_words(codes + i * (CHUNK_BYTES / 4), lane);
    Sums<1> sums;
    sums.begin_slice();
    for (int chunk = begin; chunk < end; chunk += AHEAD) {
        Words words[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) words[i] = next[i];
        codes += AHEAD * (CHUNK_BYTES / 4);
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (chunk + AHEAD + i < end) next[i] = load_words(codes + i * (CHUNK_BYTES / 4), lane);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (chunk + i >= end) break;
            const u16* at = mine + static_cast<i64>(chunk + i) * CHUNK;
            uint4 values[2][1];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                values[half][0] = make_uint4(0, 0, 0, 0);
                if (g >= rows) continue;
                if (FINE) {
                    uint2 first = load_global(reinterpret_cast<const uint2*>(at + 32 * half));
                    uint2 second = load_global(reinterpret_cast<const uint2*>(at + 32 * half + 16));
                    values[half][0] = make_uint4(first.x, first.y, second.x, second.y);
                } else {
                    values[half][0] = load_global(reinterpret_cast<const uint4*>(at) + half);
                }
            }
#pragma unroll
            for (int half = 0; half < 2; half++)
                multiply<1>(sums, w, numbers, words[i], values[half], strip, chunk + i, half, g);
        }
    }
    sums.end_group();
    // [slices][16 OUT features * 8 rows of x]
    float* partial = reinterpret_cast<float*>(memory);
#pragma unroll
    for (int i = 0; i < 4; i++) store_shared(partial + slice * 128 + 32 * i + lane, sums.slice[0][i]);
    sync_block();
    if (threadIdx.x < 128) {
        float sum = load_shared(partial + threadIdx.x);
        for (int s = 1; s < slices; s++) sum += load_shared(partial + s * 128 + threadIdx.x);
        int i = threadIdx.x / 32, row = 2 * t + i % 2, feature = strip * 16 + g + i / 2 * 8;
        if (row < rows && feature < out) store_global(y + static_cast<i64>(row) * out + feature, from_float(sum));
    }
}

constexpr int WARPS = 4;
constexpr int STRIPS = 2;  // of a warp
constexpr int STAGES = 3;

// Rows of x of one chunk, 128 bytes each. 16 bytes change places from row to row: a quarter of a warp reads 16 bytes of
// two rows at a time, or half of it 8 bytes of four, from all banks.
DEVICE int place_of(int row, int piece) { return row * 8 + (piece ^ (FINE ? (row & 3) << 1 : row & 1)); }

// What a lane needs of row `row` for steps 2 * half and the next.
DEVICE uint4 read_row(const uint4* stage, int row, int t, int half) {
    if (!FINE) return load_shared(stage + place_of(row, 2 * t + half));
    const uint2* first = reinterpret_cast<const uint2*>(stage + place_of(row, 4 * half + t / 2)) + t % 2;
    const uint2* second = reinterpret_cast<const uint2*>(stage + place_of(row, 4 * half + 2 + t / 2)) + t % 2;
    uint2 v = load_shared(first), w = load_shared(second);
    return make_uint4(v.x, v.y, w.x, w.y);
}

template <int N> DEVICE void fetch_rows(uint4* stage, const u16* x, i64 first_row, int rows, int chunks, int chunk) {
#pragma unroll
    for (int i = threadIdx.x; i < N * 8 * 8; i += WARPS * 32) {
        int row = i / 8, piece = i % 8;
        bool exists = row < rows;
        const u16* from = x + (first_row + (exists ? row : 0)) * chunks * CHUNK + static_cast<i64>(chunk) * CHUNK + piece * 8;
        copy_async(stage + place_of(row, piece), from, exists);
    }
}

// 128 OUT features by N * 8 rows of x: grid [strips / 8, rows / (N * 8), 1 or slices]. With one block for each slice, sums
// go to `partial` [slices][rows][out], else results to y.
template <int N> DEVICE void many(Weight w, const u16* x, u16* y, float* partial, int rows, int out, int slices) {
    SHARED_MEMORY(memory);
    uint4* stages = reinterpret_cast<uint4*>(memory);
    float* totals = reinterpret_cast<float*>(memory + STAGES * N * 8 * 128);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int first_strip = (blockIdx.x * WARPS + warp) * STRIPS, strips = (out + 15) / 16;
    i64 first_row = static_cast<i64>(blockIdx.y) * N * 8;
    int here = rows - static_cast<int>(first_row);
    bool whole = gridDim.z == 1;
    int slice = blockIdx.z, last_slice = whole ? slices - 1 : slice;
    int begin = slice_begin(w.chunks, slices, slice), end = slice_begin(w.chunks, slices, last_slice + 1);
    Numbers numbers = load_numbers(w.table);
    const u32* codes[STRIPS];
    Words next[STRIPS];
#pragma unroll
    for (int s = 0; s < STRIPS; s++) {
        // A strip behind the last computes what the last does, and stores nothing.
        int strip = first_strip + s < strips ? first_strip + s : strips - 1;
        codes[s] = w.codes + static_cast<i64>(strip) * w.chunks * (CHUNK_BYTES / 4);
        if (begin < end) next[s] = load_words(codes[s] + static_cast<i64>(begin) * (CHUNK_BYTES / 4), lane);
    }
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (begin + s < end) fetch_rows<N>(stages + s * N * 64, x, first_row, here, w.chunks, begin + s);
        copy_commit();
    }
    Sums<N> sums[STRIPS];
    for (int s = 0; s < STRIPS; s++) sums[s].begin_slice();
    int chunk = begin, stage = 0;
    for (; slice <= last_slice; slice++) {
        int slice_end = slice_begin(w.chunks, slices, slice + 1);
        for (; chunk < slice_end; chunk++) {
            Words words[STRIPS];
#pragma unroll
            for (int s = 0; s < STRIPS; s++) {
                words[s] = next[s];
                if (chunk + 1 < end) next[s] = load_words(codes[s] + static_cast<i64>(chunk + 1) * (CHUNK_BYTES / 4), lane);
            }
            copy_wait<STAGES - 2>();
            sync_block();  // rows of this chunk are there, and everybody is done with those of the one before
            int free_stage = stage == 0 ? STAGES - 1 : stage - 1;
            if (chunk + STAGES - 1 < end)
                fetch_rows<N>(stages + free_stage * N * 64, x, first_row, here, w.chunks, chunk + STAGES - 1);
            copy_commit();
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint4 values[N];
#pragma unroll
                for (int n = 0; n < N; n++) values[n] = read_row(stages + stage * N * 64, n * 8 + g, t, half);
#pragma unroll
                for (int s = 0; s < STRIPS; s++) {
                    int strip = first_strip + s < strips ? first_strip + s : strips - 1;
                    multiply<N>(sums[s], w, numbers, words[s], values, strip, chunk, half, g);
                }
            }
            stage = stage == STAGES - 1 ? 0 : stage + 1;
        }
#pragma unroll
        for (int s = 0; s < STRIPS; s++) {
            sums[s].end_group();
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float sum = sums[s].slice[n][i];
                    int row = n * 8 + 2 * t + i % 2, feature = (first_strip + s) * 16 + g + i / 2 * 8;
                    bool exists = row < here && feature < out;
                    i64 at = (first_row + row) * out + feature;
                    // A thread reads what it wrote itself: nothing to wait for.
                    float* total = totals + ((s * N + n) * 4 + i) * (WARPS * 32) + threadIdx.x;
                    if (!whole) {
                        if (exists) store_global(partial + static_cast<i64>(slice) * rows * out + at, sum);
                        continue;
                    }
                    if (slice > 0) sum = load_shared(total) + sum;
                    if (slice < last_slice) store_shared(total, sum);
                    else if (exists) store_global(y + at, from_float(sum));
                }
            sums[s].begin_slice();
        }
    }
}

KERNEL __launch_bounds__(WARPS * 32) linear_many_16(Weight w, const u16* x, u16* y, float* partial, int rows, int out, int slices) {
    many<2>(w, x, y, partial, rows, out, slices);
}
KERNEL __launch_bounds__(WARPS * 32) linear_many_32(Weight w, const u16* x, u16* y, float* partial, int rows, int out, int slices) {
    many<4>(w, x, y, partial, rows, out, slices);
}
KERNEL __launch_bounds__(WARPS * 32) linear_many_64(Weight w, const u16* x, u16* y, float* partial, int rows, int out, int slices) {
    many<8>(w, x, y, partial, rows, out, slices);
}

// Adds the slices of `linear_many_*` in order. A thread for each result.
KERNEL __launch_bounds__(256) add_slices(const float* partial, u16* y, i64 size, int slices) {
    i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= size) return;
    float sum = load_global(partial + i);
    for (int s = 1; s < slices; s++) sum += load_global(partial + s * size + i);
    store_global(y + i, from_float(sum));
}

// The whole matrix as numbers: y[out][64 * chunks] in the order of places. A warp for each chunk of a strip.
KERNEL __launch_bounds__(128) dequantize(Weight w, u16* y, int out) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, strip = blockIdx.y;
    int chunk = blockIdx.x * 4 + threadIdx.x / 32;
    if (chunk >= w.chunks) return;
    Numbers numbers = load_numbers(w.table);
    Words words = load_words(w.codes + (static_cast<i64>(strip) * w.chunks + chunk) * (CHUNK_BYTES / 4), lane);
    u32 result[2][8];
#pragma unroll
    for (int step = 0; step < 4; step++) {
        int group = load_global(w.group_of + (FINE ? 4 * chunk + step : chunk));
        Scales scales = load_scales(w, strip, group, g);
        u32 a[4];
        fragment(words, step, load_zeros(w, strip, group, g), numbers, a);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float scale = j % 2 ? scales.high : scales.low;
            result[j % 2][2 * step + j / 2] = pack2(low_of(a[j]) * scale, high_of(a[j]) * scale);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int feature = strip * 16 + g + 8 * half;
        if (feature >= out) continue;
        u16* to = y + (static_cast<i64>(feature) * w.chunks + chunk) * CHUNK + (FINE ? 4 : 16) * t;
#pragma unroll
        for (int step = 0; step < 4; step++) {
            uint2 pair = {result[half][2 * step], result[half][2 * step + 1]};
            store_global(reinterpret_cast<uint2*>(to + (FINE ? 16 : 4) * step), pair);
        }
    }
}
