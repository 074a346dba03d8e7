# SPDX-License-Identifier: Apache-2.0
"""Whether a module may be passed by: a fused call reads the weights of modules that nobody calls then."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def is_unmodified(module: nn.Module, is_ours: Callable[[nn.Module], bool] | None = None) -> bool:
    """Whether a call of the module is its class's ``forward`` alone, and its gradients pass unseen.

    So it is without hooks, on the module or on all modules, of the forward or of the backward pass, and
    without another function in place of ``forward`` but one of which ``is_ours`` says that it is known.
    """
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return False
    if module._backward_pre_hooks or _has_any_global_hook():
        return False
    return "forward" not in module.__dict__ or (is_ours is not None and is_ours(module))
