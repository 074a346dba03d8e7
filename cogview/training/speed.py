# SPDX-License-Identifier: Apache-2.0
"""How fast a training goes: tokens per second, model FLOPs utilisation, memory."""

from __future__ import annotations

import re
import resource
import time

import torch

# Peak rate of dense matrix products on the tensor cores in 16 bits (sums in float32), and of float32 outside
# them, in TFLOP/s, from the vendor's data sheets. The first one whose words are in the device's name counts.
_PEAK_TFLOPS = {
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
    "A100": (312.0, 19.5),
    "A10": (125.0, 31.2),
    "A40": (149.7, 37.4),
    "RTX 3090": (71.0, 35.6),
    "RTX 4090": (165.2, 82.6),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "H200": (989.0, 67.0),
    "GH200": (989.0, 67.0),
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """What the device can compute in a second, in FLOPs; 0 if that is not known here."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    for part, (half, single) in _PEAK_TFLOPS.items():
        if re.search(rf"\b{part}\b", name):
            return 1e12 * (single if dtype == torch.float32 else half)
    return 0.0


def peak_memory_gb(device: torch.device) -> float:
    """The most that PyTorch has held on a GPU so far, or this process in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Stopwatch:
    """Seconds a step, over the steps between two readings; what happens outside steps is left out."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self._since = time.perf_counter()

    def lap(self, steps: int) -> float:
        """Mean seconds of the ``steps`` since the last reading."""
        now = time.perf_counter()
        seconds, self._since = (now - self._since) / steps, now
        return max(seconds, 1e-9)
