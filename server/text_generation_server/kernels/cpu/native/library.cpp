// The C interface, called by `native/__init__.py` without the interpreter's lock.
#include <algorithm>
#include <cpuid.h>
#include <cstring>
#include <sys/syscall.h>
#include <unistd.h>
#include <vector>

#include "block.h"
#include "pool.h"

namespace kernels {
namespace {

// Rows whose activations are spread at once: they stay in a shared cache.
constexpr int64_t kRowsAtOnce = 256;
// Multiplications that are worth a second thread.
constexpr int64_t kWorthThreads = 1 << 17;

// Of AVX-512, but for what dot instructions and tiles do.
Variant with_dots(const char *name, const Dots *codes, const Dots *numbers, const Dots *tiles) {
    Variant variant = kAvx512;
    variant.name = name, variant.codes = codes, variant.numbers = numbers, variant.tiles = tiles;
    return variant;
}

// The first is the best of Intel's processors without tiles, the second of AMD's (see slow_bfloat16), and so are their ways with codes.
const Variant kAvx512Vnni = with_dots("avx512_vnni", &kDotsOfMadeCodes, nullptr, nullptr);
const Variant kAvx512Bf16 = with_dots("avx512_bf16", &kDotsOfCodes, &kDotsOfNumbers, nullptr);
#ifdef KERNELS_AMX
const Variant kAmx = with_dots("amx", &kDotsOfMadeCodes, &kDotsOfNumbers, &kTilesAmx);
#endif

bool is_intel() {
    __builtin_cpu_init();
    return __builtin_cpu_is("intel");
}

// Intel's processors, which have tiles for it, take four times as long for a dot instruction of bfloat16 as for a multiplication in
// float32, of half as many numbers; AMD's as long.
bool slow_bfloat16() { return is_intel(); }

// AMD's processors with AVX-512 read ahead within a page by themselves, which asking for lines hinders; those before them less well.
bool reads_ahead() {
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f");
}

// The best last.
std::vector<const Variant *> &variants() {
    static std::vector<const Variant *> all{
        &kAvx2,
        &kAvx512,
        slow_bfloat16() ? &kAvx512Bf16 : &kAvx512Vnni,
        slow_bfloat16() ? &kAvx512Vnni : &kAvx512Bf16,
#ifdef KERNELS_AMX
        &kAmx,
#endif
    };
    return all;
}

// Elements that are worth a second thread.
constexpr int64_t kWorthElements = 1 << 16;

template <class Function>
void each_row(int32_t threads, int64_t rows, int64_t size, Function &&function) {
    Pool::shared().run(threads, rows, std::max<int64_t>(1, kWorthElements / std::max<int64_t>(1, size)), function);
}

template <class T>
void store_tokens(const T *k, const T *v, T *keys, T *values, const int64_t *slots, int64_t tokens, int64_t stride,
                  int64_t v_stride, int64_t heads, int64_t dim, int64_t block_size) {
    for (int64_t token = 0; token < tokens; token++) {
        const int64_t block = slots[token] / block_size, offset = slots[token] % block_size;
        for (int64_t head = 0; head < heads; head++) {
            T *to = keys + (block * heads + head) * dim * block_size + offset;
            const T *from = k + token * stride + head * dim;
            for (int64_t d = 0; d < dim; d++) to[d * block_size] = from[d];
            std::memcpy(values + ((block * heads + head) * block_size + offset) * dim, v + token * v_stride + head * dim,
                        dim * sizeof(T));
        }
    }
}

// Whether the processor has tiles and Linux lets this process use them: their registers take 8 KiB of every thread's state.
bool may_use_tiles() {
    constexpr unsigned kAll = 1u << 22 | 1u << 24 | 1u << 25;  // of bfloat16, tiles at all, of 8 bits
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
    constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}

bool supported(const Variant &variant) {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                      __builtin_cpu_supports("bmi2");
#ifdef KERNELS_EMULATE_AVX512
    return avx2;
#endif
    if (&variant == &kAvx2) return avx2;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (&variant == &kAvx512) return avx512;
    const bool codes = avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
    if (&variant == &kAvx512Vnni) return codes;
    const bool dots = codes && __builtin_cpu_supports("avx512bf16");
#ifdef KERNELS_AMX
    if (&variant == &kAmx) return dots && may_use_tiles();
#endif
    return dots;
}

// Activations of a tile that are worth a second thread, where they become units.
constexpr int64_t kWorthPlaces = 1 << 13;

int64_t panels_of(const Weight &weight) { return (weight.out_features + kColumns - 1) / kColumns; }

// Panels of a part at least, so that a thread is worth waking; an even number, as some products read two at a time.
int64_t panels_at_once(const Weight &weight, int64_t rows) {
    const int64_t work = 2 * rows * weight.steps * kStepPlaces * kColumns;
    return 2 * std::max<int64_t>(1, kWorthThreads / std::max<int64_t>(1, work));
}

// Rows up to which memory is what a product waits for.
constexpr int64_t kReadAheadRows = 16;

// The codes that were read after those of a weight the last time: the products of a model follow each other in one order.
// Weights are known by their addresses, at which nobody looks; one may push another out.
class Order {
public:
    // Notes that `weight` is read now for so many rows, and says what to read after it.
    void next(const Weight &weight, int64_t rows, int threads) {
        Codes &after = entries_[place_of(previous_)];
        after = {previous_, weight.codes, weight.steps * kStepBytes[weight.coding], panels_of(weight), panels_at_once(weight, rows)};
        previous_ = &weight;
        const Codes &next = entries_[place_of(&weight)];
        if (next.after == &weight) Pool::shared().reads_next(next.begin, next.panel_bytes, threads, next.panels, next.at_once);
    }

private:
    struct Codes { const void *after; const uint8_t *begin; int64_t panel_bytes, panels, at_once; };
    static constexpr int kBits = 12;
    static size_t place_of(const void *weight) {
        return size_t(uint64_t(reinterpret_cast<uintptr_t>(weight)) * 0x9E3779B97F4A7C15u >> (64 - kBits));
    }
    std::vector<Codes> entries_ = std::vector<Codes>(1 << kBits);
    const void *previous_ = nullptr;
};

// To be called before each product, after all that is computed for it: who waits in between would read too early.
void read_ahead(const Weight &weight, int64_t rows, int threads) {
    if (rows > kReadAheadRows) return;
    static thread_local Order order;
    order.next(weight, rows, threads);
}

// y = x W^T by dot instructions or tiles. x: [count][in_features], y: [count][out_features], of bfloat16.
void multiply_by_dots(const Weight &weight, const Dots &dots, const UnitCounts &counts, const uint16_t *x, int64_t count,
                      uint16_t *y, int32_t threads) {
    static thread_local Buffer x_buffer, scales_buffer, offsets_buffer, sums_buffer, outliers_buffer;
    const int64_t outlier_words = (weight.steps * kStepPlaces + 63) / 64;
    WritableUnits to{count, counts.units, counts.blocks, weight.groups, nullptr, nullptr, nullptr, nullptr, {}};
    to.x = reinterpret_cast<uint32_t *>(x_buffer.floats(count * counts.units + counts.spare));
    if (counts.eight) {
        Outliers &outliers = to.outliers;
        outliers.words = outlier_words, outliers.x = x;
        const int64_t words = count * (outlier_words + outliers.num_any());
        outliers.places = reinterpret_cast<uint64_t *>(outliers_buffer.floats(2 * words + count));
        outliers.any = outliers.places + count * outlier_words;
        outliers.counts = reinterpret_cast<int32_t *>(outliers.places + words);
        to.scales = scales_buffer.floats(count * counts.blocks + counts.spare);
        to.offsets = reinterpret_cast<int32_t *>(offsets_buffer.floats(count * counts.blocks + counts.spare));
        if (weight.zeros) to.sums = sums_buffer.floats(count * weight.groups + counts.spare);
    }
    struct Rows { int64_t first, count; };
    std::vector<Rows> tiles;
    each_tile_of(count, counts.tile, [&](int64_t row, int64_t size) { tiles.push_back({row, size}); });
    const bool worth = tiles[0].count * weight.steps * kStepPlaces >= kWorthPlaces;
    Pool::shared().run(threads, int64_t(tiles.size()), worth ? 1 : 2, [&](int64_t first, int64_t last) {
        static thread_local Buffer scratch;
        float *own = scratch.floats(unit_scratch_floats(weight));
        for (int64_t tile = first; tile < last; tile++)
            dots.prepare(weight, x, tiles[tile].first, tiles[tile].count, own, to);
    });
    const Units units{count, counts.tile, to.units, to.blocks, to.groups, to.x, to.scales, to.offsets, to.sums, to.outliers, y};
    read_ahead(weight, count, threads);
    Pool::shared().run(threads, panels_of(weight), panels_at_once(weight, count), [&](int64_t first, int64_t last) {
        static thread_local Buffer scratch;
        dots.multiply(weight, units, first, last, scratch.floats(dots.scratch_floats(count)));
    });
}

}  // namespace

const bool kAsksForLines = !reads_ahead();

const Variant &variant_of(int32_t index) { return *variants()[index]; }

}  // namespace kernels

