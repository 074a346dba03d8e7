# SPDX-License-Identifier: Apache-2.0
"""Kernels for CogView: attention in three regions and in windows of a raster, decoding over a cache,
Sandwich-LayerNorm and Sandwich-RMSNorm, stable softmax, linear cross-entropy.

The package needs PyTorch and nothing else. ``python -m cogview_kernels.info`` prints what can run here, and
why the rest cannot.
"""

from cogview_kernels.decode_attention import decode_attention
from cogview_kernels.decode_linear import decode_linear
from cogview_kernels.decode_step import LayerStack, LayerWeights, decode_step
from cogview_kernels.layer_norm import layer_norm
from cogview_kernels.layout import ThreeRegionLayout, ThreeRegionPlan
from cogview_kernels.linear_cross_entropy import linear_cross_entropy
from cogview_kernels.local_attention_2d import local_attention_2d
from cogview_kernels.merge_attention import merge_attention
from cogview_kernels.rms_norm import rms_norm
from cogview_kernels.sandwich_layer_norm import sandwich_layer_norm
from cogview_kernels.sandwich_rms_norm import sandwich_rms_norm
from cogview_kernels.stable_softmax import stable_softmax
from cogview_kernels.three_region_attention import three_region_attention

__all__ = [
    "LayerStack",
    "LayerWeights",
    "ThreeRegionLayout",
    "ThreeRegionPlan",
    "decode_attention",
    "decode_linear",
    "decode_step",
    "layer_norm",
    "linear_cross_entropy",
    "local_attention_2d",
    "merge_attention",
    "rms_norm",
    "sandwich_layer_norm",
    "sandwich_rms_norm",
    "stable_softmax",
    "three_region_attention",
]
__version__ = "0.1.0"
