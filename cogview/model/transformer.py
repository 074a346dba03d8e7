# SPDX-License-Identifier: Apache-2.0
"""CogView: the whole transformer on one page.

A GPT over one row of text, command and image tokens, with Sandwich-LN: each branch is normalised before
and after (CogView, arXiv:2105.13290). Per layer::

    y = x + LN_third (Attention(LN_input(x)))
    z = y + LN_fourth(MLP      (LN_post_attention(y)))

    logits = LN_final(z_last) @ word_embeddings^T

The end of one branch and the start of the next are one call, ``sandwich_layer_norm``, so the layers here
hand on both the trunk ``x`` and its normalised form. Of LayerNorms the parameters are read; nobody calls
them, so that hooks on them hear nothing. Module names are those of the released checkpoint.
Without ``sandwich_norm`` the branches are added as they are: a plain pre-LN model, for comparison.

Letters: B rows, T tokens per row, C width, H heads, D = C / H, V vocabulary, S cache length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogview.config import ModelConfig
from cogview.model.cache import KVCache
from cogview.model.causal_attention import causal_attention
from cogview.model.hub import HubModel
from cogview.model.local_grid import LocalGrid
from cogview_kernels import (
    ThreeRegionLayout,
    _hooks,
    decode_attention,
    decode_linear,
    layer_norm,
    sandwich_layer_norm,
    three_region_attention,
)

Layout = ThreeRegionLayout | LocalGrid  # which keys each query sees
DTYPE = torch.float32  # of new weights, whatever PyTorch's default is; ``model.to(dtype)`` for another


def _linear(layer: nn.Linear, x: Tensor, decoding: bool, activation: str | None = None) -> Tensor:
    """``layer(x)`` and the activation. A step of decoding has few rows, for which there is a kernel."""
    if decoding and type(layer) is nn.Linear and _hooks.is_unmodified(layer):
        return decode_linear(x, layer.weight, layer.bias, activation=activation)
    y = layer(x)
    return y if activation is None else F.gelu(y, approximate="tanh")


class Attention(nn.Module):
    """Self-attention with one fused projection; Q, K and V are its three thirds."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, dtype=DTYPE)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, dtype=DTYPE)

    def forward(
        self, x: Tensor, layout: Layout | None, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        B, T, C = x.shape
        decoding = cache is not None and not cache.is_empty
        qkv = _linear(self.query_key_value, x, decoding).view(B, T, 3, self.num_heads, C // self.num_heads)
        if cache is not None:
            keys, values = cache.write(layer, qkv[:, :, 1:])
        if cache is not None and decoding:
            q = qkv.select(2, 0).transpose(1, 2)
            if isinstance(layout, LocalGrid):
                raise ValueError("layout must be no LocalGrid where there is a cache")
            out = decode_attention(q, keys, values, cache.lengths_after, layout=layout)
        else:
            out = self._among_themselves(qkv, layout)
        return _linear(self.dense, out.transpose(1, 2).reshape(B, T, C), decoding)

    def _among_themselves(self, qkv: Tensor, layout: Layout | None) -> Tensor:
        # Each [B, H, T, D]. The gradients of a permuted tensor's thirds would be copied twice, transposed.
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        dropout_p = self.dropout if self.training else 0.0
        if isinstance(layout, LocalGrid):
            return layout.attend(q, k, v, dropout_p)
        if layout is not None:
            return cast(Tensor, three_region_attention(q, k, v, layout, dropout_p=dropout_p))
        return causal_attention(q, k, v, dropout_p)


class MLP(nn.Module):
    """Four times the width, tanh-approximated GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 4 * config.hidden_size, dtype=DTYPE)
        self.dense_4h_to_h = nn.Linear(4 * config.hidden_size, config.hidden_size, dtype=DTYPE)

    def forward(self, x: Tensor, decoding: bool = False) -> Tensor:
        return _linear(self.dense_4h_to_h, _linear(self.dense_h_to_4h, x, decoding, "gelu_tanh"), decoding)


def _as_read_by(block: nn.Module, normed: Tensor) -> Tensor:
    """``normed`` as autocast would cast it inside ``block``, unless a hook of ``block`` would see it."""
    device = normed.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if casts and normed.dtype == torch.float32 and _hooks.is_unmodified(block):
        return normed.to(torch.get_autocast_dtype(device))
    return normed


def _post_norm(config: ModelConfig) -> nn.LayerNorm | None:
    """The LayerNorm that ends a branch; a plain pre-LN model has none."""
    return nn.LayerNorm(config.hidden_size, dtype=DTYPE) if config.sandwich_norm else None


class Layer(nn.Module):
    """One transformer layer with its four LayerNorms, or two without Sandwich-LN."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pb_relax = config.pb_relax
        self.dropout = config.dropout
        self.input_layernorm = nn.LayerNorm(config.hidden_size, dtype=DTYPE)
        self.attention = Attention(config)
        self.third_layernorm = _post_norm(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, dtype=DTYPE)
        self.mlp = MLP(config)
        self.fourth_layernorm = _post_norm(config)

    def _sandwich(
        self,
        branch: Tensor,
        x: Tensor,
        post: nn.LayerNorm | None,
        pre: nn.LayerNorm,
        normed_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        dropout_p = self.dropout if self.training else 0.0
        if post is None:
            x = x + F.dropout(branch, dropout_p)
            return x, layer_norm(x, pre.weight, pre.bias, eps=pre.eps, pb_relax=self.pb_relax)
        parameters = (post.weight, post.bias, pre.weight, pre.bias)
        return sandwich_layer_norm(
            branch,
            x,
            *parameters,
            eps=post.eps,
            pb_relax=self.pb_relax,
            dropout_p=dropout_p,
            normed_dtype=normed_dtype,
        )

    def forward(
        self,
        x: Tensor,
        normed: Tensor,
        next_layernorm: nn.LayerNorm,
        layout: Layout | None,
        cache: KVCache | None = None,
        index: int = 0,
        is_last: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Trunk and its input-normalised form in; the same two for the next layer out.

        Under autocast a norm gives what the next product reads, in 16 bits. What the last layer gives is read
        by others, and has the dtype of the trunk. ``is_last`` is read only where dtypes differ: a compiler
        makes code for each value of an argument that it sees read.
        """
        branch = self.attention(normed, layout, cache, index)
        x, normed = self._sandwich(
            branch, x, self.third_layernorm, self.post_attention_layernorm, branch.dtype
        )
        branch = self.mlp(normed, cache is not None and not cache.is_empty)
        normed_dtype = None if branch.dtype == x.dtype or is_last else branch.dtype
        return self._sandwich(branch, x, self.fourth_layernorm, next_layernorm, normed_dtype)


class Trunk(nn.Module):
    """Positions, layers and the final LayerNorm: what the checkpoint calls ``transformer``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.position_embeddings = nn.Embedding(config.max_positions, config.hidden_size, dtype=DTYPE)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, dtype=DTYPE)


class CogView(HubModel):
    """Token ids to hidden states, and hidden states to logits by the tied embedding.

    ``save_pretrained(folder)`` and ``CogView.from_pretrained(folder)`` are those of Hugging Face.

    Args:
        config: shape; ``PRESETS["base"].model`` has the 3,928,849,920 parameters of the released model.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, dtype=DTYPE)
        self.transformer = Trunk(config)
        self._init_weights()

    def _init_weights(self) -> None:
        """N(0, std); the two projections that end a branch N(0, std / sqrt(2 L)); biases 0."""
        for name, parameter in self.named_parameters():
            if "layernorm" in name:
                continue
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                ends_branch = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
                shrink = math.sqrt(2 * self.config.num_layers) if ends_branch else 1.0
                nn.init.normal_(parameter, std=self.config.init_std / shrink)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        layout: Layout | Sequence[ThreeRegionLayout] | None = None,
        cache: KVCache | None = None,
        first_word: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states ``[B, T, C]`` of tokens ``[B, T]`` (int64 ids below ``vocab_size``).

        Args:
            positions: ``[B, T]`` or ``[T]`` ids into the position table; by default they count from 0,
                or as ``cache.positions`` has them.
            layout: None for dense causal attention, one layout for all layers, or one per layer; a
                :class:`LocalGrid` for rows with two grids of one picture, without a cache.
            cache: keys and values of earlier tokens; the new ones are added. An empty cache is filled
                by attention among the tokens themselves. Not in training mode.
            first_word: ``[B, C]``, in place of the word embedding of each row's first token, whose id is not
                looked at then.

        Raises:
            ValueError: more tokens than positions, or a number of layouts that is not that of layers.
        """
        T = tokens.shape[1]
        trunk = self.transformer
        restarts = positions is not None or (cache is not None and cache.restart is not None)
        if self.config.max_positions < T and not restarts:
            raise ValueError(f"tokens must have at most {self.config.max_positions} columns, got {T}")
        if layout is None or isinstance(layout, (ThreeRegionLayout, LocalGrid)):
            layouts: Sequence[Layout | None] = [layout] * len(trunk.layers)
        else:
            layouts = layout
        if len(layouts) != len(trunk.layers):
            raise ValueError(f"layout must hold one per layer ({len(trunk.layers)}), got {len(layouts)}")
        if cache is not None and self.training:
            raise ValueError("cache is for generation: call model.eval() first")
        places = torch.arange(T, device=tokens.device) if cache is None else cache.begin(T)
        if positions is None:
            positions = places if cache is None else cache.positions(places)

        words = self.word_embeddings(tokens)
        if first_word is not None:
            words = torch.cat([first_word[:, None].to(words.dtype), words[:, 1:]], dim=1)
        x = words + trunk.position_embeddings(positions)
        x = F.dropout(x, self.config.dropout, self.training)
        layers = cast("list[Layer]", list(trunk.layers))
        pre_norms = [layer.input_layernorm for layer in layers] + [trunk.final_layernorm]
        if any(hasattr(norm.weight, "device_mesh") for norm in pre_norms) and not hasattr(x, "device_mesh"):
            raise ValueError(
                "fully_shard cannot take a whole layer, since its end is computed together with the first "
                "norm of the next layer; call it with each of model.sharding_units(), then with the model"
            )
        first = pre_norms[0]
        normed = layer_norm(x, first.weight, first.bias, eps=first.eps, pb_relax=self.config.pb_relax)
        normed = _as_read_by(layers[0].attention, normed)  # so that all layers but the last are alike
        for index, layer in enumerate(layers):
            arguments = (x, normed, pre_norms[index + 1], layouts[index])
            is_last = index + 1 == len(layers)
            if self.config.activation_checkpointing and self.training:
                x, normed = checkpoint(layer, *arguments, is_last=is_last, use_reentrant=False)
            else:
                x, normed = layer(*arguments, cache, index, is_last)
        if cache is not None:
            cache.advance(T)
        return normed

    def logits(self, hidden: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """Logits ``[..., last - first]`` of the ids ``first .. last - 1`` (all by default)."""
        return decode_linear(hidden, self.word_embeddings.weight[first:last])

    def sharding_units(self) -> list[list[nn.Module]]:
        """What to give to FSDP's ``fully_shard`` one by one, before the model: the branches of each layer.

        The norms are sharded with the model itself, since two layers share one call at their border.
        """
        layers = cast("list[Layer]", list(self.transformer.layers))
        return [[layer.attention, layer.mlp] for layer in layers]

    def num_parameters(self) -> int:
        """Number of parameters; the head is tied and counts once."""
        return sum(parameter.numel() for parameter in self.parameters())
