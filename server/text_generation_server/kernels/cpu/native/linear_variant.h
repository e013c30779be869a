// The product for one instruction set. Included once by each variant, inside its own namespace and after its vectors:
//
//   F, I      vectors of kWidth floats and of as many 32-bit integers
//   kBlocks   panels that one row is multiplied with at once, so that enough chains are open
//   kRows     rows whose sums of 2 vectors of columns fit into registers
//
// Nothing here may be shared between variants by the linker: everything has internal linkage.

#include "linear_parts.h"

// Codings: `load` takes what a step holds for one vector of columns, `get<J>` makes the numbers of place J of it. A code
// may come out multiplied by a power of two, since taking it where it stands saves a shift; `gain` is its inverse and
// goes into the activations, which is exact.

// Calls `function(place, vector, numbers)` for the numbers of a step in `Vectors` vectors of columns from `First` on, the
// places of a vector in ascending order. `ByPlace`: place by place, for rows that share activations; else vector by vector. `minus`: what
// is taken away from the codes of each vector, where the coding does that.
template <class C, int First, int Vectors, bool ByPlace, class Function>
INLINE void each_number(const uint8_t *step, const float *table, const I *minus, Function &&function) {
    if constexpr (C::kByPlace) {
        const auto numbers = C::prepare(table);
        repeat<kStepPlaces>([&](auto j) {
            C::template expand<j>(step, numbers, [&](auto v, F number) {
                if constexpr (v >= First && v < First + Vectors) function(j, v, number);
            });
        });
    } else {
        auto all_of = [&](auto j, auto v) {
            auto words = C::load(step, v, table);
            if constexpr (C::kSubtracts) function(j, v, C::template get<j>(words, minus[v]));
            else function(j, v, C::template get<j>(words));
        };
        if constexpr (ByPlace)
            repeat<kStepPlaces>([&](auto j) {
                repeat<Vectors>([&](auto v) { all_of(j, std::integral_constant<int, First + v>{}); });
            });
        else
            repeat<Vectors>([&](auto v) { repeat<kStepPlaces>([&](auto j) { all_of(j, v); }); });
    }
}

template <int Bits>
struct Packed {  // 8 codes of 2, 3 or 4 bits in one integer
    static constexpr bool kByPlace = false, kSubtracts = false;
    using Words = I;
    static INLINE Words load(const uint8_t *step, int vector, const float *) {
        return load_words<Bits>(step + vector * kWidth * Bits);
    }
    template <int J>
    static INLINE F get(Words words) {
        if constexpr (J * Bits + Bits == 32) return to_float(shift_right<J * Bits>(words));
        else return to_float(words & all(int32_t((1u << Bits) - 1) << (J * Bits)));
    }
    static constexpr float gain(int j) { return j * Bits + Bits == 32 ? 1.0f : 1.0f / float(int64_t(1) << (j * Bits)); }
};

// 4 codes of 8 bits in an integer, places 4 to 7 after places 0 to 3. Zero points are taken away at once: sums of codes that
// lie far from zero would lose in rounding more than a product in float32 may be off.
struct Bytes {
    static constexpr bool kByPlace = false, kSubtracts = true;
    struct Words { I low, high; };
    static INLINE Words load(const uint8_t *step, int vector, const float *) {
        const uint8_t *at = step + vector * kWidth * 4;
        return {load_integers(at), load_integers(at + kColumns * 4)};
    }
    template <int J>
    static INLINE F get(const Words &words, I zero) {
        const I word = J < 4 ? words.low : words.high;
        if constexpr (J % 4 == 3) return to_float(shift_right<24>(word) - zero);
        else return to_float((shift_right<J % 4 * 8>(word) & all(0xFF)) - zero);
    }
    static constexpr float gain(int) { return 1.0f; }
};

#ifndef TABLE
#define TABLE Table
struct Table {  // 8 codes of 4 bits in an integer
    static constexpr bool kByPlace = false, kSubtracts = false;
    struct Words { I codes; Numbers16 table; };
    static INLINE Words load(const uint8_t *step, int vector, const float *table) {
        return {load_integers(step + vector * kWidth * 4), load_numbers(table)};
    }
    template <int J>
    static INLINE F get(const Words &words) { return look_up<J * 4>(words.table, words.codes); }
    static constexpr float gain(int) { return 1.0f; }
};
#endif

