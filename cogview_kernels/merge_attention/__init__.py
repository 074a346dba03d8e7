# SPDX-License-Identifier: Apache-2.0
from cogview_kernels.merge_attention.api import merge_attention

__all__ = ["merge_attention"]
