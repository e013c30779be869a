// Drawing ids, for one instruction set. Included after layer_variant.h.

// The last elements of a row, fewer than a vector, with `fill` behind them.
INLINE F load_rest(const float *at, int64_t count, float fill) {
    float part[kWidth];
    for (int64_t i = 0; i < kWidth; i++) part[i] = i < count ? at[i] : fill;
    return load_floats(part);
}

// `function(at, vector)` for each vector of a row; behind its end stands `fill`.
template <class Function>
INLINE void each_floats(const float *row, int64_t size, float fill, Function &&function) {
    int64_t at = 0;
    for (; at + kWidth <= size; at += kWidth) function(at, load_floats(row + at));
    if (at < size) function(at, load_rest(row + at, size - at, fill));
}

RowStatistics row_statistics(const float *row, int64_t size) {
    const F infinite = all_floats(INFINITY), lowest = all_floats(-INFINITY), one = all_floats(1.0f);
    F most = lowest, not_below_infinite = zeros(), not_above_lowest = zeros();
    // Neither comparison holds for what is not a number.
    each_floats(row, size, row[0], [&](int64_t, F x) {
        most = maximum(x, most);
        not_below_infinite = choose(less(x, infinite), not_below_infinite, one);
        not_above_lowest = choose(less(lowest, x), not_above_lowest, one);
    });
    const float top = highest_of(most);
    const bool usable = add_up(not_below_infinite) == 0.0f && top > -INFINITY;
    return {top, usable && add_up(not_above_lowest) == 0.0f, usable};
}

double weigh_row(const float *row, int64_t size, float most, float temperature, float *weights) {
    const F top = all_floats(most), divisor = all_floats(temperature);
    double total = 0;
    for (int64_t begin = 0; begin < size; begin += kSumBlock) {
        F sum = zeros();
        const int64_t count = std::min(kSumBlock, size - begin);
        each_floats(row + begin, count, -INFINITY, [&](int64_t at, F x) {
            const F weight = exponential((x - top) / divisor);
            sum = sum + weight;
            if (weights) {
                if (at + kWidth <= count) store_floats(weights + begin + at, weight);
                else store_some(weights, kF32, begin + at, count - at, weight);
            }
        });
        total += add_up(sum);
    }
    return total;
}

void leave_allowed(const float *row, int64_t size, const uint32_t *mask, float *to) {
    const F never = all_floats(-INFINITY);
    each_floats(row, size, 0.0f, [&](int64_t at, F x) {
        // A vector is a whole part of a word.
        const F left = where_set(mask[at / 32] >> (at % 32), x, never);
        if (at + kWidth <= size) store_floats(to + at, left);
        else store_some(to, kF32, at, size - at, left);
    });
}

int64_t not_below(const float *row, int64_t size, float least, int32_t *to) {
    const F bound = all_floats(least);
    int64_t found = 0;
    each_floats(row, size, -INFINITY, [&](int64_t at, F x) {
        if (all_less(x, bound)) return;
        // Without a branch that cannot be foreseen; behind what was found there is room, as less was found than was seen.
        for (int64_t i = at; i < std::min(size, at + kWidth); i++) {
            to[found] = int32_t(i);
            found += row[i] >= least;
        }
    });
    return found;
}

// What is above the smallest of the largest so far goes into a buffer, which is thinned out when it is full.
float largest_of(const float *row, int64_t size, int64_t count, float *scratch) {
    const int64_t room = select_scratch(count);
    int64_t held = 0;
    float least = -INFINITY;
    const auto thin = [&] {
        std::nth_element(scratch, scratch + count - 1, scratch + held, [](float a, float b) { return a > b; });
        held = count;
        least = scratch[count - 1];
    };
    each_floats(row, size, -INFINITY, [&](int64_t at, F x) {
        const bool enough = held >= count;
        if (enough && all_less(x, all_floats(least))) return;
        for (int64_t i = at; i < std::min(size, at + kWidth); i++)
            if (held < count || row[i] > least) scratch[held++] = row[i];
        if (held + kWidth > room) thin();
    });
    thin();
    return least;
}

// Rounded after each operation: nothing is fused, so the bits are those of one operator after another.
void penalize_row(const PenalizedRow &how, int64_t size) {
    const F repetition = all_floats(how.repetition), frequency = all_floats(how.frequency), length = all_floats(how.length);
    const F presence = all_floats(how.presence), count = all_floats(how.count), one = all_floats(1.0f);
    auto penalized = [&](F x, F all, F generated) {
        const F repeated = choose(less(x, zeros()), x * repetition, x / repetition);
        x = choose(less(zeros(), all), repeated, x);
        x = x - frequency * (all / length);
        x = x - presence * choose(less(zeros(), generated), one, zeros());
        return x - count * generated;
    };
    const float *all = how.counts, *generated = how.counts + size;
    int64_t at = 0;
    for (; at + kWidth <= size; at += kWidth)
        store_floats(how.logits + at, penalized(load_floats(how.logits + at), load_floats(all + at), load_floats(generated + at)));
    if (const int64_t rest = size - at) {
        const F x = penalized(load_rest(how.logits + at, rest, 0), load_rest(all + at, rest, 0), load_rest(generated + at, rest, 0));
        store_some(how.logits, kF32, at, rest, x);
    }
}
