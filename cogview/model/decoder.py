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
from cogview_kernels import LayerStack, LayerWeights, decode_linear, decode_step

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

    def __call__(
        self,
        tokens: Tensor,
        cache: KVCache,
        positions: Tensor | None = None,
        head: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states ``[B, T, C]`` of tokens ``[B, T]``; see :meth:`CogView.forward`.

        With ``head``, rows ``[V, C]`` of the tied embedding, their logits ``[B, T, V]``.
        """
        if self.stack is None or not self._fits(self.stack, tokens.numel()):
            hidden = self.model(tokens, positions=positions, cache=cache)
            return cast(Tensor, hidden if head is None else decode_linear(hidden, head))
        T = tokens.shape[1]
        if positions is None:
            positions = cache.positions(cache.places(T))
        x = torch.embedding(self._words, tokens) + torch.embedding(self._positions, positions)
        out = decode_step(x, self.stack, cache.buffer, cache.lengths, head=head)
        cache.advance(T)
        return out

    def _fits(self, stack: LayerStack, rows: int) -> bool:
        fits = self._fitting.get(rows)
        if fits is None:
            config = self.model.config
            limit = stack.limit(rows, config.hidden_size // config.num_heads)
            fits = self._fitting[rows] = not limit
        return fits and not torch.is_autocast_enabled("cpu")


def layer_stack(model: CogView) -> LayerStack | None:
    """The model's layers as one op takes them; None where that would not be what a call of the model does.

    So it is without the norms that end the branches, and with modules or hooks that are not the model's own.
    """
    trunk, config = model.transformer, model.config
    final, layers = trunk.final_layernorm, cast("list[Layer]", list(trunk.layers))
    if model.training or not config.sandwich_norm:
        return None
    if not _are_own(model, trunk, model.word_embeddings, trunk.position_embeddings, final, *layers):
        return None
    weights = [_weights(layer) for layer in layers]
    found = tuple(one for one in weights if one is not None)
    if len(found) < len(layers):
        return None
    return LayerStack(found, (final.weight, final.bias), final.eps, config.pb_relax)


def _are_own(*modules: nn.Module) -> bool:
    """Whether modules compute what they are known for, and nobody listens."""
    return all(
        type(module) in _KNOWN and not module._forward_hooks and not module._forward_pre_hooks
        for module in modules
    )


def _weights(layer: Layer) -> LayerWeights | None:
    attention, mlp = layer.attention, layer.mlp
    if not _are_own(attention, mlp):
        return None
    third, fourth = cast(nn.LayerNorm, layer.third_layernorm), cast(nn.LayerNorm, layer.fourth_layernorm)
    parts = (
        *(layer.input_layernorm, attention.query_key_value, attention.dense, third),
        *(layer.post_attention_layernorm, mlp.dense_h_to_4h, mlp.dense_4h_to_h, fourth),
    )
    pairs = [(part.weight, part.bias) for part in parts]
    if not _are_own(*parts) or any(bias is None for _, bias in pairs):
        return None
    return LayerWeights(*pairs)
