// SPDX-License-Identifier: Apache-2.0
// CUDA on the host, as much of it as the kernels under csrc/ use: they are compiled by a C++ compiler against
// this header and run, thread by thread, on the CPU. What it is for, and what it checks, is told in
// tests/emulation/__init__.py. It is neither complete nor fast.
//
// Every thread of a block is a coroutine with a stack of its own; a block's threads run one at a time, each
// until it waits at a barrier. Blocks run one after the other. So nothing here needs a lock.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Blocks run one after the other, so one copy per kernel serves.
#define __shared__ static

// ---- vector types

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
#define EMULATED_VECTORS(T, name, size)                      \
    struct __attribute__((aligned(sizeof(T) * 2))) name##2 { \
        T x, y;                                              \
    };                                                       \
    struct __attribute__((aligned(sizeof(T) * 4))) name##4 { \
        T x, y, z, w;                                        \
    };                                                       \
    inline name##2 make_##name##2(T x, T y) {                \
        return {x, y};                                       \
    }                                                        \
    inline name##4 make_##name##4(T x, T y, T z, T w) {      \
        return {x, y, z, w};                                 \
    }
EMULATED_VECTORS(float, float, 4)
EMULATED_VECTORS(int, int, 4)
EMULATED_VECTORS(unsigned, uint, 4)
#undef EMULATED_VECTORS

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

// ---- runtime API

using cudaStream_t = void*;
enum cudaError_t {
    cudaSuccess,
    cudaErrorInvalidValue,
    cudaErrorInvalidConfiguration,
    cudaErrorIllegalAddress
};
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize,
    cudaFuncAttributePreferredSharedMemoryCarveout
};
enum cudaDeviceAttr {
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor
};

