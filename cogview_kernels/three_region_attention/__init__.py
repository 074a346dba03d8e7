# SPDX-License-Identifier: Apache-2.0
from cogview_kernels.three_region_attention.api import three_region_attention

__all__ = ["three_region_attention"]
