// What a layer computes besides its products, for one instruction set. Included after linear_variant.h.

INLINE F load_typed(const void *from, int32_t type, int64_t at) {
    return type == kF32 ? load_floats((const float *)from + at) : widen_bfloat16((const uint16_t *)from + at);
}

INLINE void store_typed(void *to, int32_t type, int64_t at, F value) {
    if (type == kF32) store_floats((float *)to + at, value);
    else store_bfloat16((uint16_t *)to + at, value);
}

// The `count` first elements of a vector, fewer than there is room for; zeros behind them.
inline F load_some(const void *from, int32_t type, int64_t at, int64_t count) {
    if (type == kF32) {
        float part[kWidth] = {};
        std::memcpy(part, (const float *)from + at, count * sizeof(float));
        return load_floats(part);
    }
    uint16_t part[kWidth] = {};
    std::memcpy(part, (const uint16_t *)from + at, count * sizeof(uint16_t));
    return widen_bfloat16(part);
}

inline void store_some(void *to, int32_t type, int64_t at, int64_t count, F value) {
    if (type == kF32) {
        float part[kWidth];
        store_floats(part, value);
        std::memcpy((float *)to + at, part, count * sizeof(float));
    } else {
        uint16_t part[kWidth];
        store_bfloat16(part, value);
        std::memcpy((uint16_t *)to + at, part, count * sizeof(uint16_t));
    }
}

// `function(at, load, store)` for each vector of `size` elements, where load(from, type, at) and store(to, type, at, value)
// touch no more than there are.
template <class Function>
INLINE void each_vector(int64_t size, Function &&function) {
    int64_t at = 0;
    for (; at + kWidth <= size; at += kWidth) function(at, load_typed, store_typed);
    if (const int64_t rest = size - at)
        function(at, [rest](const void *from, int32_t type, int64_t at) { return load_some(from, type, at, rest); },
                 [rest](void *to, int32_t type, int64_t at, F value) { store_some(to, type, at, rest, value); });
}

// e^x to a few units in the last place: exactly 0 below the smallest normal number, infinite above the largest.
INLINE F exponential(F x) {
    // What is not a number comes through: both return their second argument then.
    const F limited = minimum(all_floats(88.72283f), maximum(all_floats(-87.33654f), x));
    const F whole = round_to_whole(limited * all_floats(1.44269504f));
    F rest = subtract_product(whole, all_floats(0.693145752f), limited);
    rest = subtract_product(whole, all_floats(1.42860677e-6f), rest);
    F sum = all_floats(1.9875691e-4f);
    sum = add_product(sum, rest, all_floats(1.3981999e-3f));
    sum = add_product(sum, rest, all_floats(8.3334519e-3f));
    sum = add_product(sum, rest, all_floats(4.1665796e-2f));
    sum = add_product(sum, rest, all_floats(1.6666666e-1f));
    sum = add_product(sum, rest, all_floats(0.5f));
    sum = add_product(sum, rest * rest, rest + all_floats(1.0f));
    // In two halves: 2^128 is no number, and 2^127 times 2 is.
    const I power = to_integer(whole), half = shift_right_signed<1>(power);
    sum = sum * power_of_two(half) * power_of_two(power - half);
    sum = choose(less(x, all_floats(-87.33654f)), zeros(), sum);
    return choose(less(all_floats(88.72283f), x), all_floats(INFINITY), sum);
}

void rms_norm(const void *x, const void *weight, void *y, int32_t type, int64_t size, int64_t weight_rows, float eps,
              int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const int64_t begin = row * size, weight_begin = row % weight_rows * size;
        F squares = zeros();
        each_vector(size, [&](int64_t at, auto load, auto) {
            const F value = load(x, type, begin + at);
            squares = add_product(value, value, squares);
        });
        const F scale = all_floats(1.0f / std::sqrt(add_up(squares) / float(size) + eps));
        each_vector(size, [&](int64_t at, auto load, auto store) {
            store(y, type, begin + at, load(x, type, begin + at) * scale * load(weight, type, weight_begin + at));
        });
    }
}

void silu_and_mul(const void *x, void *y, int32_t type, int64_t size, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++)
        each_vector(size, [&](int64_t at, auto load, auto store) {
            const F gate = load(x, type, 2 * row * size + at), up = load(x, type, (2 * row + 1) * size + at);
            store(y, type, row * size + at, gate / (exponential(zeros() - gate) + all_floats(1.0f)) * up);
        });
}

void add(void *x, const void *y, int32_t type, int64_t first, int64_t last) {
    each_vector(last - first, [&](int64_t at, auto load, auto store) {
        store(x, type, first + at, load(x, type, first + at) + load(y, type, first + at));
    });
}

