// Drawing ids: what callers and variants agree on.
//
// A row is worked on by one thread in one order, so its result depends on nothing else. Logits are float32, weights are
// relative to the most probable id, and what adds up many of them is float64.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kernels {

// Weights that are added up in float32 before the sum goes on in float64.
constexpr int64_t kSumBlock = 256;

// How one row is drawn; `DRAW_REQUEST` of native/sampling.py.
struct DrawRequest {
    double number;  // uniform in [0, 1)
    double top_p, typical_p;
    int64_t top_k;  // 0: all
    float temperature;
    int32_t do_sample;
};

// The same, and what came of it; `DRAW_ROW` of native/sampling.py.
struct DrawRow {
    DrawRequest how;
    int64_t id;                 // result, as what follows
    float normalizer, logprob;  // of the raw row
    int32_t is_finite;          // else nothing else of it means anything
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

// A row whose ids a grammar limits; `GUIDED_ROW` of interface.py.
struct GuidedRow {
    void *matcher;        // that of the library which follows grammars; it goes on by the id, unless that ends the text
    int64_t place;        // of the logits
    double mask_seconds;  // result: what the mask has cost the thread; 0 if none was needed
    int32_t tries;        // of the most probable ids so many are judged before a mask is asked for
    int32_t goes_on;      // it may not end yet
    int32_t has_failed;   // result: the matcher has an error, or leaves no id
};

// How rows are guided; `_Guided` of native/sampling.py.
struct Guided {
    // `llg_matcher_validate_tokens`, `llg_matcher_consume_tokens` and `llg_matcher_compute_mask_into` of llguidance.h.
    int32_t (*validate)(void *matcher, const uint32_t *tokens, size_t count);
    int32_t (*consume)(void *matcher, const uint32_t *tokens, size_t count);
    int32_t (*fill)(void *matcher, uint32_t *mask, size_t bytes);
    int64_t mask_words;    // of the matchers' own masks
    const uint32_t *ends;  // [(size + 31) / 32], one bit for each id that ends a text
    GuidedRow *rows;
    int64_t count;         // -1 as a result: one of them is no row of the logits, and nothing was drawn
};

// The highest of `row` [size], whose highest number is `most`, if it is among the first that are tried and follows: the matcher
// has gone on by it. Else -1.
int64_t follow_most_probable(const SamplingVariant &, const Guided &, const GuidedRow &, const float *row, int64_t size, float most);
// Which ids may come next, [(size + 31) / 32], until this thread's next call; null if it has failed.
const uint32_t *mask_of(const Guided &, GuidedRow &, int64_t size);
// The matcher goes on by the id, unless that ends the text; or it has failed.
void go_on(const Guided &, GuidedRow &, int64_t id);

extern const SamplingVariant kSamplingAvx2, kSamplingAvx512;

}  // namespace kernels
