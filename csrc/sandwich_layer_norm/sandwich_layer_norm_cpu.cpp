// SPDX-License-Identifier: Apache-2.0
#include "norms/sandwich_cpu.h"
#include "sandwich_layer_norm/sandwich_layer_norm.h"

namespace cogview {
namespace COGVIEW_ISA {

void sandwich_layer_norm_fwd_cpu(const SandwichForward& args, int threads) {
    sandwich_forward<NormKind::kLayer>(args, threads);
}

void sandwich_layer_norm_bwd_cpu(const SandwichBackward& args, int threads) {
    sandwich_backward<NormKind::kLayer>(args, threads);
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
