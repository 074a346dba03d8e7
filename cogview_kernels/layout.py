# SPDX-License-Identifier: Apache-2.0
"""Which keys a query sees: the pivots of each sample and the window, and what that costs.

Everything in Python that asks whether a query sees a key asks :func:`window_start` and :func:`window_stop`
here. The same rule stands once for C++ and CUDA, in csrc/common/regions.h, and once for Triton, in
``_regions_triton``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree

from cogview_kernels import _checks, _torch_ops

_INTEGERS = (torch.int64, torch.int32, torch.int16)

# What a query block costs beyond its tiles (its masked last tiles, the lookup of its prefix), in tiles.
_BLOCK_OVERHEAD = 0.25

Position = TypeVar("Position", int, Tensor)


def window_start(
    query: Position, block_size: int, window_blocks: int, origin: Position | int = 0
) -> Position:
    """The first position in the window of the query at position ``query``, which may lie before ``origin``.

    The window is the query's own block up to the query, and the ``window_blocks - 1`` blocks before. Keys
    before the window are far: they are seen if they are pivots. Blocks are counted from ``origin``, the first
    position of the sample.
    """
    return origin + ((query - origin) // block_size - (window_blocks - 1)) * block_size


def window_stop(
    query: Position, block_size: int, window_blocks: int, causal: bool, origin: Position | int = 0
) -> Position:
    """The position after the last one in the window of a query, which may lie past the end.

    Of a causal layout the query's own is the last one; else the window has the query's own block whole and
    the ``window_blocks - 1`` blocks after it, and pivots from here on are far, too.
    """
    if causal:
        return query + 1
    return origin + ((query - origin) // block_size + window_blocks) * block_size


@dataclass(frozen=True)
class ThreeRegionPlan:
    """Work of :func:`three_region_attention` against dense attention, averaged over the samples.

    Dense attention is causal where the layout is. A tile is ``block_size`` queries by ``block_size`` keys.
    ``predicted_gain`` is how many times faster than dense attention a kernel of equal efficiency would be;
    below 1, dense attention wins.
    """

    keys_per_query: float
    dense_keys_per_query: float
    tiles_per_query_block: float
    gathered_tiles: float
    dense_tiles: int
    predicted_gain: float
    causal: bool = True

    def __str__(self) -> str:
        dense = "dense causal attention" if self.causal else "dense attention"
        verdict = (
            f"about {self.predicted_gain:.2f}x faster than {dense}"
            if self.predicted_gain > 1
            else f"{dense} wins (predicted gain {self.predicted_gain:.2f}x)"
        )
        return (
            f"{self.keys_per_query:.0f} of {self.dense_keys_per_query:.0f} keys a query, "
            f"{self.gathered_tiles:.0f} of {self.dense_tiles} tiles: {verdict}"
        )


def _with_density(pivot_bias: float, density: int) -> float:
    """Kernels know of one number."""
    return pivot_bias if density == 1 else pivot_bias + math.log(density)


@dataclass(frozen=True, eq=False)
class ThreeRegionLayout:
    """The three regions that a query sees: text and random pivots, and a block window.

    With ``b(i) = i // block_size``, query i sees key j iff ``j <= i`` and either ``b(j) > b(i) -
    window_blocks`` (window: its own block and the ``window_blocks - 1`` before it) or ``j`` is a pivot with
    ``b(j) <= b(i) - window_blocks`` (far). Far keys get ``pivot_bias`` added to their logits.

    With ``causal=False``, for encoders, the window reaches to both sides, ``|b(i) - b(j)| < window_blocks``,
    and all pivots outside it are far.

    Args:
        pivots: integer ``[B, P]``, on the device of the tensors it is used with: positions in ``[0, T)``,
            unique per sample, in any order; -1 pads. P may be 0.
        block_size: positive.
        window_blocks: positive.
        pivot_bias: finite.
        density: how many positions a far pivot stands for, at least 1: its logarithm is added to
            ``pivot_bias``. Under ``torch.compile`` an integer may follow from the sequence length, where a
            float would cost a compilation per length.
        causal: whether a query sees nothing after itself.

    A layout is a pytree node, whose leaf is ``pivots``: it may be an input of what ``torch.export`` exports,
    and ``tree_map`` reaches its tensor. It can be copied, pickled, and loaded with
    ``torch.load(weights_only=True)``, which checks it as the constructor does.

    Source: CogView, arXiv:2105.13290, section 4.1 (three-region sparse attention) and its released code.
    """

    pivots: Tensor
    block_size: int = 128
    window_blocks: int = 6
    pivot_bias: float = 0.0
    density: int = 1
    causal: bool = True

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
        _checks.check_count(op, "block_size", self.block_size, 1)
        _checks.check_count(op, "window_blocks", self.window_blocks, 1)
        _checks.check_finite_number(op, "pivot_bias", self.pivot_bias)
        _checks.check_count(op, "density", self.density, 1)
        _checks.check_bool(op, "causal", self.causal)

    @classmethod
    def sample(
        cls,
        text_mask: Tensor,
        num_pivots: int,
        *,
        block_size: int = 128,
        window_blocks: int = 6,
        density_correction: bool = True,
        causal: bool = True,
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
            block_size, window_blocks, causal: the window, as in :class:`ThreeRegionLayout`.
            density_correction: ``pivot_bias = log(T // num_pivots)`` (0 where ``T <= num_pivots``), so that
                the random pivots stand for the positions left out; False gives 0. Under ``torch.compile`` it
                is the layout's ``density`` that says so.
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
            if mask is None and name == "valid_mask":
                continue
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"{op}: {name} must be a boolean tensor, got {got}")
            if mask.dim() != 2 or mask.shape != text_mask.shape:
                shape = "[B, T]" if name == "text_mask" else f"that of text_mask, {tuple(text_mask.shape)}"
                raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(mask.shape)}")
            _checks.check_same_device(op, name, mask, "text_mask", text_mask)
        _checks.check_count(op, "num_pivots", num_pivots, 0)
        _checks.check_bool(op, "density_correction", density_correction)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"{op}: generator must be a torch.Generator, got {type(generator).__name__}")
        if generator is not None and generator.device.type != text_mask.device.type:
            raise ValueError(
                f"{op}: generator must be on the device of text_mask, {text_mask.device}, "
                f"got {generator.device}"
            )
        B, T = text_mask.shape
        fits = text_mask.sum(1) <= num_pivots
        message = f"{op}: a sample has more text positions than num_pivots ({num_pivots}); raise num_pivots"
        if _torch_ops.values_are_readable(text_mask):
            if not bool(fits.all()):
                raise ValueError(f"{message} to {int(text_mask.sum(1).max())} or more")
        else:
            torch._assert_async(fits.all(), message)

        # Text ranks above every draw from [0, 1), what is not valid below.
        # torch.compile refuses even generator=None where a size is a symbol.
        chosen: dict[str, Any] = {} if generator is None else {"generator": generator}
        rank = torch.rand(B, T, dtype=torch.float32, device=text_mask.device, **chosen)
        if valid_mask is not None:
            rank = rank.masked_fill(~valid_mask, -1.0)
        rank, pivots = rank.masked_fill(text_mask, 2.0).topk(min(num_pivots, T), dim=1)
        pivots = pivots.masked_fill(rank < 0, -1)
        if num_pivots > T:
            pivots = torch.nn.functional.pad(pivots, (0, num_pivots - T), value=-1)
        density = T // num_pivots if density_correction and T > num_pivots > 0 else 1
        if torch.compiler.is_compiling() or isinstance(T, torch.SymInt):
            return cls(pivots, block_size, window_blocks, density=density, causal=causal)
        return cls(pivots, block_size, window_blocks, math.log(density), causal=causal)

    @classmethod
    def unchecked(
        cls,
        pivots: Tensor,
        block_size: int,
        window_blocks: int,
        pivot_bias: float,
        density: int = 1,
        causal: bool = True,
    ) -> ThreeRegionLayout:
        """From the flat arguments of an op, which were a layout's before: no check costs host time twice."""
        layout = object.__new__(cls)
        members = layout.__dict__  # past the dataclass, which is frozen
        members["pivots"], members["density"] = pivots, 1
        members["pivot_bias"] = _with_density(pivot_bias, density)
        members["block_size"], members["window_blocks"], members["causal"] = block_size, window_blocks, causal
        return layout

    @property
    def kernel_bias(self) -> float:
        """``pivot_bias`` with ``density`` in it."""
        return _with_density(self.pivot_bias, self.density)

    def far_bias(self, like: Tensor) -> Tensor:
        """What is added to the logits of far keys, in plain PyTorch: 0-d, dtype and device of ``like``."""
        wide = torch.promote_types(like.dtype, torch.float32)
        log_density = torch.full((), self.density, dtype=wide, device=like.device).log()
        return (self.pivot_bias + log_density).to(like.dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What was pickled may come from anybody: kernels divide by ``block_size``."""
        self.__dict__.update(state)
        self.__post_init__()

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> ThreeRegionLayout:
        """On another device; itself where it lies there already."""
        pivots = self.pivots.to(device=device, non_blocking=non_blocking)
        return self if pivots is self.pivots else replace(self, pivots=pivots)

    def window(self, num_keys: int) -> tuple[int, int]:
        """``(block_size, window_blocks)``, cut down where it changes nothing: no product overflows."""
        return min(self.block_size, max(num_keys, 1)), min(self.window_blocks, max(num_keys, 1))

    def is_pivot(self, num_keys: int) -> Tensor:
        """Boolean ``[B, num_keys]``: True at the pivots. An error where a pivot lies at or past the end."""
        # The column past the end takes the -1 that pad.
        marks = torch.zeros(len(self.pivots), num_keys + 1, dtype=torch.bool, device=self.pivots.device)
        pivots = self.pivots.long()
        return marks.scatter(1, pivots.masked_fill(pivots < 0, num_keys), True)[:, :num_keys]

    def regions(self, query: Tensor, num_keys: int, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(window, far)``: which of ``num_keys`` keys (last dimension) a query sees, and in which region.

        Args:
            query: positions of the queries, ``[T]`` for all samples or ``[B, T]``; one below 0 sees nothing.
            starts: ``[B]``, the first position of each sample; None is 0. A query before it sees nothing.

        Returns:
            ``window``, boolean with the shape of ``query`` and ``num_keys`` behind it (with ``starts``
            ``[B, T, num_keys]``), and ``far``, boolean ``[B, T, num_keys]``. No key is in both.
        """
        key = torch.arange(num_keys, device=query.device)
        query = query[..., None]
        origin = 0 if starts is None else starts.clamp(min=0)[:, None, None]
        start = window_start(query, *self.window(num_keys), origin).clamp(min=origin)
        stop = window_stop(query, *self.window(num_keys), self.causal, origin)
        outside = key < start if self.causal else (key < start) | (key >= stop)
        visible = (key >= origin) & (query >= origin)
        pivot = self.is_pivot(num_keys)[:, None, :]
        return visible & (key >= start) & (key < stop), visible & pivot & outside

    def sorted_pivots(self, padding: int) -> Tensor:
        """int64 ``[B, P]``, ascending, with ``padding`` in place of -1.

        If ``padding`` is at least the number of keys, the far keys of a query are a prefix of its row.
        """
        pivots = self.pivots.long()
        return pivots.masked_fill(pivots < 0, padding).sort(1).values

    def dense_mask(self, T: int) -> Tensor:
        """Boolean ``[B, T, T]``: True where query (second dimension) sees key (third)."""
        _checks.check_count("ThreeRegionLayout.dense_mask", "T", T, 0)
        self.check_pivots("ThreeRegionLayout.dense_mask", T)
        window, far = self.regions(torch.arange(T, device=self.pivots.device), T)
        return window | far

    def plan(self, T: int) -> ThreeRegionPlan:
        """Counts keys and tiles at sequence length ``T`` and predicts the gain over dense attention.

        Reads the pivots on the host, so it waits for the device: meant for choosing a setting, not for a
        training step.
        """
        _checks.check_count("ThreeRegionLayout.plan", "T", T, 1)
        size = self.block_size
        pivots = self.pivots.cpu().long()
        B = max(1, pivots.shape[0])
        tiles = 0
        blocks = -(-T // size)
        for block in range(blocks):
            start = block * size
            window = max(0, window_start(start, size, self.window_blocks))
            stop = min(blocks * size, window_stop(start + size - 1, size, self.window_blocks, self.causal))
            outside = pivots < window if self.causal else (pivots < window) | (pivots >= stop)
            far = ((pivots >= 0) & outside).sum(1)
            tiles += int(((far + size - 1) // size).sum()) + B * ((stop - window) // size)
        dense_tiles = blocks * (blocks + 1) // 2 if self.causal else blocks * blocks
        gathered = tiles / B
        return ThreeRegionPlan(
            keys_per_query=self.pairs(T, pivots.tolist()) / B / T,
            dense_keys_per_query=(T + 1) / 2 if self.causal else T,
            tiles_per_query_block=gathered / blocks,
            gathered_tiles=gathered,
            dense_tiles=dense_tiles,
            predicted_gain=dense_tiles / (gathered + _BLOCK_OVERHEAD * blocks),
            causal=self.causal,
        )

    def pairs(self, T: int, pivots: list[list[int]] | None, starts: list[int] | None = None) -> int:
        """How many pairs of a query and a key are seen at length ``T``, over all samples.

        ``pivots`` and ``starts`` are values. Where there are no pivots, as in a fake tensor, as many pairs
        are counted as pivots see on average that are spread evenly; no starts are starts of 0.
        """
        B, P = self.pivots.shape
        total = 0
        for b, start in enumerate(starts or [0] * B):
            start = min(max(start, 0), T)
            length = T - start
            total += self._window_pairs(length)
            if pivots is None:
                total += min(P, length) * self._far_pairs(length, range(length)) // max(length, 1)
            else:
                total += self._far_pairs(length, [p - start for p in pivots[b] if p >= start])
        return total

    def _window_pairs(self, T: int) -> int:
        """Pairs of a query and a key of its window, in one sample of ``T`` positions."""
        size, window_blocks = self.window(T)
        pairs = 0
        for start in range(0, T, size):
            window = max(0, window_start(start, size, window_blocks))
            rows = min(T, start + size) - start
            if self.causal:
                pairs += rows * (start - window) + rows * (rows + 1) // 2
            else:
                pairs += rows * (min(T, window_stop(start, size, window_blocks, False)) - window)
        return pairs

    def _far_pairs(self, T: int, pivots: Iterable[int]) -> int:
        """Pairs of a query and one of these pivots, far from it, in one sample of ``T`` positions."""
        size, window_blocks = self.window(T)
        pairs = 0
        for pivot in pivots:
            pairs += max(0, T - window_stop(pivot, size, window_blocks, False))
            pairs += 0 if self.causal else max(0, window_start(pivot, size, window_blocks))
        return pairs

    def check_causal(self, op: str) -> None:
        """For ops that decode: a query of a sequence that is being written sees nothing after itself."""
        if not self.causal:
            raise ValueError(
                f"{op}: layout must be causal, got causal=False; use three_region_attention for a whole "
                "sequence that sees to both sides"
            )

    def check_pivots(self, op: str, num_keys: int) -> None:
        """Where they can be read: pivots lie in [-1, ``num_keys``) and, -1 apart, differ within a sample."""
        if not _torch_ops.values_are_readable(self.pivots):
            return
        outside = (self.pivots < -1) | (self.pivots >= num_keys)
        if bool(outside.any()):
            raise ValueError(
                f"{op}: layout.pivots must lie in [0, {num_keys}) (-1 pads), "
                f"got {int(self.pivots[outside][0])}; draw them for this sequence length"
            )
        ordered = self.pivots.sort(1).values
        repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        if bool(repeated.any()):
            raise ValueError(
                f"{op}: layout.pivots must be unique within a sample, "
                f"got {int(ordered[:, 1:][repeated][0])} twice"
            )


# ---- the layout as a pytree node: its tensor is a leaf, its numbers are the context


def _numbers(layout: ThreeRegionLayout) -> list[Any]:
    return [layout.block_size, layout.window_blocks, layout.pivot_bias, layout.density, layout.causal]


def _flatten(layout: ThreeRegionLayout) -> tuple[list[Any], list[Any]]:
    return [layout.pivots], _numbers(layout)


def _flatten_with_keys(layout: ThreeRegionLayout) -> tuple[list[tuple[Any, Any]], list[Any]]:
    return [(_pytree.GetAttrKey("pivots"), layout.pivots)], _numbers(layout)


def _unflatten(leaves: Iterable[Any], numbers: list[Any]) -> ThreeRegionLayout:
    # A leaf may be anything by now, so nothing is checked.
    layout = object.__new__(ThreeRegionLayout)
    names = ("pivots", "block_size", "window_blocks", "pivot_bias", "density", "causal")
    layout.__dict__.update(zip(names, (*leaves, *numbers), strict=True))
    return layout


_pytree.register_pytree_node(
    ThreeRegionLayout,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="cogview_kernels.ThreeRegionLayout",
)
torch.serialization.add_safe_globals([ThreeRegionLayout])
