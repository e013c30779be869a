// The threads of this process's kernels. One job runs at a time; its caller works too.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace kernels {

class Pool {
public:
    static Pool &shared();

    // Calls `function(first, last)` for parts of [0, tasks), of `grain` tasks or more, on up to `threads` threads. Each goes through a
    // range of its own from the front, and then takes half of what another has left from the back. Returns when all are done.
    template <class Function>
    void run(int threads, int64_t tasks, int64_t grain, Function &&function) {
        if (threads <= 1 || tasks <= grain) {
            if (tasks > 0) function(int64_t(0), tasks);
            return;
        }
        run_parts(threads, tasks, grain, &function, [](void *context, int64_t first, int64_t last) {
            (*static_cast<std::remove_reference_t<Function> *>(context))(first, last);
        });
    }

    // Names what the job after the present one reads, `bytes` for each of its tasks: a thread that waits brings there what it
    // will begin with into its own cache meanwhile, since memory that rests is time lost. Nothing may be there any more: nobody
    // looks at it.
    void reads_next(const uint8_t *begin, int64_t bytes, int threads, int64_t tasks, int64_t grain);

    // A moment of waiting: `thread` reads a little of that, or rests. The caller of jobs is thread 0.
    void idle(int thread);

private:
    using Call = void (*)(void *, int64_t, int64_t);

    // Threads of a job, at most: the others have nothing to do.
    static constexpr int kMostThreads = 256;

    // What a thread has yet to do: [begin, end) of grains, in one word. Lines of 64 bytes are fetched in pairs.
    struct alignas(128) Range {
        std::atomic<uint64_t> span{0};
    };

    // What a thread has yet to read ahead.
    struct Reader {
        uint32_t seen = 0;
        const uint8_t *at = nullptr, *end = nullptr;
    };

    void run_parts(int threads, int64_t tasks, int64_t grain, void *context, Call call);
    void work(int thread, uint32_t seen);
    void take_parts(int thread);
    bool steal(int thread);
    void compute(uint32_t begin, uint32_t end);
    bool read_ahead(int thread);
    template <class Condition>
    bool look_for(int thread, Condition &&holds);

    std::mutex running_;
    std::vector<std::thread> workers_;
    // The job. Written while nobody is inside; a worker goes inside first and looks whether it is open afterwards.
    Call call_ = nullptr;
    void *context_ = nullptr;
    int64_t tasks_ = 0, grain_ = 1;
    int num_ranges_ = 0;
    Range ranges_[kMostThreads];
    std::atomic<int> inside_{0}, wanted_{0};
    std::atomic<bool> open_{false};
    std::atomic<uint32_t> generation_{0};
    // What to read ahead: the beginnings of the ranges of so many threads, in grains of so many bytes.
    std::atomic<const uint8_t *> ahead_{nullptr}, ahead_end_{nullptr};
    std::atomic<int64_t> ahead_bytes_{0}, ahead_grains_{0};
    std::atomic<int> ahead_threads_{1};
    std::atomic<uint32_t> ahead_turn_{0};
};

}  // namespace kernels
