# SPDX-License-Identifier: Apache-2.0
"""Which keys a query sees: the pivots of each sample and the window, and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cogview_kernels import _checks
from cogview_kernels.three_region_attention.reference import region_masks

_INTEGERS = (torch.int64, torch.int32, torch.int16)

# What a query block costs beyond its tiles (its masked last tiles, the lookup of its prefix), in tiles.
_BLOCK_OVERHEAD = 0.25


@dataclass(frozen=True)
class ThreeRegionPlan:
    """Work of :func:`three_region_attention` against dense causal attention, averaged over the samples.

    A tile is ``block_size`` queries by ``block_size`` keys. ``predicted_gain`` is how many times faster than
    dense causal attention a kernel of equal efficiency would be; below 1, dense attention wins.
    """

    keys_per_query: float
    causal_keys_per_query: float
    tiles_per_query_block: float
    gathered_tiles: float
    causal_tiles: int
    predicted_gain: float

    def __str__(self) -> str:
        verdict = (
            f"about {self.predicted_gain:.2f}x faster than dense causal attention"
            if self.predicted_gain > 1
            else f"dense causal attention wins (predicted gain {self.predicted_gain:.2f}x)"
        )
        return (
            f"{self.keys_per_query:.0f} of {self.causal_keys_per_query:.0f} keys a query, "
            f"{self.gathered_tiles:.0f} of {self.causal_tiles} tiles: {verdict}"
        )


@dataclass(frozen=True, eq=False)
class ThreeRegionLayout:
    """The three regions that a query sees: text and random pivots, and a block window.

    With ``b(i) = i // block_size``, query i sees key j iff ``j <= i`` and either ``b(j) > b(i) -
    window_blocks`` (window: its own block and the ``window_blocks - 1`` before it) or ``j`` is a pivot with
    ``b(j) <= b(i) - window_blocks`` (far). Far keys get ``pivot_bias`` added to their logits.

    Args:
        pivots: integer ``[B, P]``, on the device of the tensors it is used with: positions in ``[0, T)``,
            unique per sample, in any order; -1 pads. P may be 0.
        block_size: positive.
        window_blocks: positive.
        pivot_bias: finite.

    Source: CogView, arXiv:2105.13290, section 4.1 (three-region sparse attention) and its released code.
    """

    pivots: Tensor
    block_size: int = 128
    window_blocks: int = 6
    pivot_bias: float = 0.0

    def __post_init__(self) -> None:
        op = type(self).__name__
        if not isinstance(self.pivots, Tensor):
            raise TypeError(f"{op}: pivots must be a tensor, got {type(self.pivots).__name__}")
        if self.pivots.dtype not in _INTEGERS:
            raise TypeError(
                f"{op}: pivots must be int64, int32 or int16, got {self.pivots.dtype}; "
                "ThreeRegionLayout.sample makes pivots from a boolean mask"
            )
        if self.pivots.dim() != 2:
            raise ValueError(f"{op}: pivots must have shape [B, P], got {tuple(self.pivots.shape)}")
        _check_count(op, "block_size", self.block_size, 1)
        _check_count(op, "window_blocks", self.window_blocks, 1)
        _checks.check_finite_number(op, "pivot_bias", self.pivot_bias)

    @classmethod
    def sample(
        cls,
        text_mask: Tensor,
        num_pivots: int,
        *,
        block_size: int = 128,
        window_blocks: int = 6,
        density_correction: bool = True,
        valid_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> ThreeRegionLayout:
        """All text positions, then random other positions: ``num_pivots`` a sample, drawn anew at every call.

        Nothing synchronises with the host, so every layer can draw its own at every step. Where text comes
        last, as in captioning, let ``text_mask`` cover its padding too: the number of random pivots, which
        earlier queries see, would otherwise tell the model how much text is to come.

        Args:
            text_mask: boolean ``[B, T]``; True positions always become pivots.
            num_pivots: pivots a sample. Where fewer valid positions exist, -1 fills the rest.
            block_size, window_blocks: the window, as in :class:`ThreeRegionLayout`.
            density_correction: ``pivot_bias = log(T // num_pivots)`` (0 where ``T <= num_pivots``), so that
                the random pivots stand for the positions left out; False gives 0.
            valid_mask: boolean ``[B, T]``; the random pivots are drawn uniformly, without replacement, among
                its True positions that are not text. None: among all.
            generator: of the masks' device; None takes PyTorch's default one.

        Raises:
            ValueError: a shape or range above is not met, or a sample has more text than ``num_pivots``. On a
                GPU that last check runs there, without waiting: it stops the program with a device-side
                assertion at the next synchronisation.
            TypeError: a mask is not boolean.
        """
        op = "ThreeRegionLayout.sample"
        for name, mask in (("text_mask", text_mask), ("valid_mask", valid_mask)):
            if mask is None:
                continue
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"{op}: {name} must be a boolean tensor, got {got}")
            if mask.dim() != 2 or mask.shape != text_mask.shape:
                shape = "[B, T]" if name == "text_mask" else f"that of text_mask, {tuple(text_mask.shape)}"
                raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(mask.shape)}")
            _checks.check_same_device(op, name, mask, "text_mask", text_mask)
        _check_count(op, "num_pivots", num_pivots, 0)
        if generator is not None and generator.device.type != text_mask.device.type:
            raise ValueError(
                f"{op}: generator must be on the device of text_mask, {text_mask.device}, "
                f"got {generator.device}"
            )
        B, T = text_mask.shape
        fits = text_mask.sum(1) <= num_pivots
        message = f"{op}: a sample has more text positions than num_pivots ({num_pivots}); raise num_pivots"
        if text_mask.device.type == "cpu" and not torch.compiler.is_compiling():
            if not bool(fits.all()):
                raise ValueError(f"{message} to {int(text_mask.sum(1).max())} or more")
        else:
            torch._assert_async(fits.all(), message)

        # Text ranks above every draw from [0, 1), what is not valid below.
        rank = torch.rand(B, T, device=text_mask.device, generator=generator)
        if valid_mask is not None:
            rank = rank.masked_fill(~valid_mask, -1.0)
        rank, pivots = rank.masked_fill(text_mask, 2.0).topk(min(num_pivots, T), dim=1)
        pivots = pivots.masked_fill(rank < 0, -1)
        if num_pivots > T:
            pivots = torch.nn.functional.pad(pivots, (0, num_pivots - T), value=-1)
        bias = math.log(T // num_pivots) if density_correction and T > num_pivots > 0 else 0.0
        return cls(pivots, block_size, window_blocks, bias)

    def dense_mask(self, T: int) -> Tensor:
        """Boolean ``[B, T, T]``: True where query (second dimension) sees key (third)."""
        _check_count("ThreeRegionLayout.dense_mask", "T", T, 0)
        window, far = region_masks(self.pivots, self.block_size, self.window_blocks, T)
        return window | far

    def plan(self, T: int) -> ThreeRegionPlan:
        """Counts keys and tiles at sequence length ``T`` and predicts the gain over dense causal attention.

        Reads the pivots on the host, so it waits for the device: meant for choosing a setting, not for a
        training step.
        """
        _check_count("ThreeRegionLayout.plan", "T", T, 1)
        w, W = self.block_size, self.window_blocks
        pivots = self.pivots.cpu().long()
        B = max(1, pivots.shape[0])
        keys = tiles = 0
        blocks = -(-T // w)
        for block in range(blocks):
            start, stop = block * w, min(T, (block + 1) * w)
            window_start = max(0, (block - W + 1) * w)
            rows = stop - start
            prefix = ((pivots >= 0) & (pivots < window_start)).sum(1)
            keys += int(prefix.sum()) * rows + B * (rows * (start - window_start) + rows * (rows + 1) // 2)
            tiles += int(((prefix + w - 1) // w).sum()) + B * min(W, block + 1)
        causal_tiles = blocks * (blocks + 1) // 2
        gathered = tiles / B
        return ThreeRegionPlan(
            keys_per_query=keys / B / T,
            causal_keys_per_query=(T + 1) / 2,
            tiles_per_query_block=gathered / blocks,
            gathered_tiles=gathered,
            causal_tiles=causal_tiles,
            predicted_gain=causal_tiles / (gathered + _BLOCK_OVERHEAD * blocks),
        )


def check_pivot_values(op: str, pivots: Tensor, T: int) -> None:
    """Pivots on the CPU lie in [-1, T) and, -1 apart, differ within a sample."""
    outside = (pivots < -1) | (pivots >= T)
    if bool(outside.any()):
        raise ValueError(
            f"{op}: layout.pivots must lie in [0, {T}) (-1 pads), got {int(pivots[outside][0])}; "
            "draw them for this sequence length"
        )
    ordered = pivots.sort(1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(repeated.any()):
        raise ValueError(
            f"{op}: layout.pivots must be unique within a sample, "
            f"got {int(ordered[:, 1:][repeated][0])} twice"
        )


def _check_count(op: str, name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")
