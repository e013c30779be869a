// Drawing an id for each row of logits, and what it asks of them: the maximum and where, the log of the sum of exponentials,
// whether all are finite, the largest values. Nothing sorts the vocabulary. Grid [rows], 1024 threads; a row's results depend
// on the row alone: floats are added in one order, integers in whatever order.
#include "ptx.h"

constexpr int THREADS = 1024, WARPS = THREADS / 32, DIGITS = 256;

// Maximum and the lowest id of it, minimum, whether there is a NaN.
struct Extremes {
    float most, least;
    u32 id;
    bool broken;
};

DEVICE Extremes better(const Extremes& a, const Extremes& b) {
    bool second = b.most > a.most || (b.most == a.most && b.id < a.id);
    return {second ? b.most : a.most, fmin(a.least, b.least), second ? b.id : a.id, a.broken || b.broken};
}

// Of a row, in every thread; sum: of exponentials relative to the maximum, in the first thread. memory: 4 * WARPS words.
DEVICE Extremes examine(const float* row, int size, unsigned char* memory, float& sum) {
    float* floats = reinterpret_cast<float*>(memory);
    u32* words = reinterpret_cast<u32*>(memory) + 2 * WARPS;
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
    if (mine.id == static_cast<u32>(size)) mine.id = 0;
    sync_block();
    sum = 0.0f;
    for (int i = threadIdx.x; i < size; i += THREADS) sum += exp_exact(load_global(row + i) - mine.most);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) store_shared(floats + warp, sum);
    sync_block();
    if (threadIdx.x != 0) return mine;
    sum = load_shared(floats);
    for (int i = 1; i < WARPS; i++) sum += load_shared(floats + i);
    return mine;
}

// Maximum, log-normalizer, minimum (float32 [rows][3]) and the lowest id of the maximum (int64). A NaN counts as the largest
// and the smallest.
KERNEL __launch_bounds__(1024) row_statistics(const float* logits, float* results, i64* ids, int size) {
    SHARED_MEMORY(memory);
    float sum;
    Extremes found = examine(logits + static_cast<i64>(blockIdx.x) * size, size, memory, sum);
    if (threadIdx.x != 0) return;
    float* to = results + 3 * blockIdx.x;
    float nan = float_of(0x7fffffffu);
    store_global(to, found.broken ? nan : found.most);
    store_global(to + 1, found.most + log_exact(sum));
    store_global(to + 2, found.broken ? nan : found.least);
    store_global(ids + blockIdx.x, static_cast<i64>(found.id));
}

