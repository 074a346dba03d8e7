# SPDX-License-Identifier: Apache-2.0
from cogview_kernels.decode_step.api import decode_step
from cogview_kernels.decode_step.stack import LayerStack, LayerWeights

__all__ = ["LayerStack", "LayerWeights", "decode_step"]
