# SPDX-License-Identifier: Apache-2.0
"""The layers of a decoding step op by op: in plain PyTorch, and with our ops."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.definitions import Case, Forward, Inputs, Variant
from cogview_kernels import decode_attention, decode_linear, sandwich_layer_norm

PLAIN = "F.linear, SDPA and F.layer_norm"


def _new_tokens(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    B, T, _ = x.x.shape
    return torch.arange(B)[:, None], x.lengths[:, None] + torch.arange(T), x.lengths + T


def _append(qkv: Tensor, layer: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """The queries of ``[B, T, 3 C]``; keys and values go to ``layer`` ``[2, B, H, S, D]``."""
    q, k, v = qkv.unflatten(-1, (3, layer.shape[2], -1)).unbind(2)
    layer[0][rows, :, places], layer[1][rows, :, places] = k, v
    return q.transpose(1, 2)


def _plain(x: Inputs, case: Case) -> Forward:
    """Without PB-Relax, which costs PyTorch a maximum more a norm."""
    stack, width = x.stack, (case.shape.C,)

    def norm(y: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.layer_norm(y, width, *pair, stack.eps)

    def forward() -> Tensor:
        rows, places, _ = _new_tokens(x)
        seen = (torch.arange(case.shape.S) <= places[..., None])[:, None]
        trunk = x.x
        for index, of in enumerate(stack.layers):
            q = _append(F.linear(norm(trunk, of.attention_pre), *of.qkv), x.cache[index], rows, places)
            out = F.scaled_dot_product_attention(q, *x.cache[index], attn_mask=seen)
            out = out.transpose(1, 2).reshape(trunk.shape)
            trunk = trunk + norm(F.linear(out, *of.attention_out), of.attention_post)
            up = F.gelu(F.linear(norm(trunk, of.mlp_pre), *of.mlp_up), approximate="tanh")
            trunk = trunk + norm(F.linear(up, *of.mlp_down), of.mlp_post)
        return norm(trunk, stack.final_norm)

    return forward


def _our_ops(x: Inputs, case: Case) -> Forward:
    stack = x.stack
    next_norms = [layer.attention_pre for layer in stack.layers[1:]] + [stack.final_norm]
    sandwich: Callable[..., tuple[Tensor, Tensor]] = sandwich_layer_norm

    def forward() -> Tensor:
        rows, places, after = _new_tokens(x)
        trunk = x.x
        normed = F.layer_norm(trunk, (case.shape.C,), *stack.layers[0].attention_pre, stack.eps)
        for index, (of, next_norm) in enumerate(zip(stack.layers, next_norms, strict=True)):
            q = _append(decode_linear(normed, *of.qkv), x.cache[index], rows, places)
            out = decode_attention(q, *x.cache[index], after).transpose(1, 2).reshape(trunk.shape)
            branch = decode_linear(out, *of.attention_out)
            trunk, normed = sandwich(branch, trunk, *of.attention_post, *of.mlp_pre, pb_relax=None)
            branch = decode_linear(decode_linear(normed, *of.mlp_up, activation="gelu_tanh"), *of.mlp_down)
            trunk, normed = sandwich(branch, trunk, *of.mlp_post, *next_norm, pb_relax=None)
        return normed

    return forward


VARIANTS = (
    Variant(PLAIN, _plain),
    Variant("our ops one by one", _our_ops, kind="option"),
)
