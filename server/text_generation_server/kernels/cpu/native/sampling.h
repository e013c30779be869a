// Drawing ids: what callers and variants agree on.
//
// A row is worked on by one thread in one order, so its result depends on nothing else. Logits are float32, weights are
// relative to the most probable id, and what adds up many of them is float64.
#pragma once

#include <cstdint>

namespace kernels {

// Weights that are added up in float32 before the sum goes on in float64.
constexpr int64_t kSumBlock = 256;

// How one row is drawn, and what came of it; `DRAW_ROW` of native/sampling.py.
struct DrawRow {
    double number;  // uniform in [0, 1)
    double top_p, typical_p;
    int64_t top_k;  // 0: all
    int64_t id;     // result
    float temperature;
    float normalizer, logprob;  // results, of the raw row
    int32_t do_sample;
    int32_t is_finite;  // result; else nothing else of it means anything
};

// What changes the logits of one row before an id is drawn; `PENALIZED_ROW` of native/sampling.py.
struct PenalizedRow {
    float *logits;         // [size]
    const float *counts;   // [2][size]: occurrences in prompt and generated ids, and in generated ids alone; or null
    const int64_t *bias_ids;
    const float *biases;   // [num_biases], added last
    int64_t num_biases;
    float length;          // of prompt and generated ids
    float repetition, frequency, presence, count;
};

// Of one row. finite: all of it; usable: neither a NaN nor +inf, and something above -inf.
struct RowStatistics { float most; bool finite, usable; };

struct SamplingVariant {
    RowStatistics (*statistics)(const float *row, int64_t size);
    // weights[i] = exp((row[i] - most) / temperature); weights may be null. Returns their sum.
    double (*weigh)(const float *row, int64_t size, float most, float temperature, float *weights);
    // to[i] = row[i] where the bit of `mask` is set, lowest first, and -inf elsewhere.
    void (*leave)(const float *row, int64_t size, const uint32_t *mask, float *to);
    // Ascending indices of what is not below `least`. `to` has room for all.
    int64_t (*not_below)(const float *row, int64_t size, float least, int32_t *to);
    // The `count`-th largest of `size` >= `count` > 0. scratch: of select_scratch(count) floats.
    float (*largest)(const float *row, int64_t size, int64_t count, float *scratch);
    // The penalties of a row with counts.
    void (*penalize)(const PenalizedRow &row, int64_t size);
};

constexpr int64_t select_scratch(int64_t count) { return 2 * count + 1024; }

// Which ids may be drawn, for some rows.
//   masks    [..][words]: one bit for each id that may be drawn, lowest first; words * 32 >= ids
//   mask_of  [rows]: the mask of each row, or -1
struct Allowed {
    const uint32_t *masks;
    const int64_t *mask_of;
    int64_t words;
};

extern const SamplingVariant kSamplingAvx2, kSamplingAvx512;

}  // namespace kernels
