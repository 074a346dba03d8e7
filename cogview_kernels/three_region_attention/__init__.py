# SPDX-License-Identifier: Apache-2.0
from cogview_kernels.three_region_attention.api import three_region_attention
from cogview_kernels.three_region_attention.layout import ThreeRegionLayout, ThreeRegionPlan

__all__ = ["ThreeRegionLayout", "ThreeRegionPlan", "three_region_attention"]
