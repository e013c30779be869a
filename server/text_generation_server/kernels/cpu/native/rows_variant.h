// Rows of activations as products read them in units of 4 bytes (see few_rows_variant.h and avx2_codes.cpp), and what becomes of their
// sums: what such products share, whatever multiplies. Included after linear_parts.h and after the kinds of codes, `Codes<Bits>`.

// Places of codes whose activations have one scale.
constexpr int64_t kBlockSteps = 8;

// Of several rows, where those of one tile begin in x, scales, offsets and sums; see Units.
struct Tile {
    const Units &units;
    int64_t row, count;
    const uint32_t *x(int64_t unit) const { return units.x + row * units.units + unit * count; }
    const float *scales(int64_t block) const { return units.scales + row * units.blocks + block * count; }
    const int32_t *offsets(int64_t block) const { return units.offsets + row * units.blocks + block * count; }
    const float *sums(int64_t group) const { return units.sums ? units.sums + row * units.groups + group * count : nullptr; }
};

// `function(i)` for each bit i that is set in `words` words of 64 bits, from the lowest on.
template <class Function>
INLINE void each_bit(const uint64_t *bits, int64_t words, Function &&function) {
    for (int64_t word = 0; word < words; word++)
        for (uint64_t left = bits[word]; left; left &= left - 1) function(word * 64 + __builtin_ctzll(left));
}

// Adds a row's outliers with the codes of a panel, in the order of the places, to `totals`.
template <int Bits>
__attribute__((noinline)) void add_outliers(const Weight &weight, const Outliers &outliers, int64_t row, int64_t panel, F *totals) {
    constexpr int64_t kStep = kColumns * Bits;
    const uint8_t *codes = weight.codes + panel * weight.steps * kStep;
    const uint64_t *places = outliers.places + row * outliers.words, *any = outliers.any + row * outliers.num_any();
    const uint16_t *x = outliers.x + row * weight.in_features;
    int64_t group = 0;
    each_bit(any, outliers.num_any(), [&](int64_t word) {
        each_bit(places + word, 1, [&](int64_t bit) {
            const int64_t place = word * 64 + bit, step = place / kStepPlaces, at = place % kStepPlaces;
            while (weight.group_ends[group] <= step) group++;
            const Group here{weight, (panel * weight.groups + group) * kColumns};
            const F value = all_floats(from_bfloat16(x[weight.places ? weight.places[place] : place]));
            const uint8_t *from = codes + step * kStep;
            repeat<kVectors>([&](auto v) {
                I words;
                int64_t shift;
                if constexpr (Bits == 8) {
                    words = load_integers(from + (at / 4 * kColumns + v * kWidth) * 4);
                    shift = at % 4 * 8;
                } else {
                    words = load_words<Bits>(from + v * kWidth * Bits);
                    shift = at * Bits;
                }
                const I code = shift_right(words, shift) & all((1 << Bits) - 1);
                const F number = here.scale(v * kWidth) * (to_float(code) - here.zero(v * kWidth));
                totals[v] = add_product(number, value, totals[v]);
            });
        });
    });
}

// The results of one row and panel.
template <class C>
INLINE void put_row(const Weight &weight, const Units &units, int64_t row, int64_t panel, F (&totals)[kVectors]) {
    const Rows rows{units.count, 0, nullptr, nullptr, nullptr, units.y};
    if constexpr (C::kExact)
        if (units.outliers.counts[row]) {
            F all[kVectors];  // apart, since what has an address lies in memory
            repeat<kVectors>([&](auto v) { all[v] = totals[v]; });
            add_outliers<C::kBits>(weight, units.outliers, row, panel, all);
            repeat<kVectors>([&](auto v) { totals[v] = all[v]; });
        }
    repeat<kVectors>([&](auto v) { put(rows, weight, row, panel * kColumns + v * kWidth, totals[v]); });
}

// Those of the rows [row, row + count). totals: [count][kColumns].
template <class C>
INLINE void put_rows(const Weight &weight, const Units &units, int64_t row, int64_t count, int64_t panel, const float *totals) {
    for (int64_t m = 0; m < count; m++, totals += kColumns) {
        F of_row[kVectors];
        repeat<kVectors>([&](auto v) { of_row[v] = load_floats(totals + v * kWidth); });
        put_row<C>(weight, units, row + m, panel, of_row);
    }
}

// A row of activations in float32 and by place, of which there are whole vectors.
INLINE void gather_row(const Weight &weight, const uint16_t *from, float *to) {
    const int64_t places = weight.steps * kStepPlaces;
    int64_t place = 0;
    if (!weight.places) {
        for (; place + kWidth <= places; place += kWidth) store_floats(to + place, widen_bfloat16(from + place));
        for (; place < places; place++) to[place] = from_bfloat16(from[place]);
    } else {
        for (; place < places; place++) {
            const int32_t feature = weight.places[place];
            to[place] = feature < 0 ? 0.0f : from_bfloat16(from[feature]);
        }
    }
    for (; place % kWidth; place++) to[place] = 0;
}

// What stands out of a block: what has more than 16 times the mean square of what does not. Of numbers that are normally
// distributed one in 16,000. What is left has errors of 4 / (127 sqrt(12)) of itself at most, less than 1 %. In a short block even a
// number beside zeros has not 16 times the mean.
INLINE float outstanding(int64_t size) { return std::min(16.0f, float(size) / 2); }

