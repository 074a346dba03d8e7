# SPDX-License-Identifier: Apache-2.0
from cogview_kernels.rms_norm.api import rms_norm

__all__ = ["rms_norm"]
