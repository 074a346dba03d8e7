# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled extension, or keeps the reason why it is missing for the error message."""

from __future__ import annotations

import importlib
from typing import Any

import torch

native: Any = None
missing_reason = ""
has_cuda = False

try:
    native = importlib.import_module("cogview_kernels._C")
    has_cuda = native.has_cuda
except ImportError as error:
    missing_reason = (
        f"the compiled extension cogview_kernels._C could not be loaded ({error}); "
        "build it with `make build` or reinstall the package where a C++ compiler is at hand"
    )

# The codes of csrc/common/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