namespace emulation {

constexpr int kWarp = 32, kMaxThreads = 1024;
// CUDA launches 65,535 blocks along y and z. With so few here, what grows with a tensor fails along them in a
// test of small tensors.
constexpr unsigned kMostAlongYAndZ = 8;
constexpr size_t kPage = 4096, kStack = 96 * 1024, kSharedSpace = 256 * 1024;

// Set from Python (tests/emulation/__init__.py).
struct Settings {
    unsigned order = 0;            // 0: threads and blocks by number; else a seed that shuffles both
    int fragment_layout = 0;       // which element of a matrix a lane holds: see wmma below
    int shared_limit = 96 * 1024;  // bytes of shared memory that a block may ask for
};
inline Settings settings;

struct Barrier {
    int expected = 0, arrived = 0;
    uint64_t generation = 0;
};

struct Warp {
    Barrier barrier;
    std::array<std::array<uint64_t, kWarp>, 2> slots;
    std::array<std::array<const void*, 4>, kWarp> operands;
};

struct Thread {
    ucontext_t start;
    jmp_buf context;
    uint3 index;
    int number;
    bool started, done;
    const Barrier* waits_for;
    uint64_t generation;
    unsigned exchanges;  // its parity picks the warp's slots: a lane is never two exchanges ahead
};

struct State {
    std::vector<Thread> threads = std::vector<Thread>(kMaxThreads);
    std::array<Warp, kMaxThreads / kWarp> warps;
    Barrier block_barrier;
    Thread* current = nullptr;
    jmp_buf scheduler;
    sigjmp_buf failed;
    std::string message;
    std::function<void()> body;
    std::array<uint64_t, kMaxThreads> votes;
    int live = 0;
    char* stacks = nullptr;
    char* shared_end = nullptr;
    char* shared = nullptr;
    cudaError_t last_error = cudaSuccess;
    std::map<const void*, int> shared_allowed;
};
inline State state;

[[noreturn]] inline void fail(const std::string& what) {
    state.message = what;
    siglongjmp(state.failed, 1);
}

inline void yield() {
    if (_setjmp(state.current->context) == 0) _longjmp(state.scheduler, 1);
}

// The last thread to arrive calls `complete` before any leaves.
template <typename F>
void wait(Barrier& barrier, F complete) {
    if (++barrier.arrived == barrier.expected) {
        complete();
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    state.current->waits_for = &barrier;
    state.current->generation = barrier.generation;
    yield();
    state.current->waits_for = nullptr;
}

inline void leave(Barrier& barrier) {
    if (--barrier.expected > 0 && barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
}

inline void thread_main() {
    state.body();
    Thread& self = *state.current;
    self.done = true;
    --state.live;
    leave(state.block_barrier);
    leave(state.warps[self.number / kWarp].barrier);
    _longjmp(state.scheduler, 1);
}

__attribute__((noinline)) inline void resume(Thread& thread) {
    state.current = &thread;
    threadIdx = thread.index;
    if (_setjmp(state.scheduler) != 0) return;
    if (thread.started) _longjmp(thread.context, 1);
    thread.started = true;
    setcontext(&thread.start);
}

inline unsigned random_below(unsigned& seed, unsigned n) {
    seed ^= seed << 13, seed ^= seed >> 17, seed ^= seed << 5;
    return seed % n;
}

inline void* map_pages(size_t bytes) {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) throw std::runtime_error("emulation: mmap failed");
    return at;
}

inline void run_block(const dim3& block, size_t shared_bytes, unsigned& seed) {
    const int n = int(block.x * block.y * block.z);
    // The block's shared memory ends at a page that may not be touched, and begins as NaN.
    state.shared = state.shared_end - (shared_bytes + 127) / 128 * 128;
    std::memset(state.shared, 0xff, state.shared_end - state.shared);
    state.live = n;
    state.block_barrier = {n, 0, 0};
    std::vector<Thread*> order(n);
    for (int i = 0; i < n; ++i) {
        Thread& t = state.threads[i];
        t.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
        t.number = i;
        t.started = t.done = false;
        t.waits_for = nullptr;
        t.exchanges = 0;
        getcontext(&t.start);
        t.start.uc_stack.ss_sp = state.stacks + i * kStack + kPage;
        t.start.uc_stack.ss_size = kStack - kPage;
        t.start.uc_link = nullptr;
        makecontext(&t.start, thread_main, 0);
        order[i] = &t;
    }
    for (int w = 0; w * kWarp < n; ++w) state.warps[w].barrier = {std::min(kWarp, n - w * kWarp), 0, 0};
    if (settings.order != 0)
        for (int i = n - 1; i > 0; --i) std::swap(order[i], order[random_below(seed, i + 1)]);
    while (state.live > 0) {
        bool moved = false;
        for (Thread* t : order) {
            if (t->done || (t->waits_for != nullptr && t->waits_for->generation == t->generation)) continue;
            resume(*t);
            moved = true;
        }
        if (!moved) fail("deadlock: some threads wait where the others never come");
    }
}

inline void on_fault(int, siginfo_t* info, void*) {
    char text[96];
    std::snprintf(text, sizeof text, "access out of bounds at address %p", info->si_addr);
    fail(text);
}

inline void run(std::function<void()> body, const char* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                const void* key) {
    const size_t threads = size_t(block.x) * block.y * block.z;
    const auto allowed = state.shared_allowed.find(key);
    const size_t limit = allowed == state.shared_allowed.end() ? 48 * 1024 : allowed->second;
    if (threads == 0 || threads > kMaxThreads || shared_bytes > limit || grid.x == 0 || grid.y == 0 ||
        grid.z == 0 || grid.x > 0x7fffffffu || grid.y > kMostAlongYAndZ || grid.z > kMostAlongYAndZ) {
        state.last_error = cudaErrorInvalidConfiguration;
        return;
    }
    if (state.stacks == nullptr) {
        state.stacks = static_cast<char*>(map_pages(kStack * kMaxThreads));
        for (int i = 0; i < kMaxThreads; ++i) mprotect(state.stacks + i * kStack, kPage, PROT_NONE);
        state.shared_end = static_cast<char*>(map_pages(kSharedSpace + kPage)) + kSharedSpace;
        mprotect(state.shared_end, kPage, PROT_NONE);
    }
    static std::vector<char> signal_stack(64 * 1024);
    stack_t alternative = {}, old_alternative;
    alternative.ss_sp = signal_stack.data();
    alternative.ss_size = signal_stack.size();
    struct sigaction action = {}, old_segv, old_bus;
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaltstack(&alternative, &old_alternative);
    sigaction(SIGSEGV, &action, &old_segv);
    sigaction(SIGBUS, &action, &old_bus);

    state.body = std::move(body);
    blockDim = block;
    gridDim = grid;
    state.message.clear();
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    std::vector<uint32_t> block_order(blocks);
    for (uint64_t i = 0; i < blocks; ++i) block_order[i] = uint32_t(i);
    unsigned seed = settings.order;
    if (seed != 0)
        for (uint64_t i = blocks - 1; i > 0; --i)
            std::swap(block_order[i], block_order[random_below(seed, unsigned(i + 1))]);
    if (sigsetjmp(state.failed, 1) == 0) {
        for (const uint32_t b : block_order) {
            blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
            run_block(block, shared_bytes, seed);
        }
    }
    sigaction(SIGSEGV, &old_segv, nullptr);
    sigaction(SIGBUS, &old_bus, nullptr);
    sigaltstack(&old_alternative, nullptr);
    if (!state.message.empty()) {
        char where[128];
        std::snprintf(where, sizeof where, " (block %u,%u,%u thread %u,%u,%u)", blockIdx.x, blockIdx.y,
                      blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
        throw std::runtime_error(std::string(kernel) + ": " + state.message + where);
    }
}

// kernel<<<grid, block, shared, stream>>>(arguments) is rewritten to Launch(kernel, grid, ...)(arguments).
template <typename... P>
struct Launch {
    void (*kernel)(P...);
    const char* name;
    dim3 grid, block;
    size_t shared;
    Launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared = 0,
           cudaStream_t = nullptr)
        : kernel(kernel), name(name), grid(grid), block(block), shared(shared) {}
    void operator()(std::common_type_t<P>... arguments) const {
        run([=, k = kernel] { k(arguments...); }, name, grid, block, shared,
            reinterpret_cast<const void*>(kernel));
    }
};

inline Warp& warp() {
    return state.warps[state.current->number / kWarp];
}
inline int lane() {
    return state.current->number % kWarp;
}

// Every lane gives a value and, when all have, reads those of the others.
template <typename T>
std::array<T, kWarp> exchange(unsigned mask, T value) {
    static_assert(sizeof(T) <= 8);
    Warp& w = warp();
    if (mask != 0xffffffffu) fail("a warp function with part of the lanes is not emulated");
    if (w.barrier.expected != kWarp) fail("a warp function where not all lanes are alive");
    auto& slots = w.slots[state.current->exchanges++ % 2];
    std::memcpy(&slots[lane()], &value, sizeof(T));
    wait(w.barrier, [] {});
    std::array<T, kWarp> all;
    for (int i = 0; i < kWarp; ++i) std::memcpy(&all[i], &slots[i], sizeof(T));
    return all;
}

}  // namespace emulation

inline cudaError_t cudaGetLastError() {
    return std::exchange(emulation::state.last_error, cudaSuccess);
}
inline const char* cudaGetErrorName(cudaError_t e) {
    return e == cudaSuccess                     ? "cudaSuccess"
           : e == cudaErrorInvalidValue         ? "cudaErrorInvalidValue"
           : e == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration"
                                                : "cudaErrorIllegalAddress";
}
inline const char* cudaGetErrorString(cudaError_t e) {
    return cudaGetErrorName(e);
}
template <typename F>
cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value > emulation::settings.shared_limit) return emulation::state.last_error = cudaErrorInvalidValue;
    emulation::state.shared_allowed[reinterpret_cast<const void*>(kernel)] = value;
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? emulation::settings.shared_limit
             : attribute == cudaDevAttrMultiProcessorCount        ? 8
             : attribute == cudaDevAttrComputeCapabilityMajor     ? 7
                                                                  : 0;
    return cudaSuccess;
}

