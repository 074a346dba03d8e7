# SPDX-License-Identifier: Apache-2.0
"""All layers of a decoding step by the references of the ops that it is made of."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from cogview_kernels.decode_attention.reference import decode_attention_reference
from cogview_kernels.decode_linear.reference import decode_linear_reference as linear
from cogview_kernels.layer_norm.reference import layer_norm_reference
from cogview_kernels.layout import ThreeRegionLayout
from cogview_kernels.sandwich_layer_norm.reference import sandwich_layer_norm_reference

TENSORS = 16  # of a layer


def decode_step_reference(
    x: Tensor,
    tensors: Sequence[Tensor],
    head: Tensor | None,
    cache: Tensor,
    lengths: Tensor,
    layout: ThreeRegionLayout | None,
    eps: float,
    pb_relax: str | None,
) -> Tensor:
    """See :func:`cogview_kernels.decode_step`; computed in the dtype of ``x``. ``tensors``: those of a
    ``LayerStack``."""
    B, T, C = x.shape
    H, D = cache.shape[3], cache.shape[5]
    places = lengths.long()[:, None] + torch.arange(T, device=x.device)
    rows = torch.arange(B, device=x.device)[:, None]
    sandwich = functools.partial(sandwich_layer_norm_reference, eps=eps, pb_relax=pb_relax)
    normed = layer_norm_reference(x, tensors[0], tensors[1], eps=eps, pb_relax=pb_relax)
    for index, (keys, values) in enumerate(cache.unbind(0)):
        at = index * TENSORS
        pairs = [(tensors[i], tensors[i + 1]) for i in range(at + 2, at + TENSORS + 2, 2)]
        qkv, attention_out, attention_post, mlp_pre, mlp_up, mlp_down, mlp_post, next_pre = pairs
        q, k, v = linear(normed, *qkv, None).view(B, T, 3, H, D).unbind(2)
        keys[rows, :, places], values[rows, :, places] = k, v
        out = decode_attention_reference(q.transpose(1, 2), keys, values, lengths + T, layout, D**-0.5)
        branch = linear(out.transpose(1, 2).reshape(B, T, C), *attention_out, None)
        x, normed = sandwich(branch, x, *attention_post, *mlp_pre)
        branch = linear(linear(normed, *mlp_up, "gelu_tanh"), *mlp_down, None)
        x, normed = sandwich(branch, x, *mlp_post, *next_pre)
    return normed if head is None else linear(normed, head, None, None)