// Larger floats have larger keys; both zeros have the same.
DEVICE u32 key_of(float value) {
    u32 bits = bits_of(value + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// From the highest key down: that at which the masses of a row's values reach `wanted`, digit by digit. Of `wanted` is left
// what those above do not have. `chosen` follows `histogram`.
template <class Mass> DEVICE u32 reach(const float* row, int size, u64& wanted, u64* histogram, Mass mass) {
    u64* chosen = histogram + DIGITS;
    u32 prefix = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        sync_block();
        if (threadIdx.x < DIGITS) store_shared(histogram + threadIdx.x, u64{0});
        sync_block();
        for (int i = threadIdx.x; i < size; i += THREADS) {
            float value = load_global(row + i);
            u32 key = key_of(value);
            if (shift == 24 || key >> (shift + 8) == prefix) add_shared(histogram + (key >> shift & 255), mass(value, key));
        }
        sync_block();
        if (threadIdx.x == 0) {
            int digit = DIGITS - 1;
            u64 left = wanted;
            while (digit > 0 && load_shared(histogram + digit) < left) left -= load_shared(histogram + digit--);
            store_shared(chosen, static_cast<u64>(digit)), store_shared(chosen + 1, left);
        }
        sync_block();
        prefix = prefix << 8 | static_cast<u32>(load_shared(chosen));
        wanted = load_shared(chosen + 1);
    }
    return prefix;
}

// What the threads before this one give together, and all of them.
DEVICE u64 sum_before(u64 mine, u64* places, u64& total) {
    sync_block();
    store_shared(places + threadIdx.x, mine);
    sync_block();
    for (int step = 1; step < THREADS; step *= 2) {
        u64 before = threadIdx.x >= step ? load_shared(places + threadIdx.x - step) : 0;
        sync_block();
        store_shared(places + threadIdx.x, load_shared(places + threadIdx.x) + before);
        sync_block();
    }
    total = load_shared(places + THREADS - 1);
    return load_shared(places + threadIdx.x) - mine;
}

// The `count`-th largest value of a row, then everything that is not smaller: ids ascending, and values, as far as there is
// room; `found` [rows]: how many there are. Rows without NaN.
KERNEL __launch_bounds__(1024) largest(const float* logits, int* found, i64* ids, float* values, int size, int count, int room) {
    SHARED_MEMORY(memory);
    u64* places = reinterpret_cast<u64*>(memory);
    const float* row = logits + static_cast<i64>(blockIdx.x) * size;
    u64 wanted = static_cast<u64>(count < size ? count : size), total;
    u32 least = reach(row, size, wanted, places + THREADS, [](float, u32) { return u64{1}; });
    // Each thread takes a run of ids, so that the order of threads is the order of ids.
    int run = (size + THREADS - 1) / THREADS, begin = threadIdx.x * run, end = begin + run < size ? begin + run : size;
    u64 mine = 0;
    for (int i = begin; i < end; i++) mine += key_of(load_global(row + i)) >= least;
    u64 at = sum_before(mine, places, total);
    if (threadIdx.x == 0) store_global(found + blockIdx.x, static_cast<int>(total));
    for (int i = begin; i < end; i++) {
        float value = load_global(row + i);
        if (key_of(value) < least) continue;
        if (at < static_cast<u64>(room)) {
            store_global(ids + static_cast<i64>(blockIdx.x) * room + at, static_cast<i64>(i));
            store_global(values + static_cast<i64>(blockIdx.x) * room + at, value);
        }
        at++;
    }
}

// How the id of a row is drawn. number: uniform in [0, 1); top_k 0: all.
struct Request {
    double number, top_p;
    int top_k, do_sample;
    float temperature;
    int unused;
};

// In whole numbers, so that sums are exact in any order: the most probable id has 2^40, and 2^22 of them fit.
DEVICE u64 weight(float value, float most, float temperature) {
    return static_cast<u64>(exp_exact(divide(value - most, temperature)) * 1099511627776.0f);
}

// The id at which the weights of what top_k and then top_p leave exceed `number` of their sum, ids ascending. What ties with
// the last of top_k stays; of what ties with the last of top_p, the lower ids.
DEVICE u32 sample(const float* row, int size, const Request& how, float most, u64* places) {
    u64* histogram = places + THREADS;
    float temperature = how.temperature;
    u64 wanted, total;
    u32 least = 0;
    if (how.top_k > 0 && how.top_k < size) {
        wanted = static_cast<u64>(how.top_k);
        least = reach(row, size, wanted, histogram, [](float, u32) { return u64{1}; });
    }
    int run = (size + THREADS - 1) / THREADS, begin = threadIdx.x * run, end = begin + run < size ? begin + run : size;
    u64 ties = ~u64{0}, tie = 0;
    if (how.top_p < 1.0) {
        u64 mass = 0;
        for (int i = threadIdx.x; i < size; i += THREADS) {
            float value = load_global(row + i);
            if (key_of(value) >= least) mass += weight(value, most, temperature);
        }
        sum_before(mass, places, total);
        double share = how.top_p * static_cast<double>(total);
        wanted = static_cast<u64>(share);
        if (static_cast<double>(wanted) < share || wanted == 0) wanted++;
        u32 lower = least;
        least = reach(row, size, wanted, histogram, [=](float value, u32 key) {
            return key >= lower ? weight(value, most, temperature) : u64{0};
        });
        u64 mine = 0, each = 0;
        for (int i = begin; i < end; i++) {
            float value = load_global(row + i);
            if (key_of(value) == least) mine++, each = weight(value, most, temperature);
        }
        tie = sum_before(mine, places, total);
        // Every thread must know what one of them weighs.
        if (mine && !tie) store_shared(histogram, each);
        sync_block();
        each = load_shared(histogram);
        ties = each ? (wanted + each - 1) / each : total;
    }
    u64 mine = 0, rank = tie;
    for (int i = begin; i < end; i++) {
        float value = load_global(row + i);
        u32 key = key_of(value);
        if (key > least || (key == least && rank++ < ties)) mine += weight(value, most, temperature);
    }
    u64 before = sum_before(mine, places, total);
    u64 target = static_cast<u64>(how.number * static_cast<double>(total));
    if (target >= total) target = total - 1;
    if (before <= target && target < before + mine) {
        rank = tie;
        int id = begin;
        for (int i = begin; i < end && before <= target; i++) {
            float value = load_global(row + i);
            u32 key = key_of(value);
            if (key > least || (key == least && rank++ < ties)) before += weight(value, most, temperature), id = i;
        }
        store_shared(histogram, static_cast<u64>(id));
    }
    sync_block();
    return static_cast<u32>(load_shared(histogram));
}

// results [rows][3]: the id; whether all logits are finite; log-normalizer and log-probability of the id, float32 both.
KERNEL __launch_bounds__(1024, 1) draw(const float* logits, const Request* requests, i64* results, int size) {
    SHARED_MEMORY(memory);
    const float* row = logits + static_cast<i64>(blockIdx.x) * size;
    const Request* asked = requests + blockIdx.x;
    Request how = {load_global(&asked->number), load_global(&asked->top_p), load_global(&asked->top_k),
                   load_global(&asked->do_sample), load_global(&asked->temperature), 0};
    float sum;
    Extremes found = examine(row, size, memory, sum);
    bool finite = !found.broken && found.most < -MINUS_INFINITY && found.least > MINUS_INFINITY;
    u32 id = found.id;
    if (finite && how.do_sample) id = sample(row, size, how, found.most, reinterpret_cast<u64*>(memory));
    if (threadIdx.x != 0) return;
    i64* to = results + 3 * blockIdx.x;
    float normalizer = found.most + log_exact(sum), logprob = load_global(row + id) - normalizer;
    store_global(to, static_cast<i64>(id));
    store_global(to + 1, static_cast<i64>(finite));
    store_global(to + 2, static_cast<i64>(static_cast<u64>(bits_of(logprob)) << 32 | bits_of(normalizer)));
}
