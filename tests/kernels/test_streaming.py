# SPDX-License-Identifier: Apache-2.0
"""Norms on the CPU write results that are too large for the caches past them: to the same bits."""

from __future__ import annotations

import pytest
import torch

from cogview_kernels import _extension, layer_norm, rms_norm, sandwich_layer_norm, sandwich_rms_norm

pytestmark = pytest.mark.skipif(_extension.native is None, reason=_extension.missing_reason)

# Large is a tensor from 4 MiB on, or from an eighth of the cache that cores share, which is 60 MiB on the
# largest machine at hand. A piece is 2 MiB, which is not large on any.
LARGE, PIECE, C = 72 << 20, 2 << 20, 2048


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [layer_norm, rms_norm, sandwich_layer_norm, sandwich_rms_norm])
def test_large_results_have_the_bits_of_their_pieces(op, dtype):
    torch.manual_seed(0)
    rows = LARGE // (C * dtype.itemsize)
    inputs = [torch.randn(C).to(dtype).expand(rows, C) * torch.rand(rows, 1).to(dtype)]
    if op in (sandwich_layer_norm, sandwich_rms_norm):
        inputs.append(inputs[0].flip(0))
    weights = [torch.ones(C, dtype=dtype)] * (4 if op is sandwich_layer_norm else len(inputs))
    pieces = [x.split(PIECE // (C * dtype.itemsize)) for x in inputs]

    def run(*given):
        given = [x.detach().requires_grad_() for x in given]
        out = op(*given, *weights)
        out = out if isinstance(out, tuple) else (out,)
        return *(y.detach() for y in out), *torch.autograd.grad(out, given, [y.detach() for y in out])

    whole = run(*inputs)
    for y, parts in zip(
        whole, zip(*(run(*piece) for piece in zip(*pieces, strict=True)), strict=True), strict=True
    ):
        assert torch.equal(y, torch.cat(parts))
