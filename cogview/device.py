# SPDX-License-Identifier: Apache-2.0
"""Where a model runs."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview.launch import own_gpu


def default_device() -> str:
    """``"cuda"`` where an NVIDIA GPU answers, else ``"cpu"``. Each rank of ``torchrun`` has its own GPU."""
    return own_gpu() if torch.cuda.is_available() else "cpu"


def usable_device(device: torch.device | str | None = None) -> str:
    """The name of ``device``, by default the default device; one that cannot be used here is a ValueError."""
    if device is None:
        return default_device()
    name = str(device)
    if name == "cuda":
        name = own_gpu()
    try:
        torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"device {name} cannot be used here: give cpu, cuda, or one GPU such as cuda:1"
        ) from None
    try:
        torch.zeros(1, device=name).item()  # "meta" makes tensors, but there is nothing in them
    except (RuntimeError, AssertionError, ImportError) as error:
        # PyTorch goes on with what its developers need: every device that it has heard of.
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(f"device {name} cannot be used here: {reason}; give cpu or cuda") from None
    return name


def require_values(tensor: Tensor, name: str) -> None:
    """ValueError for a tensor that has no values, as on the meta device, or has them in no plain array."""
    kind = "one that is nested" if tensor.is_nested else f"one of {tensor.layout}"
    if tensor.is_nested or tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got {kind}; convert it, as by to_dense()")
    if tensor.is_meta:
        raise ValueError(f"{name} must be a tensor with values, got one on the meta device, which has none")
