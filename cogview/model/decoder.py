# SPDX-License-Identifier: Apache-2.0
"""A model as generation calls it: the next tokens of rows whose earlier ones are cached.

On the CPU a step of a small model is mostly the host's time between the ops of its layers, which one call of
:func:`cogview_kernels.decode_step` for all of them saves.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from cogview.model.cache import KVCache
from cogview.model.transformer import MLP, Attention, CogView, Layer, Trunk
from cogview_kernels import LayerStack, LayerWeights, decode_step

# What a step knows how to compute; a module of another type was put in its place and may do anything.
_KNOWN = frozenset((CogView, Trunk, Layer, Attention, MLP, nn.Linear, nn.LayerNorm, nn.Embedding))


class Decoder:
    """``decoder(tokens, cache)`` is ``model(tokens, cache=cache)``, by one op where there is a kernel for it.

    It looks at the model once: make a new one when weights, modules or hooks are others.
    """

    def __init__(self, model: CogView) -> None:
        self.model = model
        self.stack = layer_stack(model)
        # Attributes of modules take as long to look up as small tensors take to add.
        self._words = model.word_embeddings.weight
        self._positions = model.transformer.position_embeddings.weight
        self._fitting: dict[int, bool] = {}  # by the number of rows

    def __call__(self, tokens: Tensor, cache: KVCache, positions: Tensor | None = None) -> Tensor:
        """Final hidden states ``[B, T, C]`` of tokens ``[B, T]``; see :meth:`CogView.forward`."""
        if self.stack is None or not self._fits(self.stack, tokens.numel()):
            return cast(Tensor, self.model(tokens, positions=positions, cache=cache))
        T = tokens.shape[1]
        if positions is None:
            positions = cache.positions(cache.places(T))
        x = torch.embedding(self._words, tokens) + torch.embedding(self._positions, positions)
        hidden = decode_step(x, self.stack, cache.buffer, cache.lengths)
        cache.advance(T)
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
    trunk = model.transformer
    if not model.config.sandwich_norm or model.training or not _own(model, trunk, model.word_embeddings):
        return None
    layers = cast("list[Layer]", list(trunk.layers))
    found = tuple(weights for layer in layers if (weights := _weights(layer)) is not None)
    final = _pair(trunk.final_layernorm)
    if len(found) < len(layers) or final is None or not _own(trunk.position_embeddings):
        return None
    return LayerStack(found, final, trunk.final_layernorm.eps, model.config.pb_relax)


def _own(*modules: nn.Module) -> bool:
    """Whether each computes what it is known for, and nobody listens."""
    return all(
        type(module) in _KNOWN and not module._forward_hooks and not module._forward_pre_hooks
        for module in modules
    )


def _pair(module: nn.Linear | nn.LayerNorm | None) -> tuple[Tensor, Tensor] | None:
    return (module.weight, module.bias) if module is not None and _own(module) else None


def _weights(layer: Layer) -> LayerWeights | None:
    attention, mlp = layer.attention, layer.mlp
    pairs = LayerWeights(
        attention_pre=_pair(layer.input_layernorm),
        qkv=_pair(attention.query_key_value),
        attention_out=_pair(attention.dense),
        attention_post=_pair(layer.third_layernorm),
        mlp_pre=_pair(layer.post_attention_layernorm),
        mlp_up=_pair(mlp.dense_h_to_4h),
        mlp_down=_pair(mlp.dense_4h_to_h),
        mlp_post=_pair(layer.fourth_layernorm),
    )
    return pairs if _own(layer, attention, mlp) and None not in pairs else None
