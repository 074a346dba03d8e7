# SPDX-License-Identifier: Apache-2.0
from cogview_kernels.sandwich_rms_norm.api import sandwich_rms_norm

__all__ = ["sandwich_rms_norm"]
