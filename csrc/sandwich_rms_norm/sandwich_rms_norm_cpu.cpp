// SPDX-License-Identifier: Apache-2.0
#include "norms/sandwich_cpu.h"
#include "sandwich_rms_norm/sandwich_rms_norm.h"

namespace cogview {
namespace COGVIEW_ISA {

void sandwich_rms_norm_fwd_cpu(const SandwichForward& args, int threads) {
    sandwich_forward<NormKind::kRms>(args, threads);
}

void sandwich_rms_norm_bwd_cpu(const SandwichBackward& args, int threads) {
    sandwich_backward<NormKind::kRms>(args, threads);
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
