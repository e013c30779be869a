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

// e^rest for |rest| <= log(2) / 2, where rest = x - whole * log(2).
INLINE F exponential_of_rest(F x, F whole) {
    F rest = subtract_product(whole, all_floats(0.693145752f), x);
    rest = subtract_product(whole, all_floats(1.42860677e-6f), rest);
    F sum = all_floats(1.9875691e-4f);
    sum = add_product(sum, rest, all_floats(1.3981999e-3f));
    sum = add_product(sum, rest, all_floats(8.3334519e-3f));
    sum = add_product(sum, rest, all_floats(4.1665796e-2f));
    sum = add_product(sum, rest, all_floats(1.6666666e-1f));
    sum = add_product(sum, rest, all_floats(0.5f));
    return add_product(sum, rest * rest, rest + all_floats(1.0f));
}

constexpr float kLogOfSmallest = -87.33654f, kLogOfLargest = 88.72283f, kOneByLog2 = 1.44269504f;

// e^x to a few units in the last place: exactly 0 below the smallest normal number, infinite above the largest.
INLINE F exponential(F x) {
    // What is not a number comes through: both return their second argument then.
    const F limited = minimum(all_floats(kLogOfLargest), maximum(all_floats(kLogOfSmallest), x));
    const F whole = round_to_whole(limited * all_floats(kOneByLog2));
    F result = exponential_of_rest(limited, whole);
    // In two halves: 2^128 is no number, and 2^127 times 2 is.
    const I power = to_integer(whole), half = shift_right_signed<1>(power);
    result = result * power_of_two(half) * power_of_two(power - half);
    result = choose(less(x, all_floats(kLogOfSmallest)), zeros(), result);
    return choose(less(all_floats(kLogOfLargest), x), all_floats(INFINITY), result);
}

