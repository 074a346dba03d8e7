// SPDX-License-Identifier: Apache-2.0
#include "norms/launch.h"
#include "sandwich_layer_norm/sandwich_layer_norm.h"

namespace cogview {

void sandwich_layer_norm_fwd_cuda(const SandwichForward& args, void* stream) {
    launch_sandwich_forward<NormKind::kLayer>(args, static_cast<cudaStream_t>(stream));
}

void sandwich_layer_norm_bwd_cuda(const SandwichBackward& args, void* stream) {
    launch_sandwich_backward<NormKind::kLayer>(args, static_cast<cudaStream_t>(stream));
}

}  // namespace cogview
