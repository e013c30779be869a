// What a processor can do at most: bytes read and multiplications of each kind per second. Built by roofs.py.
#include <chrono>
#include <cstdint>
#include <immintrin.h>
#include <sys/syscall.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {

// Independent chains: enough to hide the latency of each instruction, and no more than AVX2 has registers for.
constexpr int kChains = 12;
constexpr int64_t kPage = 4096;

template <class Function>
double seconds(int threads, Function &&function) {
    std::vector<std::thread> workers;
    const auto start = std::chrono::steady_clock::now();
    for (int i = 1; i < threads; i++) workers.emplace_back(function, i);
    function(0);
    for (auto &worker : workers) worker.join();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

template <class V>
void keep(V &value) { asm volatile("" : "+v"(value)); }

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT __attribute__((target("avx2"))) double roof_read(const char *data, int64_t size, int threads) {
    return seconds(threads, [=](int thread) __attribute__((target("avx2"))) {
        const int64_t part = size / threads / kPage * kPage;
        const char *at = data + thread * part, *end = at + part;
        __m256i sum[4] = {};
        for (; at < end; at += 512) {
            // A processor reads ahead by itself within a page: more than the beginning of the next one is in its way.
            if (reinterpret_cast<uintptr_t>(at) % kPage == 0)
                for (int line = 0; line < 4; line++) _mm_prefetch(at + kPage + 64 * line, _MM_HINT_T1);
            for (int i = 0; i < 16; i++)
                sum[i % 4] = _mm256_xor_si256(sum[i % 4], _mm256_loadu_si256((const __m256i *)(at + i * 32)));
        }
        for (auto &each : sum) keep(each);
    });
}

// Seconds of `rounds` rounds of kChains instructions on each thread.
#define ROOF(name, features, type, step)                                                    \
    EXPORT __attribute__((target(features))) double roof_##name(int64_t rounds, int threads) { \
        return seconds(threads, [=](int) __attribute__((target(features))) {                \
            type sum[kChains] = {}, a = {}, b = {};                                         \
            _Pragma("GCC unroll 12") for (int j = 0; j < kChains; j++) keep(sum[j]);        \
            keep(a), keep(b);                                                               \
            for (int64_t i = 0; i < rounds; i++) {                                          \
                _Pragma("GCC unroll 12") for (int j = 0; j < kChains; j++) {                \
                    sum[j] = step;                                                          \
                    keep(sum[j]);                                                           \
                }                                                                           \
            }                                                                               \
        });                                                                                 \
    }

// Products of bytes, of which each two are added up in 16 bits, and their sum: the compiler would take such a product out of the loop.
__attribute__((target("avx2"), always_inline)) inline __m256i add_pairs(__m256i sum, __m256i a, __m256i b) {
    __m256i product;
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), "x"(b));
    return sum;
}

ROOF(avx2, "avx2,fma", __m256, _mm256_fmadd_ps(a, b, sum[j]))
ROOF(pairs, "avx2", __m256i, add_pairs(sum[j], a, b))
ROOF(avx512, "avx512f", __m512, _mm512_fmadd_ps(a, b, sum[j]))
ROOF(bf16, "avx512f,avx512bf16", __m512, _mm512_dpbf16_ps(sum[j], (__m512bh)a, (__m512bh)b))
ROOF(vnni, "avx512f,avx512vnni", __m512i, _mm512_dpbusd_epi32(sum[j], a, b))

#if __has_include(<amxtileintrin.h>)

// The same of tiles, of which eight are all there are: four sums, each of two tiles by two.
#define ROOF_TILES(name, step)                                                                           \
    EXPORT double roof_##name(int64_t rounds, int threads) {                                             \
        syscall(SYS_arch_prctl, 0x1023, 18); /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */               \
        return seconds(threads, [=](int) __attribute__((target("amx-tile,amx-bf16,amx-int8"))) {         \
            alignas(64) uint8_t shapes[64] = {1};                                                        \
            for (int tile = 0; tile < 8; tile++) shapes[16 + 2 * tile] = 64, shapes[48 + tile] = 16;     \
            asm volatile("" : : "r"(shapes) : "memory");                                                 \
            _tile_loadconfig(shapes);                                                                    \
            _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);                                  \
            for (int64_t i = 0; i < rounds; i++) {                                                       \
                _Pragma("GCC unroll 4") for (int j = 0; j < kChains; j += 4) {                           \
                    step(0, 4, 6); step(1, 4, 7); step(2, 5, 6); step(3, 5, 7);                          \
                }                                                                                        \
            }                                                                                            \
            _tile_release();                                                                             \
        });                                                                                              \
    }

ROOF_TILES(amx_bf16, _tile_dpbf16ps)
ROOF_TILES(amx_int8, _tile_dpbsud)

#endif
