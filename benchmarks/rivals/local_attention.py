# SPDX-License-Identifier: Apache-2.0
"""What computes attention to windows of a raster and to text, without this library.

Masks and block masks are made in ``prepare`` and not timed: they depend on the grid alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.definitions import FORWARD, Case, Forward, Inputs, Variant


def _with_text(x: Inputs) -> tuple[Tensor, Tensor]:
    return torch.cat([x.k, x.extra_k], 2), torch.cat([x.v, x.extra_v], 2)


def _sees(case: Case, i: Tensor, j: Tensor) -> Tensor:
    """Whether query i sees key j; the text follows the grid."""
    shape = case.shape
    down, across = j // shape.grid[1] - i // shape.grid[1], j % shape.grid[1] - i % shape.grid[1]
    near = (down.abs() <= shape.kernel_size[0] // 2) & (across.abs() <= shape.kernel_size[1] // 2)
    return (j >= shape.T) | near


def _dense(x: Inputs, case: Case) -> Forward:
    i = torch.arange(case.shape.T, device=x.q.device)[:, None]
    j = torch.arange(case.shape.T + case.shape.E, device=x.q.device)
    mask = torch.zeros(i.shape[0], j.shape[0], dtype=case.dtype, device=x.q.device)
    mask = mask.masked_fill(~_sees(case, i, j), -torch.inf)

    def forward() -> Tensor:
        k, v = _with_text(x)
        return F.scaled_dot_product_attention(x.q, k, v, attn_mask=mask)

    return forward


def _flex_why_not(case: Case, device: torch.device) -> str:
    if device.type == "cpu" and case.direction != FORWARD:
        return "FlexAttention has no backward on the CPU"
    return ""


def _flex(x: Inputs, case: Case) -> Forward:
    T, S = case.shape.T, case.shape.T + case.shape.E
    block_mask = create_block_mask(lambda b, h, i, j: _sees(case, i, j), None, None, T, S, device=x.q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(x.q, *_with_text(x), block_mask=block_mask)


def _unfold(x: Inputs, case: Case) -> Forward:
    """Every query's window copied, its scores stored; -10000 outside the image, as CogView2 has it."""
    shape = case.shape
    rows, columns = shape.kernel_size
    slots, padding = rows * columns, (rows // 2, columns // 2)

    def unfolded(y: Tensor) -> Tensor:
        image = y.transpose(2, 3).reshape(shape.B * shape.H, shape.D, *shape.grid)
        cells = F.unfold(image, shape.kernel_size, padding=padding)
        return cells.view(shape.B, shape.H, shape.D, slots, shape.T).permute(0, 1, 4, 3, 2)

    inside = F.unfold(torch.ones(1, 1, *shape.grid, device=x.q.device), shape.kernel_size, padding=padding)
    outside = (inside == 0).mT.reshape(1, 1, shape.T, slots)

    def forward() -> Tensor:
        q = x.q * shape.D**-0.5
        near = (unfolded(x.k) @ q[..., None])[..., 0].masked_fill(outside, -10000.0)
        probs = torch.cat([near, q @ x.extra_k.transpose(2, 3)], 3).softmax(3)
        out = (probs[..., None, :slots] @ unfolded(x.v))[..., 0, :]
        return out + probs[..., slots:] @ x.extra_v

    return forward


DENSE = "dense SDPA, mask"
VARIANTS = (
    Variant(DENSE, _dense, note="mask made beforehand, not timed"),
    Variant(
        "FlexAttention, mask", _flex, why_not=_flex_why_not, note="block mask made beforehand, not timed"
    ),
    Variant("unfold", _unfold, note="windows copied, scores stored"),
)
