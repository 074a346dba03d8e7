# SPDX-License-Identifier: Apache-2.0
"""CogView's training step in plain PyTorch: nn.LayerNorm, SDPA, all logits, F.cross_entropy.

It moves the same weights by the same optimizer as our step; only what is computed with them is written anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.definitions import Case, Forward, Inputs, Variant
from cogview.model.transformer import CogView, Layer
from cogview.tokens.sequence import Batch
from cogview.training.loop import backward, descend
from cogview.training.memory import MicroBatch, step_memory
from cogview.training.precision import Precision
from cogview_kernels import ThreeRegionLayout


def layer_forward(layer: Layer, x: Tensor, bias: Tensor | None) -> Tensor:
    """One layer; ``bias`` on the scores, or None for causal attention."""
    B, T, C = x.shape
    attention = layer.attention
    qkv = attention.query_key_value(layer.input_layernorm(x)).view(B, T, 3, attention.num_heads, -1)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    if bias is not None:
        bias = bias.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)
    x = x + layer.third_layernorm(attention.dense(out.transpose(1, 2).reshape(B, T, C)))
    return x + layer.fourth_layernorm(layer.mlp(layer.post_attention_layernorm(x)))


def loss_of(model: CogView, batch: Batch, layouts: Sequence[ThreeRegionLayout] | None = None) -> Tensor:
    """The weighted mean loss; the layouts only show that ours computes what they say."""
    trunk = model.transformer
    T = batch.tokens.shape[1]
    x = model.word_embeddings(batch.tokens) + trunk.position_embeddings.weight[:T]
    biases = [None] * len(trunk.layers) if layouts is None else [dense_bias(layout, T) for layout in layouts]
    for layer, bias in zip(trunk.layers, biases, strict=True):
        if model.config.activation_checkpointing:
            x = checkpoint(layer_forward, layer, x, bias, use_reentrant=False)
        else:
            x = layer_forward(layer, x, bias)
    logits = F.linear(trunk.final_layernorm(x), model.word_embeddings.weight)
    losses = F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), reduction="none")
    return (losses * batch.weight.flatten()).sum() / batch.weight.sum()


def dense_bias(layout: ThreeRegionLayout, T: int) -> Tensor:
    """``[B, 1, T, T]``: what three regions add to the scores, minus infinity for a key that is not seen."""
    window, far = layout.regions(torch.arange(T, device=layout.pivots.device), T)
    bias = torch.full(far.shape, -torch.inf, device=far.device)
    return bias.masked_fill_(far, layout.pivot_bias).masked_fill_(window, 0.0)[:, None]


def first_gain(model: CogView) -> Tensor:
    """The weight whose gradient is compared: it hangs on every layer."""
    return model.transformer.layers[0].input_layernorm.weight


def descend_from(x: Inputs, loss: Tensor) -> tuple[Tensor, Tensor]:
    """The rest of a step; returns what is compared: the loss and one gradient."""
    backward(loss)
    gradient = first_gain(x.model).grad.clone()
    descend(loss, x.model, x.optimizer, clip_norm=1.0)
    return loss.detach(), gradient


def _plain(x: Inputs, function: Callable[..., Tensor]) -> Forward:
    precision = Precision(x.precision, x.batch.tokens.device)

    def step() -> tuple[Tensor, Tensor]:
        with precision.autocast():
            loss = function(x.model, x.batch)
        return descend_from(x, loss)

    return step


def _compiled_why_not(case: Case, device: torch.device) -> str:
    long = device.type == "cpu" and case.shape.T > 2048
    return "on a CPU, compiled for the shorter rows alone: it takes half a minute" if long else ""


def keeping_all(variant: Variant) -> Variant:
    """``variant`` without activation checkpointing, for a GPU that has room."""

    def prepare(x: Inputs, case: Case) -> Forward:
        step = variant.prepare(x, case)
        as_it_was = x.model.config

        def without_checkpoints() -> tuple[Tensor, Tensor]:
            x.model.config = dataclasses.replace(as_it_was, activation_checkpointing=False)
            try:
                return step()
            finally:
                x.model.config = as_it_was

        return without_checkpoints

    kind = "option" if variant.kind == "backend" else variant.kind
    name = f"{variant.name}, no checkpoints"
    return dataclasses.replace(variant, name=name, prepare=prepare, kind=kind, why_not=_no_room)


def _no_room(case: Case, device: torch.device) -> str:
    """Why the step cannot keep what checkpoints would compute again."""
    if not case.shape.model.activation_checkpointing:
        return "its layers are not checkpointed"
    config = dataclasses.replace(case.shape.model, activation_checkpointing=False)
    needed = step_memory(config, MicroBatch(case.shape.B, case.shape.T, case.dtype.itemsize)).total / 2**30
    there = torch.cuda.get_device_properties(device).total_memory / 2**30
    return "" if 1.05 * needed < there else f"needs {needed:.0f} GiB, the device has {there:.0f}"


_PLAIN = Variant("plain PyTorch", lambda x, case: _plain(x, loss_of))

VARIANTS = (
    _PLAIN,
    keeping_all(_PLAIN),
    Variant(
        "torch.compile",
        lambda x, case: _plain(x, torch.compile(loss_of, dynamic=False)),
        why_not=_compiled_why_not,
    ),
)
