# SPDX-License-Identifier: Apache-2.0
"""The weights of a stack of transformer layers with Sandwich-LN."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from cogview_kernels import _backends
from cogview_kernels.decode_step import native

WeightAndBias = tuple[Tensor, Tensor]


class LayerWeights(NamedTuple):
    """Weight and bias of each part of a layer, in the order in which a token meets them.

    C is the width, F that inside the MLP. A norm has ``[C]`` twice, a linear layer ``[outputs, inputs]`` and
    ``[outputs]``.
    """

    attention_pre: WeightAndBias  # norm before attention
    qkv: WeightAndBias  # [3 C, C]: queries, keys, values, each with its heads one after the other
    attention_out: WeightAndBias  # [C, C]
    attention_post: WeightAndBias  # norm of what attention adds to the trunk
    mlp_pre: WeightAndBias
    mlp_up: WeightAndBias  # [F, C]
    mlp_down: WeightAndBias  # [C, F]
    mlp_post: WeightAndBias


@dataclass(frozen=True, eq=False)
class LayerStack:
    """Layers, the norm after the last of them, and how all of their norms are computed.

    It keeps hold of the memory of its tensors: changes of their values count, but to put other tensors in
    their place takes a new stack.

    Args:
        eps, pb_relax: as of :func:`cogview_kernels.sandwich_layer_norm`.
    """

    layers: tuple[LayerWeights, ...]
    final_norm: WeightAndBias
    eps: float = 1e-5
    pb_relax: str | None = "row"
    # All of them, in the order above, each by a view of its own: `tensor.data = other` changes no stack, so
    # that what was once checked of a stack remains true.
    tensors: list[Tensor] = field(init=False, repr=False)
    serial: int = field(init=False, repr=False, default_factory=itertools.count().__next__)

    def __post_init__(self) -> None:
        pairs = [*(pair for layer in self.layers for pair in layer), self.final_norm]
        views = [x.detach() if isinstance(x, Tensor) else x for pair in pairs for x in pair]
        object.__setattr__(self, "tensors", views)

    def __reduce__(self) -> tuple[type[LayerStack], tuple[Any, ...]]:
        # A copy has tensors of its own, so it is another stack.
        return LayerStack, (self.layers, self.final_norm, self.eps, self.pb_relax)

    @functools.cached_property
    def handle(self) -> Any:
        """The tensors as the kernel of the CPU reads them."""
        return native.handle(self.tensors)

    @property
    def requires_grad(self) -> bool:
        """Whether any of the tensors does."""
        pairs = [*(pair for layer in self.layers for pair in layer), self.final_norm]
        return any(getattr(x, "requires_grad", False) for pair in pairs for x in pair)

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerStack:
        """The same layers with other tensors, ``function`` of each."""

        def both(pair: WeightAndBias) -> WeightAndBias:
            return function(pair[0]), function(pair[1])

        layers = tuple(LayerWeights(*map(both, layer)) for layer in self.layers)
        return LayerStack(layers, both(self.final_norm), self.eps, self.pb_relax)

    def limit(self, rows: int, head_size: int) -> str:
        """Why no kernel takes so many rows through these layers; empty where one does.

        Where none does, :func:`cogview_kernels.decode_step` saves nothing against the ops one by one.
        """
        device = self.tensors[0].device
        return _backends.why_not("cpu", device) or native.limit("cpu", rows, head_size, self.tensors)
