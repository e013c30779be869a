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

    // Names what is read after the present job: a thread that waits brings it into a cache meanwhile, since memory that
    // rests is time lost. Nothing may be there any more: nobody looks at it.
    void reads_next(const uint8_t *begin, int64_t bytes);

private:
    using Call = void (*)(void *, int64_t, int64_t);

    void run_parts(int threads, int64_t tasks, int64_t grain, void *context, Call call);
    void work(uint32_t seen);
    void take_parts();
    bool read_ahead();
    template <class Condition>
    bool look_for(Condition &&holds);

    std::mutex running_;
    std::vector<std::thread> workers_;
    // The job. Written while nobody is inside; a worker goes inside first and looks whether it is open afterwards.
    Call call_ = nullptr;
    void *context_ = nullptr;
    int64_t tasks_ = 0, grain_ = 1, threads_ = 1;
    std::atomic<int64_t> next_{0};
    std::atomic<int> inside_{0}, wanted_{0};
    std::atomic<bool> open_{false};
    std::atomic<uint32_t> generation_{0};
    // What may be read ahead still.
    std::atomic<const uint8_t *> ahead_{nullptr}, ahead_end_{nullptr};
};

}  // namespace kernels
