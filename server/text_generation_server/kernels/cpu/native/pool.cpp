#include "pool.h"

#include <algorithm>
#include <bit>
#include <chrono>

#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kernels {
namespace {

// How long a worker looks for the next job before it sleeps. The products of a layer follow each other within tens of
// microseconds, and waking a thread costs about as much; other processes may want the core, so it is not longer.
constexpr std::chrono::microseconds kLook{60};

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// A thread takes this share of its own range at once: the rest can be taken by those who are done.
constexpr uint32_t kShare = 4;

uint64_t span(uint32_t begin, uint32_t end) { return uint64_t(end) << 32 | begin; }
uint32_t begin_of(uint64_t span) { return uint32_t(span); }
uint32_t end_of(uint64_t span) { return uint32_t(span >> 32); }
uint32_t left_of(uint64_t span) { return end_of(span) - begin_of(span); }

// Grains before the range of `thread`.
uint32_t begin_of_thread(int64_t grains, int threads, int thread) { return uint32_t(grains * thread / threads); }

// Bytes that are read ahead at a glance.
constexpr int64_t kAheadAtOnce = 512;

// Bytes that a thread reads ahead: they stay in its core's second cache beside what it works on.
int64_t most_ahead() {
    constexpr long kUsual = 512 << 10, kMost = 1 << 20;
#ifdef _SC_LEVEL2_CACHE_SIZE
    if (const long cache = sysconf(_SC_LEVEL2_CACHE_SIZE); cache > 0) return std::min(cache / 2, kMost);
#endif
    return kUsual;
}

}  // namespace

// Whether `holds()` became true before the time was over.
template <class Condition>
bool Pool::look_for(int thread, Condition &&holds) {
    const auto end = std::chrono::steady_clock::now() + kLook;
    do {
        for (int i = 0; i < 32; i++) {
            if (holds()) return true;
            idle(thread);
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

void Pool::reads_next(const uint8_t *begin, int64_t bytes, int threads, int64_t tasks, int64_t grain) {
    // Who sees a part of this and a part of the former reads for nothing, at worst.
    ahead_.store(begin, std::memory_order_relaxed);
    ahead_end_.store(begin + tasks * bytes, std::memory_order_relaxed);
    ahead_bytes_.store(grain * bytes, std::memory_order_relaxed);
    ahead_grains_.store((tasks + grain - 1) / grain, std::memory_order_relaxed);
    ahead_threads_.store(std::min(threads, kMostThreads), std::memory_order_relaxed);
    ahead_turn_.fetch_add(1, std::memory_order_release);
}

void Pool::idle(int thread) {
    if (!read_ahead(thread)) pause();
}

// Whether there was something to read.
bool Pool::read_ahead(int thread) {
    static thread_local Reader reader;
    static const int64_t most = most_ahead();
    if (const uint32_t turn = ahead_turn_.load(std::memory_order_acquire); turn != reader.seen) {
        const int64_t bytes = ahead_bytes_.load(std::memory_order_relaxed), grains = ahead_grains_.load(std::memory_order_relaxed);
        const int threads = ahead_threads_.load(std::memory_order_relaxed);
        const uint8_t *begin = ahead_.load(std::memory_order_relaxed), *end = ahead_end_.load(std::memory_order_relaxed);
        reader = {turn, nullptr, nullptr};
        if (thread < threads) {
            reader.at = begin + begin_of_thread(grains, threads, thread) * bytes;
            const int64_t own = begin_of_thread(grains, threads, thread + 1) * bytes;
            reader.end = std::min({reader.at + most, begin + own, end});
        }
    }
    if (reader.at >= reader.end) return false;
    for (int64_t line = 0; line < kAheadAtOnce; line += 64) __builtin_prefetch(reader.at + line, 0, 2);
    reader.at += kAheadAtOnce;
    return true;
}

Pool &Pool::shared() {
    // Never destroyed: workers sleep until the process is gone.
    static Pool *pool = new Pool;
    return *pool;
}

void Pool::run_parts(int threads, int64_t tasks, int64_t grain, void *context, Call call) {
    std::lock_guard<std::mutex> lock(running_);
    while (int(workers_.size()) < threads - 1) {
        workers_.emplace_back(&Pool::work, this, int(workers_.size()) + 1, generation_.load());
        workers_.back().detach();
    }
    call_ = call, context_ = context, tasks_ = tasks, grain_ = grain, num_ranges_ = std::min(threads, kMostThreads);
    const int64_t grains = (tasks + grain - 1) / grain;
    for (int thread = 0; thread < num_ranges_; thread++)
        ranges_[thread].span.store(
            span(begin_of_thread(grains, num_ranges_, thread), begin_of_thread(grains, num_ranges_, thread + 1)));
    wanted_.store(int(std::min<int64_t>(num_ranges_, grains) - 1));
    open_.store(true);
    generation_.fetch_add(1);
    generation_.notify_all();
    take_parts(0);
    // Who has not come yet need not come any more.
    open_.store(false);
    while (!look_for(0, [&] { return inside_.load() == 0; })) std::this_thread::yield();
}

void Pool::work(int thread, uint32_t seen) {
    while (true) {
        if (!look_for(thread, [&] { return generation_.load() != seen; })) generation_.wait(seen);
        seen = generation_.load();
        inside_.fetch_add(1);
        if (open_.load() && wanted_.fetch_sub(1) > 0) take_parts(thread);
        inside_.fetch_sub(1);
    }
}

void Pool::compute(uint32_t begin, uint32_t end) { call_(context_, begin * grain_, std::min(end * grain_, tasks_)); }

void Pool::take_parts(int thread) {
    do {
        if (thread >= num_ranges_) continue;
        std::atomic<uint64_t> &own = ranges_[thread].span;
        uint64_t seen = own.load();
        while (const uint32_t left = left_of(seen)) {
            const uint32_t begin = begin_of(seen), end = begin + std::max(left / kShare, 1u);
            if (own.compare_exchange_weak(seen, span(end, end_of(seen)))) {
                compute(begin, end);
                seen = own.load();
            }
        }
    } while (steal(thread));
}

// Takes the rear half of what a thread has left, whoever has most; false: nobody has any.
bool Pool::steal(int thread) {
    while (true) {
        int from = 0;
        uint64_t most = 0;
        for (int other = 0; other < num_ranges_; other++)
            if (const uint64_t seen = ranges_[other].span.load(); left_of(seen) > left_of(most)) from = other, most = seen;
        if (left_of(most) == 0) return false;
        const uint32_t end = end_of(most), begin = end - (left_of(most) + 1) / 2;
        if (!ranges_[from].span.compare_exchange_strong(most, span(begin_of(most), begin))) continue;
        // Who has no range computes at once what others can no longer take.
        if (thread < num_ranges_) ranges_[thread].span.store(span(begin, end));
        else compute(begin, end);
        return true;
    }
}

}  // namespace kernels
