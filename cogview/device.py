# SPDX-License-Identifier: Apache-2.0
"""Where a model runs."""

from __future__ import annotations

import torch

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