struct Brain {  // 2 bfloat16 in an integer, the even place low
    static constexpr bool kByPlace = false, kSubtracts = false;
    using Words = const uint8_t *;
    static INLINE Words load(const uint8_t *step, int vector, const float *) { return step + vector * kWidth * 4; }
    template <int J>
    static INLINE F get(Words at) {
        I word = load_integers(at + J / 2 * kColumns * 4);
        return as_float(J % 2 ? word & all(int32_t(0xFFFF0000)) : shift_left<16>(word));
    }
    static constexpr float gain(int) { return 1.0f; }
};

struct Single {  // float32
    static constexpr bool kByPlace = false, kSubtracts = false;
    using Words = const uint8_t *;
    static INLINE Words load(const uint8_t *step, int vector, const float *) { return step + vector * kWidth * 4; }
    template <int J>
    static INLINE F get(Words at) { return load_floats((const float *)(at + J * kColumns * 4)); }
    static constexpr float gain(int) { return 1.0f; }
};

// 8-bit floats, place after place, widened by way of float16: e5m2 is its upper byte, and e4m3 has its fraction's width
// and an exponent of another bias, which makes numbers 256 times too small. Scales make up for that.
template <bool E5m2>
struct Float8 {
    static constexpr bool kByPlace = false, kSubtracts = false;
    using Words = const uint8_t *;
    static INLINE Words load(const uint8_t *step, int vector, const float *) { return step + vector * kWidth; }
    template <int J>
    static INLINE F get(Words at) { return widen_float8<E5m2>(at + J * kColumns); }
    static constexpr float gain(int) { return 1.0f; }
};

// `Count` rows with `Panels` panels, and of these `Vectors` vectors from `First` on: numbers are made in
// registers.
template <class C, int Count, int Panels, int First, int Vectors>
void multiply_few(const Weight &weight, const Rows &rows, int64_t panel) {
    const int64_t panel_bytes = weight.steps * kStepBytes[weight.coding], step_bytes = kStepBytes[weight.coding];
    const uint8_t *codes = weight.codes + panel * panel_bytes;
    const int64_t asked_bytes = kAsksForLines ? step_bytes : 64, near_end = weight.steps - kAhead / step_bytes;
    auto each = [](auto &&function) {
        repeat<Panels>([&](auto p) { repeat<Count>([&](auto m) { repeat<Vectors>([&](auto v) { function(p, m, v); }); }); });
    };
    F sums[Panels][Count][Vectors];
    each([&](auto p, auto m, auto v) { sums[p][m][v] = zeros(); });
    int64_t step = 0;
    for (int64_t group = 0; group < weight.groups; group++) {
        F partial[Panels][Count][Vectors];
        each([&](auto p, auto m, auto v) { partial[p][m][v] = zeros(); });
        I minus[Panels][kVectors];
        if constexpr (C::kSubtracts)
            repeat<Panels>([&](auto p) { Group{weight, ((panel + p) * weight.groups + group) * kColumns}.zeros_of(minus[p]); });
        for (; step < weight.group_ends[group]; step++) {
            const float *x = rows.x + step * kStepPlaces;
            repeat<Panels>([&](auto p) {
                const uint8_t *at = codes + p * panel_bytes + step * step_bytes;
                const uint8_t *ahead = step < near_end ? at : at + (Panels - 1) * panel_bytes;
                prefetch(ahead, asked_bytes);
                each_number<C, First, Vectors, (Count > 1)>(at, weight.table, minus[p], [&](auto j, auto v, F number) {
                    repeat<Count>([&](auto m) {
                        F &sum = partial[p][m][v - First];
                        sum = add_product(number, broadcast(x + m * rows.stride + j), sum);
                    });
                });
            });
        }
        each([&](auto p, auto m, auto v) {
            Group here{weight, ((panel + p) * weight.groups + group) * kColumns};
            const float *x_sum = rows.sums ? rows.sums + m * weight.groups + group : nullptr;
            if (weight.scale_type == kNone) sums[p][m][v] = partial[p][m][v];
            else sums[p][m][v] = here.add(sums[p][m][v], partial[p][m][v], (First + v) * kWidth, x_sum);
        });
    }
    each([&](auto p, auto m, auto v) {
        put(rows, weight, m, (panel + p) * kColumns + (First + v) * kWidth, sums[p][m][v]);
    });
}

