# SPDX-License-Identifier: Apache-2.0
"""PatchGAN: which patches of a picture are real (Isola et al., arXiv:1611.07004), and its hinge losses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cogview.tokens.vqvae import DTYPE

MOST_TIMES = 8  # the channels of the first layer, at most


def _norm(channels: int) -> nn.BatchNorm2d:
    """Statistics are those of the batch, always: a running mean would be moved by skipped steps too."""
    norm = nn.BatchNorm2d(channels, track_running_stats=False, dtype=DTYPE)
    nn.init.normal_(norm.weight, 1.0, 0.02)
    return norm


def _conv(inner: int, outer: int, stride: int, bias: bool = True) -> nn.Conv2d:
    conv = nn.Conv2d(inner, outer, 4, stride, padding=1, bias=bias, dtype=DTYPE)
    nn.init.normal_(conv.weight, 0.0, 0.02)
    return conv


class PatchDiscriminator(nn.Module):
    """Pictures ``[B, 3, H, W]`` in [0, 1] to logits of patches ``[B, 1, h, w]``: high means real.

    ``layers`` convolutions of stride 2, then two of stride 1; all see 4x4 cells.
    """

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        parts: list[nn.Module] = [_conv(3, channels, 2), nn.LeakyReLU(0.2)]
        inner = channels
        for number in range(1, layers + 1):
            outer = channels * min(2**number, MOST_TIMES)
            stride = 2 if number < layers else 1
            parts += [_conv(inner, outer, stride, bias=False), _norm(outer), nn.LeakyReLU(0.2)]
            inner = outer
        self.main = nn.Sequential(*parts, _conv(inner, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.main(2 * images - 1)


def hinge_loss(real: Tensor, rebuilt: Tensor) -> Tensor:
    """What the discriminator learns by, from its logits of real and of rebuilt pictures."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + rebuilt.float()).mean())


def fooling_loss(rebuilt: Tensor) -> Tensor:
    """What the tokenizer learns by, from the discriminator's logits of its pictures."""
    return -rebuilt.float().mean()
