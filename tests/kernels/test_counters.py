# SPDX-License-Identifier: Apache-2.0
"""Who gets which counters. Streams and captures are pretended; GPU tests of their users have real ones."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
import torch

from cogview_kernels import _counters, _device

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_allocated(monkeypatch):
    for name, empty in (("_of_streams", {}), ("_ahead", {}), ("_kept", [])):
        monkeypatch.setattr(_counters, name, empty)


@pytest.fixture
def on(monkeypatch):
    """``on(stream, capturing)`` calls what follows there."""

    def switch(stream=0, capturing=False):
        monkeypatch.setattr(_device, "current_stream", lambda *_: stream)
        monkeypatch.setattr(_device, "is_capturing", lambda *_: capturing)

    switch()
    return switch


def span(counters, n):
    return counters.data_ptr(), counters.data_ptr() + 4 * n


def test_a_stream_keeps_its_counters_and_shares_them_with_none(on):
    first = _counters.zeroed(40, CPU)
    assert _counters.zeroed(100, CPU) is first and first.dtype == torch.int32 and not first.any()
    on(stream=1)
    second = _counters.zeroed(40, CPU)
    assert second is not first
    on(stream=0)
    assert _counters.zeroed(40, CPU) is first
    larger = _counters.zeroed(5000, CPU)
    assert larger.numel() >= 5000 and _counters.zeroed(40, CPU) is larger
    # A kernel may still use the smaller ones.
    assert any(kept is first for kept in _counters._kept)


def test_captured_calls_share_counters_with_none(on):
    eager = _counters.zeroed(40, CPU)
    spans = [span(eager, eager.numel())]
    for stream in (0, 7, 7, 0):
        on(stream, capturing=True)
        for n in (40, 3, 1):
            counters = _counters.zeroed(n, CPU)
            assert counters.numel() >= n and counters.data_ptr() % 16 == 0
            spans.append(span(counters, n))
    assert all(end <= start for (_, end), (start, _) in pairwise(sorted(spans)))


def test_a_capture_allocates_nothing_that_lasts(on):
    on(capturing=True)
    counters = _counters.zeroed(40, CPU)
    assert counters.numel() == 40 and not counters.any()
    assert not _counters._kept and not _counters._ahead and not _counters._of_streams


def test_eager_calls_allocate_ahead_of_captures(on, monkeypatch):
    """What was given out stays in memory; when nothing is left, a capture gets counters of its own."""
    monkeypatch.setattr(_counters, "_AHEAD", 64)
    _counters.zeroed(1, CPU)
    on(capturing=True)
    given = [_counters.zeroed(30, CPU) for _ in range(3)]
    kept = lambda x: any(x.untyped_storage().data_ptr() == y.data_ptr() for y in _counters._kept)  # noqa: E731
    assert [kept(x) for x in given] == [True, True, False]
    on(capturing=False)
    _counters.zeroed(1, CPU)
    on(capturing=True)
    given.append(_counters.zeroed(30, CPU))
    assert [kept(x) for x in given] == [True, True, False, True]


def test_memory_comes_from_a_thread_of_its_own(on, monkeypatch):
    """A pool of a CUDA graph takes what the thread that warms up allocates, and must not get this."""
    makers, zeros = [], torch.zeros

    def noted(*sizes, **options):
        makers.append(threading.current_thread())
        return zeros(*sizes, **options)

    monkeypatch.setattr(torch, "zeros", noted)
    _counters.zeroed(1, CPU)
    assert len(makers) == 2 and threading.current_thread() not in makers
