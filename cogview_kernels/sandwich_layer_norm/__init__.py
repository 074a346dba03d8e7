# SPDX-License-Identifier: Apache-2.0
from cogview_kernels.sandwich_layer_norm.api import sandwich_layer_norm

__all__ = ["sandwich_layer_norm"]
