# SPDX-License-Identifier: Apache-2.0
"""Kernels for CogView: three-region attention, Sandwich-LayerNorm, stable softmax, linear cross-entropy.

Needs PyTorch and nothing else. ``python -m cogview_kernels.info`` prints what can run here and why not.
"""

from cogview_kernels.layer_norm import layer_norm
from cogview_kernels.linear_cross_entropy import linear_cross_entropy
from cogview_kernels.sandwich_layer_norm import sandwich_layer_norm
from cogview_kernels.stable_softmax import stable_softmax

__all__ = ["layer_norm", "linear_cross_entropy", "sandwich_layer_norm", "stable_softmax"]
__version__ = "0.1.0"
