# SPDX-License-Identifier: Apache-2.0
"""A model as generation calls it: the next tokens of rows whose earlier ones are cached.

On the CPU a step of a small model is mostly the host's time between the ops of its layers, which one call of
:func:`cogview_kernels.decode_step` for all of them saves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from cogview.model.cache import KVCache
from cogview.model.transformer import MLP, Attention, CogView, Layer, Trunk
from cogview_kernels import LayerStack, LayerWeights, _draw, _hooks, decode_linear, decode_step

# What a step knows how to compute; a module of another type was put in its place and may do anything.
_KNOWN = frozenset((CogView, Trunk, Layer, Attention, MLP, nn.Linear, nn.LayerNorm, nn.Embedding))


class Decoder:
    """``decoder(tokens, cache)`` is ``model(tokens, cache=cache)``, by one op where there is a kernel for it.

    It looks at the model once: make a new one when weights, modules or hooks are others.
    """

    def __init__(self, model: CogView) -> None:
        self.model = model
        self._plan = _plan_of(model)
        # Attributes of modules take as long to look up as small tensors take to add.
        self._words = model.word_embeddings.weight
        self._positions = model.transformer.position_embeddings.weight

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
        stack = self._plan.stack
        if stack is None or not self._fits(stack, tokens.numel()):
            hidden = self.model(tokens, positions=positions, cache=cache)
            return cast(Tensor, hidden if head is None else decode_linear(hidden, head))
        T = tokens.shape[1]
        if positions is None:
            positions = cache.positions(cache.places(T))
        x = torch.embedding(self._words, tokens) + torch.embedding(self._positions, positions)
        out = decode_step(x, stack, cache.buffer, cache.lengths, head=head)
        cache.advance(T)
        return out

    def whole_step(
        self, rows: tuple[Tensor, Tensor, Tensor], cache: KVCache, head: Tensor, drawing: _draw.Drawing
    ) -> Callable[[], None] | None:
        """A call of it reads the last token of each row and draws the next. None where no kernel does.

        ``rows``: those tokens, all tokens, and how many are drawn, see :class:`cogview_kernels._draw.Rows`.
        """
        stack, drawn = self._plan.stack, _draw.Rows(*rows)
        if stack is None or not self._fits(stack, len(drawn.last)):
            return None
        embedding = _draw.Embedding(self._words, self._positions, cache.restart)
        return _draw.whole_step(drawn, embedding, stack, head, cache.buffer, cache.lengths, drawing)

    def _fits(self, stack: LayerStack, rows: int) -> bool:
        fits = self._plan.fitting.get(rows)
        if fits is None:
            config = self.model.config
            limit = stack.limit(rows, config.hidden_size // config.num_heads)
            fits = self._plan.fitting[rows] = not limit
        return fits and not torch.is_autocast_enabled("cpu")


@dataclass(frozen=True)
class _Plan:
    """What a look at a model found. It holds no module, so that it ends with the model."""

    seen: list[Any]  # what it follows from, see _seen_of
    stack: LayerStack | None
    fitting: dict[int, bool] = field(default_factory=dict)  # whether the kernel takes so many rows


_plans: weakref.WeakKeyDictionary[CogView, _Plan] = weakref.WeakKeyDictionary()


def _plan_of(model: CogView) -> _Plan:
    """A look takes twice as long as a step of a small model, so that of the last call serves while it can."""
    seen, known = _seen_of(model), _plans.get(model)
    if known is None or known.seen != seen:
        known = _plans[model] = _Plan(seen, layer_stack(model))
    return known


def _seen_of(model: CogView) -> list[Any]:
    """All that :func:`layer_stack` depends on but the weights' values.

    Weights go by where they lie: while a stack has hold of them, no others can lie there.
    """
    seen: list[Any] = [model.training, model.config]
    left: list[nn.Module | None] = [model]
    while left:
        module = left.pop()
        if module is None:
            seen.append(None)
            continue
        of = module.__dict__
        seen += type(module), _hooks.is_unmodified(module), of.get("eps")
        for weight in of["_parameters"].values():
            if type(weight) is nn.Parameter:
                seen += weight.data_ptr(), weight.dtype, weight.shape, weight.stride()
            else:  # none, or of a kind that no kernel takes
                seen.append(weight if weight is None else id(weight))
        left += of["_modules"].values()
    return seen


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
    if len(found) < len(layers) or len(layers) != config.num_layers:
        return None
    # Layers that were made narrower go through their modules.
    if len({tuple(weight.shape for weight, _ in layer) for layer in found}) > 1:
        return None
    norms = [module for module in trunk.modules() if isinstance(module, nn.LayerNorm)]
    if any(norm.eps != final.eps for norm in norms):
        return None
    return LayerStack(found, (final.weight, final.bias), final.eps, config.pb_relax)


def _are_own(*modules: nn.Module) -> bool:
    """Whether modules compute what they are known for, and nobody listens."""
    return all(type(module) in _KNOWN and _hooks.is_unmodified(module) for module in modules)


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
