// A small model of a CUDA device: blocks one after another, the threads of a block as fibers that take turns at barriers
// and where a warp acts together. Shared memory starts as NaNs. `order` changes who runs first, so that what is right only
// by luck differs between two runs.
//
// It counts, for each place in the source: requests of a warp; for shared memory the passes that banks make of them and
// the fewest possible, for global memory the sectors of 32 bytes touched and the fewest that would hold the bytes.
#pragma once

#if !defined(__x86_64__)
#error "the emulation of a CUDA device switches stacks in x86-64 assembly; other processors are not served"
#endif

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

// Saves the registers that a call keeps, changes stacks, and goes on where the other fiber stopped (System V ABI).
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.globl emulation_switch
.type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulation_switch, .-emulation_switch
)");

namespace emulation {

struct Dim3 { unsigned x = 1, y = 1, z = 1; };

enum Kind { GLOBAL_READ, GLOBAL_WRITE, SHARED_READ, SHARED_WRITE };
inline const char* const KIND_NAMES[] = {"global read", "global write", "shared read", "shared write"};

struct Touch { uintptr_t address; int bytes; };
using Place = std::tuple<int, std::string, int>;  // kind, file, line
struct Counts { long requests = 0, units = 0, fewest = 0; };

struct Warp {
    int arrived = 0;
    unsigned generation = 0;
    const char* operation = nullptr;
    const void* in[32];
    void* out[32];
    std::map<std::pair<Place, int>, std::vector<Touch>> touches;
};

struct Copy { void* to; const void* from; bool whole; int group; };

struct Thread {
    void* stack_pointer = nullptr;
    std::vector<char> stack;
    Dim3 index;
    int lane = 0;
    Warp* warp = nullptr;
    bool done = false;
    const unsigned* watched = nullptr;
    unsigned seen = 0;
    std::vector<Copy> copies;
    int groups = 0;
    std::map<Place, int> visits;

    void finish_copies(int newest) {
        auto is_due = [&](const Copy& copy) { return copy.group < groups - newest; };
        for (const Copy& copy : copies)
            if (is_due(copy)) {
                if (copy.whole) __builtin_memcpy(copy.to, copy.from, 16);
                else __builtin_memset(copy.to, 0, 16);
            }
        copies.erase(std::remove_if(copies.begin(), copies.end(), is_due), copies.end());
    }
};

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulation: %s\n", what);
    std::abort();
}

struct Block {
    Dim3 index, threads_in, blocks_in;
    std::vector<unsigned char> shared;
    int waiting = 0, running = 0;
    unsigned generation = 0;
    void barrier();
};

inline Block* block = nullptr;
inline Thread* current = nullptr;
inline void* scheduler = nullptr;
inline const std::function<void()>* body = nullptr;
inline bool counting = false;
inline std::map<Place, Counts> counts;

inline void yield() { emulation_switch(&current->stack_pointer, scheduler); }

inline void wait_for(const unsigned& generation) {
    current->watched = &generation;
    current->seen = generation;
    yield();
    current->watched = nullptr;
}

inline void Block::barrier() {
    if (++waiting == running) {
        waiting = 0;
        generation++;
        return;
    }
    wait_for(generation);
}

// What 32 lanes do together: `compute` sees what each of them gives and fills what each of them gets.
template <class In, class Out, class F> Out collective(const char* operation, const In& in, F compute) {
    Warp* warp = current->warp;
    Out out{};
    if (warp->arrived == 0) warp->operation = operation;
    if (warp->operation != operation) fail("lanes of a warp are at different instructions that act on all of them");
    warp->in[current->lane] = &in;
    warp->out[current->lane] = &out;
    if (++warp->arrived == 32) {
        compute(reinterpret_cast<const In* const*>(warp->in), reinterpret_cast<Out**>(warp->out));
        warp->arrived = 0;
        warp->generation++;
    } else {
        wait_for(warp->generation);
    }
    return out;
}

inline void note(Kind kind, const void* address, int bytes, const char* file, int line) {
    auto at = reinterpret_cast<uintptr_t>(address);
    if (at % bytes) fail("an access is not aligned to its size");
    auto first = reinterpret_cast<uintptr_t>(block->shared.data());
    if (kind >= SHARED_READ && (at < first || at + bytes > first + block->shared.size()))
        fail("an access is outside of the shared memory that the launch asked for");
    if (!counting) return;
    Place place{kind, file, line};
    current->warp->touches[{place, current->visits[place]++}].push_back({at, bytes});
}

