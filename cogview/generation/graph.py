# SPDX-License-Identifier: Apache-2.0
"""A step that is repeated: on an NVIDIA GPU as a CUDA graph, elsewhere as it is."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_UP = 2  # calls before the capture: the first ones compile kernels and fill caches


def on_device(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """``function`` as it is best called again and again on ``device``.

    It must take and return nothing, keep its tensors and change them in place only, and never wait for the
    device. The effect of a call is the same on every device.
    """
    return _CapturedStep(function, device) if device.type == "cuda" else function


class _CapturedStep:
    """The first calls run as they are, on a stream of their own as capturing asks; then a graph is replayed.

    No call is repeated or left out: capturing runs nothing, so the call that captures replays as well.
    """

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        self.function, self.device = function, device
        self.stream = torch.cuda.Stream(device)
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        self.calls += 1
        if self.calls <= WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self.function()
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.function()
        self.graph.replay()
