# SPDX-License-Identifier: Apache-2.0
"""What computes causal attention, dense or by CogView's three-region rule, without this library.

Letters as in ``benchmarks.shapes``. The two strong rivals share this library's idea: with the pivots sorted,
those left of a query block's window are a prefix, so keys can be gathered once and concatenated with the
sequence. What depends on the pivots alone (sorting, prefix lengths, masks) is made in ``prepare`` and not
timed, to the rivals' advantage: in training it would be remade at every layer and step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.definitions import FORWARD, Case, Forward, Inputs, Variant

FLEX_BLOCK = 128


# ---- dense causal attention


def _dense(*kernels: SDPBackend) -> Any:
    def prepare(x: Inputs, case: Case) -> Forward:
        if not kernels:
            return lambda: F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True)

        def forced() -> Tensor:
            with sdpa_kernel(list(kernels)):
                return F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True)

        return forced

    return prepare


# ---- the loop of SDPA calls


def sort_pivots(x: Inputs, case: Case) -> Tensor:
    """``[B, P]``, ascending, T where padded."""
    pivots = x.layout.pivots.long()
    return pivots.masked_fill(pivots < 0, case.shape.T).sort(1).values


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """``[B, H, P]``: where the rows ``index`` ``[B, P]`` of ``[B, H, T, D]`` are among all of its rows."""
    B, H, T, _ = x.shape
    first = T * torch.arange(B * H, device=x.device).view(B, H, 1)
    return first + index.clamp(max=T - 1)[:, None]


def gather_keys(x: Tensor, rows: Tensor) -> Tensor:
    """``[B, H, P, D]`` of ``[B, H, T, D]``, by whole rows: ``Tensor.gather`` takes several times as long."""
    return x.flatten(0, 2).index_select(0, rows.flatten()).unflatten(0, rows.shape)


def _loop(x: Inputs, case: Case) -> Forward:
    """One call a query block over [its prefix of the sorted pivots, its window]. Query blocks that see no far
    key share one call."""
    T, regions, device = case.shape.T, case.shape.regions, x.q.device
    sorted_pivots = sort_pivots(x, case)
    rows = rows_of(x.k, sorted_pivots)
    dense = min(T, regions.block_size * regions.window_blocks)
    plan = []
    for start in range(dense, T, regions.block_size):
        stop, window_start = min(T, start + regions.block_size), regions.window_start(start)
        is_far = sorted_pivots < window_start
        prefix = int(is_far.sum(1).max())
        near = torch.ones(stop - start, stop - window_start, dtype=torch.bool, device=device)
        near = near.tril(start - window_start)
        far = is_far[:, None, None, :prefix].expand(-1, 1, stop - start, -1)
        visible = torch.cat([far, near.expand(far.shape[0], 1, -1, -1)], 3)
        mask = torch.zeros(visible.shape, dtype=case.dtype, device=device)
        mask[..., :prefix] = x.layout.pivot_bias
        plan.append((start, stop, window_start, prefix, mask.masked_fill(~visible, float("-inf"))))

    def forward() -> Tensor:
        q, k, v = x.q, x.k, x.v
        k_far, v_far = gather_keys(k, rows), gather_keys(v, rows)
        head = (q[:, :, :dense], k[:, :, :dense], v[:, :, :dense])
        parts = [F.scaled_dot_product_attention(*head, is_causal=True)]
        for start, stop, window_start, prefix, mask in plan:
            keys = torch.cat([k_far[:, :, :prefix], k[:, :, window_start:stop]], 2)
            values = torch.cat([v_far[:, :, :prefix], v[:, :, window_start:stop]], 2)
            parts.append(F.scaled_dot_product_attention(q[:, :, start:stop], keys, values, attn_mask=mask))
        return torch.cat(parts, 2)

    return forward


# ---- FlexAttention


def _flex_why_not(case: Case, device: torch.device) -> str:
    if device.type == "cpu" and case.direction != FORWARD:
        return "FlexAttention has no backward on the CPU"
    return ""


def _flex_mask(x: Inputs, case: Case) -> Forward:
    """The two-line rule as a mask_mod; its block mask covers every causal tile."""
    B, T, bias = case.shape.B, case.shape.T, x.layout.pivot_bias
    block_size, window_blocks = case.shape.regions.block_size, case.shape.regions.window_blocks
    is_pivot = torch.zeros(B, T + 1, dtype=torch.bool, device=x.q.device)
    is_pivot = is_pivot.scatter(1, sort_pivots(x, case), True)

    def in_window(i: Tensor, j: Tensor) -> Tensor:
        return j // block_size > i // block_size - window_blocks

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (in_window(i, j) | is_pivot[b, j])

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(in_window(i, j), score, score + bias)

    block_mask = create_block_mask(mask_mod, B, None, T, T, device=x.q.device, BLOCK_SIZE=FLEX_BLOCK)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(x.q, x.k, x.v, score_mod=score_mod if bias else None, block_mask=block_mask)


def gathered_block_mask(
    sorted_pivots: Tensor, T: int, block_size: int, window_blocks: int
) -> tuple[BlockMask, int]:
    """Block mask over the keys [sorted pivots, padded to whole blocks; sequence], from prefix lengths alone.

    Returns the block mask and the number of gathered columns. No ``[T, T]`` mask is built.
    """
    B, P = sorted_pivots.shape
    device, block = sorted_pivots.device, FLEX_BLOCK
    columns = -(-max(P, 1) // block) * block
    first_block = torch.arange(T, device=device) // block_size - (window_blocks - 1)
    window_start = (first_block * block_size).clamp(min=0)
    # prefix[b, i]: how many pivots query i sees
    prefix = torch.searchsorted(sorted_pivots, window_start.expand(B, T).contiguous())

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        position = j - columns
        near = (position >= window_start[i]) & (position <= i)
        return torch.where(j < columns, j < prefix[b, i], near)

    rows = -(-T // block)
    start = torch.arange(rows, device=device) * block
    last = (start + block).clamp(max=T) - 1
    far_start = torch.arange(columns // block, device=device) * block
    near_start = torch.arange(rows, device=device) * block
    near_last = (near_start + block).clamp(max=T) - 1
    # Prefix and start of the window grow with the row, so a tile's first and last row decide.
    touched = torch.cat(
        [
            prefix[:, last, None] > far_start,
            ((near_last >= window_start[start, None]) & (near_start <= last[:, None])).expand(B, -1, -1),
        ],
        2,
    )
    full = torch.cat(
        [
            prefix[:, start, None] >= far_start + block,
            ((near_start >= window_start[last, None]) & (near_last <= start[:, None])).expand(B, -1, -1)
            & (near_last - near_start == block - 1),
        ],
        2,
    )

    def ordered_blocks(dense: Tensor) -> tuple[Tensor, Tensor]:
        count = dense.sum(2, dtype=torch.int32)
        index = dense.to(torch.int8).argsort(dim=2, descending=True, stable=True).to(torch.int32)
        return count[:, None].contiguous(), index[:, None].contiguous()

    block_mask = BlockMask.from_kv_blocks(
        *ordered_blocks(touched & ~full),
        *ordered_blocks(full),
        BLOCK_SIZE=block,
        mask_mod=mask_mod,
        seq_lengths=(T, columns + T),
    )
    return block_mask, columns


def _flex_gathered(x: Inputs, case: Case) -> Forward:
    """Gather, concatenate and attend; the gather is timed, the block mask is not."""
    sorted_pivots, regions = sort_pivots(x, case), case.shape.regions
    block_mask, columns = gathered_block_mask(
        sorted_pivots, case.shape.T, regions.block_size, regions.window_blocks
    )
    rows = rows_of(x.k, F.pad(sorted_pivots, (0, columns - sorted_pivots.shape[1]), value=case.shape.T))
    bias = x.layout.pivot_bias

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(j < columns, score + bias, score)

    compiled = torch.compile(flex_attention, dynamic=False)

    def forward() -> Tensor:
        keys = torch.cat([gather_keys(x.k, rows), x.k], 2)
        values = torch.cat([gather_keys(x.v, rows), x.v], 2)
        return compiled(x.q, keys, values, score_mod=score_mod if bias else None, block_mask=block_mask)

    return forward


# ---- the original's way


def _eager_chunks(x: Inputs, case: Case) -> Forward:
    """As CogView was trained. Scores against all pivots and against each query block's window are stored,
    hidden ones set to -10000, and one softmax runs over both. An overlapping strided view spares the forward
    pass a copy of the windows."""
    B, H, T, D = x.q.shape
    regions, P = case.shape.regions, case.shape.regions.P
    block_size, window_blocks = regions.block_size, regions.window_blocks
    blocks, span = T // block_size, window_blocks * block_size
    device, dtype = x.q.device, x.q.dtype
    hidden = -10000.0
    pivots = x.layout.pivots.long()
    block = torch.arange(T, device=device) // block_size
    far = pivots[:, None, :] // block_size <= block[None, :, None] - window_blocks
    far = far & (pivots >= 0)[:, None, :]
    far_bias = torch.where(far, x.layout.pivot_bias, hidden).to(dtype)[:, None]
    row = torch.arange(block_size, device=device)[None, :, None]
    column = torch.arange(span, device=device)[None, None, :] - (span - block_size)
    block_start = torch.arange(blocks, device=device)[:, None, None] * block_size
    near_bias = torch.where((column <= row) & (column + block_start >= 0), 0.0, hidden).to(dtype)
    rows = rows_of(x.k, pivots.clamp(min=0))
    scale = D**-0.5

    def windows(y: Tensor) -> Tensor:
        padded = F.pad(y, (0, 0, span - block_size, 0))
        b, h, t, d = padded.stride()
        return padded.as_strided((B, H, blocks, span, D), (b, h, block_size * t, t, d))

    def forward() -> Tensor:
        q = x.q * scale
        far_scores = q @ gather_keys(x.k, rows).transpose(-1, -2) + far_bias
        near_scores = q.view(B, H, blocks, block_size, D) @ windows(x.k).transpose(-1, -2) + near_bias
        scores = torch.cat([far_scores, near_scores.view(B, H, T, span)], -1)
        probs = torch.softmax(scores, -1)
        out = probs[..., :P] @ gather_keys(x.v, rows)
        near_probs = probs[..., P:].view(B, H, blocks, block_size, span)
        return out + (near_probs @ windows(x.v)).view(B, H, T, D)

    return forward


def _chunks_why_not(case: Case, device: torch.device) -> str:
    fits = case.shape.T % case.shape.regions.block_size == 0
    return "" if fits else "the original needs T to be a multiple of the block size"


def _gpu_only(case: Case, device: torch.device) -> str:
    return "" if device.type == "cuda" else "on a CPU PyTorch has only one kernel, the default"


DENSE = "dense causal SDPA"
GATHERED = "FlexAttention, gathered keys"
LOOP = "loop of SDPA calls"

DENSE_VARIANTS = (
    Variant(DENSE, _dense(), truth="dense"),
    Variant("dense causal SDPA, flash", _dense(SDPBackend.FLASH_ATTENTION), truth="dense", why_not=_gpu_only),
    Variant("dense causal SDPA, cuDNN", _dense(SDPBackend.CUDNN_ATTENTION), truth="dense", why_not=_gpu_only),
    Variant(
        "dense causal SDPA, memory-efficient",
        _dense(SDPBackend.EFFICIENT_ATTENTION),
        truth="dense",
        why_not=_gpu_only,
    ),
)
_PREPARED = "block mask made beforehand, not timed"
SPARSE_VARIANTS = (
    Variant(LOOP, _loop, note="prefix lengths and masks made beforehand, not timed"),
    Variant("FlexAttention, mask", _flex_mask, why_not=_flex_why_not, note=_PREPARED),
    Variant(GATHERED, _flex_gathered, why_not=_flex_why_not, note=_PREPARED),
    Variant("original, eager", _eager_chunks, why_not=_chunks_why_not, note="as CogView was trained"),
)
