# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled extension, or keeps the reason why it is missing for the error message."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from cogview_kernels import _device

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


def call(kernel: str, backend: str, *arguments: Any) -> None:
    """Runs a kernel with PyTorch's number of CPU threads, or on the current stream of the current GPU."""
    if backend == "cpu":
        getattr(native, f"{kernel}_cpu")(*arguments, torch.get_num_threads())
    else:
        getattr(native, f"{kernel}_cuda")(*arguments, _device.current_stream())


# The codes of csrc/common/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
