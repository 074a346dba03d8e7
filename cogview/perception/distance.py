# SPDX-License-Identifier: Apache-2.0
"""How different two pictures look: the distance between what a frozen network sees in them.

LPIPS (Zhang et al., arXiv:1801.03924) compares feature maps of VGG-16, each cell scaled to length 1, and
weighs channels as people's judgements say. Its weights do not install with pip. Without them the same
distance is taken between feature maps of EfficientNet-Lite0, all channels and maps alike.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview.files import StrPath
from cogview.perception.efficientnet import EfficientNetLite0Features
from cogview.weights import load_weights
from cogview.weights.pickles import read_pickle

VGG_WEIGHTS = "vgg16-397923af.pth"  # as torchvision publishes them
LPIPS_WEIGHTS = "vgg.pth"  # as LPIPS publishes them, version 0.1
EPS = 1e-10  # added to the length of a cell's features, as LPIPS does

# Convolutions of VGG-16 by their numbers in torchvision, in the five parts behind which LPIPS looks.
_PARTS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_CHANNELS = (64, 128, 256, 512, 512)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]

_STAGES = (1, 2, 3, 5)  # of EfficientNet-Lite0: the last one of each size from a half to a 16th


class PerceptualDistance(nn.Module, ABC):
    """Two batches ``[N, 3, H, W]`` in [0, 1] to their distances ``[N]``, float32; the network is frozen."""

    @abstractmethod
    def maps(self, images: Tensor) -> Sequence[Tensor]:
        """The feature maps that are compared."""

    def weigh(self, place: int, squares: Tensor) -> Tensor:
        """Squared differences ``[N, C, H, W]`` of map number ``place``, summed over weighted channels."""
        return squares.sum(1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The mean over cells of the squared differences, summed over maps."""
        distances = []
        for place, maps in enumerate(zip(self.maps(first), self.maps(second), strict=True)):
            one, other = map(_of_length_one, maps)
            distances.append(self.weigh(place, (one - other).square()).flatten(1).mean(1))
        return torch.stack(distances).sum(0)


def _of_length_one(features: Tensor) -> Tensor:
    # The gradient of a root at 0, where a cell has no features, would be infinite.
    return features / (features.square().sum(1, keepdim=True).clamp(min=EPS**2).sqrt() + EPS)


class LPIPS(PerceptualDistance):
    """LPIPS of version 0.1 on VGG-16.

    Args:
        folder: holds ``vgg16-397923af.pth`` of torchvision and ``vgg.pth`` of LPIPS, which are read by the
            restricted unpickler.

    Raises:
        FileNotFoundError, ValueError: no such file, or one that does not hold this network.
    """

    def __init__(self, folder: StrPath) -> None:
        super().__init__()
        convolutions, inner = {}, 3
        for numbers, outer in zip(_PARTS, _CHANNELS, strict=True):
            for number in numbers:
                convolutions[str(number)] = nn.Conv2d(inner, outer, 3, padding=1)
                inner = outer
        self.features = nn.ModuleDict(convolutions)
        self.linear = nn.ParameterList(torch.zeros(1, channels, 1, 1) for channels in _CHANNELS)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(_MEAN, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD, dtype=torch.float32).view(3, 1, 1))
        self.float()  # before weights are read: another default dtype would round them
        vgg, linear = Path(folder) / VGG_WEIGHTS, Path(folder) / LPIPS_WEIGHTS
        published = _state(vgg)
        load_weights(
            self.features,
            {
                name.removeprefix("features."): tensor
                for name, tensor in published.items()
                if name.startswith("features.")
            },
            vgg,
        )
        of_channels = {_number(name): tensor for name, tensor in _state(linear).items()}
        load_weights(self.linear, of_channels, linear)
        self.requires_grad_(False)

    def maps(self, images: Tensor) -> list[Tensor]:
        x, found = (images - self.mean) / self.std, []
        for part, numbers in enumerate(_PARTS):
            if part:
                x = F.max_pool2d(x, 2)
            for number in numbers:
                x = F.relu(self.features[str(number)](x))
            found.append(x)
        return found

    def weigh(self, place: int, squares: Tensor) -> Tensor:
        return (squares * self.linear[place]).sum(1)


def _number(name: str) -> str:
    """``lin3.model.1.weight`` is our number 3."""
    found = re.fullmatch(r"lin(\d)\.model\.1\.weight", name)
    return found[1] if found else name


def _state(path: Path) -> dict[str, Tensor]:
    content = read_pickle(path)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} does not hold a state dict: names and tensors")
    return content


class EfficientNetDistance(PerceptualDistance):
    """1 minus the cosine between the features of a cell, the mean over cells and four maps.

    The maps are those of EfficientNet-Lite0, which sees pictures at ``side`` pixels.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.network = EfficientNetLite0Features(side=side)
        # With the channels last, depthwise convolutions are faster on a CPU. PyTorch's annotations have no
        # ``to`` with a memory format alone.
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def maps(self, images: Tensor) -> list[Tensor]:
        return self.network.maps(images.contiguous(memory_format=torch.channels_last), _STAGES)

    def weigh(self, place: int, squares: Tensor) -> Tensor:
        return squares.sum(1) / (2 * len(_STAGES))


def perceptual_distance(lpips: str, image_size: int) -> PerceptualDistance:
    """LPIPS from the folder ``lpips``, or without one that of EfficientNet-Lite0.

    The latter was trained at 224 pixels: small pictures are doubled, large ones are shrunk.
    """
    return LPIPS(lpips) if lpips else EfficientNetDistance(side=min(2 * image_size, 224))
