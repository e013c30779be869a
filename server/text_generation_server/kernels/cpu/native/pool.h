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

    // Calls `function(first, last)` for parts of [0, tasks), of `grain` tasks or more, on up to `threads` threads that take
    // parts as they get free: large ones first, so that the last ones keep nobody waiting. Returns when all are done.
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

    // What a thread has yet to read ahead.
    struct Reader {
        uint32_t seen = 0;
        const uint8_t *at = nullptr, *end = nullptr;
    };

    void run_parts(int threads, int64_t tasks, int64_t grain, void *context, Call call);
    void work(int thread, uint32_t seen);
    void take_parts(int thread);
    void take_first(int thread);
    bool read_ahead(int thread);
    template <class Condition>
    bool look_for(int thread, Condition &&holds);

    std::mutex running_;
    std::vector<std::thread> workers_;
    // The job. Written while nobody is inside; a worker goes inside first and looks whether it is open afterwards.
    Call call_ = nullptr;
    void *context_ = nullptr;
    int64_t tasks_ = 0, grain_ = 1, threads_ = 1, first_share_ = 0;
    // Threads, as bits, whose first part nobody has taken.
    std::atomic<uint64_t> first_parts_{0};
    std::atomic<int64_t> next_{0};
    std::atomic<int> inside_{0}, wanted_{0};
    std::atomic<bool> open_{false};
    std::atomic<uint32_t> generation_{0};
    // What to read ahead: the bytes of a first part, one for each thread, as far as there are any.
    std::atomic<const uint8_t *> ahead_{nullptr}, ahead_end_{nullptr};
    std::atomic<int64_t> ahead_share_{0};
    std::atomic<uint32_t> ahead_turn_{0};
};

}  // namespace kernels
