// Products of codes with bfloat16 activations, which become 8-bit integers, by dot instructions (see few_rows_variant.h). Compiled
// with -mavx512vnni -mavx512vbmi, and all of AVX-512's.
#include "layer.h"

#include "avx512_vectors.h"
#include "linear_parts.h"
#include "units_variant.h"

INLINE I add_dot(I sum, I weights, I x) { return {_mm512_dpbusd_epi32(sum.v, weights.v, x.v)}; }

// The same. Of many sums, given the instruction's function, gcc 12 moves each from register to register in every round of a loop.
INLINE I add_dot_in_place(I sum, I weights, I x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(weights.v), "v"(x.v));
    return sum;
}

#include "few_rows_variant.h"

// Rows of codes from which on each tile has `multiply_codes`.
constexpr int kManyCodes = 3;

// A stream of bytes that will be needed later: read into a core's second cache while something else is computed, so much in each step.
struct Ahead {
    const uint8_t *at;
    int64_t stride;
};

// Exact kinds. The next steps of a block, until `end`.
template <class C, int R>
INLINE void add_steps(const uint8_t *codes, const uint8_t *end, I table, const uint32_t *x, Ahead &ahead, I (&sum)[R][kVectors]) {
    do {
        for (int64_t line = 0; line < C::kStep; line += 64) prefetch(codes + line);
        for (int64_t line = 0; line < C::kStep / 2; line += 64) _mm_prefetch((const char *)ahead.at + line, _MM_HINT_T1);
        ahead.at += ahead.stride;
        typename C::Words words[kVectors];
        repeat<kVectors>([&](auto v) { words[v] = C::load(codes, v, table); });
        repeat<C::kUnits>([&](auto u) {
            I unit[kVectors];
            repeat<kVectors>([&](auto v) { unit[v] = C::template unit<u>(words[v]); });
            repeat<R>([&](auto m) {
                const I value = broadcast_unit(x + u * R + m);
                repeat<kVectors>([&](auto v) { sum[m][v] = add_dot_in_place(sum[m][v], unit[v], value); });
            });
        });
        codes += C::kStep, x += C::kUnits * R;
    } while (codes != end);
}

// Exact kinds: the `R` rows of a tile with one panel. Making units anew for each tile costs nothing, as a processor does so beside the
// products; so all that matters is that the sums of both kinds stay in registers.
template <class C, int R>
__attribute__((noinline)) void multiply_codes(const Weight &weight, const Tile &tile, I table, int64_t panel, Ahead ahead) {
    const uint8_t *codes = weight.codes + panel * weight.steps * C::kStep;
    auto each = [](auto &&function) {
        repeat<R>([&](auto m) { repeat<kVectors>([&](auto v) { function(m, v); }); });
    };
    alignas(64) float memory[R * kColumns];
    float *totals = memory;
    asm("" : "+r"(totals) : : "memory");  // else gcc has them in registers, and others in memory
    each([&](auto m, auto v) { store_floats(totals + m * kColumns + v * kWidth, zeros()); });
    const uint32_t *x = tile.x(0);
    const int32_t *offsets = tile.offsets(0);
    const float *scales = tile.scales(0);
    int64_t step = 0;
    for (int64_t group = 0; group < weight.groups; group++) {
        F partial[R][kVectors];
        each([&](auto m, auto v) { partial[m][v] = zeros(); });
        const int64_t end = weight.group_ends[group];
        while (step < end) {
            const int64_t steps = std::min(kBlockSteps, end - step);
            I sum[R][kVectors];
            each([&](auto m, auto v) { sum[m][v] = begin_sum<C>(offsets + m); });
            add_steps<C, R>(codes, codes + steps * C::kStep, table, x, ahead, sum);
            each([&](auto m, auto v) { partial[m][v] = add_product(to_float(sum[m][v]), all_floats(scales[m]), partial[m][v]); });
            step += steps, codes += steps * C::kStep, x += steps * C::kUnits * R;
            offsets += R, scales += R;
        }
        const Group here{weight, (panel * weight.groups + group) * kColumns};
        if (const float *x_sums = tile.sums(group))
            repeat<kVectors>([&](auto v) {
                const F zero = here.zero(v * kWidth);
                repeat<R>([&](auto m) { partial[m][v] = subtract_product(zero, all_floats(x_sums[m]), partial[m][v]); });
            });
        repeat<kVectors>([&](auto v) {
            const F scale = here.scale(v * kWidth);
            repeat<R>([&](auto m) {
                float *total = totals + m * kColumns + v * kWidth;
                store_floats(total, add_product(scale, partial[m][v], load_floats(total)));
            });
        });
    }
    const Rows rows{R, 0, nullptr, nullptr, nullptr, tile.units.y};
    for (int64_t m = 0; m < R; m++)
        repeat<kVectors>([&](auto v) {
            const F total = finished<C>(weight, tile.units, tile.row + m, panel, v, load_floats(totals + m * kColumns + v * kWidth));
            put(rows, weight, tile.row + m, panel * kColumns + v * kWidth, total);
        });
}

// Rows of a tile. Five have all they need in registers, but the fewer tiles, the less often codes of 2 or 3 bits, which take longest,
// become units. Six rows are one tile in any case, since what they wait for is memory.
template <class C>
constexpr int64_t tile_for(int64_t rows) {
    return C::kBits >= 4 && rows > kTileOfEight ? kTileOfEight - 1 : kTileOfEight;
}

template <class C>
void multiply_units_of(const Weight &weight, const Units &units, int64_t first, int64_t last) {
    const I table = all(0);
    if (units.count < kManyCodes) {
        multiply_few_rows<C, kManyCodes - 1>(weight, units, table, first, last);
        return;
    }
    // A panel stays in a core's second cache while each tile goes through it, and the next one comes there meanwhile.
    const int64_t tiles = (units.count + units.tile - 1) / units.tile, bytes = weight.steps * C::kStep;
    for (int64_t panel = first; panel < last; panel++)
        units.each_tile([&, tile = int64_t(0)](int64_t row, int64_t count) mutable {
            const uint8_t *at = weight.codes + panel * bytes;
            Ahead ahead{at, 0};
            if (tiles > 1 && panel + 1 < last) ahead = {at + bytes + bytes * tile / tiles, (C::kStep + tiles - 1) / tiles};
            tile++;
            repeat<kTileOfEight>([&](auto m) {
                if constexpr (m + 1 >= kManyCodes)
                    if (count == m + 1) multiply_codes<C, m + 1>(weight, Tile{units, row, count}, table, panel, ahead);
            });
        });
}

bool units_of(const Weight &weight, int64_t rows, UnitCounts *counts) {
    return with_codes(weight.coding, [&](auto coding) {
        using C = decltype(coding);
        *counts = {weight.steps * C::kUnits, 0, runs_of<C>(weight), true, tile_for<C>(rows)};
    });
}

void prepare_units(const Weight &weight, const void *activations, int64_t row, int64_t count, float *scratch,
                   const WritableUnits &to) {
    with_codes(weight.coding, [&](auto coding) { prepare_tile<decltype(coding)>(weight, activations, row, count, scratch, to); });
}

void multiply_units(const Weight &weight, const Units &units, int64_t first, int64_t last, float *) {
    with_codes(weight.coding, [&](auto coding) { multiply_units_of<decltype(coding)>(weight, units, first, last); });
}

}  // namespace

const Dots kDotsOfCodes{units_of, prepare_units, multiply_units, scratch_floats};

}  // namespace kernels