// `Count` rows with 2 vectors of columns of numbers that lie in memory. `sums` and `partials`: [Count][kColumns]. Meanwhile the core
// reads `ahead` into its second cache, so many bytes for each place.
template <int Count>
__attribute__((noinline)) void multiply_numbers(const float *numbers, int64_t places, const float *x, int64_t stride, float *partials,
                             bool begins, const uint8_t *ahead, int64_t ahead_bytes) {
    F partial[Count][2];
    repeat<Count>([&](auto m) {
        repeat<2>([&](auto v) { partial[m][v] = begins ? zeros() : load_floats(partials + m * kColumns + v * kWidth); });
    });
    for (int64_t place = 0; place < places; place++) {
        F a = load_floats(numbers + place * kColumns), b = load_floats(numbers + place * kColumns + kWidth);
        _mm_prefetch((const char *)ahead + place * ahead_bytes, _MM_HINT_T1);
        repeat<Count>([&](auto m) {
            F value = broadcast(x + m * stride + place);
            partial[m][0] = add_product(a, value, partial[m][0]);
            partial[m][1] = add_product(b, value, partial[m][1]);
        });
    }
    repeat<Count>([&](auto m) {
        repeat<2>([&](auto v) { store_floats(partials + m * kColumns + v * kWidth, partial[m][v]); });
    });
}

// Any number of rows with one panel: a chunk of it becomes numbers once for all rows.
template <class C>
void multiply_many(const Weight &weight, const Rows &rows, int64_t panel, float *scratch) {
    const int64_t step_bytes = kStepBytes[weight.coding];
    const uint8_t *codes = weight.codes + panel * weight.steps * step_bytes;
    float *__restrict numbers = scratch;
    float *sums = scratch + kChunkSteps * kStepPlaces * kColumns, *partials = sums + rows.count * kColumns;
    std::fill(sums, sums + rows.count * kColumns, 0.0f);
    int64_t step = 0;
    for (int64_t group = 0; group < weight.groups; group++) {
        const int64_t begin = step, end = weight.group_ends[group];
        if (step == end) continue;  // a group without features
        Group here{weight, (panel * weight.groups + group) * kColumns};
        I minus[kVectors];
        if constexpr (C::kSubtracts) here.zeros_of(minus);
        while (step < end) {
            const int64_t first = step, last = std::min(first + kChunkSteps, end);
            for (; step < last; step++) {
                const uint8_t *at = codes + step * step_bytes;
                float *to = numbers + (step - first) * kStepPlaces * kColumns;
                prefetch(at);
                each_number<C, 0, kVectors, false>(at, weight.table, minus,
                               [&](auto j, auto v, F number) { store_floats(to + j * kColumns + v * kWidth, number); });
            }
            // As many bytes come next, here or in the next panel, and are read while the processor multiplies, a share in each call.
            const bool is_last = last == weight.steps && (panel + 1) * kColumns >= weight.out_features;
            const int64_t calls = (rows.count + kRows - 1) / kRows * (kColumns / kMicroColumns), places = (last - first) * kStepPlaces;
            const int64_t ahead_bytes = is_last ? 0 : (step_bytes / kStepPlaces + calls - 1) / calls;
            const uint8_t *ahead = codes + last * step_bytes;
            each_tile_of(rows.count, kRows, [&](int64_t row, int64_t count) {
                const float *x = rows.x + row * rows.stride + first * kStepPlaces;
                for (int column = 0; column < kColumns; column += kMicroColumns) {
                    float *to = partials + row * kColumns + column;
                    const float *from = numbers + column;
                    repeat<kRows>([&](auto m) {
                        if (count == m + 1) {
                            multiply_numbers<m + 1>(from, places, x, rows.stride, to, first == begin, ahead, ahead_bytes);
                        }
                    });
                    ahead += places * ahead_bytes;
                }
            });
        }
        for (int64_t row = 0; row < rows.count; row++) {
            float *sum = sums + row * kColumns;
            const float *partial = partials + row * kColumns;
            repeat<kVectors>([&](auto v) {
                F value = load_floats(partial + v * kWidth);
                if (weight.scale_type != kNone)
                    value = here.add(load_floats(sum + v * kWidth), value, v * kWidth,
                                     rows.sums ? rows.sums + row * weight.groups + group : nullptr);
                store_floats(sum + v * kWidth, value);
            });
        }
    }
    for (int64_t row = 0; row < rows.count; row++)
        repeat<kVectors>([&](auto v) {
            put(rows, weight, row, panel * kColumns + v * kWidth, load_floats(sums + row * kColumns + v * kWidth));
        });
}

