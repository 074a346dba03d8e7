# SPDX-License-Identifier: Apache-2.0
"""Other ways to draw the same picture: the original's algorithm, and Hugging Face's ``generate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview.config import ModelConfig, SamplingConfig
from cogview.generation.sampling import Noise, choose
from cogview.model.transformer import CogView
from cogview_kernels import layer_norm, sandwich_layer_norm


@torch.no_grad()
def reprojection(
    model: CogView, prompt: Tensor, new: int, codes: int, sampling: SamplingConfig, seeds: Sequence[int]
) -> Tensor:
    """The released code's algorithm, on our norms: ids ``[B, new]`` of B candidates of one prompt ``[T]``.

    Its memory is what enters each layer, not keys and values. Every step normalises and projects the whole
    memory again, in every layer, and computes the logits of the whole vocabulary. With the same noise it
    draws what our engine draws.
    """
    B = len(seeds)
    noise = Noise(torch.tensor(seeds, device=prompt.device), new, codes)
    memory: list[Tensor] = []
    hidden = _step(model, prompt[None], memory, 0)
    memory[:] = [held.repeat_interleave(B, 0) for held in memory]
    hidden = hidden.repeat_interleave(B, 0)
    tokens = torch.empty(B, new, dtype=torch.int64, device=prompt.device)
    for index in range(new):
        if index:
            hidden = _step(model, tokens[:, index - 1 : index], memory, len(prompt) + index - 1)
        logits = model.logits(hidden[:, -1:])[..., :codes]
        at = torch.full((B, 1), index, device=prompt.device)
        tokens[:, index : index + 1] = choose(logits, sampling, noise, at)
    return tokens


def _step(model: CogView, tokens: Tensor, memory: list[Tensor], first: int) -> Tensor:
    """Final hidden states of the new tokens; the memory of each layer grows by what entered it."""
    config, trunk = model.config, model.transformer
    T = tokens.shape[1]
    x = model.word_embeddings(tokens)
    x = x + trunk.position_embeddings(torch.arange(first, first + T, device=tokens.device))
    remembers = bool(memory)
    norms = [layer.input_layernorm for layer in trunk.layers] + [trunk.final_layernorm]
    relax = config.pb_relax
    normed = x
    for index, layer in enumerate(trunk.layers):
        whole = torch.cat([memory[index], x], 1) if remembers else x
        if remembers:
            memory[index] = whole
        else:
            memory.append(whole)
        norm = norms[index]
        seen = layer_norm(whole, norm.weight, norm.bias, eps=norm.eps, pb_relax=relax)
        q, k, v = layer.attention.query_key_value(seen).chunk(3, -1)
        q, k, v = (_heads(y, config.num_heads) for y in (q[:, -T:], k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=not remembers)
        branch = layer.attention.dense(out.transpose(1, 2).reshape(x.shape))
        post, pre = layer.third_layernorm, layer.post_attention_layernorm
        x, normed = sandwich_layer_norm(
            branch, x, post.weight, post.bias, pre.weight, pre.bias, eps=post.eps, pb_relax=relax
        )
        post, pre = layer.fourth_layernorm, norms[index + 1]
        x, normed = sandwich_layer_norm(
            layer.mlp(normed), x, post.weight, post.bias, pre.weight, pre.bias, eps=post.eps, pb_relax=relax
        )
    return normed


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def hugging_face(
    config: ModelConfig, sampling: SamplingConfig, dtype: torch.dtype, device: torch.device, cache: str | None
) -> Callable[[Tensor, int, int], Tensor]:
    """``draw(prompt, new, candidates)`` by ``generate`` of a GPT-2 of the same shape, with random weights.

    ``cache``: "static", or None for the default, which grows.
    """
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.max_positions,
        n_embd=config.hidden_size,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(shape).to(device, dtype).eval()

    def draw(prompt: Tensor, new: int, candidates: int) -> Tensor:
        how = GenerationConfig(
            do_sample=True,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            max_new_tokens=new,
            min_new_tokens=new,
            num_return_sequences=candidates,
            cache_implementation=cache,
            pad_token_id=0,
            eos_token_id=None,
        )
        mask = torch.ones_like(prompt)[None]
        return model.generate(prompt[None], attention_mask=mask, generation_config=how)

    return draw
