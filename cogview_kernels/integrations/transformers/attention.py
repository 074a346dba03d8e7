# SPDX-License-Identifier: Apache-2.0
"""Three-region attention as an attention implementation of transformers.

transformers asks an implementation for two functions: one makes the mask, once per forward pass, and one
computes attention, in each layer. The mask must be a tensor of four dimensions, because only those pass
through StaticCache, ``generate`` and ``torch.compile`` untouched. So ours is int64 ``[B, 1, 1, 1 + P]``: the
number of tokens of each row, padding included, and the positions of its pivots. A row that begins with
padding adds a last column, the position of its first token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

from cogview_kernels import ThreeRegionLayout, _checks, decode_attention, three_region_attention

# What some models ask of attention beyond a mask, under the names by which they hand it over.
_UNKNOWN = ("softcap", "s_aux", "position_bias")


def register(
    name: str = "three_region",
    *,
    block_size: int = 128,
    window_blocks: int = 6,
    num_pivots: int = 768,
    text_length: int = 0,
    pivot_bias: float = 0.0,
) -> None:
    """Makes ``attn_implementation=name`` known to transformers, for every model that looks its attention up.

    Causal self-attention then is :func:`cogview_kernels.three_region_attention`, and over a cache
    :func:`cogview_kernels.decode_attention`. The layout is drawn once per forward pass, for all layers: the
    first ``text_length`` tokens of each row and random other ones, none of them padding. Draws come from
    PyTorch's default generator, so ``torch.manual_seed`` repeats them; with ``num_pivots == text_length``
    nothing is random. Rows may be padded on the left or on the right. Where padding lies between tokens, as a
    prompt that was padded on the right leaves it in a cache, SDPA gets a mask of what the layout lets a query
    see. Cross-attention, sliding windows and masks of four dimensions from the user go to it as they are.

    Args:
        name: more than one may be registered, each with its own options; none that is transformers' own.
        block_size, window_blocks: the window, see :class:`cogview_kernels.ThreeRegionLayout`.
        num_pivots: pivots a row, 0 or above.
        text_length: at most ``num_pivots``.
        pivot_bias: is added to the logits of far keys. ``math.log(T // num_pivots)`` is CogView's density
            correction for sequences of T tokens.

    Raises:
        TypeError, ValueError: a range above is not met.

    In a forward pass, NotImplementedError names what the attention cannot do: packed sequences and other
    changes of the causal mask, softcap, sinks, position biases, dropout beside a filled cache. Under
    ``torch.compile`` an ``attention_mask`` is needed, since transformers otherwise assumes packed sequences;
    nobody looks at its values there, and padding must not lie between tokens.
    """
    implementation = ThreeRegionImplementation(
        name, block_size, window_blocks, num_pivots, text_length, pivot_bias
    )
    known = AttentionInterface()
    taken = name in known and not isinstance(
        getattr(known[name], "__self__", None), ThreeRegionImplementation
    )
    if taken:
        raise ValueError(
            f"register: name {name!r} is taken in transformers; choose another, as 'three_region' is"
        )
    AttentionInterface.register(name, implementation.attention)
    AttentionMaskInterface.register(name, implementation.mask)


@dataclass(frozen=True)
class ThreeRegionImplementation:
    """The two functions that transformers asks for, and the options they share; see :func:`register`."""

    name: str
    block_size: int
    window_blocks: int
    num_pivots: int
    text_length: int
    pivot_bias: float

    def __post_init__(self) -> None:
        op = "register"
        if not isinstance(self.name, str):
            raise TypeError(f"{op}: name must be a string, got {type(self.name).__name__}")
        if not self.name:
            raise ValueError(f"{op}: name must not be empty; 'three_region' is the default")
        for option, least in (("block_size", 1), ("window_blocks", 1), ("num_pivots", 0), ("text_length", 0)):
            _checks.check_count(op, option, getattr(self, option), least)
        if self.text_length > self.num_pivots:
            raise ValueError(
                f"{op}: text_length must be at most num_pivots, {self.num_pivots}, got {self.text_length}"
            )
        _checks.check_finite_number(op, "pivot_bias", self.pivot_bias)

    def mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: Any = 0,  # of a StaticCache, a tensor
        kv_offset: int = 0,
        mask_function: Callable[..., Any] = causal_mask_function,
        attention_mask: Tensor | None = None,
        device: torch.device | str = "cpu",
        **others: Any,
    ) -> Tensor | None:
        """Lengths, pivots and starts of the rows as one tensor, or SDPA's mask for what is not causal."""
        if others.get("local_size") is not None or "allow_is_bidirectional_skip" in others:
            return sdpa_mask(
                batch_size,
                q_length,
                kv_length,
                q_offset,
                kv_offset,
                mask_function,
                attention_mask,
                device=device,
                **{**others, "allow_is_causal_skip": False},
            )
        if mask_function is not causal_mask_function:
            # While tracing, transformers cannot look at positions and takes every batch for a packed one.
            traced = "; while tracing, pass an attention_mask" if torch.compiler.is_compiling() else ""
            raise NotImplementedError(
                f"{self.name}: the mask must be causal with padding alone; packed sequences, bidirectional "
                f"blocks and mask functions of a model's own need attn_implementation='sdpa'{traced}"
            )
        length = torch.full((batch_size,), q_length, dtype=torch.int64, device=device) + q_offset
        valid = torch.arange(kv_length, device=device) < length[:, None]
        starts = None
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if padding is not None:
            valid = valid & padding[:, :kv_length]
            starts = _starts(valid)
        has_holes = padding is not None and _has_holes(valid)
        text = valid & (valid.cumsum(1) <= self.text_length)
        layout = ThreeRegionLayout.sample(text, self.num_pivots, density_correction=False, valid_mask=valid)
        if has_holes:
            query = length[:, None] - q_length + torch.arange(q_length, device=device)
            return self._dense_mask(layout, query, valid, starts)
        columns = [length[:, None], layout.pivots] + ([] if starts is None else [starts[:, None]])
        return torch.cat(columns, 1)[:, None, None]

    def _dense_mask(
        self, layout: ThreeRegionLayout, query: Tensor, valid: Tensor, starts: Tensor | None
    ) -> Tensor:
        """``[B, 1, T, S]`` for SDPA: what queries at positions ``query`` ``[B, T]`` see of valid keys."""
        layout = ThreeRegionLayout(layout.pivots, self.block_size, self.window_blocks)
        num_keys = valid.shape[1]
        window, far = layout.regions(query, num_keys, starts)
        # A query that is padding sees itself alone: of no key at all SDPA would make NaN.
        itself = query[..., None] == torch.arange(num_keys, device=query.device)
        seen = ((window | far) & valid[:, None]) | itself
        if self.pivot_bias:
            bias = torch.where(far, self.pivot_bias, 0.0)
            return bias.masked_fill_(~seen, -torch.inf)[:, None]
        return seen[:, None]

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """``[B, H, T, D]`` in, ``[B, T, H, D]`` out, as transformers has it."""
        is_causal = others.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if attention_mask is None and is_causal:
            raise NotImplementedError(
                f"{self.name}: {type(module).__name__} hands over no mask; "
                "its model needs attn_implementation='sdpa'"
            )
        if attention_mask is None or attention_mask.dtype != torch.int64:
            if attention_mask is not None and attention_mask.is_floating_point():
                attention_mask = attention_mask.to(query.dtype)
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
            )
        for option in _UNKNOWN:
            if others.get(option) is not None:
                raise NotImplementedError(
                    f"{self.name}: attention has no {option}, which {type(module).__name__} asks for; "
                    "use attn_implementation='eager'"
                )
        # Under autocast, tables of positions leave queries and keys in float32; SDPA casts them too.
        q, k = query.to(value.dtype), key.to(value.dtype)
        if attention_mask.shape[1:3] != (1, 1) or attention_mask.shape[3] - self.num_pivots not in (1, 2):
            raise TypeError(
                f"{self.name}: attention_mask of four dimensions must be boolean or floating, "
                f"got torch.int64 {tuple(attention_mask.shape)}"
            )
        fields = attention_mask[:, 0, 0]
        lengths, pivots = fields[:, 0], fields[:, 1 : 1 + self.num_pivots]
        padded = fields.shape[1] > 1 + self.num_pivots
        starts = fields[:, -1] if padded else None
        if q.shape[2] != k.shape[2] and dropout:
            raise NotImplementedError(
                f"{self.name}: there is no dropout over a cache; call model.eval() first"
            )
        # Blocks are counted from a row's first token, as if it were alone.
        layout = ThreeRegionLayout(pivots, self.block_size, self.window_blocks, self.pivot_bias)
        options: dict[str, Any] = {"layout": layout, "starts": starts, "scale": scaling}
        if q.shape[2] == k.shape[2]:
            out = cast(Tensor, three_region_attention(q, k, value, **options, dropout_p=dropout))
        else:
            out = decode_attention(q, k, value, lengths, **options)
        return out.transpose(1, 2).contiguous(), None


def _has_holes(valid: Tensor) -> bool:
    """Whether padding lies between the valid positions of a row; not looked at while tracing."""
    if torch.compiler.is_compiling():
        return False
    changes = (valid[:, 1:] != valid[:, :-1]).sum(1) + valid[:, 0]
    return bool((changes > 2).any())


def _starts(valid: Tensor) -> Tensor | None:
    """The first valid position of each row, or None where that is 0 in all rows and can be read."""
    # As transformers does for its own masks: one look per forward pass, none while tracing.
    if not torch.compiler.is_compiling() and bool(valid[:, 0].all()):
        return None
    return valid.int().argmax(1)
