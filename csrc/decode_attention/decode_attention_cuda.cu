// SPDX-License-Identifier: Apache-2.0
// Launches; the kernels are in decode.cuh.
#include <algorithm>
#include <stdexcept>

#include "common/cuda_check.h"
#include "decode_attention/decode.cuh"
#include "decode_attention/decode_attention.h"

namespace cogview {
namespace {

template <typename T>
struct CudaType {
    using type = float;
};
template <>
struct CudaType<Half> {
    using type = __half;
};
template <>
struct CudaType<BFloat16> {
    using type = __nv_bfloat16;
};

template <typename T, int LANES, int ROWS>
void launch(const DecodeAttention& a, cudaStream_t stream) {
    const int64_t rows = int64_t(a.H / a.Hkv) * a.Tq;
    const int64_t blocks = a.splits * ((rows + ROWS - 1) / ROWS) * a.Hkv * a.B;
    if (blocks > 0x7fffffff || int64_t(a.B) * a.H * a.Tq > 0x7fffffff)
        throw std::runtime_error("decode_attention_kernel: more than 2^31 blocks; split the batch");
    decode_attention_kernel<T, LANES, ROWS><<<unsigned(blocks), kDecodeThreads, 0, stream>>>(a);
    check_launch("decode_attention_kernel");
}

template <typename T, int LANES>
void pick_rows(const DecodeAttention& a, cudaStream_t stream) {
    if (a.H == a.Hkv && a.Tq == 1)
        launch<T, LANES, 1>(a, stream);
    else
        launch<T, LANES, 4>(a, stream);
}

template <typename T>
void run(const DecodeAttention& a, cudaStream_t stream) {
    if (a.D <= 32)
        pick_rows<T, 4>(a, stream);
    else if (a.D <= 64)
        pick_rows<T, 8>(a, stream);
    else if (a.D <= 128)
        pick_rows<T, 16>(a, stream);
    else
        pick_rows<T, 32>(a, stream);
    if (a.splits == 1) return;
    decode_attention_merge_kernel<T><<<unsigned(a.B * a.H * a.Tq), kDecodeThreads, 0, stream>>>(a);
    check_launch("decode_attention_merge_kernel");
}

}  // namespace

int64_t decode_attention_keys(const DecodeAttention& a) {
    return a.w == 0 ? a.S : a.P + std::min<int64_t>(a.S, int64_t(a.w) * a.W + a.Tq);
}

void decode_attention_cuda(const DecodeAttention& args, void* stream) {
    if (args.B == 0 || args.H == 0 || args.Tq == 0) return;
    if (args.D < 8 || args.D > 256 || args.D % 8 != 0)
        throw std::invalid_argument("decode_attention: the head size must be a multiple of 8 up to 256");
    if (int64_t(args.chunk) * args.splits < decode_attention_keys(args))
        throw std::invalid_argument("decode_attention: chunk * splits does not reach all keys");
    COGVIEW_DISPATCH_DTYPE(args.dtype,
                           run<typename CudaType<scalar_t>::type>(args, static_cast<cudaStream_t>(stream)));
}

}  // namespace cogview
