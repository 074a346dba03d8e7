// SPDX-License-Identifier: Apache-2.0
// What the matrix units of Hopper (sm_90a) need: barriers in shared memory, copies, descriptors, products.
//
// Layout of operands in shared memory: rows of 128 bytes (64 elements of 16 bits), whose 16-byte chunks are
// permuted by the row, chunk ^= row & 7 ("128-byte swizzle"). Eight rows are an atom of 1,024 bytes, to which
// operands are aligned. Source: PTX ISA, "Asynchronous warpgroup level matrix instructions".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/host_device.h"

namespace cogview {

constexpr int kSwizzledRow = 128;   // bytes
constexpr int kSwizzleAtom = 1024;  // bytes, eight rows
constexpr int kRowChunks = 8;       // of 16 bytes

// Byte offset of a 16-byte chunk of a row.
COGVIEW_HOST_DEVICE constexpr int swizzled(int row, int chunk) {
    return row * kSwizzledRow + ((chunk ^ (row & 7)) << 4);
}

// Which element of a 64 x N accumulator register `i` of thread `thread` of a warpgroup holds.
COGVIEW_HOST_DEVICE constexpr int accumulator_row(int thread, int i) {
    return thread / 32 * 16 + thread % 32 / 4 + (i & 2 ? 8 : 0);
}
COGVIEW_HOST_DEVICE constexpr int accumulator_column(int thread, int i) {
    return i / 4 * 8 + thread % 4 * 2 + (i & 1);
}

// A tile at a shared address. Groups of eight rows are an atom apart; nothing is wider than an atom, so that
// the other offset is not looked at. Both products read rows of 128 bytes: the one of k has the summed
// dimension along them (K-major), the one of v across them (MN-major, "transposed").
COGVIEW_HOST_DEVICE constexpr uint64_t swizzled_descriptor(uint32_t shared_address) {
    return uint64_t(shared_address >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(kSwizzleAtom >> 4) << 32 |
           uint64_t(1) << 62;
}
constexpr uint64_t kAlongRow = 16 * 2 >> 4;               // 16 elements on, in a row
constexpr uint64_t kAcrossRows = 16 * kSwizzledRow >> 4;  // 16 rows on

#if defined(COGVIEW_EMULATED)
}  // namespace cogview
#include "emulated.h"
namespace cogview {
#elif defined(__CUDACC__)

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return uint32_t(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After the last of them: other threads and the matrix units see them.
__device__ __forceinline__ void barriers_initialized() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Whether the phase with this parity is over.
__device__ __forceinline__ bool barrier_passed(uint32_t barrier, uint32_t parity) {
    uint32_t passed;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(passed)
        : "r"(barrier), "r"(parity)
        : "memory");
    return passed;
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#ifdef COGVIEW_WAIT_CLOCKS  // for debugging: an error instead of a program that hangs
    if (barrier_passed(barrier, parity)) return;
    const long long start = clock64();
    while (!barrier_passed(barrier, parity))
        if (clock64() - start > COGVIEW_WAIT_CLOCKS) __trap();
#else
    while (!barrier_passed(barrier, parity)) {
    }
#endif
}

// Barriers of hardware, by number; 0 is that of __syncthreads.
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// What follows from x is worked out here, not before the loop, where it would take registers all along.
__device__ __forceinline__ void keep_here(int& x) {
    asm volatile("" : "+r"(x));
}

// base + row * stride in one instruction; stride in bytes.
__device__ __forceinline__ const char* row_address(const char* base, uint32_t row, uint32_t stride) {
    uint64_t address;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(address) : "r"(row), "r"(stride), "l"(base));
    return reinterpret_cast<const char*>(address);
}

// 16 bytes from global to shared memory, zeros where not `valid` (then nothing is read).
__device__ __forceinline__ void copy_chunk(uint32_t to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copies_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int PENDING>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// Makes what this thread wrote to shared memory visible to the matrix units.
__device__ __forceinline__ void fence_for_products() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Registers a thread of this warpgroup has from here on.
template <int REGISTERS>
__device__ __forceinline__ void give_registers_back() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- products of a warpgroup

__device__ __forceinline__ void products_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving accesses of an accumulator across this point.
template <int N>
__device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N>
__device__ __forceinline__ void pin(uint32_t (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

#define COGVIEW_WGMMA_D32                                                    \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define COGVIEW_WGMMA_D48                                                              \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define COGVIEW_WGMMA_D64                                                              \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define COGVIEW_F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define COGVIEW_F16(d, i) COGVIEW_F4(d, i), COGVIEW_F4(d, i + 4), COGVIEW_F4(d, i + 8), COGVIEW_F4(d, i + 12)
#define COGVIEW_F32(d) COGVIEW_F16(d, 0), COGVIEW_F16(d, 16)
#define COGVIEW_F48(d) COGVIEW_F32(d), COGVIEW_F16(d, 32)
#define COGVIEW_F64(d) COGVIEW_F48(d), COGVIEW_F16(d, 48)

// Products of one step of 16: `scores` writes or adds a b^T of two tiles in shared memory, `output` adds a b
// with a in registers.
template <typename T, int N>
struct Products;

#define COGVIEW_SCORES(TYPE, N, R, A, B, P)                                                                  \
    static __device__ __forceinline__ void scores(float (&d)[R], uint64_t a, uint64_t b, bool add) {         \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P                                                 \
                     ", 0;\n"                                                                                \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" COGVIEW_WGMMA_D##R \
                     "}, %" #A ", %" #B ", p, 1, 1, 0, 0;\n}\n"                                              \
                     : COGVIEW_F##R(d)                                                                       \
                     : "l"(a), "l"(b), "r"(int(add)));                                                       \
    }
#define COGVIEW_OUTPUT(TYPE)                                                                            \
    static __device__ __forceinline__ void output(float (&d)[32], const uint32_t* a, uint64_t b) {      \
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" COGVIEW_WGMMA_D32 \
                     "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"                                      \
                     : COGVIEW_F32(d)                                                                   \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                             \
    }

template <>
struct Products<__nv_bfloat16, 64> {
    COGVIEW_SCORES("bf16", 64, 32, 32, 33, 34)
    COGVIEW_OUTPUT("bf16")
};
template <>
struct Products<__nv_bfloat16, 96> {
    COGVIEW_SCORES("bf16", 96, 48, 48, 49, 50)
};
template <>
struct Products<__nv_bfloat16, 128> {
    COGVIEW_SCORES("bf16", 128, 64, 64, 65, 66)
};
template <>
struct Products<__half, 64> {
    COGVIEW_SCORES("f16", 64, 32, 32, 33, 34)
    COGVIEW_OUTPUT("f16")
};
template <>
struct Products<__half, 96> {
    COGVIEW_SCORES("f16", 96, 48, 48, 49, 50)
};
template <>
struct Products<__half, 128> {
    COGVIEW_SCORES("f16", 128, 64, 64, 65, 66)
};

#endif  // __CUDACC__

}  // namespace cogview
