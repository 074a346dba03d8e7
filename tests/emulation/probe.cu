// SPDX-License-Identifier: Apache-2.0
// Small kernels, most of them wrong on purpose: tests/test_emulation.py sees whether the emulation notices.
// Each entry gives the error's text, or an empty one.
#include <cuda_fp16.h>
#include <mma.h>

#include "cuda_emulation.h"

using namespace nvcuda;

namespace {

std::string text;

template <typename F>
const char* caught(F launch) {
    text.clear();
    try {
        launch();
    } catch (const std::exception& error) {
        text = error.what();
    }
    return text.c_str();
}

__global__ void probe_product(const __half* a, const __half* b, float* c) {
    wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> fa;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::row_major> fb;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> fc;
    wmma::fill_fragment(fc, 0.0f);
    wmma::load_matrix_sync(fa, a, 16);
    wmma::load_matrix_sync(fb, b, 16);
    wmma::mma_sync(fc, fa, fb, fc);
    wmma::store_matrix_sync(c, fc, 16, wmma::mem_row_major);
}

__global__ void probe_places(const float* numbers, float* out) {
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> f;
    wmma::load_matrix_sync(f, numbers, 16, wmma::mem_row_major);
    for (int i = 0; i < f.num_elements; ++i) out[threadIdx.x * 8 + i] = f.x[i];
}

__global__ void probe_write(float* x, int index) {
    x[index] = 1.0f;
}

__global__ void probe_barrier() {
    threadIdx.x == 0 ? __syncthreads() : __syncwarp();
}

__global__ void probe_shuffle() {
    if (threadIdx.x < 16) __shfl_xor_sync(0xffff, 1, 1);
}

__global__ void probe_misaligned(const float* x) {
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> f;
    wmma::load_matrix_sync(f, x + 4, 16, wmma::mem_row_major);
}

__global__ void probe_shared(float* out, int n) {
    extern __shared__ float raw[];
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = raw[i];
}

// Reads what a neighbour may or may not have written yet.
__global__ void probe_race(float* out) {
    extern __shared__ float raw[];
    raw[threadIdx.x] = float(threadIdx.x);
    out[threadIdx.x] =
        raw[(threadIdx.x + 1) % blockDim.x] == raw[(threadIdx.x + 1) % blockDim.x] ? 1.0f : 0.0f;
}

}  // namespace

#define PROBE extern "C" __attribute__((visibility("default"))) const char*

PROBE probe_run_product(const __half* a, const __half* b, float* c) {
    return caught([=] { probe_product<<<1, 32>>>(a, b, c); });
}
PROBE probe_run_places(const float* numbers, float* out) {
    return caught([=] { probe_places<<<1, 32>>>(numbers, out); });
}
PROBE probe_run_write(float* x, int index) {
    return caught([=] { probe_write<<<1, 1>>>(x, index); });
}
PROBE probe_run_barrier() {
    return caught([] { probe_barrier<<<1, 32>>>(); });
}
PROBE probe_run_shuffle() {
    return caught([] { probe_shuffle<<<1, 32>>>(); });
}
PROBE probe_run_misaligned(const float* x) {
    return caught([=] { probe_misaligned<<<1, 32>>>(x); });
}
PROBE probe_run_shared(float* out, int n, int bytes) {
    return caught([=] { probe_shared<<<1, 32, bytes>>>(out, n); });
}
PROBE probe_run_race(float* out) {
    return caught([=] { probe_race<<<1, 64, 256>>>(out); });
}