void rotate(const void *x, const float *cos, const float *sin, void *y, int32_t type, int64_t heads, int64_t dim,
            int64_t stride, int64_t first, int64_t last) {
    const int64_t half = dim / 2;
    for (int64_t token = first; token < last; token++)
        for (int64_t head = 0; head < heads; head++) {
            const int64_t from = token * stride + head * dim, to = (token * heads + head) * dim;
            const float *c = cos + token * dim, *s = sin + token * dim;
            each_vector(half, [&](int64_t at, auto load, auto store) {
                const F a = load(x, type, from + at), b = load(x, type, from + half + at);
                store(y, type, to + at, add_product(b, load(s, kF32, at), a * load(c, kF32, at)));
                store(y, type, to + half + at, add_product(a, load(s, kF32, half + at), b * load(c, kF32, half + at)));
            });
        }
}

// Weighted values of `Count` rows: sums[row] += weights[row][0:keys] * values[0:keys].
template <int Count>
INLINE void add_values(const float *values, int64_t keys, int64_t dim, const float *weights, float *sums, int64_t at) {
    F sum[Count][2];
    repeat<Count>([&](auto r) { repeat<2>([&](auto v) { sum[r][v] = load_floats(sums + r * dim + at + v * kWidth); }); });
    for (int64_t key = 0; key < keys; key++) {
        const F a = load_floats(values + key * dim + at), b = load_floats(values + key * dim + at + kWidth);
        repeat<Count>([&](auto r) {
            const F weight = broadcast(weights + r * kTileKeys + key);
            sum[r][0] = add_product(weight, a, sum[r][0]);
            sum[r][1] = add_product(weight, b, sum[r][1]);
        });
    }
    repeat<Count>([&](auto r) { repeat<2>([&](auto v) { store_floats(sums + r * dim + at + v * kWidth, sum[r][v]); }); });
}

// Scores of `Count` rows with a tile of keys [dim][kTileKeys].
template <int Count>
INLINE void score(const float *keys, int64_t dim, const float *queries, float *scores) {
    constexpr int kParts = kTileKeys / kWidth;
    F sum[Count][kParts];
    repeat<Count>([&](auto r) { repeat<kParts>([&](auto v) { sum[r][v] = zeros(); }); });
    for (int64_t d = 0; d < dim; d++) {
        F part[kParts];
        repeat<kParts>([&](auto v) { part[v] = load_floats(keys + d * kTileKeys + v * kWidth); });
        repeat<Count>([&](auto r) {
            const F query = broadcast(queries + r * dim + d);
            repeat<kParts>([&](auto v) { sum[r][v] = add_product(query, part[v], sum[r][v]); });
        });
    }
    repeat<Count>([&](auto r) { repeat<kParts>([&](auto v) { store_floats(scores + r * kTileKeys + v * kWidth, sum[r][v]); }); });
}

// `function(row, count)` for groups of rows whose count is known to the compiler.
template <class Function>
INLINE void in_groups(int64_t first, int64_t last, Function &&function) {
    for (int64_t row = first; row < last; row += kRows) {
        const int count = int(std::min<int64_t>(kRows, last - row));
        repeat<kRows>([&](auto m) {
            if (count == m + 1) function(row, std::integral_constant<int, m + 1>{});
        });
    }
}

// tanh(x): of small numbers by its series, so that no digits are lost.
INLINE F hyperbolic_tangent(F x) {
    const F square = x * x, one = all_floats(1.0f);
    F series = all_floats(62.0f / 2835);
    series = add_product(series, square, all_floats(-17.0f / 315));
    series = add_product(series, square, all_floats(2.0f / 15));
    series = add_product(series, square, all_floats(-1.0f / 3));
    const F small = add_product(series * square, x, x);
    const F large = one - all_floats(2.0f) / (exponential(x + x) + one);
    return choose(less(square, all_floats(0.0625f)), small, large);
}

