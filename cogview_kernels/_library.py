# SPDX-License-Identifier: Apache-2.0
"""Registration under ``torch.ops.cogview_kernels`` by ``define`` + ``impl`` + ``autograd.Function``.

Half the host time of ``torch.library.custom_op``, and the names stay stable for selective checkpointing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("cogview_kernels", "FRAGMENT")


def define(schema: str) -> None:
    # Kernels read strides themselves; without the tag, Inductor may hand them other strides than eager did.
    _library.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Kernels go to the current device and its stream, which tensors on another GPU are not on."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        device = next(x.device for x in arguments if isinstance(x, Tensor))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(*arguments)
        with torch.cuda.device(device):
            return function(*arguments)

    return run


def implement(
    name: str, function: Callable[..., Any], autograd: type[torch.autograd.Function] | None = None
) -> None:
    """``function`` runs on CPU and CUDA; with ``autograd`` the op itself is differentiable."""
    _library.impl(name, _on_its_device(function), "CompositeExplicitAutograd")
    if autograd is not None:
        _library.impl(name, autograd.apply, "Autograd")


def eager(name: str, *arguments: Any) -> Any:
    """Calls the op past its Autograd key: from its own Function, or where nothing needs a gradient.

    The key costs 10 us of host time. Not traceable; under ``torch.compile`` call ``torch.ops`` itself.
    """
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.cogview_kernels, name).default(*arguments)
