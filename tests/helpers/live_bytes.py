# SPDX-License-Identifier: Apache-2.0
"""How many bytes of tensors live at most while something runs on the CPU."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

# Where a processor has units for 16-bit products, PyTorch's take scratch memory from the same allocator, more
# than their operands; elsewhere none.
_PRODUCTS = frozenset(("aten::addmm", "aten::addmm_", "aten::bmm", "aten::mm"))


def peak_live_bytes(run: Callable[[], object]) -> int:
    """The most bytes that PyTorch's CPU allocator has given out at once within ``run()``.

    What was allocated before does not count, nor what a product takes and gives back. PyTorch's profiler sees
    every allocation, also those inside an operator; it sees nothing of what compiled code asks of the system
    itself.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    assert record.profiler is not None
    events = record.profiler.kineto_results.events()
    products = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.name() in _PRODUCTS
    )
    live = most = place = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        while place < len(products) and products[place][1] < event.start_ns():
            place += 1
            most = max(most, live)  # with the result of the product that has ended
        live += event.nbytes()
        if place == len(products) or event.start_ns() < products[place][0]:
            most = max(most, live)
    return max(most, live)
