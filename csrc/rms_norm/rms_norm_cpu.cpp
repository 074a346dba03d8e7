// SPDX-License-Identifier: Apache-2.0
#include "norms/single_cpu.h"
#include "rms_norm/rms_norm.h"

namespace cogview {
namespace COGVIEW_ISA {

void rms_norm_fwd_cpu(const NormForward& args, int threads) {
    COGVIEW_DISPATCH_DTYPE(args.shape.dtype, norm_forward<NormKind::kRms, scalar_t>(args, threads));
}

void rms_norm_bwd_cpu(const NormBackward& args, int threads) {
    COGVIEW_DISPATCH_DTYPE(args.shape.dtype, norm_backward<NormKind::kRms, scalar_t>(args, threads));
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
