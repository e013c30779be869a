// Products of numbers with bfloat16 activations by dot instructions (see few_rows_variant.h). Compiled with -mavx512bf16, and all that
// avx512_vnni.cpp is compiled with.
#include "layer.h"

#include "avx512_vectors.h"
#include "linear_parts.h"
#include "units_variant.h"

INLINE F add_dot(F sum, I weights, I x) { return _mm512_dpbf16_ps(sum, (__m512bh)weights.v, (__m512bh)x.v); }

#include "few_rows_variant.h"

// What a tile of rows does with a chunk of units of one panel and one group.
struct Chunk {
    const uint8_t *numbers;  // [units][kColumns] units
    int64_t units;
    bool begins, ends;       // its group
    float scales[kColumns];  // where the group ends
};

constexpr int64_t kFewTiles = 4;

// The group may be none.
template <class C, int R>
__attribute__((noinline)) void multiply_brains(const Chunk &chunk, bool scaled, const uint32_t *x, float *partials,
                                               float *totals) {
    F sum[R][kVectors];
    repeat<R>([&](auto m) {
        repeat<kVectors>([&](auto v) { sum[m][v] = chunk.begins ? zeros() : load_floats(partials + m * kColumns + v * kWidth); });
    });
    const uint8_t *numbers = chunk.numbers;
    for (int64_t unit = 0; unit < chunk.units; unit++, x += R, numbers += kColumns * 4) {
        if constexpr (C::kInMemory) prefetch(numbers), prefetch(numbers + 64);
        const I a = load_integers(numbers), b = load_integers(numbers + kWidth * 4);
        repeat<R>([&](auto m) {
            const I value = broadcast_unit(x + m);
            sum[m][0] = add_dot(sum[m][0], a, value);
            sum[m][1] = add_dot(sum[m][1], b, value);
        });
    }
    repeat<R>([&](auto m) {
        repeat<kVectors>([&](auto v) {
            float *total = totals + m * kColumns + v * kWidth;
            if (!chunk.ends) store_floats(partials + m * kColumns + v * kWidth, sum[m][v]);
            else if (!scaled) store_floats(total, sum[m][v]);
            else store_floats(total, add_product(load_floats(chunk.scales + v * kWidth), sum[m][v], load_floats(total)));
        });
    });
}

// Any number of rows with one panel.
template <class C>
void multiply_many(const Weight &weight, const Units &units, I table, int64_t panel, float *scratch) {
    const uint8_t *codes = weight.codes + panel * weight.steps * C::kStep;
    uint8_t *made = (uint8_t *)scratch;
    float *totals = scratch + kChunkSteps * kStepPlaces * kColumns, *partials = totals + units.count * kColumns;
    std::fill(totals, totals + units.count * kColumns, 0.0f);
    const bool scaled = weight.scale_type != kNone;
    Chunk chunk;
    int64_t step = 0, group = 0;
    while (step < weight.steps) {
        const int64_t first = step;
        while (weight.group_ends[group] <= step) group++;
        chunk.begins = step == (group ? weight.group_ends[group - 1] : 0);
        step = std::min(step + kChunkSteps, int64_t(weight.group_ends[group]));
        chunk.ends = step == weight.group_ends[group];
        if (chunk.ends && scaled) {
            Group here{weight, (panel * weight.groups + group) * kColumns};
            repeat<kVectors>([&](auto v) { store_floats(chunk.scales + v * kWidth, here.scale(v * kWidth)); });
        }
        chunk.units = (step - first) * C::kUnits;
        chunk.numbers = make_units<C>(codes, table, first, step, made);
        units.each_tile([&](int64_t row, int64_t count) {
            const uint32_t *x = Tile{units, row, count}.x(first * C::kUnits);
            repeat<kTileOfBrain>([&](auto m) {
                if (count == m + 1) multiply_brains<C, m + 1>(chunk, scaled, x, partials + row * kColumns, totals + row * kColumns);
            });
        });
    }
    put_rows<C>(weight, units, 0, units.count, panel, totals);
}

template <class C>
void multiply_units_of(const Weight &weight, const Units &units, int64_t first, int64_t last, float *scratch) {
    const I table = load_table(weight);
    if (units.count == 1) multiply_pairs<C, 1>(weight, units, table, first, last);
    else if (units.count == 2) multiply_pairs<C, 2>(weight, units, table, first, last);
    else if (units.count <= kFewTiles * kTileOfBrain) multiply_tiles<C, kTileOfBrain>(weight, units, table, first, last);
    else
        for (int64_t panel = first; panel < last; panel++) multiply_many<C>(weight, units, table, panel, scratch);
}

bool units_of(const Weight &weight, int64_t, UnitCounts *counts) {
    return with_numbers(weight.coding, [&](auto coding) {
        *counts = {weight.steps * decltype(coding)::kUnits, 0, 0, false, kTileOfBrain};
    });
}

void prepare_units(const Weight &weight, const void *activations, int64_t row, int64_t count, float *scratch,
                   const WritableUnits &to) {
    with_numbers(weight.coding, [&](auto coding) { prepare_tile<decltype(coding)>(weight, activations, row, count, scratch, to); });
}

void multiply_units(const Weight &weight, const Units &units, int64_t first, int64_t last, float *scratch) {
    with_numbers(weight.coding, [&](auto coding) { multiply_units_of<decltype(coding)>(weight, units, first, last, scratch); });
}

}  // namespace

const Dots kDotsOfNumbers{units_of, prepare_units, multiply_units, scratch_floats};

}  // namespace kernels
