# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter as tests/helpers/interpreter.py sets it up."""

from __future__ import annotations

import math

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


def test_types_that_are_made_once_are_told_apart():
    elements = (tl.float32, tl.int32, tl.pointer_type(tl.float32), tl.pointer_type(tl.int32))
    types = [(element, shape) for element in elements for shape in ((8,), (8, 1), (1, 8), (8, 8))]
    for _ in range(2):
        made = [tl.block_type(element, [tl.constexpr(n) for n in shape]) for element, shape in types]
        for (element, shape), block in zip(types, made, strict=True):
            assert block.scalar == element and tuple(block.shape) == shape and block.numel == math.prod(shape)
            tensor = tl.tensor(None, block)
            assert tensor.dtype == element and [n.value for n in tensor.shape] == [*shape]
            assert [other == block for other in made].count(True) == 1
        with pytest.raises(ValueError, match="power of 2"):
            tl.block_type(tl.float32, [3])
