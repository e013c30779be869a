// The functions of ptx.h for a processor: each written from the same section of the PTX manual as the instruction there.
#pragma once

#include <cmath>
#include <cstring>

#include "device.h"

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

#define DEVICE inline
#define KERNEL void
#define __global__
#define __launch_bounds__(...)
#define threadIdx (emulation::current->index)
#define blockIdx (emulation::block->index)
#define blockDim (emulation::block->threads_in)
#define gridDim (emulation::block->blocks_in)
#define SHARED_MEMORY(name) unsigned char* name = emulation::block->shared.data()

// Where an access stands in the source.
#define PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define HERE file, line

inline void sync_block() { emulation::block->barrier(); }
inline void sync_warp() { emulation::collective<int, int>("sync_warp", 0, [](const int* const*, int**) {}); }

template <class T> T shuffled(T value, int mask) {
    return emulation::collective<T, T>("shuffle_xor", value, [mask](const T* const* in, T** out) {
        for (int lane = 0; lane < 32; lane++) *out[lane] = *in[lane ^ mask];
    });
}
inline float shuffle_xor(float value, int mask) { return shuffled(value, mask); }
inline u32 shuffle_xor(u32 value, int mask) { return shuffled(value, mask); }

inline u32 shuffle_from(u32 value, int lane) {
    struct In { u32 value; int lane; };
    return emulation::collective<In, u32>("shuffle_from", In{value, lane}, [](const In* const* in, u32** out) {
        for (int i = 0; i < 32; i++) *out[i] = in[in[i]->lane]->value;
    });
}

template <class T> T load_global(const T* p, PLACE) {
    emulation::note(emulation::GLOBAL_READ, p, sizeof(T), HERE);
    return *p;
}
template <class T> T load_once(const T* p, PLACE) { return load_global(p, HERE); }
template <class T> void store_global(T* p, T value, PLACE) {
    emulation::note(emulation::GLOBAL_WRITE, p, sizeof(T), HERE);
    *p = value;
}
template <class T> T load_shared(const T* p, PLACE) {
    emulation::note(emulation::SHARED_READ, p, sizeof(T), HERE);
    return *p;
}
template <class T> void store_shared(T* p, T value, PLACE) {
    emulation::note(emulation::SHARED_WRITE, p, sizeof(T), HERE);
    *p = value;
}

// What is copied arrives as late as the manual allows: when the thread waits for its group.
inline void copy_async(void* shared, const void* global, bool whole, PLACE) {
    emulation::note(emulation::SHARED_WRITE, shared, 16, HERE);
    if (whole) emulation::note(emulation::GLOBAL_READ, global, 16, HERE);
    emulation::current->copies.push_back({shared, global, whole, emulation::current->groups});
}
inline void copy_commit() { emulation::current->groups++; }
template <int N> void copy_wait() { emulation::current->finish_copies(N); }

inline void load_transposed(u32 (&d)[4], const void* row, PLACE) {
    emulation::note(emulation::SHARED_READ, row, 16, HERE);
    struct Four { u32 d[4]; };
    Four four = emulation::collective<const void*, Four>("load_transposed", row, [](const void* const* const* in, Four** out) {
        for (int lane = 0; lane < 32; lane++)
            for (int matrix = 0; matrix < 4; matrix++) {
                u16 pair[2];
                for (int i = 0; i < 2; i++)
                    pair[i] = static_cast<const u16*>(*in[8 * matrix + 2 * (lane % 4) + i])[lane / 4];
                std::memcpy(&out[lane]->d[matrix], pair, 4);
            }
    });
    std::memcpy(d, four.d, sizeof d);
}

inline u32 bits_of(float x) { u32 y; std::memcpy(&y, &x, 4); return y; }
inline float float_of(u32 x) { float y; std::memcpy(&y, &x, 4); return y; }