// What becomes of the scores of a row with kTileKeys keys, of which the first lies `distance` positions behind its own.
INLINE void adjust(const Attention &step, int64_t head, int64_t distance, float *scores) {
    alignas(64) static constexpr float kCount[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    static_assert(sizeof kCount / sizeof *kCount == kTileKeys);
    for (int64_t key = 0; key < kTileKeys; key += kWidth) {
        F score = load_floats(scores + key);
        if (step.cap != 0) score = all_floats(step.cap) * hyperbolic_tangent(score / all_floats(step.cap));
        if (step.slopes)
            score = add_product(all_floats(step.slopes[head]), load_floats(kCount + key) - all_floats(float(distance)), score);
        store_floats(scores + key, score);
    }
}

// Softmax over tiles (Milakov and Gimelshein 2018, arXiv:1805.02867): whenever a tile holds a new maximum, what was added up
// before is scaled down.
void attend(const Attention &step, const AttentionTile &tile, float *scratch, int64_t room) {
    constexpr int kParts = kTileKeys / kWidth;
    const int64_t dim = step.head_dim, group = step.heads / step.kv_heads, rows = tile.count * group;
    const int64_t before = step.lengths[tile.sequence] - (step.starts[tile.sequence + 1] - step.starts[tile.sequence]);
    const int64_t first_token = step.starts[tile.sequence] + tile.token;
    auto position = [&](int64_t row) { return before + tile.token + row / group; };
    auto first_key = [&](int64_t row) { return step.window ? std::max<int64_t>(0, position(row) - step.window + 1) : 0; };
    float *queries = scratch, *sums = queries + room * dim, *scores = sums + room * dim;
    float *maxima = scores + room * kTileKeys, *totals = maxima + room;
    float *keys = totals + room, *values = keys + dim * kTileKeys;
    for (int64_t row = 0; row < rows; row++) {
        const int64_t from = (first_token + row / group) * step.query_stride + (tile.kv_head * group + row % group) * dim;
        each_vector(dim, [&](int64_t at, auto load, auto store) {
            store(queries, kF32, row * dim + at, load(step.queries, step.type, from + at) * all_floats(step.scale));
        });
        maxima[row] = -INFINITY, totals[row] = 0;
    }
    std::fill(sums, sums + rows * dim, 0.0f);
    const int64_t *table = step.block_tables + tile.sequence * step.table_stride;
    for (int64_t begin = first_key(0) / kTileKeys * kTileKeys; begin <= position(rows - 1); begin += kTileKeys) {
        const int64_t offset = begin % step.block_size;
        const int64_t head = table[begin / step.block_size] * step.kv_heads + tile.kv_head;
        // Behind the last position nobody may have written yet.
        const int64_t written = std::min(kTileKeys, position(rows - 1) - begin + 1);
        for (int64_t d = 0; d < dim; d++)
            repeat<kParts>([&](auto v) {
                store_floats(keys + d * kTileKeys + v * kWidth,
                             load_typed(step.keys, step.type, (head * dim + d) * step.block_size + offset + v * kWidth));
            });
        for (int64_t key = 0; key < written; key++)
            for (int64_t at = 0; at < dim; at += kWidth)
                store_floats(values + key * dim + at,
                             load_typed(step.values, step.type, (head * step.block_size + offset + key) * dim + at));
        // Rows are in the order of their positions: those before the tile come first, and see nothing of it.
        const int64_t first = std::max<int64_t>(0, begin - position(0)) * group;
        in_groups(first, rows, [&](int64_t row, auto count) {
            score<count>(keys, dim, queries + row * dim, scores + row * kTileKeys);
        });
        int64_t last = rows;
        for (int64_t row = first; row < rows; row++) {
            // A window may have left the tile behind.
            if (first_key(row) >= begin + kTileKeys) { last = row; break; }
            float *mine = scores + row * kTileKeys;
            if (step.cap != 0 || step.slopes) adjust(step, tile.kv_head * group + row % group, position(row) - begin, mine);
            const int64_t low = first_key(row) - begin, high = position(row) - begin;
            for (int64_t key = 0; key < std::min(low, kTileKeys); key++) mine[key] = -INFINITY;
            for (int64_t key = high + 1; key < kTileKeys; key++) mine[key] = -INFINITY;
            F part[kParts], highest;
            repeat<kParts>([&](auto v) { part[v] = load_floats(mine + v * kWidth); });
            highest = part[0];
            repeat<kParts>([&](auto v) { highest = maximum(highest, part[v]); });
            const float top = highest_of(highest);
            if (top > maxima[row]) {
                const F shrink = exponential(all_floats(maxima[row] - top));
                totals[row] *= first_of(shrink);
                for (int64_t at = 0; at < dim; at += kWidth)
                    store_floats(sums + row * dim + at, load_floats(sums + row * dim + at) * shrink);
                maxima[row] = top;
            }
            F total = zeros();
            repeat<kParts>([&](auto v) {
                const F weight = exponential(part[v] - all_floats(maxima[row]));
                store_floats(mine + v * kWidth, weight);
                total = total + weight;
            });
            totals[row] += add_up(total);
        }
        // A weight of zero adds nothing, so rows need not stop at the keys that they see; but keys that nobody wrote hold
        // anything, and are left out.
        in_groups(first, last, [&](int64_t row, auto count) {
            for (int64_t at = 0; at < dim; at += 2 * kWidth)
                add_values<count>(values, written, dim, scores + row * kTileKeys, sums + row * dim, at);
        });
    }
    for (int64_t row = 0; row < rows; row++) {
        const int64_t to = ((first_token + row / group) * step.heads + tile.kv_head * group + row % group) * dim;
        const F total = all_floats(totals[row]);
        for (int64_t at = 0; at < dim; at += kWidth)
            store_typed(step.output, step.type, to + at, load_floats(sums + row * dim + at) / total);
    }
}
