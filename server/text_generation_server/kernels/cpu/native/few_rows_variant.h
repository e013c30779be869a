// Products of few rows by dot instructions, and what the sources of such products share. Included after units_variant.h and after add_dot.
//
// A unit is 4 bytes of one column: 2 places in bfloat16, or 4 in 8 bits; an instruction adds the products of a unit of
// weights and a unit of activations, for 16 columns. Two kinds of weights:
//
//   numbers  (bfloat16, tables, 8-bit floats; avx512_bf16.cpp): a chain over the units of a group, in float32, as the processor's
//            instruction adds.
//   codes    (2, 3, 4, 8 bits; avx512_vnni.cpp): activations become 8-bit integers, a block of at most kBlockSteps at a time, each
//            block with a scale of its own, which follows from the row alone. Sums within a block are exact; then a chain over
//            the blocks of a group, in float32.
//
// After that a chain over the groups, as everywhere. One row goes through many columns in registers; several rows share
// units, which are made in registers for each tile or, of many rows, once in memory. All walk the same chains.

// The sum of products of codes begins with what the middle of the codes takes away from it.
template <class C>
INLINE typename C::Sum begin_sum(const int32_t *offset) {
    if constexpr (C::kExact) return {_mm512_set1_epi32(*offset)};
    else return zeros();
}

// The `R` rows of a tile with `Panels` panels: units are made in registers.
template <class C, int R, int Panels>
__attribute__((noinline)) void multiply_few(const Weight &weight, const Tile &tile, I table, int64_t panel, Ahead ahead) {
    const int64_t panel_bytes = weight.steps * C::kStep;
    const uint8_t *codes = weight.codes + panel * panel_bytes;
    const int64_t near_end = weight.steps - kAhead / C::kStep;
    auto each = [](auto &&function) {
        repeat<R>([&](auto m) { repeat<Panels>([&](auto p) { repeat<kVectors>([&](auto v) { function(m, p, v); }); }); });
    };
    // Exact sums may be added up in any order: of few, each has a chain for each unit of a step, so that none waits for itself,
    // and units are taken as they are.
    constexpr bool kRaw = C::kExact && R * Panels <= 2;
    constexpr int kChains = kRaw ? C::kUnits : 1;
    F totals[R][Panels][kVectors];
    each([&](auto m, auto p, auto v) { totals[m][p][v] = zeros(); });
    int64_t step = 0, block = 0;
    for (int64_t group = 0; group < weight.groups; group++) {
        F partial[R][Panels][kVectors];
        each([&](auto m, auto p, auto v) { partial[m][p][v] = zeros(); });
        const int64_t end = weight.group_ends[group];
        while (step < end) {
            const int64_t last = C::kExact ? std::min(step + kBlockSteps, end) : end;
            typename C::Sum sum[R][Panels][kVectors][kChains];
            each([&](auto m, auto p, auto v) {
                sum[m][p][v][0] = begin_sum<C>(tile.offsets(block) + m);
                if constexpr (kRaw) sum[m][p][v][1] = {_mm512_setzero_si512()};
            });
            const uint32_t *x = tile.x(step * C::kUnits);
            for (; step < last; step++, x += C::kUnits * R) {
                repeat<Panels>([&](auto p) {
                    const uint8_t *at = codes + p * panel_bytes + step * C::kStep;
                    // Of few rows, memory is all that a step waits for.
                    if (R > 2 || kAsksForLines) {
                        // Behind the end of this panel comes that of the next tile of panels.
                        const uint8_t *near = step < near_end ? at : at + (Panels - 1) * panel_bytes;
                        prefetch(near, C::kStep);
                    } else {
                        prefetch_page<C::kStep>(at);
                    }
                    if (R > 2 && ahead.stride) ahead.ask(C::kStep / 2);
                    typename C::Words words[kVectors];
                    repeat<kVectors>([&](auto v) { words[v] = C::load(at, v, table); });
                    repeat<C::kUnits>([&](auto u) {
                        I unit[kVectors];
                        repeat<kVectors>([&](auto v) {
                            if constexpr (kRaw) unit[v] = C::template raw<u>(words[v]);
                            else unit[v] = C::template unit<u>(words[v]);
                        });
                        repeat<R>([&](auto m) {
                            const I value = broadcast_unit(x + u * R + m);
                            repeat<kVectors>([&](auto v) { sum[m][p][v][u % kChains] = add_dot(sum[m][p][v][u % kChains], unit[v], value); });
                        });
                    });
                });
            }
            each([&](auto m, auto p, auto v) {
                if constexpr (kRaw) sum[m][p][v][0] = sum[m][p][v][0] + shift_right_signed<C::kRawShift>(sum[m][p][v][1]);
                if constexpr (C::kExact)
                    partial[m][p][v] = add_product(to_float(sum[m][p][v][0]), all_floats(tile.scales(block)[m]), partial[m][p][v]);
                else partial[m][p][v] = sum[m][p][v][0];
            });
            block++;
        }
        each([&](auto m, auto p, auto v) {
            Group here{weight, ((panel + p) * weight.groups + group) * kColumns};
            const float *x_sum = tile.units.sums ? tile.sums(group) + m : nullptr;
            if (weight.scale_type == kNone) totals[m][p][v] = partial[m][p][v];
            else totals[m][p][v] = here.add(totals[m][p][v], partial[m][p][v], v * kWidth, x_sum);
        });
    }
    repeat<R>([&](auto m) {
        repeat<Panels>([&](auto p) { put_row<C>(weight, tile.units, tile.row + m, panel + p, totals[m][p]); });
    });
}