// The same bits for x <= 0, in fewer steps.
INLINE F exponential_of_negative(F x) {
    const F limited = maximum(all_floats(kLogOfSmallest), x);
    const F whole = round_to_whole(limited * all_floats(kOneByLog2));
    const F result = exponential_of_rest(limited, whole) * power_of_two(to_integer(whole));
    return choose(less(x, all_floats(kLogOfSmallest)), zeros(), result);
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

void sum(const void *const *parts, int64_t count, void *to, int32_t type, int64_t first, int64_t last) {
    each_vector(last - first, [&](int64_t at, auto load, auto store) {
        F total = load(parts[0], type, first + at);
        for (int64_t part = 1; part < count; part++) total = total + load(parts[part], type, first + at);
        store(to, type, first + at, total);
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

// Elements of a cache.
struct Floats {
    using T = float;
    static INLINE F load(const float *at) { return load_floats(at); }
};
struct Brains {
    using T = uint16_t;
    static INLINE F load(const uint16_t *at) { return widen_bfloat16(at); }
};

// What will be read next, `stride` bytes apart: brought into a core's second cache while something else is computed.
struct NextRead {
    const char *at;
    int64_t stride;
    INLINE void take() {
        _mm_prefetch(at, _MM_HINT_T1);
        at += stride;
    }
};

// Weighted values of `Count` rows: sums[row] += weights[row][0:keys] * values[0:keys], two vectors of each row.
template <class E, int Count>
__attribute__((noinline)) void add_values(const typename E::T *values, int64_t keys, int64_t dim, const float *weights, float *sums,
                                          NextRead next) {
    F sum[Count][2];
    repeat<Count>([&](auto r) { repeat<2>([&](auto v) { sum[r][v] = load_floats(sums + r * dim + v * kWidth); }); });
    for (int64_t key = 0; key < keys; key++) {
        next.take();
        const F a = E::load(values + key * dim), b = E::load(values + key * dim + kWidth);
        repeat<Count>([&](auto r) {
            const F weight = broadcast(weights + r * kTileKeys + key);
            sum[r][0] = add_product(weight, a, sum[r][0]);
            sum[r][1] = add_product(weight, b, sum[r][1]);
        });
    }
    repeat<Count>([&](auto r) { repeat<2>([&](auto v) { store_floats(sums + r * dim + v * kWidth, sum[r][v]); }); });
}

// Scores of `Count` rows with kScoredKeys keys, whose elements of one dimension lie together, `stride` after those of the one
// before; queries [dim][room], so that no row needs an address of its own.
template <class E, int Count>
__attribute__((noinline)) void score(const typename E::T *keys, int64_t stride, int64_t dim, const float *queries, int64_t room,
                                     float *scores, NextRead next) {
    constexpr int kParts = kScoredKeys / kWidth;
    F sum[Count][kParts];
    repeat<Count>([&](auto r) { repeat<kParts>([&](auto v) { sum[r][v] = zeros(); }); });
    for (int64_t d = 0; d < dim; d++, keys += stride, queries += room) {
        next.take();
        F part[kParts];
        repeat<kParts>([&](auto v) { part[v] = E::load(keys + v * kWidth); });
        repeat<Count>([&](auto r) {
            const F query = broadcast(queries + r);
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

// The numbers of a vector's keys within a tile, of which the vector begins at `key`.
INLINE F count_from(int64_t key) {
    alignas(64) static constexpr float kCount[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    static_assert(sizeof kCount / sizeof *kCount >= kWidth);
    return load_floats(kCount) + all_floats(float(key));
}

// What becomes of the scores of a row with `keys` keys, of which the first lies `distance` positions behind its own.
INLINE void adjust(const Attention &step, int64_t head, int64_t distance, int64_t keys, float *scores) {
    for (int64_t key = 0; key < keys; key += kWidth) {
        F score = load_floats(scores + key);
        if (step.cap != 0) score = all_floats(step.cap) * hyperbolic_tangent(score / all_floats(step.cap));
        if (step.slopes)
            score = add_product(all_floats(step.slopes[head]), count_from(key) - all_floats(float(distance)), score);
        store_floats(scores + key, score);
    }
}

// A row's softmax so far (Milakov and Gimelshein 2018, arXiv:1805.02867): whenever a tile holds a new maximum, what was added
// up before is scaled down.
struct Softmax { float highest, total; };

// Turns the scores of a row with `keys` keys, of which it sees [low, high], into weights.
INLINE void weigh(Softmax &row, int64_t low, int64_t high, int64_t keys, int64_t dim, float *scores, float *sums) {
    F highest = all_floats(-INFINITY);
    for (int64_t key = 0; key < keys; key += kWidth) {
        F part = load_floats(scores + key);
        if (low > key || high < key + kWidth - 1) {
            const F number = count_from(key);
            part = choose(less(number, all_floats(float(low))), all_floats(-INFINITY), part);
            part = choose(less(all_floats(float(high)), number), all_floats(-INFINITY), part);
            store_floats(scores + key, part);
        }
        highest = maximum(highest, part);
    }
    const float top = highest_of(highest);
    if (top > row.highest) {
        const F shrink = exponential(all_floats(row.highest - top));
        row.total *= first_of(shrink);
        for (int64_t at = 0; at < dim; at += kWidth) store_floats(sums + at, load_floats(sums + at) * shrink);
        row.highest = top;
    }
    F total = zeros();
    for (int64_t key = 0; key < keys; key += kWidth) {
        const F weight = exponential_of_negative(load_floats(scores + key) - all_floats(row.highest));
        store_floats(scores + key, weight);
        total = total + weight;
    }
    row.total += add_up(total);
}

// Positions of the rows of a query tile, which stand in their order: of each token all query heads of the key head.
struct Positions {
    int64_t group, begin, rows, window;

    Positions(const Attention &step, const AttentionTile &tile) : group(step.heads / step.kv_heads), window(step.window) {
        begin = step.lengths[tile.sequence] - (step.starts[tile.sequence + 1] - step.starts[tile.sequence]) + tile.token;
        rows = tile.count * group;
    }
    int64_t of(int64_t row) const { return begin + row / group; }
    // Behind the last position nobody may have written yet.
    int64_t end() const { return of(rows - 1) + 1; }
    int64_t first_key(int64_t row) const { return window ? std::max<int64_t>(0, of(row) - window + 1) : 0; }
    int64_t first_tile() const { return first_key(0) / kTileKeys * kTileKeys; }
};

// Keys [begin, end) of a head, which is all or part of a tile of keys; where they stand, kScoredKeys at a time.
template <class E>
struct TileKeys {
    using T = typename E::T;
    const Attention &step;
    const AttentionTile &tile;
    int64_t begin, end;

    // Where `key` of the tile stands; behind the end, where the last ones do.
    int64_t place(int64_t key) const {
        const int64_t at = std::min(begin + key, (end - 1) / kScoredKeys * kScoredKeys);
        const int64_t block = step.block_tables[tile.sequence * step.table_stride + at / step.block_size];
        return (block * step.kv_heads + tile.kv_head) * step.head_dim * step.block_size + at % step.block_size;
    }
    const T *keys(int64_t key) const { return (const T *)step.keys + place(key); }
    const T *values(int64_t key) const {
        const int64_t at = place(key), offset = at % step.block_size;
        return (const T *)step.values + at - offset + offset * step.head_dim;
    }
};

// Rows that attend together, and what is known of them so far.
//   queries [dim][room], sums [rows][dim], scores [rows][kTileKeys], softmax [rows]
//   keys [dim][kScoredKeys], values [kScoredKeys][dim]: widened once for many rows
template <class E>
struct QueryTile {
    using T = typename E::T;
    const Attention &step;
    const AttentionTile &tile;
    const Positions at;
    const int64_t dim, room;
    const bool widens;
    float *queries, *sums, *scores, *keys, *values;
    Softmax *softmax;

    QueryTile(const Attention &step, const AttentionTile &tile, float *scratch, int64_t room)
        : step(step), tile(tile), at(step, tile), dim(step.head_dim), room(room), widens(at.rows > kRows), queries(scratch),
          sums(queries + room * dim), scores(sums + room * dim), keys(scores + room * kTileKeys), values(keys + dim * kScoredKeys),
          softmax((Softmax *)(values + dim * kScoredKeys)) {
        for (int64_t row = 0; row < at.rows; row++) {
            const T *from = (const T *)step.queries + token_of(row) * step.query_stride + head_of(row) * dim;
            for (int64_t d = 0; d < dim; d += kWidth) {
                float part[kWidth];
                store_floats(part, E::load(from + d) * all_floats(step.scale));
                for (int64_t i = 0; i < kWidth; i++) queries[(d + i) * room + row] = part[i];
            }
            softmax[row] = {-INFINITY, 0};
        }
        std::fill(sums, sums + at.rows * dim, 0.0f);
    }
    int64_t token_of(int64_t row) const { return step.starts[tile.sequence] + tile.token + row / at.group; }
    int64_t head_of(int64_t row) const { return tile.kv_head * at.group + row % at.group; }

    // Rows [first, last) with the tile's keys from `seen` on.
    void score_keys(const TileKeys<E> &now, const TileKeys<E> &after, int64_t seen, int64_t first, int64_t last) {
        for (int64_t key = seen; key < now.end - now.begin; key += kScoredKeys) {
            const T *from = now.keys(key);
            if (widens)
                for (int64_t d = 0; d < dim; d++)
                    for (int64_t i = 0; i < kScoredKeys; i += kWidth)
                        store_floats(keys + d * kScoredKeys + i, E::load(from + d * step.block_size + i));
            NextRead next{(const char *)after.keys(key), int64_t(step.block_size * sizeof(T))};
            in_groups(first, last, [&](int64_t row, auto count) {
                float *to = scores + row * kTileKeys + key;
                if (widens) score<Floats, count>(keys, kScoredKeys, dim, queries + row, room, to, next);
                else score<E, count>(from, step.block_size, dim, queries + row, room, to, next);
                next = {(const char *)to, 0};
            });
        }
    }

    void weigh_keys(const TileKeys<E> &now, int64_t first, int64_t last) {
        const int64_t whole = (now.end - now.begin + kScoredKeys - 1) / kScoredKeys * kScoredKeys;
        for (int64_t row = first; row < last; row++) {
            float *mine = scores + row * kTileKeys;
            if (step.cap != 0 || step.slopes) adjust(step, head_of(row), at.of(row) - now.begin, whole, mine);
            weigh(softmax[row], at.first_key(row) - now.begin, at.of(row) - now.begin, whole, dim, mine, sums + row * dim);
        }
    }

    // A weight of zero adds nothing, so rows need not stop at the keys that they see; but keys that nobody wrote hold anything,
    // and are left out.
    void add_keys(const TileKeys<E> &now, const TileKeys<E> &after, int64_t seen, int64_t first, int64_t last) {
        for (int64_t key = seen; key < now.end - now.begin; key += kScoredKeys) {
            const int64_t some = std::min(kScoredKeys, now.end - now.begin - key);
            const T *from = now.values(key), *next_values = after.values(key);
            if (widens)
                for (int64_t i = 0; i < some * dim; i += kWidth) store_floats(values + i, E::load(from + i));
            in_groups(first, last, [&](int64_t row, auto count) {
                const float *weights = scores + row * kTileKeys + key;
                for (int64_t d = 0; d < dim; d += 2 * kWidth) {
                    const NextRead next{(const char *)(next_values + d), int64_t(dim * sizeof(T))};
                    if (widens) add_values<Floats, count>(values + d, some, dim, weights, sums + row * dim + d, next);
                    else add_values<E, count>(from + d, some, dim, weights, sums + row * dim + d, next);
                }
            });
        }
    }

    void write() {
        for (int64_t row = 0; row < at.rows; row++) {
            const F total = all_floats(softmax[row].total);
            for (int64_t d = 0; d < dim; d += kWidth)
                store_typed(step.output, step.type, (token_of(row) * step.heads + head_of(row)) * dim + d,
                            load_floats(sums + row * dim + d) / total);
        }
    }
};

template <class E>
void attend_of(const Attention &step, const AttentionTile &tile, const AttentionTile *next_tile, float *scratch, int64_t room) {
    QueryTile<E> rows(step, tile, scratch, room);
    const Positions &at = rows.at;
    auto tile_from = [&](const AttentionTile &tile, int64_t begin, int64_t end) {
        return TileKeys<E>{step, tile, begin, std::min(begin + kTileKeys, end)};
    };
    for (int64_t begin = at.first_tile(); begin < at.end(); begin += kTileKeys) {
        const TileKeys<E> now = tile_from(tile, begin, at.end());
        const bool ends = begin + kTileKeys >= at.end();
        const AttentionTile &following = ends && next_tile ? *next_tile : tile;
        const Positions following_at(step, following);
        const TileKeys<E> after = tile_from(following, !ends ? begin + kTileKeys : following_at.first_tile(), following_at.end());
        // Rows before the tile come first, and see nothing of it; a window may have left it behind.
        const int64_t first = std::max<int64_t>(0, begin - at.begin) * at.group;
        int64_t last = at.rows;
        while (at.first_key(last - 1) >= begin + kTileKeys) last -= at.group;
        const int64_t seen = std::max<int64_t>(0, at.first_key(first) - begin) / kScoredKeys * kScoredKeys;
        rows.score_keys(now, after, seen, first, last);
        rows.weigh_keys(now, first, last);
        rows.add_keys(now, after, seen, first, last);
    }
    rows.write();
}

void attend(const Attention &step, const AttentionTile &tile, const AttentionTile *next, float *scratch, int64_t room) {
    if (step.type == kF32) attend_of<Floats>(step, tile, next, scratch, room);
    else attend_of<Brains>(step, tile, next, scratch, room);
}
