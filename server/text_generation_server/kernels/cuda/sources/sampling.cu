// What drawing an id asks of a row of logits: its maximum and where, the log of the sum of exponentials, whether all are
// finite, and its largest values, without sorting the vocabulary. Grid [rows], 1024 threads; a row's results depend on the
// row alone, and integers are added in whatever order.
#include "ptx.h"

constexpr int THREADS = 1024, WARPS = THREADS / 32, DIGITS = 256;

// Maximum, log-normalizer, minimum (float32 [rows][3]) and the lowest id of the maximum (int64). A NaN counts as the largest
// and the smallest.
struct Extremes {
    float most, least;
    u32 id;
    bool broken;
};

DEVICE Extremes better(const Extremes& a, const Extremes& b) {
    bool second = b.most > a.most || (b.most == a.most && b.id < a.id);
    return {second ? b.most : a.most, fmin(a.least, b.least), second ? b.id : a.id, a.broken || b.broken};
}

KERNEL __launch_bounds__(1024) row_statistics(const float* logits, float* results, i64* ids, int size) {
    SHARED_MEMORY(memory);
    float* floats = reinterpret_cast<float*>(memory);
    u32* words = reinterpret_cast<u32*>(memory) + 2 * WARPS;
    const float* row = logits + static_cast<i64>(blockIdx.x) * size;
    Extremes mine = {MINUS_INFINITY, -MINUS_INFINITY, static_cast<u32>(size), false};
    for (int i = threadIdx.x; i < size; i += THREADS) {
        float value = load_global(row + i);
        mine = better(mine, {value, value, static_cast<u32>(i), !(value == value)});
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2)
        mine = better(mine, {shuffle_xor(mine.most, mask), shuffle_xor(mine.least, mask), shuffle_xor(mine.id, mask),
                             shuffle_xor(static_cast<u32>(mine.broken), mask) != 0});
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) {
        store_shared(floats + warp, mine.most), store_shared(floats + WARPS + warp, mine.least);
        store_shared(words + warp, mine.id), store_shared(words + WARPS + warp, static_cast<u32>(mine.broken));
    }
    sync_block();
    for (int i = 0; i < WARPS; i++)
        mine = better(mine, {load_shared(floats + i), load_shared(floats + WARPS + i), load_shared(words + i),
                             load_shared(words + WARPS + i) != 0});
    sync_block();
    float sum = 0.0f;
    for (int i = threadIdx.x; i < size; i += THREADS) sum += exp_exact(load_global(row + i) - mine.most);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) store_shared(floats + warp, sum);
    sync_block();
    if (threadIdx.x != 0) return;
    sum = load_shared(floats);
    for (int i = 1; i < WARPS; i++) sum += load_shared(floats + i);
    float* to = results + 3 * blockIdx.x;
    float nan = float_of(0x7fffffffu);
    store_global(to, mine.broken ? nan : mine.most);
    store_global(to + 1, mine.most + log_exact(sum));
    store_global(to + 2, mine.broken ? nan : mine.least);
    store_global(ids + blockIdx.x, static_cast<i64>(mine.id == static_cast<u32>(size) ? 0 : mine.id));
}

// Larger floats have larger keys.
DEVICE u32 key_of(float value) {
    u32 bits = bits_of(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The `count`-th largest value of a row, digit by digit from the highest, then everything that is not smaller: ids
// ascending, and values, as far as there is room; `found` [rows]: how many there are. Rows without NaN.
KERNEL __launch_bounds__(1024) largest(const float* logits, int* found, i64* ids, float* values, int size, int count, int room) {
    SHARED_MEMORY(memory);
    u32* histogram = reinterpret_cast<u32*>(memory);
    u32* chosen = histogram + DIGITS;  // digit, and how many are still wanted
    u32* offsets = chosen + 2;
    const float* row = logits + static_cast<i64>(blockIdx.x) * size;
    u32 prefix = 0, wanted = static_cast<u32>(count < size ? count : size);
    for (int shift = 24; shift >= 0; shift -= 8) {
        if (threadIdx.x < DIGITS) store_shared(histogram + threadIdx.x, 0u);
        sync_block();
        for (int i = threadIdx.x; i < size; i += THREADS) {
            u32 key = key_of(load_global(row + i));
            if (shift == 24 || key >> (shift + 8) == prefix) add_shared(histogram + (key >> shift & 255), 1u);
        }
        sync_block();
        if (threadIdx.x == 0) {
            u32 digit = DIGITS - 1, left = wanted;
            while (load_shared(histogram + digit) < left) left -= load_shared(histogram + digit--);
            store_shared(chosen, digit), store_shared(chosen + 1, left);
        }
        sync_block();
        prefix = prefix << 8 | load_shared(chosen);
        wanted = load_shared(chosen + 1);
    }
    // Each thread takes a run of ids, so that the order of threads is the order of ids.
    int run = (size + THREADS - 1) / THREADS, begin = threadIdx.x * run, end = begin + run < size ? begin + run : size;
    u32 mine = 0;
    for (int i = begin; i < end; i++) mine += key_of(load_global(row + i)) >= prefix;
    store_shared(offsets + threadIdx.x, mine);
    sync_block();
    for (int step = 1; step < THREADS; step *= 2) {
        u32 before = threadIdx.x >= step ? load_shared(offsets + threadIdx.x - step) : 0;
        sync_block();
        store_shared(offsets + threadIdx.x, load_shared(offsets + threadIdx.x) + before);
        sync_block();
    }
    u32 at = load_shared(offsets + threadIdx.x) - mine;
    if (threadIdx.x == THREADS - 1) store_global(found + blockIdx.x, static_cast<int>(load_shared(offsets + threadIdx.x)));
    for (int i = begin; i < end; i++) {
        float value = load_global(row + i);
        if (key_of(value) < prefix) continue;
        if (at < static_cast<u32>(room)) {
            store_global(ids + static_cast<i64>(blockIdx.x) * room + at, static_cast<i64>(i));
            store_global(values + static_cast<i64>(blockIdx.x) * room + at, value);
        }
        at++;
    }
}
