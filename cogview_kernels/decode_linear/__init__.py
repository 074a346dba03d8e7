# SPDX-License-Identifier: Apache-2.0
from cogview_kernels.decode_linear.api import decode_linear

__all__ = ["decode_linear"]