inline float half_to_float(u16 bits) {
    int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float size = exponent == 0 ? std::ldexp(float(mantissa), -24)
                               : std::ldexp(float(mantissa + 1024), exponent - 25);
    if (exponent == 31) size = mantissa ? NAN : INFINITY;
    return bits & 0x8000 ? -size : size;
}
inline u16 half_from_float(double x) {
    u16 sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return 0x7fff;
    double size = std::fabs(x);
    if (size == 0) return sign;
    int exponent = std::max(std::ilogb(size), -14);
    double units = std::nearbyint(std::ldexp(size, 10 - exponent));
    if (units >= 2048) units /= 2, exponent++;
    if (exponent > 15) return sign | 0x7c00;
    return sign | (units < 1024 ? u16(units) : u16((exponent + 15) << 10 | (int(units) - 1024)));
}
// float32 to bfloat16 after a double was rounded once to an odd last place: never rounded twice.
inline u16 bf16_from_float(double x) {
    if (std::isnan(x)) return 0x7fff;
    float f = float(x);
    u32 bits = bits_of(f);
    if (double(f) != x && std::isfinite(f)) {
        if (std::fabs(double(f)) > std::fabs(x)) bits--;
        bits |= 1;
    }
    if (std::isinf(f)) return bits >> 16;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u16 number_from(double x) { return BF16 ? bf16_from_float(x) : half_from_float(x); }
inline float number_of(u16 bits) { return BF16 ? float_of(u32(bits) << 16) : half_to_float(bits); }
inline u32 pack2(float low, float high) { return number_from(low) | u32(number_from(high)) << 16; }

inline u32 fma2(u32 a, u32 b, u32 c) {
    u32 d = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        double exact = double(number_of(a >> shift)) * number_of(b >> shift) + number_of(c >> shift);
        d |= u32(number_from(exact)) << shift;
    }
    return d;
}

// Products and sums are exact here, then rounded to float32; the order of additions in the hardware is not documented.
inline void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    struct In { u32 a[4], b[2]; float c[4]; };
    struct Out { float c[4]; };
    In mine{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
    Out result = emulation::collective<In, Out>("mma", mine, [](const In* const* in, Out** out) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 2; i++) {
                int g = lane / 4, k = 2 * (lane % 4) + i, shift = 16 * i;
                left[g][k] = number_of(in[lane]->a[0] >> shift);
                left[g + 8][k] = number_of(in[lane]->a[1] >> shift);
                left[g][k + 8] = number_of(in[lane]->a[2] >> shift);
                left[g + 8][k + 8] = number_of(in[lane]->a[3] >> shift);
                right[k][g] = number_of(in[lane]->b[0] >> shift);
                right[k + 8][g] = number_of(in[lane]->b[1] >> shift);
            }
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) {
                int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
                double sum = in[lane]->c[i];
                for (int k = 0; k < 16; k++) sum += double(left[row][k]) * right[k][column];
                out[lane]->c[i] = float(sum);
            }
    });
    std::memcpy(c, result.c, sizeof c);
}

inline u32 pick_bytes(u32 a, u32 b, u32 selector) {
    u8 bytes[8];
    std::memcpy(bytes, &a, 4);
    std::memcpy(bytes + 4, &b, 4);
    u32 d = 0;
    for (int i = 0; i < 4; i++) {
        u32 nibble = selector >> 4 * i & 15, byte = bytes[nibble & 7];
        if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
        d |= byte << 8 * i;
    }
    return d;
}
inline u32 and_or(u32 a, u32 b, u32 c) { return (a & b) | c; }

inline float exp2_fast(float x) { return x < -126 ? 0.0f : std::exp2(x); }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline float divide(float a, float b) { return a / b; }
inline float inverse_root(float x) { return 1.0f / std::sqrt(x); }
inline float log_exact(float x) { return std::log(x); }
inline float exp_exact(float x) { return std::exp(x); }
inline void add_shared(u32* p, u32 value) { *p += value; }
inline void add_shared(u64* p, u64 value) { *p += value; }
using std::fmax;
using std::fmin;
