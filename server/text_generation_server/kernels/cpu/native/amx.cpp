// Products of bfloat16 activations by tiles. Compiled with -mamx-tile -mamx-bf16 -mamx-int8, and all that avx512_bf16.cpp is
// compiled with.
//
// A tile of weights is a run: 16 units of 16 columns, half of what a panel has for them, where it lies or made in memory first. A tile of
// activations holds the same 16 units of up to 16 rows. The last run of a group is filled up with zeros on both sides.
//
//   numbers  any number of rows goes through tiles: how the processor adds up within a tile is its own affair, but each row of a tile is
//            by itself, so a row's bits are the same in any company
//   codes    a run is a block of avx512_vnni.cpp. Sums within it are exact and everything after it is in the same order, so the bits are
//            those of that source, which computes few rows
//
// Of a tile of rows the sums of two times 16 rows and two times 16 columns are in tiles 0 to 3, the rows in 4 and 5, the weights in 6
// and 7.
#include "layer.h"
#include "tiles.h"

#include "avx512_vectors.h"
#include "linear_parts.h"
#include "units_variant.h"

constexpr int64_t kHalf = 16;                              // rows or columns of a tile
constexpr int64_t kTileRows = 2 * kHalf;                   // of activations, at most; what a tile has of sums stands this far apart
constexpr int64_t kRunBytes = kRunUnits * kColumns * 4;    // of a panel
constexpr int64_t kRowRun = kRunUnits * 4;                 // bytes of a row
constexpr int64_t kColumnsBytes = kColumns * 4;
// Runs of a panel that all rows go through before the next ones: of many rows as much as stays in a core's second cache, of few in
// its first. How many there are changes no bit: sums go to memory and come back as they are.
constexpr int64_t kChunkRuns = 32, kFewRowsRuns = 8;
// Rows of codes for which making units once in memory, for tiles, is not worth while.
constexpr int64_t kFewOfCodes = 8;

// Runs of one group within a chunk; of codes one run, whose sum has a scale.
struct Piece {
    int64_t runs, group;
    bool begins, ends;                             // the group
    float scales[kColumns], zeros[kColumns];       // where the group ends
};

struct Chunk {
    int64_t first, runs;                           // of a row
    int64_t pieces;
    const uint8_t *numbers[kChunkRuns];            // [16 units][32 columns] of each run
    Piece list[kChunkRuns];
};

// Rows of the first half, of tiles of so many rows and of those of one fewer.
INLINE int64_t first_half(int64_t most) { return most > kHalf ? (most + 1) / 2 : most; }

INLINE int64_t largest_tile(const Units &units) {
    int64_t most = 0;
    units.each_tile([&](int64_t, int64_t count) { most = std::max(most, count); });
    return most;
}

// Units of the steps [first, last), with zeros behind them, at `made` or where they lie already.
template <class C>
INLINE const uint8_t *make_run(const uint8_t *codes, I table, int64_t first, int64_t last, uint8_t *made) {
    const uint8_t *numbers = make_units<C>(codes, table, first, last, made);
    const int64_t bytes = (last - first) * C::kUnits * kColumnsBytes;
    if (bytes == kRunBytes) return numbers;
    if (numbers != made) std::memcpy(made, numbers, bytes);
    std::memset(made + bytes, 0, kRunBytes - bytes);
    return made;
}