// ---- barriers, warps, atomics on integers, arithmetic

[[noreturn]] inline void __trap() {
    emulation::fail("trap");
}

inline void __syncthreads() {
    emulation::wait(emulation::state.block_barrier, [] {});
}
inline int __syncthreads_or(int predicate) {
    auto& s = emulation::state;
    s.votes[s.current->number] = predicate != 0;
    __syncthreads();
    int any = 0;
    for (unsigned i = 0; i < blockDim.x * blockDim.y * blockDim.z; ++i) any |= int(s.votes[i]);
    __syncthreads();
    return any;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    emulation::exchange(mask, 0);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
    return emulation::exchange(mask, value)[source % emulation::kWarp];
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
    return emulation::exchange(mask, value)[emulation::lane() ^ step];
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int step) {
    const int from = emulation::lane() + step;
    const auto all = emulation::exchange(mask, value);
    return from < emulation::kWarp ? all[from] : value;
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int step) {
    const int from = emulation::lane() - step;
    const auto all = emulation::exchange(mask, value);
    return from >= 0 ? all[from] : value;
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const auto all = emulation::exchange(mask, predicate);
    unsigned bits = 0;
    for (int i = 0; i < emulation::kWarp; ++i) bits |= unsigned(all[i] != 0) << i;
    return bits;
}
inline int __any_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) == 0xffffffffu;
}
inline void __threadfence() {}
inline int atomicAdd(int* at, int value) {
    return std::exchange(*at, *at + value);
}
inline unsigned atomicAdd(unsigned* at, unsigned value) {
    return std::exchange(*at, *at + value);
}
template <typename T>
T __ldcg(const T* at) {
    return *at;
}
template <typename T>
T __ldg(const T* at) {
    return *at;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return unsigned(uint64_t(a) * b >> 32);
}
inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline int __ffs(int x) {
    return __builtin_ffs(x);
}
inline int __float_as_int(float x) {
    int bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline unsigned __float_as_uint(float x) {
    return unsigned(__float_as_int(x));
}
inline float __int_as_float(int bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline float __uint_as_float(unsigned bits) {
    return __int_as_float(int(bits));
}
inline float __expf(float x) {
    return std::exp(x);
}
inline float __logf(float x) {
    return std::log(x);
}
inline float __log2f(float x) {
    return std::log2(x);
}
inline float __fdividef(float x, float y) {
    return x / y;
}
inline float __frcp_rn(float x) {
    return 1.0f / x;
}
inline float __fmaf_rn(float x, float y, float z) {
    return std::fma(x, y, z);
}
inline float rsqrtf(float x) {
    return 1.0f / std::sqrt(x);
}
using std::max;
using std::min;

// ---- 16-bit floats

struct __half {
    _Float16 value;
    __half() = default;
    __half(float x) : value(_Float16(x)) {}
    operator float() const { return float(value); }
};
using half = __half;
struct __attribute__((aligned(4))) __half2 {
    __half x, y;
};
using half2 = __half2;
inline float __half2float(__half x) {
    return float(x.value);
}
inline __half __float2half_rn(float x) {
    return __half(x);
}
inline __half __float2half(float x) {
    return __half(x);
}
inline __half2 __floats2half2_rn(float x, float y) {
    return {__half(x), __half(y)};
}
inline __half2 __halves2half2(__half x, __half y) {
    return {x, y};
}
inline float2 __half22float2(__half2 x) {
    return {float(x.x), float(x.y)};
}
inline float __low2float(__half2 x) {
    return float(x.x);
}
inline float __high2float(__half2 x) {
    return float(x.y);
}

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __attribute__((aligned(4))) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 x) {
    return __uint_as_float(unsigned(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    unsigned bits = __float_as_uint(x);
    if (x != x) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float x) {
    return __float2bfloat16_rn(x);
}
inline float2 __bfloat1622float2(__nv_bfloat162 x) {
    return {__bfloat162float(x.x), __bfloat162float(x.y)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

// ---- matrix fragments, 16 x 16 x 16

namespace nvcuda {
namespace wmma {

struct row_major {};
struct col_major {};
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
    static_assert(M == 16 && N == 16 && K == 16);
    // Operands: lanes l and l + 16 hold row l of a, or column l of b.
    static constexpr int num_elements = std::is_same_v<Use, accumulator> ? 8 : 16;
    T x[num_elements];
};

// Which element of an accumulator lane `lane` holds as x[i]. CUDA leaves it open: a kernel asks, and stops
// where the answer is none that it can use.
//   0: as Volta's quad pairs hold it   1: as mma.m16n8k16 holds it   2: without any pattern
inline void accumulator_place(int lane, int i, int* row, int* column) {
    switch (emulation::settings.fragment_layout) {
        case 0:
            *row = (lane & 1) + (i & 2) + (lane & 16 ? 4 : 0) + (lane & 4 ? 8 : 0);
            *column = (i & 1) + (lane & 2) + (i & 4) + (lane & 8);
            return;
        case 1:
            *row = lane / 4 + (i & 2 ? 8 : 0);
            *column = lane % 4 * 2 + (i & 1) + (i & 4 ? 8 : 0);
            return;
        default: {
            const int place = (lane * 8 + i) * 37 % 256;
            *row = place / 16;
            *column = place % 16;
        }
    }
}

template <typename T>
void check_matrix(const T* at, unsigned ldm) {
    if (reinterpret_cast<uintptr_t>(at) % 32 != 0) emulation::fail("wmma: matrix not aligned to 256 bits");
    if (ldm * sizeof(T) % 16 != 0) emulation::fail("wmma: leading dimension not a multiple of 16 bytes");
}

template <typename T>
void fill_fragment(fragment<accumulator, 16, 16, 16, T>& f, float value) {
    for (T& x : f.x) x = T(value);
}

template <typename Use, typename T, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& f, const T* at, unsigned ldm) {
    check_matrix(at, ldm);
    // a: index 0 is the row, index 1 runs along k; b: the other way round.
    const bool row_major_a = std::is_same_v<Use, matrix_a> == std::is_same_v<Layout, row_major>;
    const int outer = emulation::lane() % 16;
    for (int k = 0; k < 16; ++k) f.x[k] = row_major_a ? at[outer * ldm + k] : at[k * ldm + outer];
}

template <typename T>
void load_matrix_sync(fragment<accumulator, 16, 16, 16, T>& f, const T* at, unsigned ldm, layout_t layout) {
    check_matrix(at, ldm);
    for (int i = 0; i < 8; ++i) {
        int row, column;
        accumulator_place(emulation::lane(), i, &row, &column);
        f.x[i] = layout == mem_row_major ? at[row * ldm + column] : at[column * ldm + row];
    }
}

template <typename T>
void store_matrix_sync(T* at, const fragment<accumulator, 16, 16, 16, T>& f, unsigned ldm, layout_t layout) {
    check_matrix(at, ldm);
    for (int i = 0; i < 8; ++i) {
        int row, column;
        accumulator_place(emulation::lane(), i, &row, &column);
        (layout == mem_row_major ? at[row * ldm + column] : at[column * ldm + row]) = f.x[i];
    }
}

template <typename LayoutA, typename LayoutB, typename T>
void mma_sync(fragment<accumulator, 16, 16, 16, T>& d, const fragment<matrix_a, 16, 16, 16, half, LayoutA>& a,
              const fragment<matrix_b, 16, 16, 16, half, LayoutB>& b,
              const fragment<accumulator, 16, 16, 16, T>& c) {
    using A = fragment<matrix_a, 16, 16, 16, half, LayoutA>;
    using B = fragment<matrix_b, 16, 16, 16, half, LayoutB>;
    using C = fragment<accumulator, 16, 16, 16, T>;
    emulation::Warp& w = emulation::warp();
    if (w.barrier.expected != emulation::kWarp) emulation::fail("wmma: not all lanes are alive");
    w.operands[emulation::lane()] = {&a, &b, &c, &d};
    emulation::wait(w.barrier, [&w] {
        float left[16][16], right[16][16], sum[16][16];
        for (int l = 0; l < 16; ++l)
            for (int k = 0; k < 16; ++k) {
                left[l][k] = float(static_cast<const A*>(w.operands[l][0])->x[k]);
                right[k][l] = float(static_cast<const B*>(w.operands[l][1])->x[k]);
            }
        int row, column;
        for (int l = 0; l < 32; ++l)
            for (int i = 0; i < 8; ++i) {
                accumulator_place(l, i, &row, &column);
                sum[row][column] = float(static_cast<const C*>(w.operands[l][2])->x[i]);
            }
        for (int m = 0; m < 16; ++m)
            for (int k = 0; k < 16; ++k)
                for (int n = 0; n < 16; ++n) sum[m][n] += left[m][k] * right[k][n];
        for (int l = 0; l < 32; ++l)
            for (int i = 0; i < 8; ++i) {
                accumulator_place(l, i, &row, &column);
                static_cast<C*>(const_cast<void*>(w.operands[l][3]))->x[i] = T(sum[row][column]);
            }
    });
}

}  // namespace wmma
}  // namespace nvcuda
