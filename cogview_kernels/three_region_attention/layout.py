# SPDX-License-Identifier: Apache-2.0
"""To be deleted with the move of three_region_attention to op.py."""

from cogview_kernels.layout import ThreeRegionLayout, ThreeRegionPlan


def check_pivot_values(op, pivots, T):
    ThreeRegionLayout(pivots).check_pivots(op, T)


__all__ = ["ThreeRegionLayout", "ThreeRegionPlan", "check_pivot_values"]
