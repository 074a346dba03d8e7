// SPDX-License-Identifier: Apache-2.0
// What the attention kernels share: matrix fragments, tiles of rows in shared memory, visible ranges,
// dropout.
//
// A warp owns 16 (or 32) rows of scores and works on a strip of shared memory of its own, so that barriers of
// the block are needed only where tiles change. wmma does not say where a fragment keeps an element. `Places`
// asks, by loading a matrix of its own numbers, and stops the kernel where the answer has another shape than
// the kernels count on. So the same source serves every chip.
#pragma once

#include <mma.h>

#include "common/cuda_types.cuh"
#include "three_region_attention/three_region_attention.h"

namespace cogview {
namespace {

namespace wmma = nvcuda::wmma;

using FragmentA = wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major>;
using FragmentB = wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::row_major>;
using FragmentBT = wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::col_major>;
using Accumulator = wmma::fragment<wmma::accumulator, 16, 16, 16, float>;
static_assert(Accumulator::num_elements == 8, "256 elements over 32 lanes");

constexpr float kLog2e = 1.4426950408889634f;

// From one row of a tile to the next, in halves. Volta reads fragments 16 or 8 bytes a lane, from several
// rows at once. They lie in different banks where the distance is an odd number of 32 bytes. At D = 80 that
// takes 64 bytes of padding; an odd number of 16 bytes is second best.
constexpr int padded_row(int D) {
    return D + (D % 32 == 0 ? 16 : 8);
}
// Beside the columns of a warp's strip.
constexpr int kStripPad = 8;

__device__ __forceinline__ float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
    const __half2 two = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&two);
}

__device__ __forceinline__ uint4 pack(const float* eight) {
    return make_uint4(pack(eight[0], eight[1]), pack(eight[2], eight[3]), pack(eight[4], eight[5]),
                      pack(eight[6], eight[7]));
}

// Where, in its 16 x 16 matrix, a lane's eight elements of an Accumulator lie: in two rows, and in each row
// as two pairs of neighbours. What belongs to a row is so read twice instead of eight times, and two
// neighbours are stored at once.
struct Places {
    int first_row, first_column, row_step, column_step;
    __device__ __forceinline__ int row(int i) const { return first_row + (i & 2 ? row_step : 0); }
    __device__ __forceinline__ int column(int i) const {
        return first_column + (i & 1) + (i & 4 ? column_step : 0);
    }
    // Rounded to fp16.
    __device__ __forceinline__ void store_halves(__half* to, int stride, const Accumulator& from) const {
#pragma unroll
        for (int i = 0; i < 8; i += 2)
            *reinterpret_cast<uint32_t*>(to + row(i) * stride + column(i)) = pack(from.x[i], from.x[i + 1]);
    }
};

// `scratch`: 256 floats of this warp's own.
__device__ __forceinline__ Places find_places(float* scratch) {
    for (int i = threadIdx.x % 32; i < 256; i += 32) scratch[i] = float(i);
    __syncwarp();
    Accumulator numbers;
    wmma::load_matrix_sync(numbers, scratch, 16, wmma::mem_row_major);
    const int first = int(numbers.x[0]);
    Places places = {first / 16, first % 16, int(numbers.x[2]) / 16 - first / 16, int(numbers.x[4]) - first};
#if defined(__CUDA_ARCH__)
    // Known to the compiler the steps cost no registers.
    places.row_step = __CUDA_ARCH__ < 750 ? 2 : 8;
    places.column_step = __CUDA_ARCH__ < 750 ? 4 : 8;
#endif
    bool wrong = false;
#pragma unroll
    for (int i = 0; i < 8; ++i) wrong |= int(numbers.x[i]) != places.row(i) * 16 + places.column(i);
    // By a vote: after a branch that lanes may take apart the compiler would have them meet at each barrier.
    if (__any_sync(kAllLanes, wrong)) __trap();
    __syncwarp();
    return places;
}

// Hands the 16 x 16 matrix of `from` to `use(row, column, values)`, eight values of a row a lane.
// `scratch`: 320 floats of this warp's own.
template <typename F>
__device__ __forceinline__ void by_rows(const Accumulator& from, float* scratch, F use) {
    wmma::store_matrix_sync(scratch, from, 20, wmma::mem_row_major);
    __syncwarp();
    const int row = threadIdx.x % 32 / 2, column = threadIdx.x % 2 * 8;
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(scratch + row * 20 + column + i);
        values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    }
    use(row, column, values);
    __syncwarp();
}

// ROWS rows of D halves on their way from device memory to shared memory, in the registers of THREADS
// threads: fetched while the tile before is worked on.
template <int ROWS, int D, int THREADS>
struct Carrier {
    static constexpr int kRowChunks = D / 8;
    static constexpr int kChunks = ROWS * kRowChunks;
    static constexpr int kPerThread = (kChunks + THREADS - 1) / THREADS;
    uint4 chunks[kPerThread];

