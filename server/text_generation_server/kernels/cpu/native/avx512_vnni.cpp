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
// Of few rows, each tile makes units in registers, which costs little beside products and leaves memory time to come; of more, they are
// made once for all tiles, whose sums have the registers for themselves: then none of them waits for itself.
constexpr int kTileInRegisters = 6;
constexpr int64_t kRowsInRegisters = 3 * kTileInRegisters;

// Steps of a panel that every tile goes through before the next ones: their units stay in a core's first cache meanwhile.
constexpr int64_t kChunkOfCodes = 64;
struct Made : Codes<8> {};  // units in memory lie as codes of 8 bits do
static_assert(kChunkOfCodes * Made::kStep <= kChunkSteps * kStepPlaces * kColumns * int64_t(sizeof(float)));

// A stream of bytes that will be needed later: read into a core's second cache while something else is computed, so much in each step.
struct Ahead {
    const uint8_t *at;
    int64_t stride;
};

// Steps [first, last) of a panel, which are `blocks` whole blocks; `group` and `block` of a row are those of the first.
struct Chunk {
    int64_t first, last, group, block, blocks;
};

// What comes after `former`: no more than kChunkOfCodes.
inline Chunk next_chunk(const Weight &weight, const Chunk &former) {
    Chunk chunk{former.last, former.last, former.group, former.block + former.blocks, 0};
    while (weight.group_ends[chunk.group] <= chunk.first) chunk.group++;
    for (int64_t group = chunk.group; chunk.last < weight.steps && chunk.last - chunk.first + kBlockSteps <= kChunkOfCodes; chunk.blocks++) {
        while (weight.group_ends[group] <= chunk.last) group++;
        chunk.last = std::min<int64_t>(chunk.last + kBlockSteps, weight.group_ends[group]);
    }
    return chunk;
}

// Exact kinds. Adds the products of the units from `at` to `end`, which lie as those of `U` do, with activations `x`.
template <class C, class U, int R>
INLINE void add_steps(const uint8_t *at, const uint8_t *end, const uint32_t *x, Ahead &ahead, I (&sum)[R][kVectors]) {
    auto add = [&](const I (&unit)[kVectors], auto u) {
        repeat<R>([&](auto m) {
            const I value = broadcast_unit(x + u * R + m);
            repeat<kVectors>([&](auto v) { sum[m][v] = add_dot_in_place(sum[m][v], unit[v], value); });
        });
    };
    auto ask = [&] {
        for (int64_t line = 0; line < C::kStep / 2; line += 64) _mm_prefetch((const char *)ahead.at + line, _MM_HINT_T1);
        ahead.at += ahead.stride;
    };
    if constexpr (std::is_same_v<U, Made>) {
        // Unit by unit: of more than one in a round, gcc 12 has each sum in two registers, and for many sums there are not so many.
        for (; at != end; at += kColumns * 4, x += R) {
            ask();
            I unit[kVectors];
            repeat<kVectors>([&](auto v) { unit[v] = load_integers(at + v * kWidth * 4); });
            add(unit, std::integral_constant<int, 0>{});
        }
    } else {
        do {
            prefetch(at, U::kStep);
            ask();
            typename U::Words words[kVectors];
            repeat<kVectors>([&](auto v) { words[v] = U::load(at, v, I{}); });
            repeat<U::kUnits>([&](auto u) {
                I unit[kVectors];
                repeat<kVectors>([&](auto v) { unit[v] = U::template unit<u>(words[v]); });
                add(unit, u);
            });
            at += U::kStep, x += U::kUnits * R;
        } while (at != end);
    }
}

// Exact kinds: the `R` rows of a tile with a chunk of one panel, whose units begin at `at`. Sums within a block stay in registers, of which
// there are enough for none to wait for itself; those over the blocks of a group, and over groups, lie in memory.
template <class C, class U, int R>
__attribute__((noinline)) void multiply_codes(const Weight &weight, const Tile &tile, const Chunk &chunk, int64_t panel,
                                              const uint8_t *at, Ahead ahead, float *partials, float *totals) {
    alignas(64) static constexpr float kNothing[R * kColumns] = {};
    auto each = [](auto &&function) {
        repeat<R>([&](auto m) { repeat<kVectors>([&](auto v) { function(m, v, m * kColumns + v * kWidth); }); });
    };
    const uint32_t *x = tile.x(chunk.first * U::kUnits);
    const int32_t *offsets = tile.offsets(chunk.block);
    const float *scales = tile.scales(chunk.block);
    int64_t step = chunk.first;
    for (int64_t group = chunk.group; step < chunk.last; group++) {
        const int64_t group_end = weight.group_ends[group], end = std::min(group_end, chunk.last);
        if (step == group_end) continue;  // a group without features
        const float *before = step == (group ? weight.group_ends[group - 1] : 0) ? kNothing : partials;
        I sum[R][kVectors];
        auto add_block = [&] {
            const int64_t steps = std::min(kBlockSteps, end - step);
            each([&](auto m, auto v, auto) { sum[m][v] = begin_sum<C>(offsets + m); });
            add_steps<C, U, R>(at, at + steps * U::kStep, x, ahead, sum);
            step += steps, at += steps * U::kStep, x += steps * U::kUnits * R;
        };
        auto scaled = [&](auto m, auto v, auto i) { return add_product(to_float(sum[m][v]), all_floats(scales[m]), load_floats(before + i)); };
        while (true) {
            add_block();
            if (step == group_end) break;
            each([&](auto m, auto v, auto i) { store_floats(partials + i, scaled(m, v, i)); });
            before = partials, offsets += R, scales += R;
            if (step == end) return;
        }
        const Group here{weight, (panel * weight.groups + group) * kColumns};
        F scale[kVectors];
        repeat<kVectors>([&](auto v) { scale[v] = here.scale(v * kWidth); });
        auto finish = [&](auto m, auto v, auto i, F partial) {
            store_floats(totals + i, add_product(scale[v], partial, load_floats(totals + i)));
        };
        if (const float *x_sums = tile.sums(group)) {
            F zero[kVectors];
            repeat<kVectors>([&](auto v) { zero[v] = here.zero(v * kWidth); });
            each([&](auto m, auto v, auto i) { finish(m, v, i, subtract_product(zero[v], all_floats(x_sums[m]), scaled(m, v, i))); });
        } else {
            each([&](auto m, auto v, auto i) { finish(m, v, i, scaled(m, v, i)); });
        }
        offsets += R, scales += R;
    }
}

