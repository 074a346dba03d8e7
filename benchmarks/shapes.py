# SPDX-License-Identifier: Apache-2.0
"""The named shapes. Letters: B batch, H heads, T length, S keys of a cache, D head size, P pivots a sample,
N rows or tokens, C width, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from cogview.config import ModelConfig, ThreeRegionConfig
from cogview.presets import PRESETS
from cogview_kernels import ThreeRegionLayout

GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CPU_DTYPES = (torch.float32, torch.bfloat16)
_MODEL = PRESETS["base"].model
_REGIONS = ThreeRegionConfig()
WIDTH, VOCABULARY, HEADS = _MODEL.hidden_size, _MODEL.vocab_size, _MODEL.num_heads
HEAD, LENGTH = WIDTH // HEADS, _MODEL.max_positions - 1


@dataclass(frozen=True)
class Regions:
    """What a layout is drawn from: the first ``text`` positions are pivots, random ones fill up to P."""

    block_size: int
    window_blocks: int
    P: int
    text: int = 64

    def __str__(self) -> str:
        return f"blocks of {self.block_size}, a window of {self.window_blocks}, {self.P} pivots"

    @property
    def config(self) -> ThreeRegionConfig:
        return ThreeRegionConfig(self.block_size, self.window_blocks, self.P)

    def window_start(self, query: int) -> int:
        """The first key of the window that ``query`` sees."""
        return max(0, (query // self.block_size - self.window_blocks + 1) * self.block_size)

    def sample(
        self, B: int, T: int, device: torch.device, generator: torch.Generator | None = None
    ) -> ThreeRegionLayout:
        text = torch.zeros(B, T, dtype=torch.bool, device=device)
        text[:, : self.text] = True
        return ThreeRegionLayout.sample(
            text,
            self.P,
            block_size=self.block_size,
            window_blocks=self.window_blocks,
            generator=generator,
        )


@dataclass(frozen=True)
class AttentionShape:
    name: str
    B: int
    H: int
    T: int
    D: int
    regions: Regions

    def __str__(self) -> str:
        return f"B={self.B} H={self.H} T={self.T} D={self.D}, {self.regions}"


@dataclass(frozen=True)
class LocalShape:
    """Queries and keys on a grid, and E keys of text."""

    name: str
    B: int
    H: int
    grid: tuple[int, int]
    kernel_size: tuple[int, int]
    E: int
    D: int

    @property
    def T(self) -> int:
        return self.grid[0] * self.grid[1]

    def __str__(self) -> str:
        rows, columns = self.kernel_size
        return (
            f"B={self.B} H={self.H} {self.grid[0]} x {self.grid[1]} D={self.D}, {rows} x {columns} + {self.E}"
        )


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
    options: bool = False
    """A bias, soft capping, z-loss and label smoothing besides."""

    def __str__(self) -> str:
        return f"{self.N} x {self.C} x {self.V}" + (" with all options" if self.options else "")


@dataclass(frozen=True)
class DecodeStepShape:
    """T new tokens of B rows through layers of width C, behind a cache that they fill to S positions."""

    name: str
    B: int
    T: int
    layers: int
    C: int
    H: int
    S: int

    def __str__(self) -> str:
        return f"B={self.B} T={self.T}, {self.layers} layers of {self.C}, H={self.H} S={self.S}"


@dataclass(frozen=True)
class LinearShape:
    """N rows through ``layers`` matrices of O outputs and K inputs."""

    name: str
    N: int
    K: int
    O: int
    layers: int
    activation: str | None = None

    def __str__(self) -> str:
        gelu = " and GELU" * (self.activation is not None)
        return f"{self.N} x {self.K} x {self.O}{gelu}, {self.layers} layers"


@dataclass(frozen=True)
class DecodeShape:
    """One new query a sequence against a cache of S keys: all of them, or those of three regions."""

    name: str
    B: int
    H: int
    S: int
    D: int
    regions: Regions | None = None

    def __str__(self) -> str:
        sizes = f"B={self.B} H={self.H} S={self.S} D={self.D}"
        return sizes if self.regions is None else f"{sizes}, {self.regions}"


@dataclass(frozen=True)
class StepShape:
    """B rows of a training step of ``model``."""

    name: str
    B: int
    model: ModelConfig
    regions: Regions

    @property
    def T(self) -> int:
        return self.model.max_positions - 1

    def __str__(self) -> str:
        m = self.model
        layers = f"{m.num_layers} layers{' (checkpointed)' * m.activation_checkpointing} of {m.hidden_size}"
        return f"B={self.B} T={self.T}, {layers}, {m.vocab_size} ids, {self.regions}"


@dataclass(frozen=True)
class ShapesOf:
    """An op's shapes on a GPU, on a CPU, and those that only show that everything runs. In order of
    importance: a run that is short of time leaves out the last ones."""

    gpu: tuple[Any, ...]
    cpu: tuple[Any, ...]
    tiny: tuple[Any, ...]

    def on(self, device: torch.device, tiny: bool) -> tuple[Any, ...]:
        if tiny:
            return self.tiny
        return self.gpu if device.type == "cuda" else self.cpu


PAPER = Regions(_REGIONS.block_size, _REGIONS.window_blocks, _REGIONS.num_pivots)
RELEASED = Regions(64, 4, 256)  # as the released scripts set it
TINY = Regions(16, 2, 24, text=8)

_ATTENTION = (
    AttentionShape("paper", B=4, H=HEADS, T=4224, D=HEAD, regions=PAPER),
    AttentionShape("cogview", B=8, H=HEADS, T=LENGTH, D=HEAD, regions=RELEASED),
    AttentionShape("long", B=4, H=HEADS, T=4224, D=HEAD, regions=RELEASED),
    AttentionShape("16k", B=1, H=HEADS, T=16384, D=HEAD, regions=PAPER),
)
ATTENTION = ShapesOf(
    gpu=_ATTENTION,
    # The longest shape takes minutes a variant there. "dense" is a window over everything: what
    # three_region_attention does without a layout, and what the model's dense attention is on a CPU.
    cpu=(
        *(replace(shape, B=1, H=8) for shape in _ATTENTION if shape.T <= 8192),
        AttentionShape(
            "dense", B=1, H=8, T=LENGTH, D=HEAD, regions=Regions(128, -(-LENGTH // 128), 0, text=0)
        ),
    ),
    tiny=(AttentionShape("tiny", B=2, H=2, T=96, D=32, regions=TINY),),
)

_LOCAL = (
    LocalShape("64x64", B=4, H=HEADS, grid=(64, 64), kernel_size=(9, 9), E=64, D=HEAD),
    LocalShape("32x32", B=4, H=HEADS, grid=(32, 32), kernel_size=(5, 5), E=64, D=HEAD),
)
LOCAL = ShapesOf(
    gpu=_LOCAL,
    cpu=tuple(replace(shape, B=1, H=8) for shape in _LOCAL),
    tiny=(LocalShape("tiny", B=2, H=2, grid=(6, 7), kernel_size=(3, 5), E=4, D=32),),
)

ROWS = ShapesOf(
    gpu=(RowShape("width", N=16896, C=WIDTH), RowShape("few", N=64, C=WIDTH)),
    cpu=(RowShape("width", N=4352, C=WIDTH),),
    tiny=(RowShape("tiny", N=6, C=96),),
)

SOFTMAX = ShapesOf(
    gpu=(
        ROWS.gpu[0],
        RowShape("vocabulary", N=2048, C=VOCABULARY),
        ScoreShape("causal", B=4, H=HEADS, T=LENGTH),
    ),
    cpu=(
        ROWS.cpu[0],
        RowShape("vocabulary", N=192, C=VOCABULARY),
        ScoreShape("causal", B=1, H=8, T=LENGTH),
    ),
    tiny=(ROWS.tiny[0], ScoreShape("tiny-causal", B=1, H=2, T=20)),
)

LOSS = ShapesOf(
    gpu=(
        LossShape("cogview", N=8 * LENGTH, C=WIDTH, V=VOCABULARY),
        LossShape("options", N=8 * LENGTH, C=WIDTH, V=VOCABULARY, options=True),
    ),
    cpu=(
        LossShape("vocabulary", N=512, C=512, V=VOCABULARY),
        # A quarter of the GPU's tokens and of its width.
        LossShape("quarter", N=2 * LENGTH, C=WIDTH // 4, V=VOCABULARY),
        LossShape("options", N=512, C=512, V=VOCABULARY, options=True),
    ),
    tiny=(LossShape("tiny", N=12, C=16, V=100), LossShape("options", N=12, C=16, V=100, options=True)),
)

_DECODE = (
    DecodeShape("cogview", B=1, H=HEADS, S=LENGTH, D=HEAD),
    DecodeShape("cogview-16", B=16, H=HEADS, S=LENGTH, D=HEAD),
    DecodeShape("paper", B=1, H=HEADS, S=4224, D=HEAD, regions=PAPER),
    DecodeShape("16k", B=1, H=HEADS, S=16384, D=HEAD, regions=PAPER),
)
DECODE = ShapesOf(
    gpu=_DECODE,
    cpu=tuple(replace(shape, H=8) for shape in _DECODE),
    tiny=(DecodeShape("tiny", B=2, H=2, S=96, D=32, regions=TINY),),
)

_GELU = "gelu_tanh"
# The matrices of a layer of `base`. Those of all layers are more than a GPU's L2 cache holds, and take less
# than the 50 us up to which a call is also timed in a graph.
_BASE_LINEAR = tuple(
    LinearShape(f"{name}{suffix}", N, K, O, layers, activation)
    for suffix, N in (("", 1), ("-16", 16))
    for name, K, O, layers, activation in (
        ("qkv", WIDTH, 3 * WIDTH, 2, None),
        ("out", WIDTH, WIDTH, 6, None),
        ("up", WIDTH, 4 * WIDTH, 2, _GELU),
        ("down", 4 * WIDTH, WIDTH, 2, None),
    )
)
LINEAR = ShapesOf(
    gpu=_BASE_LINEAR,
    cpu=(
        LinearShape("up", N=1, K=768, O=3072, layers=12, activation=_GELU),
        LinearShape("down", N=1, K=3072, O=768, layers=12),
        LinearShape("up-8", N=8, K=768, O=3072, layers=12, activation=_GELU),
    ),
    tiny=(LinearShape("tiny", N=2, K=40, O=24, layers=2, activation=_GELU),),
)

_DECODE_STEP = (
    DecodeStepShape("digits", B=1, T=1, layers=3, C=128, H=4, S=24),
    DecodeStepShape("digits-60", B=60, T=1, layers=3, C=128, H=4, S=24),
    DecodeStepShape("gpt2", B=1, T=1, layers=12, C=768, H=12, S=560),
)
DECODE_STEP = ShapesOf(
    gpu=(), cpu=_DECODE_STEP, tiny=(DecodeStepShape("tiny", B=2, T=2, layers=2, C=32, H=2, S=9),)
)

# Plain PyTorch would pay more for dropout and PB-Relax. Weights are as large as in the released model.
_PLAIN = {"dropout": 0.0, "pb_relax": None}
_BASE = replace(_MODEL, **_PLAIN)
# As wide as the preset `small`, and shallow: a CPU without units for 16-bit products ends within minutes too.
_SMALL = ModelConfig(
    num_layers=2,
    hidden_size=256,
    num_heads=4,
    vocab_size=4096,
    max_positions=LENGTH + 1,
    init_std=0.04,
    **_PLAIN,
)
STEP = ShapesOf(
    gpu=(
        StepShape("base", B=8, model=_BASE, regions=RELEASED),
        StepShape("base-4224", B=2, model=replace(_BASE, max_positions=4225), regions=PAPER),
    ),
    cpu=(
        StepShape("small", B=1, model=_SMALL, regions=RELEASED),
        StepShape("small-4224", B=1, model=replace(_SMALL, num_layers=1, max_positions=4225), regions=PAPER),
    ),
    tiny=(
        StepShape(
            "tiny",
            B=2,
            model=replace(
                _SMALL, num_layers=2, hidden_size=64, num_heads=2, vocab_size=100, max_positions=97
            ),
            regions=TINY,
        ),
    ),
)