// The next runs of a panel, `most` of them, from `step` of `group` on.
template <class C>
void make_chunk(const Weight &weight, bool zeros, I table, int64_t panel, int64_t most, int64_t &step, int64_t &group, uint8_t *made,
                Chunk &chunk) {
    const uint8_t *codes = weight.codes + panel * weight.steps * C::kStep;
    chunk.first += chunk.runs, chunk.runs = chunk.pieces = 0;
    while (chunk.runs < most && step < weight.steps) {
        while (weight.group_ends[group] <= step) group++;
        Piece &piece = chunk.list[chunk.pieces++];
        const int64_t end = weight.group_ends[group];
        piece.runs = 0, piece.group = group, piece.begins = step == (group ? weight.group_ends[group - 1] : 0);
        do {
            const int64_t last = std::min(step + kRunSteps<C>, end);
            chunk.numbers[chunk.runs] = make_run<C>(codes, table, step, last, made + chunk.runs * kRunBytes);
            piece.runs++, chunk.runs++;
            step = last;
        } while (!C::kExact && step < end && chunk.runs < most);
        piece.ends = step == end;
        if (piece.ends && weight.scale_type != kNone) {
            const Group here{weight, (panel * weight.groups + group) * kColumns};
            repeat<kVectors>([&](auto v) {
                store_floats(piece.scales + v * kWidth, here.scale(v * kWidth));
                if (zeros) store_floats(piece.zeros + v * kWidth, here.zero(v * kWidth));
            });
        }
    }
}

// Tells the processor to read a run that will be needed soon.
INLINE void prefetch_run(const uint8_t *numbers) {
    for (int64_t line = 0; line < kRunBytes; line += 64) prefetch(numbers + line);
}

// Rows of a tile with a chunk of numbers, `half` of them or all in its first half. `partials`, `totals`: [kTileRows][kColumns].
template <bool Both>
__attribute__((noinline)) void multiply_brains(const Chunk &chunk, const Tile &tile, int64_t half, bool scaled, bool ahead,
                                               float *partials, float *totals) {
    const int64_t run_bytes = tile.count * kRowRun;
    const uint8_t *x = reinterpret_cast<const uint8_t *>(tile.x(chunk.first * kRunUnits));
    const uint8_t *const *numbers = chunk.numbers;
    float *second = partials + half * kColumns;
    for (int64_t i = 0; i < chunk.pieces; i++) {
        const Piece &piece = chunk.list[i];
        if (piece.begins) {
            TILE_ZERO(0);
            TILE_ZERO(1);
            if constexpr (Both) {
                TILE_ZERO(2);
                TILE_ZERO(3);
            }
        } else {
            TILE_LOAD(0, partials, kColumnsBytes);
            TILE_LOAD(1, partials + kHalf, kColumnsBytes);
            if constexpr (Both) {
                TILE_LOAD(2, second, kColumnsBytes);
                TILE_LOAD(3, second + kHalf, kColumnsBytes);
            }
        }
        for (int64_t run = 0; run < piece.runs; run++, numbers++, x += run_bytes) {
            if (ahead) prefetch_run(*numbers);
            TILE_LOAD(4, x, kRowRun);
            TILE_LOAD(6, *numbers, kColumnsBytes);
            TILE_ADD_BRAINS(0, 4, 6);
            TILE_LOAD(7, *numbers + kHalf * 4, kColumnsBytes);
            TILE_ADD_BRAINS(1, 4, 7);
            if constexpr (Both) {
                TILE_LOAD(5, x + half * kRowRun, kRowRun);
                TILE_ADD_BRAINS(2, 5, 6);
                TILE_ADD_BRAINS(3, 5, 7);
            }
        }
        TILE_STORE(0, partials, kColumnsBytes);
        TILE_STORE(1, partials + kHalf, kColumnsBytes);
        if constexpr (Both) {
            TILE_STORE(2, second, kColumnsBytes);
            TILE_STORE(3, second + kHalf, kColumnsBytes);
        }
        if (!piece.ends) continue;
        for (int64_t m = 0; m < tile.count; m++)
            repeat<kVectors>([&](auto v) {
                const int64_t at = m * kColumns + v * kWidth;
                const F sum = load_floats(partials + at);
                if (!scaled) store_floats(totals + at, sum);
                else store_floats(totals + at, add_product(load_floats(piece.scales + v * kWidth), sum, load_floats(totals + at)));
            });
    }
}

