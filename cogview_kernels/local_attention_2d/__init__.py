# SPDX-License-Identifier: Apache-2.0
from cogview_kernels.local_attention_2d.api import local_attention_2d

__all__ = ["local_attention_2d"]
