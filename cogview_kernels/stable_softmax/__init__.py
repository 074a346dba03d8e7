# SPDX-License-Identifier: Apache-2.0
from cogview_kernels.stable_softmax.api import stable_softmax

__all__ = ["stable_softmax"]
