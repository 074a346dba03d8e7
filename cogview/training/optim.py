# SPDX-License-Identifier: Apache-2.0
"""AdamW with the parameter groups and the schedule of the released code."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cogview.config import TrainConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: everything decays, embeddings and positions included, but LayerNorms and biases."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_free = isinstance(module, nn.LayerNorm) or name == "bias"
            (free if is_free else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`, in PyTorch's fused form."""
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=1e-8, fused=True)


@contextmanager
def shrunk_gradient(embedding: nn.Embedding, factor: float) -> Iterator[None]:
    """What ``embedding`` gives within the block sends back ``factor`` times its gradient.

    This is the gradient of ``factor * x + (1 - factor) * x.detach()``, without the rounding of its value. The
    head that is tied to the embedding keeps its whole gradient. The gradients of embeddings are far larger
    than others, so shrinking them allows fp16 a larger loss scale (CogView, arXiv:2105.13290).
    """
    if factor == 1:
        yield
        return

    def shrink(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * factor)

    handle = embedding.register_forward_hook(shrink)
    try:
        yield
    finally:
        handle.remove()


def cosine_to_zero(steps: int) -> Tensor:
    """The shares of the full rate in steps 0 to ``steps``: from 1 to 0."""
    angle = torch.linspace(0, torch.pi, steps + 1, dtype=torch.float32, device="cpu")
    return 0.5 * (1 + torch.cos(angle))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of step 0, 1, ...: linear warm-up, then a cosine from the full rate to its final fraction.

    The cosine's period is the whole run, so the last step lies just above the final fraction.
    """
    warmup = config.warmup_fraction * config.steps
    if step < warmup:
        return config.learning_rate * (step + 1) / math.ceil(warmup)
    progress = (step - warmup) / config.steps
    final = config.final_lr_fraction
    return config.learning_rate * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))
