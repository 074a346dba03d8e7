# SPDX-License-Identifier: Apache-2.0
"""The named shapes. Letters: B batch, H heads, T length, D head size, w block, W window blocks, P pivots,
N rows or tokens, C width, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

CPU_DTYPES = (torch.float32, torch.bfloat16)
WIDTH = 2560
VOCABULARY = 58240
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
    text: int = TEXT

    def __str__(self) -> str:
        return f"B={self.B} H={self.H} S={self.S} D={self.D} w={self.w} W={self.W} P={self.P}"


# In order of importance: a run that is short of time leaves out the last ones.
ATTENTION = (
    AttentionShape("paper", B=4, H=40, T=4224, D=64, w=128, W=6, P=768),
    AttentionShape("cogview", B=8, H=40, T=1088, D=64, w=64, W=4, P=256),
    AttentionShape("long", B=4, H=40, T=4224, D=64, w=64, W=4, P=256),
    AttentionShape("16k", B=1, H=40, T=16384, D=64, w=128, W=6, P=768),
)
ATTENTION_CPU = tuple(replace(shape, B=1, H=8) for shape in ATTENTION)
ATTENTION_TINY = (AttentionShape("tiny", B=2, H=2, T=96, D=32, w=16, W=2, P=24, text=8),)

ROWS = (RowShape("width", N=16896, C=WIDTH),)
ROWS_CPU = (RowShape("width", N=4352, C=WIDTH),)
ROWS_TINY = (RowShape("tiny", N=6, C=96),)

SOFTMAX = (*ROWS, RowShape("vocabulary", N=2048, C=VOCABULARY), ScoreShape("causal", B=4, H=40, T=1088))
SOFTMAX_CPU = (*ROWS_CPU, RowShape("vocabulary", N=192, C=VOCABULARY), ScoreShape("causal", B=1, H=8, T=1088))
SOFTMAX_TINY = (*ROWS_TINY, ScoreShape("tiny-causal", B=1, H=2, T=20))

LOSS = (LossShape("cogview", N=8704, C=WIDTH, V=VOCABULARY),)
LOSS_CPU = (LossShape("vocabulary", N=512, C=512, V=VOCABULARY),)
LOSS_TINY = (LossShape("tiny", N=12, C=16, V=100),)

DECODE = (
    DecodeShape("cogview", B=1, H=40, S=1088, D=64, w=64, W=4, P=256),
    DecodeShape("cogview-16", B=16, H=40, S=1088, D=64, w=64, W=4, P=256),
    DecodeShape("16k", B=1, H=40, S=16384, D=64, w=128, W=6, P=768),
)
DECODE_CPU = tuple(replace(shape, H=8) for shape in DECODE)
DECODE_TINY = (DecodeShape("tiny", B=2, H=2, S=96, D=32, w=16, W=2, P=24, text=8),)


def choose(gpu: tuple, cpu: tuple, tiny: tuple, device_type: str, is_tiny: bool) -> tuple:
    if is_tiny:
        return tiny
    return gpu if device_type == "cuda" else cpu
