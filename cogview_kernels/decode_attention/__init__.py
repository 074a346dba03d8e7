# SPDX-License-Identifier: Apache-2.0
from cogview_kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
