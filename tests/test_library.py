# SPDX-License-Identifier: Apache-2.0
"""How ops are registered."""

from __future__ import annotations

import contextlib

import pytest
import torch

from cogview_kernels import _library


class OnSecondGPU(torch.Tensor):
    device = torch.device("cuda", 1)


@pytest.mark.parametrize(("current", "entered"), [(0, [1]), (1, [])])
def test_an_op_runs_on_the_device_of_its_first_tensor(current, entered, monkeypatch):
    inside = []

    @contextlib.contextmanager
    def device(which):
        inside.append(which.index)
        yield
        inside.clear()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    run = _library._on_its_device(lambda *arguments: (len(arguments), list(inside)))
    assert run(None, torch.ones(2).as_subclass(OnSecondGPU), 0.5) == (3, entered)
    assert run(torch.ones(2)) == (1, [])
