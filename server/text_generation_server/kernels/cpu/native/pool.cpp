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

// A thread takes what is left, divided by this and the number of threads. Few: each part begins with memory that nobody
// has asked for yet.
constexpr int64_t kShares = 4;

// Tasks of the next part, where so many are left.
int64_t share_of(int64_t tasks, int64_t threads, int64_t grain) {
    return std::max(grain, tasks / (kShares * threads) / grain * grain);
}

// Threads that have a first part of their own, at most: bits of a word.
constexpr int64_t kFirstParts = 64;

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
    ahead_share_.store(share_of(tasks, threads, grain) * bytes, std::memory_order_relaxed);
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
        const int64_t share = ahead_share_.load(std::memory_order_relaxed);
        reader = {turn, ahead_.load(std::memory_order_relaxed) + thread * share, nullptr};
        reader.end = std::min(reader.at + std::min(share, most), ahead_end_.load(std::memory_order_relaxed));
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
    call_ = call, context_ = context, tasks_ = tasks, grain_ = grain, threads_ = threads;
    first_share_ = share_of(tasks, threads, grain);
    const int64_t firsts = std::min({int64_t(threads), kFirstParts, tasks / first_share_});
    first_parts_.store(firsts == kFirstParts ? ~uint64_t(0) : (uint64_t(1) << firsts) - 1);
    next_.store(firsts * first_share_);
    wanted_.store(int(std::min<int64_t>(threads - 1, (tasks + grain - 1) / grain - 1)));
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

// Takes the first part that was meant for `thread`, unless somebody took it.
void Pool::take_first(int thread) {
    const uint64_t bit = thread < kFirstParts ? uint64_t(1) << thread : 0;
    if (first_parts_.fetch_and(~bit) & bit) call_(context_, thread * first_share_, (thread + 1) * first_share_);
}

void Pool::take_parts(int thread) {
    take_first(thread);
    while (true) {
        int64_t first = next_.load(), last;
        do {
            if (first >= tasks_) break;
            last = std::min(first + share_of(tasks_ - first, threads_, grain_), tasks_);
        } while (!next_.compare_exchange_weak(first, last));
        if (first >= tasks_) break;
        call_(context_, first, last);
    }
    // Of those who are late.
    while (const uint64_t left = first_parts_.load()) take_first(std::countr_zero(left));
}

}  // namespace kernels
