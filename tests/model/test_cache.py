# SPDX-License-Identifier: Apache-2.0
"""The write of new keys and values into the cache: the kernel for GPUs does what indexing does."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from cogview.model.cache import KVCache
from cogview_kernels import _cache
from tests.helpers.triton_compile import assert_clean, compile_launches, meta

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def buffer_and_view(B, H, S, D, dtype, device):
    """Memory as a cache has it, and ``[B, S, 2, H, D]`` of it."""
    buffer = torch.randn(2, B, H, S, D).to(device, dtype)
    return buffer, buffer.permute(1, 3, 0, 2, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "H", "D"), [(1, 3, 64), (3, 2, 80), (2, 5, 7), (1, 40, 64)])
def test_the_kernel_writes_what_indexing_does(T, H, D, dtype, backend_device):
    device = backend_device("triton")
    buffer, view = buffer_and_view(3, H, 9, D, dtype, device)
    packed = torch.randn(3, T, 3, H, D).to(device, dtype)
    places = torch.tensor([[4], [0], [9 - T]], device=device) + torch.arange(T, device=device)
    expected = buffer.clone()
    rows = torch.arange(3, device=device)[:, None]
    expected.permute(1, 3, 0, 2, 4)[rows, places] = packed[:, :, 1:]
    _cache.write(view, packed[:, :, 1:], places)
    assert torch.equal(buffer, expected)


def test_autograd_is_told_of_the_write(backend_device):
    buffer, view = buffer_and_view(1, 2, 6, 16, torch.float32, backend_device("triton"))
    loss = (buffer * torch.ones_like(buffer, requires_grad=True)).sum()
    places = torch.zeros(1, 1, dtype=torch.int64, device=buffer.device)
    _cache.write(view, torch.ones(1, 1, 2, 2, 16, device=buffer.device), places)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_wrong_place_stays_inside_the_cache(backend_device):
    buffer, view = buffer_and_view(2, 2, 6, 16, torch.float32, backend_device("triton"))
    before = buffer.clone()
    for place in (-1, 6, 2**40):
        places = torch.full((2, 1), place, device=buffer.device)
        _cache.write(view, torch.ones(2, 1, 2, 2, 16, device=buffer.device), places)
    assert torch.equal(buffer, before)


def test_offsets_of_64_bits(backend_device):
    """Places 2^29 numbers apart, in memory that is never touched between them."""
    device = backend_device("triton")
    far = torch.empty(2**31 + 2**10, dtype=torch.bfloat16, device=device)
    view = far.as_strided((1, 5, 2, 2, 8), (0, 2**29, 16, 8, 1))
    new = torch.randn(1, 1, 2, 2, 8, device=device).bfloat16()
    _cache.write(view, new, torch.tensor([[4]], device=device))
    assert torch.equal(view[:, 4:], new)


def test_opcheck(backend_device):
    device = backend_device("triton")
    _, view = buffer_and_view(2, 2, 6, 16, torch.float32, device)
    new, places = torch.ones(2, 1, 2, 2, 16, device=device), torch.tensor([[1], [5]], device=device)
    tests = ("test_schema", "test_faketensor")  # it has no derivative
    torch.library.opcheck(torch.ops.cogview_kernels._write_to_cache, (view, new, places), test_utils=tests)


def test_a_cache_that_the_kernel_fills(backend_device, monkeypatch):
    """Rows of different lengths, step after step."""
    device = backend_device("triton")
    caches = [
        KVCache(num_layers=2, batch=2, num_heads=3, capacity=8, head_size=16, device=device) for _ in range(2)
    ]
    prompt = torch.randn(2, 4, 2, 3, 16, device=device)
    steps = torch.randn(3, 2, 1, 2, 3, 16, device=device)
    for cache, with_kernel in zip(caches, (True, False), strict=True):
        monkeypatch.setattr(_cache, "can_write", lambda *_, answer=with_kernel: answer)
        for new in (prompt, *steps):
            cache.begin(new.shape[1])
            for layer in range(2):
                cache.write(layer, new + layer)
            cache.advance(new.shape[1])
            if new is prompt:
                cache.set_lengths(torch.tensor([4, 2], device=device))
    assert torch.equal(caches[0].buffer, caches[1].buffer) and bool(caches[0].buffer[1, 1, 0, :, 6].all())


class Other(torch.Tensor):
    pass


def test_what_the_kernel_takes(backend_device):
    backend_device("triton")
    new = torch.ones(2, 1, 2, 2, 16)

    def on_a_gpu(stride=1):
        device = torch.device("cuda", 0)
        return SimpleNamespace(is_cuda=True, dtype=torch.float32, device=device, stride=lambda _: stride)

    assert _cache.can_write(on_a_gpu(), new)
    assert not _cache.can_write(torch.ones(2, 6, 2, 2, 16), new)
    assert not _cache.can_write(on_a_gpu(stride=2), new)
    assert not _cache.can_write(on_a_gpu(), new.transpose(-1, -2))
    assert not _cache.can_write(on_a_gpu(), new.half())
    assert not _cache.can_write(on_a_gpu(), new.as_subclass(Other))
    assert not _cache.can_write(on_a_gpu(), new.clone().requires_grad_())
    with torch.no_grad():
        assert _cache.can_write(on_a_gpu(), new.clone().requires_grad_())


@pytest.mark.parametrize("arch", [80, 90])
def test_compiles(arch):
    """Of `base`: 16 bytes a thread, and nothing to wait for but its own loads."""
    from cogview_kernels import _cache_triton

    cache = meta(2, 1, 40, 1088, 64).permute(1, 3, 0, 2, 4)
    new = meta(1, 1, 3, 40, 64)[:, :, 1:]
    reports = compile_launches(_cache_triton.write, arch, cache, new, meta(1, 1, dtype=torch.int64))
    assert_clean(reports)
    (report,) = reports
    assert report.shared == 0 and report.registers <= 40, report
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", report.ptx)) == 1, report
    assert len(re.findall(r"st\.global\S*\.v4\.b32", report.ptx)) == 1, report
