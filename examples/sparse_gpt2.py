# SPDX-License-Identifier: Apache-2.0
"""GPT-2 of Hugging Face on three-region attention: a training step and its memory against SDPA.

The model is small and has random weights, so that nothing is downloaded; with
``AutoModelForCausalLM.from_pretrained("gpt2", attn_implementation="three_region")`` it is the real one.
"""

from __future__ import annotations

import statistics
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cogview_kernels.integrations.transformers import register

T, ROUNDS = 1024, 3

# Each token sees the first 64 tokens, 64 random ones, and two blocks of 64 up to itself.
register("three_region", block_size=64, window_blocks=2, num_pivots=128, text_length=64)

torch.manual_seed(0)
config = GPT2Config(vocab_size=512, n_positions=T, n_embd=128, n_layer=2, n_head=2)
config.bos_token_id = config.eos_token_id = 0
model = GPT2LMHeadModel(config)
tokens = torch.randint(512, (1, T))


def step(implementation: str) -> float:
    """Seconds of one forward and backward pass."""
    model.set_attn_implementation(implementation)
    start = time.perf_counter()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    model.zero_grad()
    return time.perf_counter() - start


times: dict[str, list[float]] = {"sdpa": [], "three_region": []}
for turn in range(ROUNDS + 1):
    for implementation, taken in times.items():
        seconds = step(implementation)
        if turn > 0:  # the first round warms up
            taken.append(seconds)
dense, sparse = (statistics.median(taken) for taken in times.values())
print(f"a training step of GPT-2 with {T} tokens: dense {dense:.3f} s, three-region {sparse:.3f} s")
print(f"ratio: {dense / sparse:.2f}x as fast")