// Rows up to which numbers are made in registers, beside whose sums there is room for them: with more, they are made once, in memory.
constexpr int kHalves = kVectors / 2, kFewRows = kHalves == 1 ? 8 : 6;
// Bytes of a panel that is gone through once for each half of it: it must stay in a core's second cache meanwhile.
constexpr int64_t kPanelBytes = 160 << 10;

template <class C>
void multiply_coded(const Weight &weight, const Rows &rows, int64_t first, int64_t last, float *scratch) {
    int64_t panel = first;
    if (rows.count == 1)
        for (; panel + kBlocks <= last; panel += kBlocks) multiply_few<C, 1, kBlocks, 0, kVectors>(weight, rows, panel);
    const bool stays = kHalves == 1 || weight.steps * kStepBytes[weight.coding] <= kPanelBytes;
    for (; panel < last; panel++) {
        if (rows.count > (stays ? kFewRows : 2)) {
            multiply_many<C>(weight, rows, panel, scratch);
            continue;
        }
        repeat<kFewRows>([&](auto m) {
            if (rows.count != m + 1) return;
            if constexpr (m < 2) multiply_few<C, m + 1, 1, 0, kVectors>(weight, rows, panel);
            else repeat<kHalves>([&](auto half) { multiply_few<C, m + 1, 1, 2 * half, 2>(weight, rows, panel); });
        });
    }
}

template <class C>
void spread_coded(const Weight &weight, const void *activations, Float type, int64_t first, int64_t last, int64_t stride,
                  float *x, float *sums) {
    float gains[kStepPlaces];
    for (int j = 0; j < kStepPlaces; j++) gains[j] = C::gain(j);
    for (int64_t row = first; row < last; row++) {
        const float *from32 = (const float *)activations + row * weight.in_features;
        const uint16_t *from16 = (const uint16_t *)activations + row * weight.in_features;
        float *to = x + row * stride;
        int64_t step = 0;
        for (int64_t group = 0; group < weight.groups; group++) {
            float lanes[kStepPlaces] = {};
            for (; step < weight.group_ends[group]; step++) {
                float values[kStepPlaces];
                const int64_t place = step * kStepPlaces;
                if (!weight.places) {
                    for (int j = 0; j < kStepPlaces; j++)
                        values[j] = type == kF32 ? from32[place + j] : from_bfloat16(from16[place + j]);
                } else {
                    for (int j = 0; j < kStepPlaces; j++) {
                        const int32_t feature = weight.places[place + j];
                        values[j] = feature < 0 ? 0.0f : type == kF32 ? from32[feature] : from_bfloat16(from16[feature]);
                    }
                }
                for (int j = 0; j < kStepPlaces; j++) {
                    lanes[j] += values[j];
                    to[place + j] = values[j] * gains[j];
                }
            }
            if (sums)
                sums[row * weight.groups + group] = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
                                                    ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
        }
    }
}

template <class Function>
void with_coding(int32_t coding, Function &&function) {
    switch (coding) {
        case kFloat32: return function(Single{});
        case kBfloat16: return function(Brain{});
        case kInt2: return function(Packed<2>{});
        case kInt3: return function(Packed<3>{});
        case kInt4: return function(Packed<4>{});
        case kInt8: return function(Bytes{});
        case kTable4:
        case kTable4Bytes: return function(TABLE{});
        case kE4m3: return function(Float8<false>{});
        case kE5m2: return function(Float8<true>{});
    }
}

void spread(const Weight &weight, const void *activations, Float type, int64_t first, int64_t last, int64_t stride,
            float *x, float *sums) {
    with_coding(weight.coding, [&](auto coding) {
        spread_coded<decltype(coding)>(weight, activations, type, first, last, stride, x, sums);
    });
}

void multiply(const Weight &weight, const Rows &rows, int64_t first, int64_t last, float *scratch) {
    with_coding(weight.coding, [&](auto coding) { multiply_coded<decltype(coding)>(weight, rows, first, last, scratch); });
}
