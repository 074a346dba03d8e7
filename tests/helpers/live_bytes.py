# SPDX-License-Identifier: Apache-2.0
"""How many bytes of tensors live at most while something runs on the CPU."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_live_bytes(run: Callable[[], object]) -> int:
    """The most bytes that PyTorch's CPU allocator has given out at once within ``run()``.

    What was allocated before does not count. PyTorch's profiler sees every allocation, also those inside an
    operator; it sees nothing of what compiled code asks of the system itself.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    live = most = 0
    assert record.profiler is not None
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most