// `R` rows, or fewer, of a tile from `row` on with a chunk of codes, and of a panel one half of the columns. Rows beyond `count` are
// computed of whatever is there. `sums`: of a tile.
template <int R, bool Second>
__attribute__((noinline)) void multiply_codes(const Chunk &chunk, const Tile &tile, int64_t row, int64_t count, int64_t column, bool ahead,
                                              float *sums, float *partials, float *totals) {
    const int64_t run_bytes = tile.count * kRowRun;
    const uint8_t *x = reinterpret_cast<const uint8_t *>(tile.x(chunk.first * kRunUnits)) + row * kRowRun;
    F partial[R];
    repeat<R>([&](auto m) { partial[m] = chunk.list[0].begins ? zeros() : load_floats(partials + m * kColumns); });
    for (int64_t i = 0; i < chunk.pieces; i++, x += run_bytes) {
        const Piece &piece = chunk.list[i];
        if (ahead) prefetch_run(chunk.numbers[i]);
        const uint8_t *numbers = chunk.numbers[i] + column * 4;
        if constexpr (Second) {
            TILE_ZERO(2);
            TILE_LOAD(5, x, kRowRun);
            TILE_LOAD(6, numbers, kColumnsBytes);
            TILE_ADD_BYTES(2, 5, 6);
            TILE_STORE(2, sums, kHalf * 4);
        } else {
            TILE_ZERO(0);
            TILE_LOAD(4, x, kRowRun);
            TILE_LOAD(6, numbers, kColumnsBytes);
            TILE_ADD_BYTES(0, 4, 6);
            TILE_STORE(0, sums, kHalf * 4);
        }
        const float *scales = tile.scales(chunk.first + i) + row;
        const int32_t *offsets = tile.offsets(chunk.first + i) + row;
        repeat<R>([&](auto m) {
            const __m512i sum = _mm512_add_epi32(_mm512_loadu_si512(sums + m * kHalf), _mm512_set1_epi32(offsets[m]));
            partial[m] = add_product(to_float({sum}), all_floats(scales[m]), partial[m]);
        });
        if (!piece.ends) continue;
        const F scale = load_floats(piece.scales + column);
        const float *x_sums = tile.sums(piece.group);
        repeat<R>([&](auto m) {
            if (m < count) {
                F value = partial[m];
                if (x_sums) value = subtract_product(load_floats(piece.zeros + column), all_floats(x_sums[row + m]), value);
                float *total = totals + m * kColumns;
                store_floats(total, add_product(scale, value, load_floats(total)));
            }
            partial[m] = zeros();
        });
    }
    repeat<R>([&](auto m) { if (m < count) store_floats(partials + m * kColumns, partial[m]); });
}

template <class C>
void multiply_panel(const Weight &weight, const Units &units, I table, int64_t panel, float *scratch) {
    uint8_t *made = reinterpret_cast<uint8_t *>(scratch);
    const int64_t rows = (units.count + kTileRows - 1) / kTileRows * kTileRows;
    float *sums = scratch + kChunkRuns * kRunBytes / 4, *totals = sums + kHalf * kHalf, *partials = totals + rows * kColumns;
    std::fill(totals, totals + rows * kColumns, 0.0f);
    auto each_tile = [&](auto &&function) {
        int64_t at = 0;
        units.each_tile([&](int64_t row, int64_t count) {
            function(Tile{units, row, count}, totals + at, partials + at);
            at += kTileRows * kColumns;
        });
    };
    const int64_t first = first_half(largest_tile(units));
    const int64_t runs = units.count <= kTileRows ? kFewRowsRuns : kChunkRuns;
    Chunk chunk;
    chunk.first = chunk.runs = 0;
    for (int64_t step = 0, group = 0; step < weight.steps;) {
        make_chunk<C>(weight, units.sums != nullptr, table, panel, runs, step, group, made, chunk);
        each_tile([&](const Tile &tile, float *total, float *partial) {
            const bool ahead = C::kInMemory && tile.row == 0;
            const int64_t half = std::min(first, tile.count);
            if constexpr (C::kExact) {
                for (int64_t column = 0; column < kColumns; column += kHalf) {
                    float *part = partial + column, *whole = total + column;
                    auto some = [&](auto second, int64_t row, int64_t count) {
                        constexpr bool kSecond = second;
                        const int64_t at = row * kColumns;
                        if (count <= kHalf / 2)
                            multiply_codes<kHalf / 2, kSecond>(chunk, tile, row, count, column, ahead, sums, part + at, whole + at);
                        else multiply_codes<kHalf, kSecond>(chunk, tile, row, count, column, ahead, sums, part + at, whole + at);
                    };
                    some(std::false_type{}, 0, half);
                    if (half < tile.count) some(std::true_type{}, half, tile.count - half);
                }
            } else {
                const bool scaled = weight.scale_type != kNone;
                if (half < tile.count) multiply_brains<true>(chunk, tile, half, scaled, ahead, partial, total);
                else multiply_brains<false>(chunk, tile, half, scaled, ahead, partial, total);
            }
        });
    }
    each_tile([&](const Tile &tile, const float *total, const float *) { put_rows<C>(weight, units, tile.row, tile.count, panel, total); });
}