// A panel with each tile.
template <class C>
void multiply_panel(const Weight &weight, const Units &units, int64_t panel, float *scratch) {
    uint8_t *made = reinterpret_cast<uint8_t *>(scratch);
    float *totals = scratch + kChunkSteps * kStepPlaces * kColumns, *partials = totals + units.count * kColumns;
    std::fill(totals, partials, 0.0f);
    const uint8_t *codes = weight.codes + panel * weight.steps * C::kStep;
    const int64_t tiles = (units.count + units.tile - 1) / units.tile;
    auto multiply = [&](const Chunk &chunk, auto kind, const uint8_t *at) {
        using U = decltype(kind);
        constexpr bool kMade = std::is_same_v<U, Made>;
        // As many bytes come next, here or in the next panel, and each tile asks for a share of them.
        const bool more = tiles > 1 && (chunk.last < weight.steps || (panel + 1) * kColumns < weight.out_features);
        const int64_t bytes = more ? (chunk.last - chunk.first) * C::kStep : 0, asks = kMade ? tiles * C::kUnits : tiles;
        units.each_tile([&, tile = int64_t(0)](int64_t row, int64_t count) mutable {
            const Ahead ahead{codes + chunk.last * C::kStep * more + bytes * tile / tiles, more ? (C::kStep + asks - 1) / asks : 0};
            tile++;
            repeat<kTileOfEight>([&](auto m) {
                if constexpr (kMade ? m + 1 >= kTileOfEight / 2 : m + 1 >= kManyCodes && m + 1 <= kTileInRegisters)
                    if (count == m + 1)
                        multiply_codes<C, U, m + 1>(weight, Tile{units, row, count}, chunk, panel, at, ahead, partials + row * kColumns,
                                                    totals + row * kColumns);
            });
        });
    };
    if (units.tile == kTileInRegisters) {
        multiply(Chunk{0, weight.steps, 0, 0, 0}, C{}, codes);
    } else {
        for (Chunk chunk{}; chunk.last < weight.steps;) {
            chunk = next_chunk(weight, chunk);
            multiply(chunk, Made{}, make_units<C>(codes, I{}, chunk.first, chunk.last, made));
        }
    }
    put_panel<C>(weight, units, panel, totals);
}

template <class C>
void multiply_units_of(const Weight &weight, const Units &units, int64_t first, int64_t last, float *scratch) {
    if (units.count < kManyCodes) multiply_few_rows<C, kManyCodes - 1>(weight, units, all(0), first, last);
    else
        for (int64_t panel = first; panel < last; panel++) multiply_panel<C>(weight, units, panel, scratch);
}

bool units_of(const Weight &weight, int64_t rows, UnitCounts *counts) {
    return with_codes(weight.coding, [&](auto coding) {
        using C = decltype(coding);
        *counts = {weight.steps * C::kUnits, 0, runs_of<C>(weight), true, rows <= kRowsInRegisters ? kTileInRegisters : kTileOfEight};
    });
}

void prepare_units(const Weight &weight, const void *activations, int64_t row, int64_t count, float *scratch,
                   const WritableUnits &to) {
    with_codes(weight.coding, [&](auto coding) { prepare_tile<decltype(coding)>(weight, activations, row, count, scratch, to); });
}

void multiply_units(const Weight &weight, const Units &units, int64_t first, int64_t last, float *scratch) {
    with_codes(weight.coding, [&](auto coding) { multiply_units_of<decltype(coding)>(weight, units, first, last, scratch); });
}

}  // namespace

const Dots kDotsOfCodes{units_of, prepare_units, multiply_units, scratch_floats};

}  // namespace kernels
