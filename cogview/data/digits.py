# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits with captions in two languages.

The pictures are the 1,797 scans of 8x8 px that scikit-learn bundles (``load_digits``), so this real
data set needs no download.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ENGLISH = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CHINESE = ("零", "一", "二", "三", "四", "五", "六", "七", "八", "九")

# Never seen in training, whole; their words are, in all other combinations.
HELD_OUT_PHRASINGS = (
    *("a handwritten {en}", "the scanned {en}", "this is the handwritten {en}"),
    *("这是手写的数字{zh}", "一个扫描的数字{zh}", "这里是手写的数字{zh}"),
)


def _combinations(*choices: tuple[str, ...]) -> list[str]:
    return ["".join(parts) for parts in itertools.product(*choices)]


# Every combination of a few words, so that a held-out one is made of steps that training saw. The digit's
# word always follows the same kind of word and competes with no other: were there "handwritten seven" and
# "handwritten digit seven", a picture that might be no seven would make the word "digit" likelier, and
# CapLoss would like it for that.
TRAINING_PHRASINGS = tuple(
    phrasing
    for phrasing in [
        *_combinations(
            ("a ", "the ", "one ", "this is a ", "this is the "),
            ("handwritten ", "scanned ", "grey ", "small ", "tiny "),
            ("{en}",),
        ),
        *_combinations(
            ("", "一个", "这是", "这里是"),
            ("手写", "扫描", "灰色", "小小"),
            ("的数字{zh}",),
        ),
    ]
    if phrasing not in HELD_OUT_PHRASINGS
)
SPLIT_SEED = 0  # one split for every run, whatever the run's seed
SCAN_SIDE = 8
TRAINING_COPIES = 8  # what training sees of a scan: the scan itself and 7 slightly altered ones


def phrase(template: str, digit: int) -> str:
    """The caption of ``digit`` under a phrasing."""
    return template.format(en=ENGLISH[digit], zh=CHINESE[digit])


@lru_cache(maxsize=1)
def splits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Scans (values 0 to 16, ``[N, 64]``) and labels of ``"train"`` and ``"test"``."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        scans, labels, test_size=0.2, stratify=labels, random_state=SPLIT_SEED
    )
    return {"train": (train_x, train_y), "test": (test_x, test_y)}


class DigitPairs:
    """Scans of one split (``"train"``, 1,437, or ``"test"``, 360) with their captions.

    With ``copies`` above 1, each scan is followed by slightly turned, scaled and moved ones, always the
    same: without them a transformer learns 1,437 pictures by heart.
    """

    absent: tuple[str, ...] = ()

    def __init__(self, split: str = "train", copies: int = 1) -> None:
        self.copies = copies
        scans, labels = splits()[split]
        images = torch.tensor(scans, dtype=torch.float32).view(-1, 1, SCAN_SIDE, SCAN_SIDE) / 16
        images = images.repeat_interleave(copies, dim=0)
        is_copy = torch.arange(len(images)) % copies > 0
        self._scans = torch.where(is_copy[:, None, None, None], _jitter(images), images)
        self.labels = torch.tensor(labels).repeat_interleave(copies)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int, size: int) -> Tensor:
        """``[3, size, size]`` in [0, 1], enlarged by repeating pixels; size a multiple of 8."""
        self.check(size)
        factor = size // SCAN_SIDE
        scan = self._scans[index].repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        return scan.expand(3, size, size).clone()

    def name(self, index: int) -> str:
        """Number of the scan within its split."""
        return f"scan {index // self.copies}"

    def origin(self, index: int) -> str:
        """All copies of a scan have one origin."""
        return self.name(index)

    def check(self, size: int, *, skip_bad: bool = False, progress: bool = True) -> list[str]:
        """ValueError unless scans can be enlarged to ``size``."""
        if size % SCAN_SIDE:
            raise ValueError(f"size must be a multiple of {SCAN_SIDE} for digits, got {size}")
        return []

    def identity(self) -> Iterator[bytes]:
        """The scans, how many altered copies of each there are, and the captions of every digit."""
        yield self._scans[:: self.copies].numpy().tobytes()
        yield repr((self.copies, self.labels.tolist(), TRAINING_PHRASINGS, ENGLISH, CHINESE)).encode()

    def captions(self, index: int) -> list[str]:
        """All training phrasings of the digit shown."""
        return [phrase(template, int(self.labels[index])) for template in TRAINING_PHRASINGS]


def training_pairs() -> DigitPairs:
    """What ``"digits"`` means as training data."""
    return DigitPairs("train", TRAINING_COPIES)


def _jitter(images: Tensor) -> Tensor:
    """Each image turned by up to 10 degrees, scaled by up to 8 % and moved by up to 0.6 px."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    uniform = 2 * torch.rand(4, len(images), generator=generator, dtype=torch.float32) - 1
    angle, scale = uniform[0] * math.radians(10), 1 + 0.08 * uniform[1]
    shift = 0.6 * 2 / SCAN_SIDE * uniform[2:]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    transform = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).clamp(0, 1)
