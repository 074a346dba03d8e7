# SPDX-License-Identifier: Apache-2.0
"""How good enlarged pictures are: distance from the true ones, and whether the edges of windows show."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bicubic(pictures: Tensor) -> Tensor:
    """Pictures ``[N, 3, H, W]`` in [0, 1] at twice the side, by what enlargements are compared with."""
    return F.interpolate(pictures, scale_factor=2, mode="bicubic").clamp(0, 1)


def peak_signal_to_noise(pictures: Tensor, truth: Tensor) -> float:
    """Mean PSNR in dB of pictures ``[N, 3, H, W]`` in [0, 1]; infinite where one equals its truth."""
    error = (pictures.double() - truth.double()).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


def seam_contrast(pictures: Tensor, windows: Tensor) -> float:
    """Mean absolute step between neighbouring pixels of two windows, divided by that of one window.

    1 where the edges of windows look like the edges of any other code. Only steps from code to code count.

    Args:
        pictures: ``[N, 3, S, S]``.
        windows: ``[n, n]``, the number of the window that drew each code; n divides S.
    """
    across, within = [], []
    size = pictures.shape[2] // windows.shape[0]
    for own, image in ((windows, pictures), (windows.T, pictures.transpose(2, 3))):
        steps = image.diff(dim=2)[:, :, size - 1 :: size].abs().mean((0, 1))  # [n - 1, S]
        is_edge = (own.diff(dim=0) != 0).repeat_interleave(size, 1)
        across.append(steps[is_edge])
        within.append(steps[~is_edge])
    return float(torch.cat(across).mean() / torch.cat(within).mean())
