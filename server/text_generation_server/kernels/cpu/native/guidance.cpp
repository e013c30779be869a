// Rows whose ids a grammar limits: which id is the most probable of those that are allowed, or which ones are allowed.
//
// Whoever follows grammars is a library of its own, reached by three functions. Whether one id may come next costs a small part
// of a mask, and what is wanted is mostly among the most probable.
#include <time.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "sampling.h"

namespace kernels {
namespace {

double seconds_of_thread() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

bool has(const uint32_t *mask, int64_t id) { return mask[id / 32] >> (id % 32) & 1; }

}  // namespace

int64_t follow_most_probable(const SamplingVariant &use, const Guided &by, const GuidedRow &guided, const float *row, int64_t size,
                             float most) {
    static thread_local std::vector<float> left;
    for (int32_t turn = 0; turn < guided.tries; turn++) {
        const int64_t best = std::find(row, row + size, most) - row;
        if (has(by.ends, best)) return -1;
        const uint32_t token = uint32_t(best);
        if (by.validate(guided.matcher, &token, 1) == 1 && by.consume(guided.matcher, &token, 1) == 0) return best;
        if (turn + 1 == guided.tries) return -1;
        if (turn == 0) {
            left.assign(row, row + size);
            row = left.data();
        }
        left[best] = -std::numeric_limits<float>::infinity();
        const RowStatistics of_rest = use.statistics(row, size);
        if (!of_rest.usable) return -1;
        most = of_rest.most;
    }
    return -1;
}

const uint32_t *mask_of(const Guided &by, GuidedRow &guided, int64_t size) {
    static thread_local std::vector<uint32_t> mask;
    const int64_t words = (size + 31) / 32;
    const double begun = seconds_of_thread();
    mask.assign(std::max(words, by.mask_words), 0);
    const int32_t failed = by.fill(guided.matcher, mask.data(), size_t(by.mask_words) * sizeof(uint32_t));
    guided.mask_seconds = seconds_of_thread() - begun;
    mask.resize(words);
    if (size % 32) mask.back() &= (uint32_t(1) << size % 32) - 1;
    if (failed || std::all_of(mask.begin(), mask.end(), [](uint32_t word) { return word == 0; })) {
        guided.has_failed = 1;
        return nullptr;
    }
    if (guided.goes_on) {
        // A form that has come to its end counts more than a least length.
        bool any = false;
        for (int64_t i = 0; i < words; i++) any |= (mask[i] & ~by.ends[i]) != 0;
        for (int64_t i = 0; any && i < words; i++) mask[i] &= ~by.ends[i];
    }
    return mask.data();
}

void go_on(const Guided &by, GuidedRow &guided, int64_t id) {
    const uint32_t token = uint32_t(id);
    if (!has(by.ends, id) && by.consume(guided.matcher, &token, 1) != 0) guided.has_failed = 1;
}

}  // namespace kernels
