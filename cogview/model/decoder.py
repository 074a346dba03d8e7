# SPDX-License-Identifier: Apache-2.0
"""A model as generation calls it: the next tokens of rows whose earlier ones are cached.

On the CPU a step of a small model is mostly the host's time between the ops of its layers, which one call of
:func:`cogview_kernels.decode_step` for all of them saves.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview.model.cache import KVCache
from cogview.model.transformer import MLP, Attention, CogView, Layer, Trunk
from cogview_kernels import LayerStack, LayerWeights, decode_step

# What a step knows how to compute; a module of another type was put in its place and may do anything.
_KNOWN = frozenset(
    (CogView, Trunk, Layer, Attention, MLP, nn.Linear, nn.LayerNorm, nn.Embedding, nn.ModuleList)
)


class Decoder:
    """``decoder(tokens, cache)`` is ``model(tokens, cache=cache)``, by one op where there is a kernel for it.

    It looks at the model once: make a new one when weights, modules or hooks are others.
    """

    def __init__(self, model: CogView) -> None:
        self.model = model
        self.stack = layer_stack(model)
        self._fitting: dict[int, bool] = {}  # by the number of rows

    def __call__(self, tokens: Tensor, cache: KVCache, positions: Tensor | None = None) -> Tensor:
        """Final hidden states ``[B, T, C]`` of tokens ``[B, T]``; see :meth:`CogView.forward`."""
        if self.stack is None or not self._fits(self.stack, tokens.numel()):
            return cast(Tensor, self.model(tokens, positions=positions, cache=cache))
        places = cache.begin(tokens.shape[1])
        positions = cache.positions(places) if positions is None else positions
        x = F.embedding(tokens, self.model.word_embeddings.weight)
        x = x + F.embedding(positions, self.model.transformer.position_embeddings.weight)
        hidden = decode_step(x, self.stack, cache.buffer, cache.lengths)
        cache.advance(tokens.shape[1])
        return hidden

    def _fits(self, stack: LayerStack, rows: int) -> bool:
        fits = self._fitting.get(rows)
        if fits is None:
            config = self.model.config
            limit = stack.limit(rows, config.hidden_size // config.num_heads)
            fits = self._fitting[rows] = not limit and not torch.is_autocast_enabled("cpu")
        return fits


def layer_stack(model: CogView) -> LayerStack | None:
    """The model's layers as one op takes them; None where that would not be what a call of the model does.

    So it is without the norms that end the branches, and with modules or hooks that are not the model's own.
    """
    if not model.config.sandwich_norm or model.training:
        return None
    for module in model.modules():
        if type(module) not in _KNOWN or module._forward_hooks or module._forward_pre_hooks:
            return None
    layers = tuple(_weights(cast(Layer, layer)) for layer in model.transformer.layers)
    final = model.transformer.final_layernorm
    return LayerStack(layers, _pair(final), final.eps, model.config.pb_relax)


def _pair(module: nn.Linear | nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
    assert module is not None
    return module.weight, module.bias


def _weights(layer: Layer) -> LayerWeights:
    return LayerWeights(
        attention_pre=_pair(layer.input_layernorm),
        qkv=_pair(layer.attention.query_key_value),
        attention_out=_pair(layer.attention.dense),
        attention_post=_pair(layer.third_layernorm),
        mlp_pre=_pair(layer.post_attention_layernorm),
        mlp_up=_pair(layer.mlp.dense_h_to_4h),
        mlp_down=_pair(layer.mlp.dense_4h_to_h),
        mlp_post=_pair(layer.fourth_layernorm),
    )
