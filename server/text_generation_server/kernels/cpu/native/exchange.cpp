#include "exchange.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstring>
#include <vector>

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "block.h"
#include "pool.h"

namespace kernels {
namespace {

// How long a rank looks for another before it asks to be woken. Longer than waking takes: who sleeps for every delay, also for those
// that a hypervisor makes, makes one for the others. The core is offered to others now and then, as there may be more ranks than cores.
constexpr std::chrono::microseconds kLook{300};
constexpr int kLooksAtOnce = 32;

// Elements that are worth a second thread.
constexpr int64_t kWorthElements = 1 << 16;

std::atomic_ref<uint64_t> number_of(const Exchange &exchange, int32_t rank) {
    return std::atomic_ref<uint64_t>(exchange.words[rank * exchange.line_words]);
}

// Returns once all ranks have contributed to collective `number`; false: that is in vain.
bool wait_for_all(Exchange &exchange, uint64_t number) {
    for (int32_t rank = 0; rank < exchange.size; rank++) {
        if (rank == exchange.rank) continue;
        const auto word = number_of(exchange, rank);
        const auto has_come = [&] { return word.load(std::memory_order_acquire) >= number; };
        const auto end = std::chrono::steady_clock::now() + kLook;
        bool came = has_come();
        while (!came && std::chrono::steady_clock::now() < end) {
            for (int i = 0; i < kLooksAtOnce && !(came = has_come()); i++) Pool::shared().idle(0);
            if (!came) std::this_thread::yield();
        }
        if (came) continue;
        exchange.goes_on = 0;
        exchange.wait(rank, number);
        if (!exchange.goes_on) return false;
    }
    return true;
}

// Gives `bytes` to the next collective.
bool contribute(Exchange &exchange, const char *from, int64_t bytes, char *slots) {
    std::memcpy(slots + exchange.rank * exchange.slot_bytes, from, bytes);
    const auto word = number_of(exchange, exchange.rank);
    word.store(exchange.number, std::memory_order_seq_cst);
    // Who sleeps has said so nowhere.
    syscall(SYS_futex, exchange.words + exchange.rank * exchange.line_words, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
    if (exchange.contributed == nullptr) return true;
    exchange.goes_on = 0;
    exchange.contributed();
    return exchange.goes_on;
}

}  // namespace

bool sum_over_ranks(Exchange &exchange, void *values, int64_t count, int32_t type, int32_t variant, int32_t threads) {
    const int64_t element = type == kF32 ? 4 : 2, most = exchange.slot_bytes / element;
    static thread_local std::vector<const void *> parts;
    parts.resize(exchange.size);
    const void **const of_ranks = parts.data();  // other threads have vectors of their own
    for (int64_t begin = 0; begin < count; begin += most) {
        const int64_t here = std::min(most, count - begin);
        char *to = static_cast<char *>(values) + begin * element;
        char *slots = exchange.slots + (++exchange.number & 1) * exchange.size * exchange.slot_bytes;
        for (int32_t rank = 0; rank < exchange.size; rank++) of_ranks[rank] = slots + rank * exchange.slot_bytes;
        exchange.waits = 1;
        bool goes_on = wait_for_all(exchange, exchange.number - 1);
        exchange.waits = 0;
        goes_on = goes_on && contribute(exchange, to, here * element, slots);
        exchange.waits = 1;
        goes_on = goes_on && wait_for_all(exchange, exchange.number);
        exchange.waits = 0;
        if (!goes_on) return false;
        Pool::shared().run(threads, here, kWorthElements, [&](int64_t first, int64_t last) {
            variant_of(variant).layer->sum(of_ranks, exchange.size, to, type, first, last);
        });
    }
    return true;
}

}  // namespace kernels
