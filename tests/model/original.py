# SPDX-License-Identifier: Apache-2.0
"""The original transformer and image tokenizer at tiny sizes, written from what is known of them.

Each model-parallel rank computes with its own tensors and the ranks' results are summed or concatenated, as
Megatron does it: nothing here merges a weight, so the merging of the package is judged independently.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Original:
    """The states of all ranks; ``heads`` is that of the whole model."""

    states: list[dict[str, Tensor]]
    heads: int

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits of the whole vocabulary, unused rows included, with dropout off."""
        first = self.states[0]
        table = first["transformer.position_embeddings.weight"]
        x = self._lookup(tokens) + table[: tokens.shape[1]]
        layer = 0
        while (prefix := f"transformer.layers.{layer}.") + "input_layernorm.weight" in first:
            branch = self._attention(self._norm(x, prefix + "input_layernorm"), prefix + "attention.")
            x = x + self._norm(branch, prefix + "third_layernorm")
            branch = self._mlp(self._norm(x, prefix + "post_attention_layernorm"), prefix + "mlp.")
            x = x + self._norm(branch, prefix + "fourth_layernorm")
            layer += 1
        x = self._norm(x, "transformer.final_layernorm")
        return torch.cat([x @ state["word_embeddings.weight"].T for state in self.states], -1)

    def _lookup(self, tokens: Tensor) -> Tensor:
        """Each rank looks up the ids of its own rows and gives zeros for the others."""
        total = torch.zeros(())
        for rank, state in enumerate(self.states):
            table = state["word_embeddings.weight"]
            own = tokens - rank * len(table)
            is_own = (own >= 0) & (own < len(table))
            total = total + table[own.clamp(0, len(table) - 1)] * is_own[..., None]
        return total

    def _norm(self, x: Tensor, name: str) -> Tensor:
        """PB-relax: the largest magnitude of the whole tensor becomes 8, then LayerNorm."""
        weight, bias = (self.states[0][f"{name}.{kind}"] for kind in ("weight", "bias"))
        return F.layer_norm(x / (x.abs().max() / 8), x.shape[-1:], weight, bias, 1e-5)

    def _attention(self, x: Tensor, prefix: str) -> Tensor:
        rows, length, width = x.shape
        size = width // self.heads
        mask = torch.ones(length, length).tril()
        total = torch.zeros(())
        for state in self.states:
            mixed = x @ state[prefix + "query_key_value.weight"].T + state[prefix + "query_key_value.bias"]
            own = mixed.shape[-1] // 3
            q, k, v = (
                mixed[..., part * own : (part + 1) * own].view(rows, length, -1, size).transpose(1, 2)
                for part in range(3)
            )
            scores = (q / size**0.5) @ k.transpose(2, 3)
            probabilities = (scores * mask - 10000.0 * (1 - mask)).softmax(-1)
            context = (probabilities @ v).transpose(1, 2).reshape(rows, length, own)
            total = total + context @ state[prefix + "dense.weight"].T
        return total + self.states[0][prefix + "dense.bias"]

    def _mlp(self, x: Tensor, prefix: str) -> Tensor:
        total = torch.zeros(())
        for state in self.states:
            h = x @ state[prefix + "dense_h_to_4h.weight"].T + state[prefix + "dense_h_to_4h.bias"]
            h = 0.5 * h * (1.0 + torch.tanh(0.79788456 * h * (1.0 + 0.044715 * h * h)))
            total = total + h @ state[prefix + "dense_4h_to_h.weight"].T
        return total + self.states[0][prefix + "dense_4h_to_h.bias"]


