# SPDX-License-Identifier: Apache-2.0
from cogview_kernels.layer_norm.api import layer_norm

__all__ = ["layer_norm"]
