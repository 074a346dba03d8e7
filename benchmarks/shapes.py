# SPDX-License-Identifier: Apache-2.0
"""The named shapes. Letters: B batch, H heads, T length, D head size, w block, W window blocks, P pivots,
N rows or tokens, C width, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from cogview.config import PRESETS, ThreeRegionConfig

GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CPU_DTYPES = (torch.float32, torch.bfloat16)
_MODEL = PRESETS["base"].model
_REGIONS = ThreeRegionConfig()
WIDTH, VOCABULARY, HEADS = _MODEL.hidden_size, _MODEL.vocab_size, _MODEL.num_heads
HEAD, LENGTH = WIDTH // HEADS, _MODEL.max_positions - 1
TEXT = 64


@dataclass(frozen=True)
class AttentionShape:
    name: str
    B: int
    H: int
    T: int
    D: int
    w: int
    W: int
    P: int
    text: int = TEXT

    def __str__(self) -> str:
        return f"B={self.B} H={self.H} T={self.T} D={self.D} w={self.w} W={self.W} P={self.P}"


@dataclass(frozen=True)
class RowShape:
    """N rows of C: what LayerNorm and softmax see."""

    name: str
    N: int
    C: int

    def __str__(self) -> str:
        return f"{self.N} x {self.C}"


@dataclass(frozen=True)
class ScoreShape:
    """Attention scores under a causal mask."""

    name: str
    B: int
    H: int
    T: int

    def __str__(self) -> str:
        return f"B={self.B} H={self.H} T={self.T}"


@dataclass(frozen=True)
class LossShape:
    name: str
    N: int
    C: int
    V: int

    def __str__(self) -> str:
        return f"{self.N} x {self.C} x {self.V}"


@dataclass(frozen=True)
class DecodeShape:
    """One new query per sequence against a cache of S keys, all of them or those of three regions."""

    name: str
    B: int
    H: int
    S: int
    D: int
    w: int
    W: int
    P: int
    regions: bool
    text: int = TEXT

    def __str__(self) -> str:
        return f"B={self.B} H={self.H} S={self.S} D={self.D} w={self.w} W={self.W} P={self.P}"


# In order of importance: a run that is short of time leaves out the last ones.
_WIDE = {"w": _REGIONS.block_size, "W": _REGIONS.window_blocks, "P": _REGIONS.num_pivots}
_NARROW = {"w": 64, "W": 4, "P": 256}  # as the released scripts set it
ATTENTION = (
    AttentionShape("paper", B=4, H=HEADS, T=4224, D=HEAD, **_WIDE),
    AttentionShape("cogview", B=8, H=HEADS, T=LENGTH, D=HEAD, **_NARROW),
    AttentionShape("long", B=4, H=HEADS, T=4224, D=HEAD, **_NARROW),
    AttentionShape("16k", B=1, H=HEADS, T=16384, D=HEAD, **_WIDE),
)
ATTENTION_CPU = tuple(replace(shape, B=1, H=8) for shape in ATTENTION)
ATTENTION_TINY = (AttentionShape("tiny", B=2, H=2, T=96, D=32, w=16, W=2, P=24, text=8),)

ROWS = (RowShape("width", N=16896, C=WIDTH), RowShape("few", N=64, C=WIDTH))
ROWS_CPU = (RowShape("width", N=4352, C=WIDTH),)
ROWS_TINY = (RowShape("tiny", N=6, C=96),)

SOFTMAX = (
    ROWS[0],
    RowShape("vocabulary", N=2048, C=VOCABULARY),
    ScoreShape("causal", B=4, H=HEADS, T=LENGTH),
)
SOFTMAX_CPU = (
    *ROWS_CPU,
    RowShape("vocabulary", N=192, C=VOCABULARY),
    ScoreShape("causal", B=1, H=8, T=LENGTH),
)
SOFTMAX_TINY = (*ROWS_TINY, ScoreShape("tiny-causal", B=1, H=2, T=20))

LOSS = (LossShape("cogview", N=8 * LENGTH, C=WIDTH, V=VOCABULARY),)
LOSS_CPU = (
    LossShape("vocabulary", N=512, C=512, V=VOCABULARY),
    LossShape("quarter", N=2 * LENGTH, C=WIDTH // 4, V=VOCABULARY),  # of the GPU's tokens and of its width
)
LOSS_TINY = (LossShape("tiny", N=12, C=16, V=100),)

DECODE = (
    DecodeShape("cogview", B=1, H=HEADS, S=LENGTH, D=HEAD, **_NARROW, regions=False),
    DecodeShape("cogview-16", B=16, H=HEADS, S=LENGTH, D=HEAD, **_NARROW, regions=False),
    DecodeShape("paper", B=1, H=HEADS, S=4224, D=HEAD, **_WIDE, regions=True),
    DecodeShape("16k", B=1, H=HEADS, S=16384, D=HEAD, **_WIDE, regions=True),
)
DECODE_CPU = tuple(replace(shape, H=8) for shape in DECODE)
DECODE_TINY = (DecodeShape("tiny", B=2, H=2, S=96, D=32, w=16, W=2, P=24, regions=True, text=8),)


def choose(gpu: tuple, cpu: tuple, tiny: tuple, device_type: str, is_tiny: bool) -> tuple:
    if is_tiny:
        return tiny
    return gpu if device_type == "cuda" else cpu
