#include "pool.h"

#include <algorithm>
#include <chrono>

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

// Bytes that are read ahead, which stay in a core's second cache beside what it works on, and those of a glance.
constexpr int64_t kAhead = 512 << 10, kAheadAtOnce = 512;

}  // namespace

// Whether `holds()` became true before the time was over.
template <class Condition>
bool Pool::look_for(Condition &&holds) {
    const auto end = std::chrono::steady_clock::now() + kLook;
    do {
        for (int i = 0; i < 32; i++) {
            if (holds()) return true;
            if (!read_ahead()) pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

void Pool::reads_next(const uint8_t *begin, int64_t bytes) {
    // Empty in between: an end belongs to no other beginning.
    ahead_end_.store(nullptr);
    ahead_.store(begin);
    ahead_end_.store(begin + std::min(bytes, kAhead));
}

// Whether there was something to read.
bool Pool::read_ahead() {
    const uint8_t *at = ahead_.load();
    if (at >= ahead_end_.load()) return false;
    if (ahead_.compare_exchange_weak(at, at + kAheadAtOnce))
        for (int64_t line = 0; line < kAheadAtOnce; line += 64) __builtin_prefetch(at + line, 0, 2);
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
        workers_.emplace_back(&Pool::work, this, generation_.load());
        workers_.back().detach();
    }
    call_ = call, context_ = context, tasks_ = tasks, grain_ = grain, threads_ = threads;
    next_.store(0);
    wanted_.store(int(std::min<int64_t>(threads - 1, (tasks + grain - 1) / grain - 1)));
    open_.store(true);
    generation_.fetch_add(1);
    generation_.notify_all();
    take_parts();
    // Who has not come yet need not come any more.
    open_.store(false);
    while (!look_for([&] { return inside_.load() == 0; })) std::this_thread::yield();
}

void Pool::work(uint32_t seen) {
    while (true) {
        if (!look_for([&] { return generation_.load() != seen; })) generation_.wait(seen);
        seen = generation_.load();
        inside_.fetch_add(1);
        if (open_.load() && wanted_.fetch_sub(1) > 0) take_parts();
        inside_.fetch_sub(1);
    }
}

void Pool::take_parts() {
    while (true) {
        int64_t first = next_.load(), last;
        do {
            if (first >= tasks_) return;
            const int64_t share = (tasks_ - first) / (kShares * threads_) / grain_ * grain_;
            last = std::min(first + std::max(grain_, share), tasks_);
        } while (!next_.compare_exchange_weak(first, last));
        call_(context_, first, last);
    }
}

}  // namespace kernels
