// Sums over the ranks of one machine, without leaving native code.
#pragma once

#include <cstdint>

namespace kernels {

// A rank's part in what shared_memory.py says of memory and turns, and mirrors.
//   words   [size][line_words]: in the first of a line, how many collectives that rank has contributed to
//   slots   [2][size][slot_bytes]
struct Exchange {
    uint64_t *words;
    char *slots;
    int64_t line_words, slot_bytes;
    uint64_t number;  // of this rank's words
    // Waits until `rank` has contributed to collective `number`.
    void (*wait)(int32_t rank, uint64_t number);
    // Called between contributing and receiving, or null.
    void (*contributed)();
    int32_t rank, size;
    volatile int32_t waits;  // whether this rank can only go on when others have done their part; read by any thread
    volatile int32_t goes_on;  // set by the functions above where they did what is asked of them
};

// values: the sum over ranks of `count` elements, in rank order in float32, rounded once. False: one of the functions above did not.
bool sum_over_ranks(Exchange &exchange, void *values, int64_t count, int32_t type, int32_t variant, int32_t threads);

}  // namespace kernels