// A block of activations in 8 bits: what each of them stands for, their sum, and what a sum of their products with codes begins with.
struct Block {
    float scale;
    int32_t sum, offset;
};

// Makes units of the rows [row, row + count) for codes, block by block: `quantize(x, size, units, noted, num_outliers)` makes those of
// a block, `put(m, step, block, units, size)` takes what the row + m has, `size` of them, which begin with this step and are the
// `block`th.
template <class C, class Quantize, class Put>
INLINE void prepare_codes(const Weight &weight, const void *activations, int64_t row, int64_t count, float *scratch,
                          const WritableUnits &to, Quantize &&quantize, Put &&put) {
    constexpr int kUnits = kBlockSteps * C::kUnits;
    alignas(64) uint32_t units[kUnits] = {};
    const Outliers &outliers = to.outliers;
    for (int64_t m = 0; m < count; m++) {
        gather_row(weight, (const uint16_t *)activations + (row + m) * weight.in_features, scratch);
        uint64_t *noted = outliers.places + (row + m) * outliers.words;
        noted[outliers.words - 1] = 0;
        outliers.counts[row + m] = 0;
        int64_t step = 0, run = 0;
        for (int64_t group = 0; group < weight.groups; group++) {
            float sum = 0;
            while (step < weight.group_ends[group]) {
                const int64_t first = step, last = std::min<int64_t>(step + kBlockSteps, weight.group_ends[group]);
                const Block block = quantize(scratch + first * kStepPlaces, (last - first) * kStepPlaces, units,
                                             reinterpret_cast<uint8_t *>(noted) + first, &outliers.counts[row + m]);
                const int64_t at = row * to.blocks + run * count + m;
                to.scales[at] = block.scale;
                to.offsets[at] = block.offset;
                sum = std::fma(block.scale, float(block.sum), sum);
                if (last - first == kBlockSteps) put(m, first, run, units, std::integral_constant<int, kUnits>{});
                else put(m, first, run, units, (last - first) * C::kUnits);
                step = last, run++;
            }
            if (to.sums) to.sums[row * weight.groups + group * count + m] = sum;
        }
        if (outliers.counts[row + m]) {
            uint64_t *any = outliers.any + (row + m) * outliers.num_any();
            std::fill(any, any + outliers.num_any(), 0);
            for (int64_t word = 0; word < outliers.words; word++) any[word / 64] |= uint64_t(noted[word] != 0) << word % 64;
        }
    }
}

// Runs of at most `most` steps of a row, of which each group has whole ones.
inline int64_t runs_of(const Weight &weight, int64_t most) {
    int64_t runs = 0, step = 0;
    for (int64_t group = 0; group < weight.groups; step = weight.group_ends[group++])
        runs += (weight.group_ends[group] - step + most - 1) / most;
    return runs;
}

template <class Function>
bool with_codes(int32_t coding, Function &&function) {
    switch (coding) {
        case kInt2: function(Codes<2>{}); return true;
        case kInt3: function(Codes<3>{}); return true;
        case kInt4: function(Codes<4>{}); return true;
        case kInt8: function(Codes<8>{}); return true;
        default: return false;
    }
}

// `function` with the rows of a tile as a number that the compiler knows, one of `Least` to `Most`.
template <int Least, int Most, class Function>
INLINE void with_rows(int64_t rows, Function &&function) {
    repeat<Most - Least + 1>([&](auto i) {
        if (rows == Least + i) function(std::integral_constant<int, Least + i>{});
    });
}

// A stream of bytes that will be needed later: read into a core's second cache while something else is computed, so much in each step.
struct Ahead {
    const uint8_t *at;
    int64_t stride;
    INLINE void ask(int64_t bytes) {
        for (int64_t line = 0; line < bytes; line += 64) _mm_prefetch((const char *)at + line, _MM_HINT_T1);
        at += stride;
    }
};

// Of `steps` steps at `next`, which several tiles ask for while they go through as many: the share of one of them, in `asks` calls for
// each step. A single tile has nothing to do meanwhile, and asks for nothing.
template <class C>
INLINE Ahead share_of(const uint8_t *next, int64_t steps, int64_t asks, int64_t tile, int64_t tiles) {
    if (steps == 0 || tiles == 1) return {next, 0};
    return {next + steps * C::kStep * tile / tiles, (C::kStep + tiles * asks - 1) / (tiles * asks)};
}

// Steps [first, last) of a panel, which are `blocks` whole blocks; `group` and `block` of a row are those of the first.
struct ChunkOfSteps {
    int64_t first, last, group, block, blocks;
};

// What comes after `former`: no more than `most` steps.
inline ChunkOfSteps next_chunk(const Weight &weight, const ChunkOfSteps &former, int64_t most) {
    ChunkOfSteps chunk{former.last, former.last, former.group, former.block + former.blocks, 0};
    while (weight.group_ends[chunk.group] <= chunk.first) chunk.group++;
    for (int64_t group = chunk.group; chunk.last < weight.steps && chunk.last - chunk.first + kBlockSteps <= most; chunk.blocks++) {
        while (weight.group_ends[group] <= chunk.last) group++;
        chunk.last = std::min<int64_t>(chunk.last + kBlockSteps, weight.group_ends[group]);
    }
    return chunk;
}
