// What the kernels ask of the machine beyond C++: one small function for each instruction, with the section of the
// PTX manual ("PTX ISA", NVIDIA) that describes it. `emulation/ptx_emulated.h` has the same functions for a processor; nothing else differs
// between the two, so the sources of kernels stand once.
//
// BF16 (1 or 0) says whether activations of this module are bfloat16 or float16.
#pragma once

#ifdef EMULATED
#include "ptx_emulated.h"
#else

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void
// The block's dynamic shared memory, 16-byte aligned. All shared memory is of this kind, so that the emulator sees it.
extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
#define SHARED_MEMORY(name) unsigned char* name = dynamic_shared_memory

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }

// "shfl.sync", mode bfly.
DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE u32 shuffle_xor(u32 value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// "shfl.sync", mode idx.
DEVICE u32 shuffle_from(u32 value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// "ld.global.nc": memory that no thread writes while the kernel runs.
template <class T> DEVICE T load_global(const T* p) { return __ldg(p); }

// The same for weights, which are read once: they shall not push activations out of the first cache.
DEVICE uint4 load_once(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
DEVICE uint2 load_once(const uint2* p) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
DEVICE u32 load_once(const u32* p) {
    u32 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

template <class T> DEVICE void store_global(T* p, T value) { *p = value; }
template <class T> DEVICE T load_shared(const T* p) { return *p; }
template <class T> DEVICE void store_shared(T* p, T value) { *p = value; }

// "cp.async" of 16 bytes past the first cache; where `whole` is false, zeros are written and nothing is read.
// Before sm_80 it is an ordinary copy.
DEVICE void copy_async(void* shared, const void* global, bool whole) {
#if __CUDA_ARCH__ >= 800
    u32 to = static_cast<u32>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(whole ? 16 : 0) : "memory");
#else
    *static_cast<uint4*>(shared) = whole ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#endif
}
// "cp.async.commit_group".
DEVICE void copy_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// "cp.async.wait_group": all but the newest N groups of this thread have arrived.
template <int N> DEVICE void copy_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// "ldmatrix", .x4 .trans: lanes 8i to 8i + 7 give the rows of matrix i (8 numbers of 16 bits each); of each
// matrix lane l gets the numbers (rows 2 * (l % 4) and the next, column l / 4).
DEVICE void load_transposed(u32 (&d)[4], const void* row) {
    u32 from = static_cast<u32>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(from) : "memory");
}

// "mma", m16n8k16: c += a b with sums in float32. Fragments as in the manual: with g = lane / 4, t = lane % 4,
// a[0], a[2]: row g, a[1], a[3]: row g + 8, columns 2t, 2t + 1 (a[0], a[1]) and 8 more (a[2], a[3]); b0: rows 2t, 2t + 1 of
// column g, b1: 8 rows further; c[0], c[1]: row g, columns 2t, 2t + 1; c[2], c[3]: row g + 8.
DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    // sm_75 multiplies half as many columns at a time.
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// "prmt", default mode: byte i of the result is the byte of {b, a} that nibble i of `selector` names; bit 3 of a
// nibble: the sign of that byte, eight times.
DEVICE u32 pick_bytes(u32 a, u32 b, u32 selector) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
}

// "lop3" with the table of (a & b) | c.
DEVICE u32 and_or(u32 a, u32 b, u32 c) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// "fma" of two numbers of 16 bits at a time, rounded once.
DEVICE u32 fma2(u32 a, u32 b, u32 c) {
    u32 d;
#if BF16
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
    return d;
}

// "cvt": to the nearest, ties to even. `low` is the first in memory.
DEVICE u32 pack2(float low, float high) {
    u32 d;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#else
    asm("{.reg .b16 a, b; cvt.rn.f16.f32 a, %1; cvt.rn.f16.f32 b, %2; mov.b32 %0, {a, b};}"
        : "=r"(d) : "f"(low), "f"(high));
#endif
    return d;
}
DEVICE float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// "ex2.approx": 2 to the x, within 2 units of the last place; below -126 it is 0.
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// "fma.rn.f32", rounded once. Modules are compiled with --fmad=false: a sum and a product are fused here alone.
DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
DEVICE float inverse_root(float x) { return __fdiv_rn(1.0f, __fsqrt_rn(x)); }
DEVICE float log_exact(float x) { return logf(x); }
DEVICE float exp_exact(float x) { return expf(x); }
DEVICE u32 bits_of(float x) { return __float_as_uint(x); }
DEVICE float float_of(u32 x) { return __uint_as_float(x); }

// Shared memory alone; results do not depend on the order in which threads arrive, since these are integers.
DEVICE void add_shared(u32* p, u32 value) { atomicAdd(p, value); }
DEVICE void add_shared(u64* p, u64 value) { atomicAdd(p, value); }

#endif

DEVICE float bf16_to_float(u16 bits) { return float_of(static_cast<u32>(bits) << 16); }
DEVICE float to_float(u16 bits) {
#if BF16
    return bf16_to_float(bits);
#else
    return half_to_float(bits);
#endif
}
DEVICE u16 from_float(float x) { return static_cast<u16>(pack2(x, x)); }
#define MINUS_INFINITY float_of(0xff800000u)
DEVICE float low_of(u32 pair) { return to_float(static_cast<u16>(pair)); }
DEVICE float high_of(u32 pair) { return to_float(static_cast<u16>(pair >> 16)); }
