// SPDX-License-Identifier: Apache-2.0
#include "norms/sandwich_cpu.h"
#include "sandwich_layer_norm/sandwich_layer_norm.h"

namespace cogview {
namespace COGVIEW_ISA {

void sandwich_layer_norm_fwd_cpu(const SandwichForward& args, int threads) {
    constexpr NormKind kKind = NormKind::kLayer;
    COGVIEW_DISPATCH_DTYPE(args.shape.dtype,
                           !args.dropout.drops()
                               ? sandwich_forward<kKind, false, scalar_t, scalar_t>(args, threads)
                               : sandwich_forward<kKind, true, scalar_t, scalar_t>(args, threads));
}

void sandwich_layer_norm_bwd_cpu(const SandwichBackward& args, int threads) {
    constexpr NormKind kKind = NormKind::kLayer;
    COGVIEW_DISPATCH_DTYPE(args.shape.dtype,
                           !args.dropout.drops()
                               ? sandwich_backward<kKind, false, scalar_t, scalar_t>(args, threads)
                               : sandwich_backward<kKind, true, scalar_t, scalar_t>(args, threads));
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
