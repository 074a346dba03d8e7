# SPDX-License-Identifier: Apache-2.0
"""``python -m cogview_kernels.three_region_attention.tune [D ...]``: tunes the Triton kernels on this GPU.

For each head size (default 64 and 128), dtype and dropout off and on, times the candidates on a CogView
super-resolution shape and prints the rows to put into ``launch_config.DEFAULTS``. Results also stay in the
cache file, where ``COGVIEW_KERNELS_AUTOTUNE=1`` finds them.
"""

from __future__ import annotations

import sys

import torch

from cogview_kernels.layout import ThreeRegionLayout
from cogview_kernels.three_region_attention import launch_config
from cogview_kernels.three_region_attention.api import three_region_attention

B, H, T, P = 4, 16, 4224, 768


def tune(
    D: int, dtype: torch.dtype, dropout_p: float, device: torch.device
) -> dict[str, launch_config.Config]:
    """The fastest configuration of each kernel."""
    chosen: dict[str, launch_config.Config] = {}
    choose = launch_config.choose

    def watch(kernel, *arguments):
        chosen[kernel] = choose(kernel, *arguments)
        return chosen[kernel]

    text = torch.zeros(B, T, dtype=torch.bool, device=device)
    layout = ThreeRegionLayout.sample(text, P)
    q, k, v = (torch.randn(B, H, T, D, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    autotune = launch_config.AUTOTUNE
    launch_config.choose, launch_config.AUTOTUNE = watch, True
    try:
        out = three_region_attention(q, k, v, layout, dropout_p=dropout_p, seed=0, backend="triton")
        assert isinstance(out, torch.Tensor)
        out.backward(torch.randn_like(out))
    finally:
        launch_config.choose, launch_config.AUTOTUNE = choose, autotune
    return chosen


def main(head_sizes: list[int]) -> None:
    device = torch.device("cuda")
    arch = launch_config.architecture(device)
    print(f"{torch.cuda.get_device_name()}, results in {launch_config.cache_file()}")
    for D in head_sizes:
        for dtype, bits in ((torch.bfloat16, 16), (torch.float32, 32)):
            for dropout_p in (0.0, 0.1):
                chosen = tune(D, dtype, dropout_p, device)
                row = ", ".join(str(chosen[kernel]) for kernel in launch_config.KERNELS)
                print(f"({arch}, {bits}): ({launch_config.padded(D)}, {dropout_p > 0}): ({row})")


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [64, 128])