    // Where the rows of this thread's chunks lie, kNowhere for a row of zeros.
    struct Positions {
        int at[kPerThread];

        template <typename F>
        __device__ __forceinline__ void find(F position) {
#pragma unroll
            for (int i = 0; i < kPerThread; ++i) {
                const int chunk = threadIdx.x + i * THREADS;
                at[i] = chunk < kChunks ? position(chunk / kRowChunks) : kNowhere;
            }
        }
        __device__ __forceinline__ void put(int* to) const {
#pragma unroll
            for (int i = 0; i < kPerThread; ++i) {
                const int chunk = threadIdx.x + i * THREADS;
                if (chunk < kChunks && chunk % kRowChunks == 0) to[chunk / kRowChunks] = at[i];
            }
        }
    };

    __device__ __forceinline__ void fetch(const __half* from, int64_t stride, const Positions& positions) {
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
            const int column = (threadIdx.x + i * THREADS) % kRowChunks * 8, at = positions.at[i];
            chunks[i] = make_uint4(0, 0, 0, 0);
            if (at != kNowhere) chunks[i] = *reinterpret_cast<const uint4*>(from + at * stride + column);
        }
    }
    template <typename F>
    __device__ __forceinline__ void fetch(const __half* from, int64_t stride, F position) {
        Positions positions;
        positions.find(position);
        fetch(from, stride, positions);
    }

    // `row`: from one row to the next.
    __device__ __forceinline__ void put(__half* to, int row) const {
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
            const int chunk = threadIdx.x + i * THREADS;
            if (chunk < kChunks)
                *reinterpret_cast<uint4*>(to + chunk / kRowChunks * row + chunk % kRowChunks * 8) = chunks[i];
        }
    }
};

// The keys that a tile of queries [first, last] walks over, TILE at a time: the pivots left of the last
// query's window and, where the layout is not causal, those after the first query's window, as one row; then
// the window from that of the first query up to that of the last one. Tiles need a mask only at the ends of
// the pivots, on the diagonal, and where the tile's queries have different windows. A tile whose queries all
// lie before their sample walks over no keys: `tiles` is 0.
template <int TILE, bool CAUSAL>
struct KeyWalk {
    const int32_t* sorted_pivots;
    int far, far_for_all;  // pivots that some query sees; how many of the first of them all see
    int window_start, window_last, window_start_of_last, window_last_of_first;
    int far_tiles, tiles;
    // Not causal: from place `prefix` on `gap` pivots of the list are left out, those from `suffix_for_all`
    // on are seen by all.
    int prefix, gap, suffix_for_all;

    __device__ __forceinline__ KeyWalk(const Attention& a, int b, int first, int last)
        : sorted_pivots(a.sorted_pivots + int64_t(b) * a.layout.P) {
        const int P = a.layout.P, T = a.shape.T, origin = a.layout.origin_of(b, T);
        window_start = a.layout.window_start(first, origin);
        window_start_of_last = a.layout.window_start(last, origin);
        window_last = a.layout.window_last(last, origin, T, CAUSAL);
        window_last_of_first = a.layout.window_last(first, origin, T, CAUSAL);
        far = pivots_before(sorted_pivots, P, window_start_of_last);
        far_for_all =
            window_start == window_start_of_last ? far : pivots_before(sorted_pivots, P, window_start);
        if (!CAUSAL) {
            // Where the windows of the queries lie apart, nothing is left out, and nothing comes twice.
            prefix = far;
            const int suffix = max(far, pivots_before(sorted_pivots, P, window_last_of_first + 1));
            gap = suffix - prefix;
            far = pivots_before(sorted_pivots, P, T) - gap;  // less the padding
            suffix_for_all = pivots_before(sorted_pivots, P, window_last + 1) - gap;
        }
        far_tiles = (far + TILE - 1) / TILE;
        tiles = far_tiles + (window_last - window_start + TILE) / TILE;
        if (last < origin) tiles = 0;
    }
    __device__ __forceinline__ bool is_far(int tile) const { return tile < far_tiles; }
    __device__ __forceinline__ bool is_full(int tile) const {
        if (is_far(tile)) {
            const bool in_suffix = !CAUSAL && tile * TILE >= suffix_for_all && (tile + 1) * TILE <= far;
            return (tile + 1) * TILE <= far_for_all || in_suffix;
        }
        const int key = window_start + (tile - far_tiles) * TILE;
        return key >= window_start_of_last && key + TILE - 1 <= window_last_of_first;
    }
    __device__ __forceinline__ int position(int tile, int row) const {
        if (is_far(tile)) {
            const int slot = tile * TILE + row;
            if (slot >= far) return kNowhere;
            return sorted_pivots[CAUSAL || slot < prefix ? slot : slot + gap];
        }
        const int key = window_start + (tile - far_tiles) * TILE + row;
        return key <= window_last ? key : kNowhere;
    }
};

}  // namespace
}  // namespace cogview
