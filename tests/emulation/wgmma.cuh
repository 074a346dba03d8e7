// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/three_region_attention/wgmma.cuh. Copies and products happen when they are waited for,
// as late as they may, so what is read or overwritten too early shows.
#pragma once

#include "cuda_emulation.h"
#include "three_region_attention/swizzle.cuh"

namespace emulation {

struct PendingCopy {
    uint32_t to;
    const void* from;
    bool valid;
};

// One step of 16: a comes from shared memory, or from registers of the warp.
struct PendingProduct {
    float* d;
    const uint32_t* registers;
    uint64_t a, b;
    bool add;
};

struct Pending {
    std::vector<PendingCopy> copies;
    std::vector<PendingProduct> products;
};
inline std::array<Pending, kMaxThreads> pending;
inline std::map<uint32_t, Barrier> shared_barriers;

inline Pending& of_thread() {
    return pending[state.current->number];
}

// Shared memory begins at an address that is a multiple of 128 alone.
constexpr uint32_t kSharedBegin = 128;

inline char* at_shared(uint32_t address) {
    return state.shared + (address - kSharedBegin);
}

inline float value_of(uint16_t bits, __half) {
    __half x;
    std::memcpy(&x, &bits, 2);
    return __half2float(x);
}
inline float value_of(uint16_t bits, __nv_bfloat16) {
    return __bfloat162float({bits});
}

// Element `i` of row `row` of a tile that a descriptor names: see PTX ISA, "Matrix descriptor".
template <typename T>
float element(uint64_t descriptor, int row, int i) {
    if (descriptor >> 62 != 1) fail("wgmma: a descriptor of another swizzle than that of 128 bytes");
    const uint32_t begin = uint32_t(descriptor & 0x3fff) << 4, atoms = uint32_t(descriptor >> 32 & 0x3fff)
                                                                       << 4;
    uint32_t address = begin + row / 8 * atoms + row % 8 * 128 + i * 2;
    address ^= (address >> 7 & 7) << 4;
    uint16_t bits;
    std::memcpy(&bits, at_shared(address), 2);
    return value_of(bits, T{});
}

// This thread's part of d += a b, with b [16, 64] (or its transpose, which rows of shared memory hold).
template <typename T>
void run(const PendingProduct& o) {
    const int thread = state.current->number % 128, lane = thread % kWarp;
    float a[2][16];
    std::array<uint32_t, kWarp> words[4];
    if (o.registers != nullptr)
        for (int i = 0; i < 4; ++i) words[i] = exchange(0xffffffffu, o.registers[i]);
    for (int half = 0; half < 2; ++half)
        for (int k = 0; k < 16; ++k) {
            // PTX ISA, "Register fragments for wgmma.mma_async.m64k16": word 2 (k / 8) + half of lane 4 r + k
            // / 2 % 4.
            if (o.registers == nullptr)
                a[half][k] = element<T>(o.a, thread / kWarp * 16 + lane / 4 + 8 * half, k);
            else
                a[half][k] =
                    value_of(uint16_t(words[half + k / 8 * 2][lane / 4 * 4 + k % 8 / 2] >> k % 2 * 16), T{});
        }
    for (int i = 0; i < 32; ++i) {
        const int half = i / 2 % 2, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float sum = o.add ? o.d[i] : 0.f;
        for (int k = 0; k < 16; ++k)
            sum += a[half][k] *
                   (o.registers == nullptr ? element<T>(o.b, column, k) : element<T>(o.b, k, column));
        o.d[i] = sum;
    }
}

// What runs the products of a thread; they have one type.
inline void (*run_product)(const PendingProduct&) = nullptr;

}  // namespace emulation

namespace cogview {

inline uint32_t shared_address(const void* p) {
    return uint32_t(static_cast<const char*>(p) - emulation::state.shared) + emulation::kSharedBegin;
}
inline void barrier_init(uint32_t barrier, int arrivals) {
    emulation::shared_barriers[barrier] = {arrivals, 0, 0};
}
inline void barriers_initialized() {
    for (auto& of_thread : emulation::pending) of_thread = {};  // a launch that failed may have left some
}
inline void barrier_arrive(uint32_t barrier) {
    auto& b = emulation::shared_barriers.at(barrier);
    if (++b.arrived == b.expected) b.arrived = 0, ++b.generation;
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
    auto& b = emulation::shared_barriers.at(barrier);
    while ((b.generation & 1) == parity) {
        emulation::state.current->waits_for = &b;
        emulation::state.current->generation = b.generation;
        emulation::yield();
        emulation::state.current->waits_for = nullptr;
    }
}
inline void keep_here(int&) {}
inline const char* row_address(const char* base, uint32_t row, uint32_t stride) {
    return base + uint64_t(row) * stride;
}
inline void copy_chunk(uint32_t to, const void* from, bool valid) {
    if (to % 16 != 0 || (valid && uintptr_t(from) % 16 != 0))
        emulation::fail("cp.async: not aligned to 16 bytes");
    emulation::of_thread().copies.push_back({to, from, valid});
}
inline void copies_commit() {}
inline void copies_wait() {
    auto& copies = emulation::of_thread().copies;
    for (const auto& c : copies) {
        char* to = emulation::at_shared(c.to);
        c.valid ? std::memcpy(to, c.from, 16) : std::memset(to, 0, 16);
    }
    copies.clear();
}
inline void fence_for_products() {}
template <int REGISTERS>
void give_registers_back() {}
template <int REGISTERS>
void take_registers() {}
inline float exp2_approximate(float x) {
    const float y = std::exp2(x);
    return y < 1.17549435e-38f ? 0.f : y;
}
inline void products_begin() {}
inline void products_commit() {}
inline void products_wait() {
    auto& products = emulation::of_thread().products;
    for (const auto& product : products) emulation::run_product(product);
    products.clear();
}
template <typename X>
void pin(X&) {}

template <typename T>
struct Products {
    static void scores(float (&d)[32], uint64_t a, uint64_t b, bool add) { push({d, nullptr, a, b, add}); }
    static void output(float (&d)[32], const uint32_t* a, uint64_t b) { push({d, a, 0, b, true}); }
    static void push(const emulation::PendingProduct& product) {
        emulation::run_product = emulation::run<T>;
        emulation::of_thread().products.push_back(product);
    }
};

}  // namespace cogview