inline void count(Warp& warp) {
    for (auto& [key, touches] : warp.touches) {
        Counts& sum = counts[key.first];
        sum.requests++;
        if (std::get<0>(key.first) < SHARED_READ) {
            std::set<uintptr_t> sectors, bytes;
            for (Touch touch : touches)
                for (int i = 0; i < touch.bytes; i++) sectors.insert((touch.address + i) / 32), bytes.insert(touch.address + i);
            sum.units += sectors.size();
            sum.fewest += (bytes.size() + 31) / 32;
            continue;
        }
        // A pass serves 128 bytes: all lanes with 4 bytes each, half of them with 8, a quarter with 16.
        size_t lanes = 32 * 4 / std::max(4, touches[0].bytes);
        for (size_t begin = 0; begin < touches.size(); begin += lanes) {
            std::set<uintptr_t> words[32];
            for (size_t i = begin; i < std::min(begin + lanes, touches.size()); i++)
                for (int byte = 0; byte < touches[i].bytes; byte += 4) {
                    uintptr_t word = (touches[i].address + byte) / 4;
                    words[word % 32].insert(word);
                }
            size_t most = 1;
            for (auto& bank : words) most = std::max(most, bank.size());
            sum.units += most;
            sum.fewest++;
        }
    }
    warp.touches.clear();
}

inline void enter() {
    (*body)();
    current->done = true;
    block->running--;
    if (block->waiting && block->waiting == block->running) {
        block->waiting = 0;
        block->generation++;
    }
    yield();
    fail("a fiber went on after its end");
}

inline void start(Thread& thread) {
    // The stack as emulation_switch leaves it: six registers, then where to go on; aligned as after a call.
    auto top = reinterpret_cast<uintptr_t>(thread.stack.data() + thread.stack.size()) & ~uintptr_t(15);
    auto* words = reinterpret_cast<void**>(top) - 8;
    for (int i = 0; i < 6; i++) words[i] = nullptr;
    words[6] = reinterpret_cast<void*>(&enter);
    words[7] = nullptr;
    thread.stack_pointer = words;
}

inline void run_block(Block& here, std::vector<Thread>& threads, std::vector<Warp>& warps, int order) {
    block = &here;
    here.running = static_cast<int>(threads.size());
    std::fill(here.shared.begin(), here.shared.end(), 0xff);
    for (auto& warp : warps) warp = Warp{};
    for (size_t i = 0; i < threads.size(); i++) {
        Thread& thread = threads[i];
        thread.done = false;
        thread.watched = nullptr;
        thread.copies.clear();
        thread.groups = 0;
        thread.visits.clear();
        unsigned x = here.threads_in.x, y = here.threads_in.y, n = static_cast<unsigned>(i);
        thread.index = {n % x, n / x % y, n / x / y};
        thread.lane = i % 32;
        thread.warp = &warps[i / 32];
        start(thread);
    }
    while (here.running) {
        bool moved = false;
        for (size_t i = 0; i < threads.size(); i++) {
            Thread& thread = threads[order ? threads.size() - 1 - i : i];
            if (thread.done || (thread.watched && *thread.watched == thread.seen)) continue;
            moved = true;
            current = &thread;
            emulation_switch(&scheduler, thread.stack_pointer);
        }
        if (!moved) fail("threads wait for each other");
    }
    for (auto& warp : warps) {
        if (warp.arrived) fail("a lane ended while others of its warp wait for it");
        count(warp);
    }
}

template <class... A, size_t... I>
void launch(void (*kernel)(A...), std::index_sequence<I...>, const unsigned* shape, unsigned shared, void** arguments) {
    std::function<void()> call = [&] { kernel(*static_cast<std::remove_reference_t<A>*>(arguments[I])...); };
    body = &call;
    Block here;
    here.blocks_in = {shape[0], shape[1], shape[2]};
    here.threads_in = {shape[3], shape[4], shape[5]};
    here.shared.resize(shared);
    unsigned num_threads = shape[3] * shape[4] * shape[5];
    if (num_threads % 32) fail("a block is not made of whole warps");
    std::vector<Thread> threads(num_threads);
    for (auto& thread : threads) thread.stack.resize(1 << 16);
    std::vector<Warp> warps(num_threads / 32);
    for (unsigned z = 0; z < shape[2]; z++)
        for (unsigned y = 0; y < shape[1]; y++)
            for (unsigned x = 0; x < shape[0]; x++) {
                here.index = {x, y, z};
                run_block(here, threads, warps, static_cast<int>(shape[6]));
            }
}

template <class... A> void launch(void (*kernel)(A...), const unsigned* shape, unsigned shared, void** arguments) {
    launch(kernel, std::index_sequence_for<A...>(), shape, shared, arguments);
}

}  // namespace emulation

extern "C" void emulation_count(int on) {
    emulation::counting = on;
    emulation::counts.clear();
}

extern "C" const char* emulation_report() {
    static std::string text;
    text.clear();
    for (auto& [place, sum] : emulation::counts) {
        const auto& [kind, file, line] = place;
        text += std::string(emulation::KIND_NAMES[kind]) + "\t" + file.substr(file.rfind('/') + 1) + "\t" +
                std::to_string(line) + "\t" + std::to_string(sum.requests) + "\t" + std::to_string(sum.units) + "\t" +
                std::to_string(sum.fewest) + "\n";
    }
    return text.c_str();
}

// shape: blocks x, y, z; threads x, y, z; the order in which threads take turns.
#define EXPORT_KERNEL(name)                                                                        \
    extern "C" void emulate_##name(const unsigned* shape, unsigned shared, void** arguments) { \
        emulation::launch(name, shape, shared, arguments);                                         \
    }
