# SPDX-License-Identifier: Apache-2.0
"""Gemma 2 of Hugging Face with fused norms and without logits: the same losses, and the time of a step.

The model is small and has random weights, so that nothing is downloaded.
"""

from __future__ import annotations

import statistics
import time

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from cogview_kernels.integrations.transformers import patch, unpatch

ROUNDS = 3

torch.manual_seed(0)
config = Gemma2Config(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    attn_implementation="eager",
)
model = Gemma2ForCausalLM(config).train()
tokens = torch.randint(3, 8192, (2, 256))


def step() -> tuple[float, float]:
    """Loss, and seconds of one forward and backward pass."""
    start = time.perf_counter()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    model.zero_grad()
    return loss.item(), time.perf_counter() - start


times: dict[str, list[float]] = {"plain": [], "patched": []}
losses = {}
for turn in range(ROUNDS + 1):
    losses["plain"], plain = step()
    patch(model)
    losses["patched"], patched = step()
    unpatch(model)
    if turn > 0:  # the first round warms up
        times["plain"].append(plain)
        times["patched"].append(patched)
print(f"loss: {losses['plain']:.6f} as it is, {losses['patched']:.6f} patched")
plain, patched = (statistics.median(taken) for taken in times.values())
print(f"a training step: {plain:.3f} s as it is, {patched:.3f} s patched")
print(f"ratio: {plain / patched:.2f}x as fast")