// For tiles of at most so many rows.
TileShapes shapes_for(int64_t rows) {
    TileShapes shapes;
    auto set = [&](int tile, int64_t count) {
        shapes.rows[tile] = uint8_t(count);
        shapes.row_bytes[tile] = count ? 64 : 0;
    };
    const int64_t half = first_half(rows);
    for (int tile : {0, 1, 4}) set(tile, half);
    for (int tile : {2, 3, 5}) set(tile, rows - half);
    for (int tile : {6, 7}) set(tile, kHalf);
    return shapes;
}

bool counts_of(const Weight &weight, int64_t rows, UnitCounts *counts) {
    return with_units(weight.coding, [&](auto coding) {
        using C = decltype(coding);
        const int64_t runs = runs_of(weight, kRunSteps<C>);
        *counts = {runs * kRunUnits, kTileRows * kRunUnits, C::kExact ? runs : 0, C::kExact, kTileRows};
    }) && (!counts->eight || rows > kFewOfCodes);
}

// x: of each tile of rows [runs][rows of the tile][16 units].
void prepare(const Weight &weight, const void *activations, int64_t row, int64_t count, float *scratch, const WritableUnits &to) {
    with_units(weight.coding, [&](auto coding) {
        uint32_t *x = to.x + row * to.units;
        prepare_runs<decltype(coding)>(weight, activations, row, count, scratch, to,
                                       [&](int64_t m, int64_t, int64_t run, const uint32_t *units, auto size) {
                                           uint32_t *at = x + (run * count + m) * kRunUnits;
                                           std::memcpy(at, units, size * 4);
                                           std::memset(at + size, 0, (kRunUnits - size) * 4);
                                       });
    });
}

void multiply_tiles(const Weight &weight, const Units &units, int64_t first, int64_t last, float *scratch) {
    const TileShapes shapes = shapes_for(largest_tile(units));
    TILE_SHAPES(&shapes);
    with_units(weight.coding, [&](auto coding) {
        const I table = load_table(weight);
        for (int64_t panel = first; panel < last; panel++) multiply_panel<decltype(coding)>(weight, units, table, panel, scratch);
    });
    TILE_RELEASE();
}

int64_t tile_scratch_floats(int64_t rows) {
    return kChunkRuns * kRunBytes / 4 + kHalf * kHalf + 2 * (rows + kTileRows) * kColumns;
}

}  // namespace

#ifdef KERNELS_EMULATE_TILES
extern "C" {
__attribute__((visibility("default"))) const Dots *kernels_emulated_tiles() {
    static const Dots tiles{counts_of, prepare, multiply_tiles, tile_scratch_floats};
    return &tiles;
}
__attribute__((visibility("default"))) int64_t kernels_emulated_products() { return emulated::products; }
}
#else
const Dots kTilesAmx{counts_of, prepare, multiply_tiles, tile_scratch_floats};
#endif

}  // namespace kernels
