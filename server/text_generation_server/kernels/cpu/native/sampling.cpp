// Drawing an id for each row: temperature, top_k, top_p, typical_p, then the inverse of the cumulative distribution at one
// uniform number, ids in ascending order. Nothing sorts the vocabulary.
#include "sampling.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "block.h"
#include "pool.h"

namespace kernels {
namespace {

// Classes of keys whose weights are added up to find the class in which a share of all weight is reached.
constexpr int64_t kClasses = 4096;
// As few as these are simply sorted.
constexpr int64_t kFew = 256;

// Where, in the order of key and then index, the weights reach `mass`: the last that is needed.
struct Last { double key; int64_t index; };

Last reach(const std::vector<double> &keys, const std::vector<float> &weights, double mass) {
    const int64_t size = int64_t(keys.size());
    static thread_local std::vector<int32_t> part;
    part.clear();
    double reached = 0;
    const double highest = *std::max_element(keys.begin(), keys.end());
    if (size <= kFew || !(highest > 0)) {
        for (int64_t i = 0; i < size; i++) part.push_back(int32_t(i));
    } else {
        static thread_local std::vector<double> masses;
        masses.assign(kClasses, 0.0);
        const double scale = kClasses / highest;
        const auto class_of = [&](double key) { return std::min(kClasses - 1, int64_t(key * scale)); };
        for (int64_t i = 0; i < size; i++) masses[class_of(keys[i])] += weights[i];
        // Rounding may leave the whole below what is asked for: then it is the last class with any weight.
        int64_t wanted = 0;
        double before = 0;
        for (int64_t c = 0; c < kClasses; c++) {
            if (masses[c] == 0) continue;
            wanted = c, before = reached;
            reached += masses[c];
            if (reached >= mass) break;
        }
        reached = before;
        for (int64_t i = 0; i < size; i++)
            if (class_of(keys[i]) == wanted) part.push_back(int32_t(i));
    }
    std::sort(part.begin(), part.end(), [&](int32_t a, int32_t b) { return keys[a] != keys[b] ? keys[a] < keys[b] : a < b; });
    for (const int32_t i : part) {
        reached += weights[i];
        if (reached >= mass) return {keys[i], i};
    }
    return {keys[part.back()], part.back()};
}

// In float64 throughout: what top_p leaves out may be less than what float32 rounds away. Four sums, as one would wait for
// itself.
double add_up(const std::vector<float> &weights) {
    double sums[4] = {};
    for (size_t i = 0; i < weights.size(); i++) sums[i % 4] += weights[i];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Ids that may be drawn, ascending, with their logits and weights.
struct Candidates {
    std::vector<int32_t> ids;
    std::vector<float> values, weights;

    void gather(const float *row) {
        values.resize(ids.size());
        for (size_t i = 0; i < ids.size(); i++) values[i] = row[ids[i]];
    }

    template <class Keep>
    void filter(Keep &&keep) {
        size_t kept = 0;
        for (size_t i = 0; i < ids.size(); i++) {
            ids[kept] = ids[i], values[kept] = values[i], weights[kept] = weights[i];
            kept += keep(i);
        }
        ids.resize(kept), values.resize(kept), weights.resize(kept);
    }
};

// row: [size], usable; most: its highest.
void find_candidates(const SamplingVariant &use, const float *row, int64_t size, float most, const DrawRequest &how,
                     Candidates &found) {
    static thread_local std::vector<double> keys;
    const bool some = how.top_k > 0 && how.top_k < size, share = how.top_p < 1.0;
    const auto find = [&](const float *from, float least) {
        found.ids.resize(size);
        found.ids.resize(use.not_below(from, size, least, found.ids.data()));
        found.gather(row);
    };
    double total = 0;
    if (!some && share) {
        static thread_local std::vector<float> weights;
        weights.resize(size);
        use.weigh(row, size, most, how.temperature, weights.data());
        total = add_up(weights);
        // All below this together have less than what top_p leaves out, so none of them is needed; half of it, as sums
        // are rounded.
        const double least = 0.5 * (1.0 - how.top_p) * total / double(size);
        find(weights.data(), std::max(float(least), FLT_MIN));
        found.weights.resize(found.ids.size());
        for (size_t i = 0; i < found.ids.size(); i++) found.weights[i] = weights[found.ids[i]];
    } else {
        float least = -FLT_MAX;
        if (some) {
            static thread_local Buffer scratch;
            least = std::max(least, use.largest(row, size, how.top_k, scratch.floats(select_scratch(how.top_k))));
        }
        find(row, least);
        found.weights.resize(found.ids.size());
        use.weigh(found.values.data(), int64_t(found.values.size()), most, how.temperature, found.weights.data());
        total = add_up(found.weights);
    }
    if (share) {
        keys.resize(found.ids.size());
        for (size_t i = 0; i < keys.size(); i++) keys[i] = double(most) - double(found.values[i]);
        const Last last = reach(keys, found.weights, how.top_p * total);
        found.filter([&](size_t i) { return keys[i] < last.key || (keys[i] == last.key && int64_t(i) <= last.index); });
    }
    if (how.typical_p < 1.0) {
        // Locally typical sampling (Meister et al. 2022, arXiv:2202.00666). What ties with the last stays.
        found.filter([&](size_t i) { return found.weights[i] > 0; });
        const double mass = add_up(found.weights), log_mass = std::log(mass);
        keys.resize(found.ids.size());
        double entropy = 0;
        for (size_t i = 0; i < keys.size(); i++) {
            keys[i] = log_mass - double((found.values[i] - most) / how.temperature);
            entropy += found.weights[i] / mass * keys[i];
        }
        for (double &key : keys) key = std::abs(key - entropy);
        const Last last = reach(keys, found.weights, how.typical_p * mass);
        found.filter([&](size_t i) { return keys[i] <= last.key; });
    }
}

// The first of `weights` at which their sum exceeds `number` of the whole.
int64_t pick(const float *weights, int64_t size, double total, double number) {
    double reached = 0;
    int64_t last = 0;
    for (int64_t i = 0; i < size; i++) {
        if (weights[i] > 0) last = i;
        reached += weights[i];
        if (reached > number * total) return i;
    }
    // Rounding may reach the total; the last with any weight is meant.
    return last;
}

// Without filters, the block of ids is found first.
int64_t draw_any(const SamplingVariant &use, const float *row, int64_t size, float most, const DrawRequest &how) {
    static thread_local std::vector<double> sums;
    sums.clear();
    double total = 0;
    for (int64_t begin = 0; begin < size; begin += kSumBlock) {
        sums.push_back(use.weigh(row + begin, std::min(kSumBlock, size - begin), most, how.temperature, nullptr));
        total += sums.back();
    }
    double reached = 0;
    int64_t wanted = -1;
    double before = 0;
    for (int64_t block = 0; block < int64_t(sums.size()); block++) {
        if (sums[block] == 0) continue;
        wanted = block, before = reached;
        reached += sums[block];
        if (reached > how.number * total) break;
    }
    float weights[kSumBlock];
    const int64_t begin = wanted * kSumBlock, count = std::min(kSumBlock, size - begin);
    use.weigh(row + begin, count, most, how.temperature, weights);
    return begin + pick(weights, count, 1.0, how.number * total - before);
}

// The row with what a mask does not allow made impossible, until this thread's next call.
const float *leave_allowed(const SamplingVariant &use, const float *row, int64_t size, const uint32_t *mask) {
    static thread_local std::vector<float> left;
    left.resize(size);
    use.leave(row, size, mask, left.data());
    return left.data();
}

// most: the highest of the row.
int64_t draw_from(const SamplingVariant &use, const float *row, int64_t size, float most, const DrawRequest &how) {
    if (!how.do_sample) return std::find(row, row + size, most) - row;
    if (how.top_k == 0 && how.top_p >= 1.0 && how.typical_p >= 1.0) return draw_any(use, row, size, most, how);
    static thread_local Candidates found;
    find_candidates(use, row, size, most, how, found);
    return found.ids[pick(found.weights.data(), int64_t(found.ids.size()), add_up(found.weights), how.number)];
}

// mask: of the ids that may be drawn, or null. guided: what limits the row, or null.
void draw_row(const SamplingVariant &use, const float *raw, const float *processed, const uint32_t *mask, const Guided *by,
              GuidedRow *guided, int64_t size, DrawRow &row) {
    if (mask) processed = leave_allowed(use, processed, size, mask);
    const RowStatistics of_raw = use.statistics(raw, size);
    RowStatistics of_processed = processed == raw ? of_raw : use.statistics(processed, size);
    row.id = 0, row.normalizer = row.logprob = 0;
    // Biases and a constraint may together forbid every id; a penalty may overflow.
    row.is_finite = of_raw.finite && of_processed.usable;
    if (!row.is_finite) return;
    row.normalizer = float(of_raw.most + std::log(use.weigh(raw, size, of_raw.most, 1.0f, nullptr)));
    row.id = guided && !row.how.do_sample ? follow_most_probable(use, *by, *guided, processed, size, of_processed.most) : -1;
    if (row.id < 0) {
        if (guided) {
            mask = mask_of(*by, *guided, size);
            if (!mask) return;
            processed = leave_allowed(use, processed, size, mask);
            of_processed = use.statistics(processed, size);
            row.is_finite = of_processed.usable;
            if (!row.is_finite) return;
        }
        row.id = draw_from(use, processed, size, of_processed.most, row.how);
        if (guided) go_on(*by, *guided, row.id);
    }
    row.logprob = raw[row.id] - row.normalizer;
}

}  // namespace
}  // namespace kernels

using namespace kernels;

extern "C" {

// raw, processed: [rows][size], `raw_stride` and `processed_stride` elements from one row to the next; they may be the same.
// allowed: null for all. guided: null if no row is.
EXPORT void kernels_draw(int32_t variant, const float *raw, int64_t raw_stride, const float *processed,
                         int64_t processed_stride, int64_t size, const Allowed *allowed, Guided *guided, DrawRow *row,
                         int64_t rows, int32_t threads) {
    static thread_local std::vector<GuidedRow *> guided_at;
    guided_at.assign(rows, nullptr);
    for (int64_t i = 0; guided && i < guided->count; i++) {
        GuidedRow &one = guided->rows[i];
        if (one.place < 0 || one.place >= rows) {
            guided->count = -1;
            return;
        }
        one.mask_seconds = 0, one.has_failed = 0;
        guided_at[one.place] = &one;
    }
    GuidedRow *const *at = guided_at.data();
    Pool::shared().run(threads, rows, 1, [&, at](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) {
            const int64_t of = allowed ? allowed->mask_of[i] : -1;
            draw_row(*variant_of(variant).sampling, raw + i * raw_stride, processed + i * processed_stride,
                     of < 0 ? nullptr : allowed->masks + of * allowed->words, guided, at[i], size, row[i]);
        }
    });
}

EXPORT void kernels_penalize(int32_t variant, const PenalizedRow *how, int64_t rows, int64_t size, int32_t threads) {
    Pool::shared().run(threads, rows, 1, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            if (how[row].counts) variant_of(variant).sampling->penalize(how[row], size);
            for (int64_t i = 0; i < how[row].num_biases; i++) how[row].logits[how[row].bias_ids[i]] += how[row].biases[i];
        }
    });
}

// The ids of one row, of finite numbers, that may be drawn, ascending, with their weights, and how many there are.
EXPORT void kernels_candidates(int32_t variant, const float *row, int64_t size, const DrawRequest *how, int32_t *ids,
                               float *weights, int64_t *count) {
    const SamplingVariant &use = *variant_of(variant).sampling;
    Candidates found;
    find_candidates(use, row, size, use.statistics(row, size).most, *how, found);
    std::copy(found.ids.begin(), found.ids.end(), ids);
    std::copy(found.weights.begin(), found.weights.end(), weights);
    *count = int64_t(found.ids.size());
}
}
