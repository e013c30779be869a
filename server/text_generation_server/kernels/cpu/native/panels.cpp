// Brings a weight into panels of steps (see linear.h): what loading it consists of besides reading and decoding.
// Compiled with -mavx2 -mbmi2: what is needed of a processor for anything here.
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "bits.h"
#include "block.h"
#include "pool.h"

namespace kernels {
namespace {

// Bits of an element of the data that a coding is made of.
constexpr int element_bits(int32_t coding) { return int(kStepBytes[coding] * 8 / (kStepPlaces * kColumns)); }

// Bytes that are read of a row at a time: a line of a cache.
constexpr int64_t kLine = 64;

template <class T>
T load(const uint8_t *from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

void store(uint8_t *to, uint32_t value) { std::memcpy(to, &value, sizeof value); }

// Four codes of 4 bits as the low halves of four bytes.
uint32_t spread_four(uint32_t codes) {
    codes = (codes | codes << 8) & 0x00FF00FF;
    return (codes | codes << 4) & 0x0F0F0F0F;
}

// One column of a step: 8 places, which follow each other in `from`, low bits first, and are as many bytes as an element has bits.
template <int32_t C>
void put(const uint8_t *from, int column, uint8_t *step) {
    constexpr int kBits = element_bits(C);
    if constexpr (C == kTable4Bytes) {
        // Of vector v the bytes 4v to 4v + 3 of both halves, see avx2.cpp.
        const int byte = column % 8 / 4 * 16 + column / 8 * 4 + column % 4;
        const uint32_t codes = load<uint32_t>(from), both = spread_four(codes & 0xFFFF) | spread_four(codes >> 16) << 4;
        for (int j = 0; j < 4; j++) step[j * kColumns + byte] = uint8_t(both >> 8 * j);
    } else if constexpr (C == kE4m3 || C == kE5m2) {
        for (int j = 0; j < kStepPlaces; j++) step[j * kColumns + column] = from[j];
    } else if constexpr (kBits >= 8) {
        for (int j = 0; j < kBits / 4; j++) store(step + (j * kColumns + column) * 4, load<uint32_t>(from + 4 * j));
    } else {
        std::memcpy(step + column * kBits, from, kBits);
    }
}

// Rows whose places are their features. Some steps of each row at a time: neither rows, which lie far apart, nor steps leave the
// first cache in between.
template <int32_t C>
void pack_in_order(const Weight &weight, const uint8_t *data, int64_t row_bytes, int64_t rows, uint8_t *panel) {
    constexpr int64_t kBits = element_bits(C), kSteps = std::max<int64_t>(1, kLine / kBits);
    if (rows < kColumns) std::memset(panel, 0, weight.steps * kStepBytes[C]);
    for (int64_t first = 0; first < weight.steps; first += kSteps) {
        const int64_t last = std::min(weight.steps, first + kSteps);
        for (int column = 0; column < rows; column++)
            for (int64_t step = first; step < last; step++)
                put<C>(data + column * row_bytes + step * kBits, column, panel + step * kStepBytes[C]);
    }
}

// Rows of which `sources` names the feature at each place, or -1.
template <int32_t C>
void pack_by_source(const Weight &weight, const uint8_t *data, int64_t row_bytes, const int32_t *sources, int64_t rows,
                    uint8_t *panel) {
    constexpr int kBits = element_bits(C), kBytes = std::max(1, kBits / 8);
    static thread_local std::vector<uint8_t> spread;
    if (rows < kColumns) std::memset(panel, 0, weight.steps * kStepBytes[C]);
    for (int column = 0; column < rows; column++) {
        const uint8_t *__restrict row = data + column * row_bytes;
        if constexpr (kBits < 8) {
            spread.resize(weight.in_features);
            spread_row<kBits>(row, spread.data(), weight.in_features);
            row = spread.data();
        }
        for (int64_t step = 0; step < weight.steps; step++) {
            uint8_t taken[kStepPlaces * kBytes] = {};
            for (int j = 0; j < kStepPlaces; j++)
                if (const int64_t from = sources[step * kStepPlaces + j]; from >= 0)
                    std::memcpy(taken + j * kBytes, row + from * kBytes, kBytes);
            if constexpr (kBits < 8) {
                const uint64_t codes = gathered<kBits>(load<uint64_t>(taken));
                std::memcpy(taken, &codes, kBits);
            }
            put<C>(taken, column, panel + step * kStepBytes[C]);
        }
    }
}

template <int32_t C>
void pack(const Weight &weight, const uint8_t *data, int64_t row_bytes, const int32_t *sources, int64_t rows, uint8_t *to,
          int32_t threads) {
    Pool::shared().run(threads, (rows + kColumns - 1) / kColumns, 1, [&](int64_t first, int64_t last) {
        for (int64_t panel = first; panel < last; panel++) {
            const uint8_t *from = data + panel * kColumns * row_bytes;
            const int64_t there = std::min<int64_t>(kColumns, rows - panel * kColumns);
            uint8_t *at = to + panel * weight.steps * kStepBytes[C];
            if (sources) pack_by_source<C>(weight, from, row_bytes, sources, there, at);
            else pack_in_order<C>(weight, from, row_bytes, there, at);
        }
    });
}

template <int... C>
constexpr auto packs_of(std::integer_sequence<int, C...>) {
    return std::array{&pack<C>...};
}

constexpr auto kPacks = packs_of(std::make_integer_sequence<int, kCodings>{});

}  // namespace
}  // namespace kernels

using namespace kernels;

extern "C" {

EXPORT int64_t kernels_step_bytes(int32_t coding) { return kStepBytes[coding]; }

// Panels of `rows` rows of a weight. data: rows of `row_bytes` bytes, elements of as many bits as the coding has, low bits first;
// sources: [steps * 8], which of a row's is at each place, or -1; null: as they lie, and steps are whole. to: the first panel.
EXPORT void kernels_pack(const Weight *weight, const uint8_t *data, int64_t row_bytes, const int32_t *sources, int64_t rows,
                         uint8_t *to, int32_t threads) {
    kPacks[weight->coding](*weight, data, row_bytes, sources, rows, to, threads);
}
}
