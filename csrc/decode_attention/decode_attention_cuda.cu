// SPDX-License-Identifier: Apache-2.0
// Launches; the kernels are in decode.cuh.
#include <algorithm>
#include <stdexcept>

#include "common/cuda_check.h"
#include "decode_attention/decode.cuh"
#include "decode_attention/decode_attention.h"

namespace cogview {
namespace {

template <typename T, int LANES, int ROWS>
void launch(const DecodeAttention& a, cudaStream_t stream) {
    const DecodeShape& shape = a.shape;
    const int64_t rows = int64_t(shape.H / shape.Hkv) * shape.Tq;
    const int64_t blocks = a.splits * ((rows + ROWS - 1) / ROWS) * shape.Hkv * shape.B;
    const char* name = "decode_attention_kernel";
    decode_attention_kernel<T, LANES, ROWS><<<grid_of(name, blocks), kDecodeThreads, 0, stream>>>(a);
    check_launch(name);
}

template <typename T, int LANES>
void pick_rows(const DecodeAttention& a, cudaStream_t stream) {
    if (a.shape.H == a.shape.Hkv && a.shape.Tq == 1)
        launch<T, LANES, 1>(a, stream);
    else
        launch<T, LANES, 4>(a, stream);
}

template <typename T>
void run(const DecodeAttention& a, cudaStream_t stream) {
    if (a.shape.D <= 32)
        pick_rows<T, 4>(a, stream);
    else if (a.shape.D <= 64)
        pick_rows<T, 8>(a, stream);
    else if (a.shape.D <= 128)
        pick_rows<T, 16>(a, stream);
    else
        pick_rows<T, 32>(a, stream);
}

// How many keys, pivots included, a query may have to look at.
int64_t most_keys(const DecodeAttention& a) {
    const int64_t window = int64_t(a.layout.block_size) * a.layout.window_blocks + a.shape.Tq;
    return a.layout.P + std::min<int64_t>(a.shape.S, window);
}

}  // namespace

void decode_attention_cuda(const DecodeAttention& args, void* stream) {
    const DecodeShape& shape = args.shape;
    if (shape.B == 0 || shape.H == 0 || shape.Tq == 0) return;
    if (shape.D < 8 || shape.D > 256 || shape.D % 8 != 0)
        throw std::invalid_argument("decode_attention: the head size must be a multiple of 8 up to 256");
    if (int64_t(args.chunk) * args.splits < most_keys(args))
        throw std::invalid_argument("decode_attention: chunk * splits does not reach all keys");
    COGVIEW_DISPATCH_DTYPE(args.dtype,
                           run<typename CudaType<scalar_t>::type>(args, static_cast<cudaStream_t>(stream)));
}

}  // namespace cogview
