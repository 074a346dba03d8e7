// SPDX-License-Identifier: Apache-2.0
#include "layer_norm/layer_norm.h"
#include "norms/single_cpu.h"

namespace cogview {
namespace COGVIEW_ISA {

void layer_norm_fwd_cpu(const NormForward& args, int threads) {
    COGVIEW_DISPATCH_DTYPE(args.shape.dtype, norm_forward<NormKind::kLayer, scalar_t>(args, threads));
}

void layer_norm_bwd_cpu(const NormBackward& args, int threads) {
    COGVIEW_DISPATCH_DTYPE(args.shape.dtype, norm_backward<NormKind::kLayer, scalar_t>(args, threads));
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
