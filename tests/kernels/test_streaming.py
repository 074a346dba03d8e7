# SPDX-License-Identifier: Apache-2.0
"""Norms on the CPU write results that will leave the caches past them: to the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cogview_kernels import _extension, layer_norm, rms_norm, sandwich_layer_norm, sandwich_rms_norm

pytestmark = pytest.mark.skipif(_extension.native is None, reason=_extension.missing_reason)

# Large is a tensor from 4 MiB on, or from a sixteenth of the cache that cores share, which is 30 MiB on the
# largest machine at hand, if its pages are not fresh. A piece is 2 MiB, which is not large on any.
LARGE, PIECE, C = 36 << 20, 2 << 20, 2048
OPS = (layer_norm, rms_norm, sandwich_layer_norm, sandwich_rms_norm)
DTYPES = (torch.float32, torch.bfloat16)


def has_the_bits_of_its_pieces(op, dtype):
    torch.manual_seed(0)
    rows = LARGE // (C * dtype.itemsize)
    inputs = [torch.randn(C).to(dtype).expand(rows, C) * torch.rand(rows, 1).to(dtype)]
    if op in (sandwich_layer_norm, sandwich_rms_norm):
        inputs.append(inputs[0].flip(0))
    weights = [torch.ones(C, dtype=dtype)] * (4 if op is sandwich_layer_norm else len(inputs))

    def run(*given):
        given = [x.detach().requires_grad_() for x in given]
        out = op(*given, *weights)
        out = out if isinstance(out, tuple) else (out,)
        return *(y.detach() for y in out), *torch.autograd.grad(out, given, [y.detach() for y in out])

    pieces = zip(*(x.split(PIECE // (C * dtype.itemsize)) for x in inputs), strict=True)
    expected = [torch.cat(parts) for parts in zip(*(run(*piece) for piece in pieces), strict=True)]
    return all(map(torch.equal, run(*inputs), expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_memory_as_it_comes(op, dtype):
    assert has_the_bits_of_its_pieces(op, dtype)


def test_pages_that_are_used_again():
    """glibc then gives memory that was freed, however large, as it does by itself below 32 MiB."""
    code = (
        "from tests.kernels.test_streaming import DTYPES, OPS, has_the_bits_of_its_pieces as right\n"
        "import torch\n"
        "kept = [torch.ones(9 << 20) for _ in range(12)]\n"
        "del kept\n"
        "assert all(right(op, dtype) for op in OPS for dtype in DTYPES)\n"
    )
    keep = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **keep}, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
