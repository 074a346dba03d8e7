// SPDX-License-Identifier: Apache-2.0
#include "norms/sandwich_cpu.h"
#include "sandwich_rms_norm/sandwich_rms_norm.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

constexpr NormKind kKind = NormKind::kRms;

template <typename B, typename T>
void forward(const SandwichForward& args, int threads) {
    args.dropout.drops() ? sandwich_forward<kKind, true, B, T>(args, threads)
                         : sandwich_forward<kKind, false, B, T>(args, threads);
}

template <typename B, typename T>
void backward(const SandwichBackward& args, int threads) {
    args.dropout.drops() ? sandwich_backward<kKind, true, B, T>(args, threads)
                         : sandwich_backward<kKind, false, B, T>(args, threads);
}

}  // namespace

void sandwich_rms_norm_fwd_cpu(const SandwichForward& args, int threads) {
    if (args.shape.dtype == DType::kFloat32)
        COGVIEW_DISPATCH_DTYPE(args.branch_dtype, forward<scalar_t, float>(args, threads))
    else
        COGVIEW_DISPATCH_DTYPE(args.shape.dtype, forward<scalar_t, scalar_t>(args, threads))
}

void sandwich_rms_norm_bwd_cpu(const SandwichBackward& args, int threads) {
    if (args.shape.dtype == DType::kFloat32)
        COGVIEW_DISPATCH_DTYPE(args.branch_dtype, backward<scalar_t, float>(args, threads))
    else
        COGVIEW_DISPATCH_DTYPE(args.shape.dtype, backward<scalar_t, scalar_t>(args, threads))
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
