# SPDX-License-Identifier: Apache-2.0
"""Integers in GPU memory by which the programs of one launch find out which of them finishes last.

Whoever adds the last arrival to a counter sets it back to zero, so a counter serves any number of launches
that run one after the other, and no launch has to clear it. Launches that may run at the same time must not
share a counter. Three hazards shape this file.

- Calls on two streams run at the same time: each stream of a GPU has counters of its own.
- A CUDA graph keeps the address that was captured, and may be replayed on any stream, beside eager calls and
  beside other graphs. A captured call therefore gets counters that no other call ever gets. They are never
  given back, because a graph does not say when it dies: 4 bytes for each captured counter.
- Memory that is allocated during a capture, or during the warm-up runs of ``torch.compile``'s CUDA graphs,
  comes from the graph's own pool, which is handed to other tensors later, and in which ``torch.compile``
  tolerates no tensor that it does not know. And what clears it would be captured, too: it happens at replays
  alone. So counters are allocated by eager calls, ahead of captures, in a thread of their own (a pool takes
  what one thread or one captured stream allocates), and are zero before anyone gets them.

A capture that no eager call on that GPU preceded, or that uses up what is ahead, clears counters of its own
at each call. Its graph is right, and slower by a memset a call.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from cogview_kernels import _device

# Counters that one stream gets at first, and that wait for captures: 34 graphs of 48 layers with 40 heads.
_OF_A_STREAM, _AHEAD = 1024, 2**16

# A pointer that is a multiple of 16 bytes makes another Triton kernel than one that is not, and during a
# capture nothing can be compiled.
_ALIGNMENT = 4

_of_streams: dict[tuple[torch.device, int], Tensor] = {}
_ahead: dict[torch.device, Tensor] = {}
# Graphs and kernels under way hold addresses, not tensors: whatever was given out outlives everything.
_kept: list[Tensor] = []
_lock = threading.Lock()


def zeroed(n: int, device: torch.device) -> Tensor:
    """At least ``n`` counters at zero, int32, for one call on the current stream of ``device``.

    The call leaves them at zero."""
    if _device.is_capturing(device):
        return _for_capture(n, device)
    stream = device, _device.current_stream(device)
    counters = _of_streams.get(stream)
    if counters is None or counters.numel() < n:
        counters = _of_streams[stream] = _allocate(max(n, _OF_A_STREAM), device)
    if device not in _ahead or _ahead[device].numel() < _AHEAD // 2:
        _ahead[device] = _allocate(_AHEAD, device)
    return counters


def _for_capture(n: int, device: torch.device) -> Tensor:
    size = -(-n // _ALIGNMENT) * _ALIGNMENT
    with _lock:
        ahead = _ahead.get(device)
        if ahead is not None and ahead.numel() >= size:
            _ahead[device] = ahead[size:]
            return ahead[:n]
    return torch.zeros(n, dtype=torch.int32, device=device)


def _allocate(n: int, device: torch.device) -> Tensor:
    """Waits for the default stream: once for each stream, and once for thousands of captured calls."""

    def make() -> None:
        counters = torch.zeros(n, dtype=torch.int32, device=device)
        _device.wait_for_stream(device)
        made.append(counters)

    made: list[Tensor] = []
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    _kept.extend(made)
    return made[0]
