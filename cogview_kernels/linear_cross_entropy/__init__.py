# SPDX-License-Identifier: Apache-2.0
from cogview_kernels.linear_cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
