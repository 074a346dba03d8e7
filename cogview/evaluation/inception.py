# SPDX-License-Identifier: Apache-2.0
"""The Inception network of 2015 whose features define the FID and whose classes define the Inception Score.

Sources: Inception v3 (arXiv:1512.00567) as TensorFlow's graph ``inception-2015-12-05`` has it, FID
(arXiv:1706.08500), Inception Score (arXiv:1606.03498). The weights are those that pytorch-fid and
torch-fidelity publish: ``pt_inception-2015-12-05-6726825d.pth`` and
``weights-inception-2015-12-05-6726825d.pth`` hold the same tensors. Pictures are resized as TensorFlow 1 did,
which torch-fidelity repeats. The Inception v3 of torchvision is another network with other features.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview.perception.efficientnet import require_images
from cogview.weights import load_weights
from cogview.weights.pickles import read_pickle


class _Convolution(nn.Module):
    def __init__(
        self, inner: int, outer: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True
    ):
        super().__init__()
        height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = (height // 2, width // 2) if pad else 0
        self.conv = nn.Conv2d(inner, outer, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outer, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


_reduced = partial(_Convolution, stride=2, pad=False)
# TensorFlow's average does not count the zeros of the padding.
_average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_largest = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halved = partial(F.max_pool2d, kernel_size=3, stride=2)


# The names of modules are those in the files of weights.
class _MixedA(nn.Module):
    """35x35: 1x1, 5x5, two 3x3, pool."""

    def __init__(self, inner: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Convolution(inner, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = _Convolution(inner, 48, 1), _Convolution(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Convolution(inner, 64, 1), _Convolution(64, 96, 3)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3)
        self.branch_pool = _Convolution(inner, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average(x))], 1)


class _MixedB(nn.Module):
    """35x35 to 17x17."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.branch3x3 = _reduced(inner, 384, 3)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Convolution(inner, 64, 1), _Convolution(64, 96, 3)
        self.branch3x3dbl_3 = _reduced(96, 96, 3)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, _halved(x)], 1)


class _MixedC(nn.Module):
    """17x17: 1x1, 7x7 and two 7x7 as rows and columns, pool."""

    def __init__(self, inner: int, mid: int) -> None:
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = _Convolution(inner, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = _Convolution(inner, mid, 1), _Convolution(mid, mid, row)
        self.branch7x7_3 = _Convolution(mid, 192, column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = _Convolution(inner, mid, 1), _Convolution(mid, mid, column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = _Convolution(mid, mid, row), _Convolution(mid, mid, column)
        self.branch7x7dbl_5 = _Convolution(mid, 192, row)
        self.branch_pool = _Convolution(inner, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], 1)


class _MixedD(nn.Module):
    """17x17 to 8x8."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = _Convolution(inner, 192, 1), _reduced(192, 320, 3)
        self.branch7x7x3_1, self.branch7x7x3_2 = _Convolution(inner, 192, 1), _Convolution(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = _Convolution(192, 192, (7, 1)), _reduced(192, 192, 3)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, _halved(x)], 1)


class _MixedE(nn.Module):
    """8x8: branches that fork into a row and a column. The last of the two blocks pools by the maximum."""

    def __init__(self, inner: int, *, is_last: bool) -> None:
        super().__init__()
        row, column = (1, 3), (3, 1)
        self.pool = _largest if is_last else _average
        self.branch1x1 = _Convolution(inner, 320, 1)
        self.branch3x3_1 = _Convolution(inner, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = _Convolution(384, 384, row), _Convolution(384, 384, column)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Convolution(inner, 448, 1), _Convolution(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = (
            _Convolution(384, 384, row),
            _Convolution(384, 384, column),
        )
        self.branch_pool = _Convolution(inner, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        forks = [
            *(self.branch3x3_2a(three), self.branch3x3_2b(three)),
            *(self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)),
        ]
        return torch.cat([self.branch1x1(x), *forks, self.branch_pool(self.pool(x))], 1)


def resize_as_tensorflow(images: Tensor, side: int) -> Tensor:
    """``[N, 3, H, W]`` to ``[N, 3, side, side]``, bilinearly, as TensorFlow 1 did without aligned corners.

    The pixel ``i`` is read at ``i * H / side``, where ``F.interpolate`` reads at
    ``(i + 0.5) * H / side - 0.5``. There is no antialiasing.
    """

    def along(x: Tensor, dim: int) -> Tensor:
        size = x.shape[dim]
        position = torch.arange(side, dtype=torch.float32, device=x.device) * torch.tensor(
            size / side, dtype=torch.float32, device=x.device
        )
        low = position.long()
        share = position - low
        if dim == 2:
            share = share[:, None]
        first = x.index_select(dim, low)
        return first + (x.index_select(dim, (low + 1).clamp(max=size - 1)) - first) * share

    return along(along(images, 3), 2)


class InceptionFeatures(nn.Module):
    """``[N, 3, H, W]`` pictures to the ``[N, 2048]`` features of the FID: the average of the last map.

    Values are rounded to the 256 steps of an 8-bit picture, since that is what the FID is defined on. The
    weights are frozen and the network stays in eval mode.

    Args:
        weights: the file of pytorch-fid or torch-fidelity.

    Raises:
        FileNotFoundError, ValueError: no such file, or one that does not hold this network.
    """

    name = "Inception-2015"
    distance = "FID"
    score = "Inception Score"
    width = 2048
    side = 299

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = _reduced(3, 32, 3), _Convolution(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = _Convolution(64, 80, 1), _Convolution(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _MixedA(192, 32), _MixedA(256, 64), _MixedA(288, 64)
        self.Mixed_6a = _MixedB(288)
        self.Mixed_6b, self.Mixed_6c = _MixedC(768, 128), _MixedC(768, 160)
        self.Mixed_6d, self.Mixed_6e = _MixedC(768, 160), _MixedC(768, 192)
        self.Mixed_7a = _MixedD(768)
        self.Mixed_7b, self.Mixed_7c = _MixedE(1280, is_last=False), _MixedE(2048, is_last=True)
        self.fc = nn.Linear(self.width, 1008)
        self.float()  # before weights are read: another default dtype would round them
        load_weights(self, read_pickle(weights), weights)
        self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> InceptionFeatures:
        """Stays in eval mode, also as a part of a model that is trained."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures ``[N, 3, H, W]``, uint8 or floats in [0, 1], as float32 ``[N, 2048]``."""
        levels = (require_images(images) * 255).round().clamp(0, 255)
        x = (resize_as_tensorflow(levels, self.side) - 128) / 128
        x = _halved(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = _halved(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))

    def class_logits(self, features: Tensor) -> Tensor:
        """Logits of the 1,008 classes ``[N, 1008]``, without the bias, which the graph's score leaves out."""
        return features @ self.fc.weight.T
