# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter as tests/helpers/interpreter.py sets it up."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import HAS_GPU

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(HAS_GPU, reason="kernels are interpreted where no GPU is")


@triton.jit
def _sum_of_exponentials_kernel(x_ptr, out_ptr, fails: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 8))
    tl.static_assert(not fails)
    tl.store(out_ptr, tl.sum(tl.exp(x), axis=0))  # tl.sum is a function of another module


def test_the_language_is_prepared_for_each_launch_and_itself_again_after_it():
    """After one that fails, too."""
    language = lambda: (tl.exp, tl.range, tl.core.reduce, tl.core.tensor.__add__)  # noqa: E731
    before, x, out = language(), torch.randn(8), torch.zeros(1)
    for fails in (False, True, False):
        out.zero_()
        try:
            _sum_of_exponentials_kernel[(1,)](x, out, fails=fails)
        except Exception:
            assert fails
        assert language() == before
        torch.testing.assert_close(out[0], torch.tensor(0.0) if fails else x.exp().sum())
