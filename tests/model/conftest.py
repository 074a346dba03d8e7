# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the model package's tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def default_dtype():
    """``default_dtype(dtype)`` sets PyTorch's default until the test ends."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)
