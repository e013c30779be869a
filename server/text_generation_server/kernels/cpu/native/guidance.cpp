// Rows whose ids a grammar limits: which id is the most probable of those that are allowed, or which ones are allowed.
//
// Whoever follows grammars is a library of its own, reached by three functions. What it has to look at for one row lies
// scattered in memory and is cold after a forward pass, so rows are spread over the threads.
#include <time.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "block.h"
#include "pool.h"
#include "sampling.h"

namespace kernels {
namespace {

double seconds_of_thread() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

bool has(const uint32_t *mask, int64_t id) { return mask[id / 32] >> (id % 32) & 1; }

// The highest of a row; -1 if there is none, or a NaN or +inf.
int64_t highest(const SamplingVariant &use, const float *row, int64_t size) {
    const RowStatistics of_row = use.statistics(row, size);
    return of_row.usable ? std::find(row, row + size, of_row.most) - row : -1;
}

// Goes on by the id, if it is allowed.
bool follow(const MatcherFunctions &by, void *matcher, int64_t id) {
    const uint32_t token = uint32_t(id);
    return by.validate(matcher, &token, 1) == 1 && by.consume(matcher, &token, 1) == 0;
}

void guide_row(const SamplingVariant &use, const MatcherFunctions &by, const uint32_t *ends, int64_t size, GuidedRow &row) {
    row.id = kMasked, row.mask_seconds = 0;
    static thread_local std::vector<float> left;
    const float *logits = row.logits;
    int64_t best = row.is_greedy ? highest(use, logits, size) : -1;
    for (int32_t turn = 0; turn < row.tries && best >= 0 && !has(ends, best); turn++) {
        if (follow(by, row.matcher, best)) {
            row.id = best;
            return;
        }
        if (turn == 0) {
            left.assign(logits, logits + size);
            logits = left.data();
        }
        left[best] = -std::numeric_limits<float>::infinity();
        best = turn + 1 < row.tries ? highest(use, logits, size) : -1;
    }
    const double begun = seconds_of_thread();
    const int64_t words = (size + 31) / 32, shared = std::min(words, row.mask_words);
    static thread_local std::vector<uint32_t> mask;
    mask.assign(std::max(words, row.mask_words), 0);
    const int32_t failed = by.mask(row.matcher, mask.data(), size_t(row.mask_words) * sizeof(uint32_t));
    row.mask_seconds = seconds_of_thread() - begun;
    std::copy(mask.begin(), mask.begin() + shared, row.mask);
    std::fill(row.mask + shared, row.mask + words, 0);
    if (size % 32) row.mask[words - 1] &= (uint32_t(1) << size % 32) - 1;
    if (failed || std::all_of(row.mask, row.mask + words, [](uint32_t word) { return word == 0; })) {
        row.id = kFailed;
        return;
    }
    if (row.goes_on) {
        // A form that has come to its end counts more than a least length.
        bool any = false;
        for (int64_t i = 0; i < words; i++) any |= (row.mask[i] & ~ends[i]) != 0;
        for (int64_t i = 0; any && i < words; i++) row.mask[i] &= ~ends[i];
    }
    if (!row.is_greedy) return;
    left.resize(size);
    use.leave(row.logits, size, row.mask, left.data());
    best = highest(use, left.data(), size);
    // What is left to whoever draws from the mask: numbers that are none, and nothing above -inf.
    if (best < 0) return;
    const uint32_t token = uint32_t(best);
    if (!has(ends, best) && by.consume(row.matcher, &token, 1) != 0)
        row.id = kFailed;
    else
        row.id = best;
}

}  // namespace
}  // namespace kernels

using namespace kernels;

extern "C" {

// ends: one bit for each id that ends a text, [(size + 31) / 32].
EXPORT void kernels_guide(int32_t variant, const MatcherFunctions *by, const uint32_t *ends, int64_t size, GuidedRow *rows,
                          int64_t count, int32_t threads) {
    Pool::shared().run(threads, count, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++)
            guide_row(*variant_of(variant).sampling, *by, ends, size, rows[i]);
    });
}
}
