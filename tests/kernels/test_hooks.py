# SPDX-License-Identifier: Apache-2.0
"""Whoever listens to a module, or has put something in place of its ``forward``, keeps fused calls off it."""

from __future__ import annotations

from types import MethodType

import pytest
from torch import nn
from torch.nn.modules import module as every_module

from cogview_kernels._hooks import is_unmodified


def _silent(*_):
    return None


OF_ONE = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]
OF_ALL = [
    "register_module_forward_hook",
    "register_module_forward_pre_hook",
    "register_module_full_backward_hook",
    "register_module_full_backward_pre_hook",
]


@pytest.mark.parametrize("name", [*OF_ONE, *OF_ALL])
def test_every_kind_of_hook_counts_while_it_is_there(name):
    module = nn.Linear(2, 2)
    assert is_unmodified(module) is True
    handle = getattr(every_module if name in OF_ALL else module, name)(_silent)
    try:
        assert is_unmodified(module) is False
        assert is_unmodified(module, lambda _: True) is False
    finally:
        handle.remove()
    assert is_unmodified(module) is True


def test_another_forward_counts_unless_it_is_known():
    module = nn.Linear(2, 2)
    module.forward = MethodType(nn.Linear.forward, module)
    assert is_unmodified(module) is False
    assert is_unmodified(module, lambda one: one is module) is True
    assert is_unmodified(module, lambda _: False) is False
