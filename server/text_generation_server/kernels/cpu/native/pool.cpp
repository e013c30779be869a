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

// Whether `holds()` became true before the time was over.
template <class Condition>
bool look_for(std::chrono::microseconds time, Condition &&holds) {
    const auto end = std::chrono::steady_clock::now() + time;
    do {
        for (int i = 0; i < 32; i++) {
            if (holds()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

}  // namespace

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
    call_ = call, context_ = context, tasks_ = tasks, grain_ = grain;
    next_.store(0);
    wanted_.store(int(std::min<int64_t>(threads - 1, (tasks + grain - 1) / grain - 1)));
    open_.store(true);
    generation_.fetch_add(1);
    generation_.notify_all();
    take_parts();
    // Who has not come yet need not come any more.
    open_.store(false);
    while (!look_for(kLook, [&] { return inside_.load() == 0; })) std::this_thread::yield();
}

void Pool::work(uint32_t seen) {
    while (true) {
        if (!look_for(kLook, [&] { return generation_.load() != seen; })) generation_.wait(seen);
        seen = generation_.load();
        inside_.fetch_add(1);
        if (open_.load() && wanted_.fetch_sub(1) > 0) take_parts();
        inside_.fetch_sub(1);
    }
}

void Pool::take_parts() {
    while (true) {
        const int64_t first = next_.fetch_add(grain_);
        if (first >= tasks_) return;
        call_(context_, first, std::min(first + grain_, tasks_));
    }
}

}  // namespace kernels