// Bytes of a panel from which on two of them are streams that are long enough for a processor to read ahead by itself; shorter
// ones are read one after the other, which is one stream.
constexpr int64_t kLongPanel = 40 << 10;

// One or two rows, with two panels at a time: enough sums that none waits for itself.
template <class C, int R>
void multiply_pairs(const Weight &weight, const Units &units, I table, int64_t first, int64_t last) {
    const Tile rows{units, 0, R};
    int64_t panel = first;
    const bool alone = C::kExact && weight.steps * C::kStep < kLongPanel && !kAsksForLines;
    for (; !alone && panel + 2 <= last; panel += 2) multiply_few<C, R, 2>(weight, rows, table, panel, Ahead{});
    for (; panel < last; panel++) multiply_few<C, R, 1>(weight, rows, table, panel, Ahead{});
}

// More rows, in tiles of at most `Most`. A panel stays in a core's second cache while each tile goes through it.
template <class C, int Most>
void multiply_tiles(const Weight &weight, const Units &units, I table, int64_t first, int64_t last) {
    const int64_t tiles = (units.count + units.tile - 1) / units.tile;
    for (int64_t panel = first; panel < last; panel++) {
        const int64_t more = (panel + 1) * kColumns < weight.out_features ? weight.steps : 0;
        units.each_tile([&, tile = int64_t(0)](int64_t row, int64_t count) mutable {
            const Ahead ahead = share_of<C>(weight.codes + (panel + 1) * weight.steps * C::kStep, more, 1, tile++, tiles);
            with_rows<3, Most>(count, [&](auto rows) { multiply_few<C, rows, 1>(weight, Tile{units, row, count}, table, panel, ahead); });
        });
    }
}

template <class C>
void prepare_tile(const Weight &weight, const void *activations, int64_t row, int64_t count, float *scratch, const WritableUnits &to) {
    uint32_t *x = to.x + row * to.units;
    prepare_runs<C>(weight, activations, row, count, scratch, to,
                    [&](int64_t m, int64_t step, int64_t, const uint32_t *units, auto size) {
                        uint32_t *at = x + step * C::kUnits * count + m;
                        for (int64_t unit = 0; unit < size; unit++) at[unit * count] = units[unit];
                    });
}
