# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the model package's tests."""

from __future__ import annotations

import pytest
import torch

import cogview.data.digits


@pytest.fixture
def default_dtype():
    """``default_dtype(dtype)`` sets PyTorch's default until the test ends."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def one_copy_of_each_digit():
    """Training on an eighth of the digits data: each scan without its altered copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cogview.data.digits, "TRAINING_COPIES", 1)
        yield
