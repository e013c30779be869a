// The matrix product y = x W^T of one prepared weight, for every instruction set: what callers and variants agree on.
//
// A weight is cut into panels of 32 OUT features. A panel is a run of steps; a step holds 8 places of the IN axis for
// each of its 32 columns, so that one stream of bytes feeds the product. Places are IN features in the order of their
// groups: `places` names the feature of each, and a group that does not fill its last step has places without one.
//
//   w[o, p] = (value(code[o, p]) - zero[o, g(p)]) * scale[o, g(p)]
//
// Every output is one chain of fused multiply-adds over the places of a group in ascending order, then one over the
// groups. The chain is the same for every number of rows, of threads, and at every place in a batch.
#pragma once

#include <cstdint>

namespace kernels {

constexpr int kColumns = 32;     // OUT features of a panel
constexpr int kStepPlaces = 8;   // IN places of a step

enum Coding : int32_t { kFloat32, kBfloat16, kInt2, kInt3, kInt4, kInt8, kTable4, kE4m3, kE5m2, kTable4Bytes, kCodings };
enum Float : int32_t { kNone, kF32, kF16, kBf16 };

// Bytes of a step: 8 places x 32 columns.
constexpr int64_t kStepBytes[kCodings] = {1024, 512, 64, 96, 128, 256, 128, 256, 256, 128};

// Mirrored by `native/linear.py`.
struct Weight {
    int32_t coding;
    int32_t scale_type;         // kNone: one group, and its sum is the result
    int64_t out_features;
    int64_t in_features;
    int64_t steps;              // of a panel
    int64_t groups;
    const uint8_t *codes;       // [panels][steps][step bytes]
    const int32_t *group_ends;  // [groups]: the step after the last one of each group
    const void *scales;         // [panels][groups][32]
    const uint8_t *zeros;       // [panels][groups][32], or null: `middle` everywhere
    const int32_t *places;      // [steps * 8]: IN feature or -1; null: each place is its own feature
    const float *table;         // 16 numbers, of kTable4 and kTable4Bytes
    float middle;
    float outlier_threshold;    // activations of at least this are never rounded, besides those that stand out; 0: no such number
};

// Activations as the product reads them.
struct Rows {
    int64_t count;
    int64_t stride;             // floats from one row to the next
    const float *x;             // [count][stride]: places, each divided by what its code is multiplied by
    const float *sums;          // [count][groups]: of plain activations; null where no zero point needs it
    float *y32;                 // one of the two results, [count][out_features]
    uint16_t *y16;
};

// Activations as products by dot instructions read them, in units of 4 bytes: 2 places in bfloat16 or 4 in 8 bits. Rows stand
// in tiles; what a tile has for one unit, block or group lies together.
struct UnitCounts {
    int64_t units;   // of a row
    int64_t spare;   // behind the last row, of which anything may be read
    int64_t blocks;  // of a row: each has a scale; none where units hold bfloat16
    bool eight;      // whether units hold 8 bits
    int64_t tile;    // rows of a tile, at most
};

constexpr int kTileOfEight = 12, kTileOfBrain = 12;

// Rows of a step are cut into tiles of nearly the same size.
template <class Function>
void each_tile_of(int64_t count, int64_t most, Function &&function) {
    const int64_t tiles = (count + most - 1) / most;
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t row = tile * count / tiles;
        function(row, (tile + 1) * count / tiles - row);
    }
}

// Activations that are left out of units of 8 bits and multiplied as they are: one of them would cost the others of its block
// their digits.
struct Outliers {
    int64_t words;              // of a row: 64 places each
    int32_t *counts;            // [rows]
    uint64_t *places;           // [rows][words]: a bit for each place, lowest first
    uint64_t *any;              // [rows][num_any()]: a bit for each word that has any; of rows without outliers, anything
    int64_t num_any() const { return (words + 63) / 64; }
    const uint16_t *x;          // [rows][in_features] in bfloat16
};

struct WritableUnits {
    int64_t count;              // rows
    int64_t units, blocks, groups;
    uint32_t *x;                // [tiles][units][rows of the tile], or as the product that reads them wants them within a tile
    float *scales;              // [tiles][blocks][rows of the tile]
    int32_t *offsets;           // the same: what the middle of the codes takes away from the sum of a block
    float *sums;                // [tiles][groups][rows of the tile]; null where the middle is every zero point
    Outliers outliers;          // of units of 8 bits
};

struct Units {
    int64_t count, tile;
    int64_t units, blocks, groups;
    const uint32_t *x;
    const float *scales;
    const int32_t *offsets;
    const float *sums;
    Outliers outliers;
    uint16_t *y;                // [count][out_features]

    template <class Function>
    void each_tile(Function &&function) const { each_tile_of(count, tile, function); }
};

// Products of bfloat16 activations by dot instructions, where a processor has them.
struct Dots {
    // Fills `counts` for so many rows; false if these, or weights of this coding, are multiplied otherwise.
    bool (*counts)(const Weight &, int64_t rows, UnitCounts *counts);
    // Makes units of the rows [row, row + count), which are a tile. `scratch`: this thread's own, of `unit_scratch_floats`.
    void (*prepare)(const Weight &, const void *activations, int64_t row, int64_t count, float *scratch, const WritableUnits &);
    // Panels [first, last). `scratch`: this thread's own, of `scratch_floats(rows)`.
    void (*multiply)(const Weight &, const Units &, int64_t first, int64_t last, float *scratch);
    int64_t (*scratch_floats)(int64_t rows);
};

struct LayerVariant;
struct SamplingVariant;

// What one instruction set provides.
struct Variant {
    const char *name;
    Coding table;  // how it wants codes of a table laid out: kTable4 or kTable4Bytes
    // Fills rows [first, last) of `x` and `sums` from activations of `type` [count][in_features].
    void (*spread)(const Weight &, const void *activations, Float type, int64_t first, int64_t last, int64_t stride,
                   float *x, float *sums);
    // Panels [first, last) of the product. `scratch` is this thread's own, of `scratch_floats(rows)`.
    void (*multiply)(const Weight &, const Rows &, int64_t first, int64_t last, float *scratch);
    const Dots *codes, *numbers;  // of each kind of weights; or null
    const Dots *tiles;            // asked before these; or null. Of codes both give the same bits
    const LayerVariant *layer;
    const SamplingVariant *sampling;
};

// Steps that are made into numbers at once, to stay in a core's first cache.
constexpr int64_t kChunkSteps = 16;

constexpr int64_t scratch_floats(int64_t rows) {
    return kChunkSteps * kStepPlaces * kColumns + 2 * rows * kColumns;
}

inline int64_t unit_scratch_floats(const Weight &weight) { return 2 * weight.steps * kStepPlaces + 256; }

// Whether lines of codes that few rows are multiplied with are asked for one by one. Measured: Intel's processors read them a tenth
// faster so, AMD's before AVX-512 (Zen 3) up to 1.4 times as fast, later ones (Zen 5) slower.
extern const bool kAsksForLines;

extern const Variant kAvx2, kAvx512;
extern const Dots kDotsOfNumbers, kTilesAmx;
// Two ways, of the same bits. Units are made in registers, for each tile of rows; or, of more than 18 rows, once for all tiles, in memory.
// AMD's processors are faster with the first, by 1.15 times: they make units beside dot instructions and store sums slowly. Intel's with
// the second, by 1.05 to 1.08: what makes units is in the way of dot instructions there.
extern const Dots kDotsOfCodes, kDotsOfMadeCodes;
// Without dot instructions, of pairs of places in 16 bits.
extern const Dots kPairsOfCodes;

}  // namespace kernels