def random_original(
    ranks: int, *, rows: int, width: int, heads: int, layers: int = 2, positions: int = 40, seed: int = 0
) -> Original:
    """Random weights, large enough that every part of the model matters; ``rows`` of vocabulary per rank.

    Embeddings differ in size by up to a factor of 10,000, so that PB-relax over the tensor is another
    function than PB-relax over each row: eps counts in the small rows.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 0.3, mean: float = 0.0) -> Tensor:
        return mean + scale * torch.randn(shape, generator=generator, dtype=torch.float32)

    states: list[dict[str, Tensor]] = [{} for _ in range(ranks)]

    def draw_embeddings(number: int) -> Tensor:
        size = 10 ** (-4 * torch.rand(number, 1, generator=generator, dtype=torch.float32))
        return 2 * size * draw(number, width)

    def everywhere(name: str, tensor: Tensor) -> None:
        for state in states:
            state[name] = tensor

    def on_each(name: str, *shape: int) -> None:
        for state in states:
            state[name] = draw(*shape)

    def norm(name: str) -> None:
        everywhere(f"{name}.weight", draw(width, mean=1.0))
        everywhere(f"{name}.bias", draw(width))

    for state in states:
        state["word_embeddings.weight"] = draw_embeddings(rows)
    everywhere("transformer.position_embeddings.weight", draw_embeddings(positions))
    for layer in range(layers):
        prefix = f"transformer.layers.{layer}."
        norm(prefix + "input_layernorm")
        on_each(prefix + "attention.query_key_value.weight", 3 * width // ranks, width)
        on_each(prefix + "attention.query_key_value.bias", 3 * width // ranks)
        on_each(prefix + "attention.dense.weight", width, width // ranks)
        everywhere(prefix + "attention.dense.bias", draw(width))
        for name in ("post_attention_layernorm", "third_layernorm", "fourth_layernorm"):
            norm(prefix + name)
        on_each(prefix + "mlp.dense_h_to_4h.weight", 4 * width // ranks, width)
        on_each(prefix + "mlp.dense_h_to_4h.bias", 4 * width // ranks)
        on_each(prefix + "mlp.dense_4h_to_h.weight", width, 4 * width // ranks)
        everywhere(prefix + "mlp.dense_4h_to_h.bias", draw(width))
    norm("transformer.final_layernorm")
    return Original(states, heads)


class LossScaler:
    """A class of a training that whoever converts the file does not have (its module is not this one)."""

    def __init__(self) -> None:
        self.scale = 65536.0


LossScaler.__module__ = LossScaler.__qualname__ = "deepspeed"


def save_original(model: Original, folder, iteration: int = 20000, prefix: str = "", **others) -> None:
    """The files of all ranks with their tracker, as DeepSpeed leaves them behind."""
    (folder / str(iteration)).mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
    for rank, state in enumerate(model.states):
        content = {
            "module": {prefix + name: tensor for name, tensor in state.items()},
            "iteration": iteration,
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
            "random_rng_state": random.Random(0).getstate(),
            "np_rng_state": np.random.RandomState(0).get_state(),
            "torch_rng_state": torch.Generator().get_state(),
            **others,
        }
        torch.save(content, folder / str(iteration) / f"mp_rank_{rank:02d}_model_states.pt")


def random_image_tokenizer(codes: int = 16, code_size: int = 4, channels: int = 8) -> dict[str, Tensor]:
    """A state dict with the names and the proportions of the released VQ-VAE, which has 3 stages."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=generator, dtype=torch.float32)

    state = {}
    for block, inputs in ((0, 3), (2, channels), (4, channels)):
        state[f"enc_b.blocks.{block}.weight"] = draw(channels, inputs, 4, 4)
        state[f"enc_b.blocks.{block}.bias"] = draw(channels)
    state |= {
        "enc_b.blocks.6.weight": draw(code_size, channels, 1, 1),
        "enc_b.blocks.6.bias": draw(code_size),
    }
    state |= {
        "quantize_t.embed": draw(code_size, codes),
        "quantize_t.cluster_size": torch.ones(codes, dtype=torch.float32),
        "quantize_t.embed_avg": draw(code_size, codes),
    }
    for block, inputs in ((0, code_size), (2, channels), (4, channels)):
        state[f"dec.blocks.{block}.weight"] = draw(inputs, channels, 4, 4)
        state[f"dec.blocks.{block}.bias"] = draw(channels)
    return state | {"dec.blocks.6.weight": draw(3, channels, 1, 1), "dec.blocks.6.bias": draw(3)}