using namespace kernels;

extern "C" {

// The digest of the sources that this was built from.
EXPORT const char *kernels_sources() { return KERNELS_SOURCES; }

// The name of variant `index`, or null beyond the last; `runs`: whether this processor executes it.
EXPORT const char *kernels_variant(int32_t index, int32_t *runs) {
    if (index < 0 || index >= int32_t(variants().size())) return nullptr;
    *runs = supported(*variants()[index]);
    return variants()[index]->name;
}

// One more variant, which is `avx512_bf16` with these tiles: for tests, before anything else is asked. The first, since it is the last
// that anyone should choose.
EXPORT void kernels_add_tiles(const char *name, const Dots *tiles) {
    variants().insert(variants().begin(), new Variant(with_dots(strdup(name), &kDotsOfMadeCodes, &kDotsOfNumbers, tiles)));
}

// Whether a variant has dot instructions or tiles for bfloat16 activations and codes, which makes 8-bit integers of activations; and for
// numbers.
EXPORT int32_t kernels_dots_of_codes(int32_t variant) { return variants()[variant]->codes != nullptr; }
EXPORT int32_t kernels_dots_of_numbers(int32_t variant) { return variants()[variant]->numbers != nullptr; }

// The coding that a variant wants for codes of a table.
EXPORT int32_t kernels_table_coding(int32_t variant) { return variants()[variant]->table; }

// y = x W^T. x: [rows][in_features] of `x_type`; y: [rows][out_features], of the same type.
EXPORT void kernels_multiply(const Weight *weight, int32_t variant, const void *x, int32_t x_type, int64_t rows, void *y,
                      int32_t threads) {
    static thread_local Buffer spread_buffer, sums_buffer;
    const Variant &use = *variants()[variant];
    const Float type = Float(x_type);
    const int64_t x_bytes = type == kF32 ? 4 : 2;
    // Rows one after another at a power of two would share few places of a cache.
    const int64_t stride = weight->steps * kStepPlaces + 16;
    const bool has_sums = weight->coding >= kInt2 && weight->coding <= kInt4;
    for (int64_t begin = 0; begin < rows; begin += kRowsAtOnce) {
        const int64_t count = std::min(kRowsAtOnce, rows - begin);
        const char *from = static_cast<const char *>(x) + begin * weight->in_features * x_bytes;
        char *to = static_cast<char *>(y) + begin * weight->out_features * x_bytes;
        UnitCounts counts;
        const Dots *dots = nullptr;
        if (type == kBf16)
            for (const Dots *each : {use.tiles, use.codes, use.numbers})
                if (!dots && each && each->counts(*weight, count, &counts)) dots = each;
        if (dots) {
            multiply_by_dots(*weight, *dots, counts, reinterpret_cast<const uint16_t *>(from), count, reinterpret_cast<uint16_t *>(to),
                             threads);
            continue;
        }
        float *spread = spread_buffer.floats(count * stride);
        float *sums = has_sums ? sums_buffer.floats(count * weight->groups) : nullptr;
        const int64_t grain = std::max<int64_t>(1, kWorthThreads / 4 / std::max<int64_t>(1, weight->in_features));
        Pool::shared().run(threads, count, grain, [&](int64_t first, int64_t last) {
            use.spread(*weight, from, type, first, last, stride, spread, sums);
        });
        const Rows activations{count, stride, spread, sums, type == kF32 ? reinterpret_cast<float *>(to) : nullptr,
                               type == kF32 ? nullptr : reinterpret_cast<uint16_t *>(to)};
        read_ahead(*weight, count, threads);
        Pool::shared().run(threads, panels_of(*weight), panels_at_once(*weight, count), [&](int64_t first, int64_t last) {
            static thread_local Buffer scratch;
            use.multiply(*weight, activations, first, last, scratch.floats(scratch_floats(count)));
        });
    }
}

// x, y: [rows][size] of `type`; weight: [weight_rows][size].
EXPORT void kernels_rms_norm(int32_t variant, const void *x, const void *weight, void *y, int32_t type, int64_t rows,
                             int64_t size, int64_t weight_rows, float eps, int32_t threads) {
    each_row(threads, rows, size, [&](int64_t first, int64_t last) {
        variant_of(variant).layer->rms_norm(x, weight, y, type, size, weight_rows, eps, first, last);
    });
}

// x: [rows][2 * size]; y: [rows][size].
EXPORT void kernels_silu_and_mul(int32_t variant, const void *x, void *y, int32_t type, int64_t rows, int64_t size,
                                 int32_t threads) {
    each_row(threads, rows, 4 * size, [&](int64_t first, int64_t last) {
        variant_of(variant).layer->silu_and_mul(x, y, type, size, first, last);
    });
}

EXPORT void kernels_rotate(int32_t variant, const void *x, const float *cos, const float *sin, void *y, int32_t type,
                           int64_t tokens, int64_t heads, int64_t dim, int64_t stride, int32_t threads) {
    each_row(threads, tokens, heads * dim, [&](int64_t first, int64_t last) {
        variant_of(variant).layer->rotate(x, cos, sin, y, type, heads, dim, stride, first, last);
    });
}

// k, v: [tokens][heads][dim], `k_stride` and `v_stride` elements from one token to the next; the caches: see Attention.
EXPORT void kernels_store_kv(const void *k, const void *v, void *keys, void *values, const int64_t *slots, int32_t type,
                             int64_t tokens, int64_t k_stride, int64_t v_stride, int64_t heads, int64_t dim,
                             int64_t block_size) {
    if (type == kF32)
        store_tokens(static_cast<const float *>(k), static_cast<const float *>(v), static_cast<float *>(keys),
                     static_cast<float *>(values), slots, tokens, k_stride, v_stride, heads, dim, block_size);
    else
        store_tokens(static_cast<const uint16_t *>(k), static_cast<const uint16_t *>(v), static_cast<uint16_t *>(keys),
                     static_cast<uint16_t *>(values), slots, tokens, k_stride, v_stride, heads, dim, block_size);
}

EXPORT void kernels_round_columns(int32_t variant, const Columns *run, int32_t threads) {
    const int64_t parts = (run->outputs + kColumnOutputs - 1) / kColumnOutputs;
    const int64_t grain = std::max<int64_t>(1, kWorthThreads / (kColumnOutputs * run->num * run->num));
    Pool::shared().run(threads, parts, grain, [&](int64_t first, int64_t last) {
        variant_of(variant).layer->round_columns(*run, first * kColumnOutputs, std::min(last * kColumnOutputs, run->outputs));
    });
}

EXPORT void kernels_attend(int32_t variant, const Attention *step, int32_t threads) {
    const int64_t group = step->heads / step->kv_heads, tokens = std::max<int64_t>(1, kTileRows / group);
    std::vector<AttentionTile> tiles;
    for (int64_t sequence = 0; sequence < step->sequences; sequence++) {
        const int64_t count = step->starts[sequence + 1] - step->starts[sequence];
        // The last tokens see the most keys, and are begun first.
        for (int64_t token = (count - 1) / tokens * tokens; token >= 0; token -= tokens)
            for (int64_t head = 0; head < step->kv_heads; head++)
                tiles.push_back({sequence, token, std::min(tokens, count - token), head});
    }
    int64_t keys = 0;
    for (int64_t sequence = 0; sequence < step->sequences; sequence++) keys += step->lengths[sequence];
    // Waking a thread costs more than few keys.
    const bool worth = keys * step->head_dim * step->heads > kWorthElements;
    Pool::shared().run(worth ? threads : 1, int64_t(tiles.size()), 1, [&](int64_t first, int64_t last) {
        static thread_local Buffer scratch;
        float *floats = scratch.floats(attention_scratch_floats(step->head_dim, tokens * group));
        for (int64_t tile = first; tile < last; tile++) {
            // Who takes `last` will most likely be this thread.
            const AttentionTile *next = tile + 1 < int64_t(tiles.size()) ? &tiles[tile + 1] : nullptr;
            variant_of(variant).layer->attend(*step, tiles[tile], next, floats, tokens * group);
        }
    });
}
}
