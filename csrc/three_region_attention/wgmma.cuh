// SPDX-License-Identifier: Apache-2.0
// Instructions of Hopper (sm_90a): barriers in shared memory, copies, products of a warpgroup. A shared
// address is what the instructions take, an integer of 32 bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace cogview {

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
    while (!barrier_passed(barrier, parity)) {
    }
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
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
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
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
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

#define COGVIEW_WGMMA_D                                                      \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define COGVIEW_F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define COGVIEW_F16(d, i) COGVIEW_F4(d, i), COGVIEW_F4(d, i + 4), COGVIEW_F4(d, i + 8), COGVIEW_F4(d, i + 12)
#define COGVIEW_F32(d) COGVIEW_F16(d, 0), COGVIEW_F16(d, 16)

// Products of one step of 16: `scores` writes d = a b^T, or adds it where `add`, of two tiles in shared
// memory (their descriptors: swizzle.cuh); `output` adds a b with a in registers.
template <typename T>
struct Products;

#define COGVIEW_PRODUCTS(T, TYPE)                                                                         \
    template <>                                                                                           \
    struct Products<T> {                                                                                  \
        static __device__ __forceinline__ void scores(float (&d)[32], uint64_t a, uint64_t b, bool add) { \
            asm volatile(                                                                                 \
                "{\n"                                                                                     \
                ".reg .pred p;\n"                                                                         \
                "setp.ne.b32 p, %34, 0;\n"                                                                \
                "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" COGVIEW_WGMMA_D          \
                "}, %32, %33, p, 1, 1, 0, 0;\n"                                                           \
                "}\n"                                                                                     \
                : COGVIEW_F32(d)                                                                          \
                : "l"(a), "l"(b), "r"(int(add)));                                                         \
        }                                                                                                 \
        static __device__ __forceinline__ void output(float (&d)[32], const uint32_t* a, uint64_t b) {    \
            asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" COGVIEW_WGMMA_D \
                         "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"                                    \
                         : COGVIEW_F32(d)                                                                 \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                           \
        }                                                                                                 \
    };
COGVIEW_PRODUCTS(__nv_bfloat16, "bf16")
COGVIEW_PRODUCTS(__half, "f16")

#undef COGVIEW_PRODUCTS
#undef COGVIEW_F32
#undef COGVIEW_F16
#undef COGVIEW_F4
#undef COGVIEW_WGMMA_D

}  // namespace cogview
