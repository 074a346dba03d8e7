# SPDX-License-Identifier: Apache-2.0
"""Per-resblock gradient scaling: how DALL-E trained in float16 (Ramesh et al., arXiv:2102.12092, appendix D).

A loss scale is one number for the whole model, and what suits the gradients of the last block may be too
little or too much for the first. Here each residual block has a scale of its own. The trunk and its gradient
are float32, the block between them float16::

    gradient of the trunk --------------------------------------------------+--> float32
              |                                                             |
              +-- * scale --> float16 --> backward of the block --> filter / scale

The filter turns what is not finite into zero, so a block that overflows spoils none before it. Its own step
is dropped and its scale divided by sqrt(2), at most once in 125 steps. After every other step it grows by a
factor of 2 ** (1 / 1000). The head has no block around it, so its logits and their gradient are float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from cogview.model.transformer import CogView, Layer

INITIAL_SCALE, SMALLEST_SCALE, LARGEST_SCALE = 2.0**13, 2.0**7, 2.0**24
GROWTH, BACKOFF = 2.0 ** (1 / 1000), 2.0**-0.5
STEPS_BETWEEN_BACKOFFS = 125


class ResblockScaling:
    """One gradient scale for attention and one for the MLP of each layer of ``model``, on its device."""

    def __init__(self, model: CogView) -> None:
        layers = cast("list[Layer]", list(model.transformer.layers))
        self.blocks: list[nn.Module] = [block for layer in layers for block in (layer.attention, layer.mlp)]
        device = model.word_embeddings.weight.device
        self.scales = torch.full((len(self.blocks),), INITIAL_SCALE, device=device, dtype=torch.float32)
        self.steps_since_backoff = torch.full_like(self.scales, STEPS_BETWEEN_BACKOFFS)

    @contextmanager
    def scaled(self) -> Iterator[None]:
        """Backward passes within the block scale the gradients that the residual blocks work with.

        The parameters of a block then have gradients that are too large by its scale: see :meth:`unscale`.
        """
        handles: list[Any] = []
        for block, scale in zip(self.blocks, self.scales.unbind(), strict=True):
            handles.append(block.register_forward_pre_hook(_leaves_unscaled(scale)))
            handles.append(block.register_forward_hook(_enters_scaled(scale)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def unscale(self) -> Tensor:
        """Divide the blocks' gradients by their scales, then move the scales; returns how many were dropped.

        A block that has a gradient which is not finite is dropped: its gradients become zero. Nothing here
        waits for the device.
        """
        finite = []
        for block, scale in zip(self.blocks, self.scales.unbind(), strict=True):
            gradients = [part.grad for part in block.parameters() if part.grad is not None]
            is_finite = torch.isfinite(nn.utils.get_total_norm(gradients))
            for gradient in gradients:
                gradient.copy_(torch.where(is_finite, gradient / scale, 0.0))
            finite.append(is_finite)
        dropped = ~torch.stack(finite)
        backs_off = dropped & (self.steps_since_backoff >= STEPS_BETWEEN_BACKOFFS)
        factors = torch.where(backs_off, BACKOFF, torch.where(dropped, 1.0, GROWTH))
        self.scales = (self.scales * factors).clamp(SMALLEST_SCALE, LARGEST_SCALE)
        self.steps_since_backoff = torch.where(backs_off, 0.0, self.steps_since_backoff + 1)
        return dropped.sum()

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to scale as this one would, for JSON."""
        return {
            "block_scales": self.scales.tolist(),
            "steps_since_backoff": self.steps_since_backoff.tolist(),
        }

    def load_state(self, state: Mapping[str, Any], source: object) -> None:
        """Go on from :meth:`state`. A ValueError that names ``source`` if it is not of as many blocks."""
        for name, mine in (("block_scales", self.scales), ("steps_since_backoff", self.steps_since_backoff)):
            saved = state.get(name, [])
            if len(saved) != len(mine):
                raise ValueError(
                    f"{source} must hold {name} of {len(mine)} residual blocks to go on with "
                    f"resblock_scaling, got {len(saved)}; choose another folder"
                )
            mine.copy_(torch.tensor(saved, dtype=torch.float32))


def _leaves_unscaled(scale: Tensor) -> Any:
    def filtered(gradient: Tensor) -> Tensor:
        return torch.where(torch.isfinite(gradient), gradient, 0.0) / scale

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        if not x.requires_grad:
            return inputs
        x = x.view_as(x)  # A tensor of its own: the trunk's gradient must not pass through the hook.
        x.register_hook(filtered)
        return (x, *inputs[1:])

    return hook


def _enters_scaled(scale: Tensor) -> Any:
    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        # In float32, so that the gradient is multiplied before it is rounded to float16.
        output = output.float()
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * scale)
        return output

    return hook
