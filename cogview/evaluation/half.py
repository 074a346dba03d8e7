# SPDX-License-Identifier: Apache-2.0
"""Training wholly in float16, as CogView was: what the study of stability looks at.

Here the trunk and the attention scores are float16 too, so both can overflow. ``cogview train`` keeps the
trunk in float32 and never writes scores to memory, so it cannot show what the paper met.
"""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cogview.config import ModelConfig, TrainConfig
from cogview.model.cache import KVCache
from cogview.model.transformer import Attention, CogView, Layer
from cogview.tokens.sequence import Batch
from cogview.training.loop import Descent, descend
from cogview.training.optim import make_optimizer, shrunk_gradient
from cogview.training.precision import NonFiniteWatch
from cogview.training.resblock import ResblockScaling
from cogview_kernels import ThreeRegionLayout, linear_cross_entropy, stable_softmax

ALPHA = 32  # of PB-Relax attention, the paper's example
aten = torch.ops.aten


class SumsInFloat32(TorchDispatchMode):
    """Within the block, long sums of float16 numbers are taken in float32 and rounded once to float16.

    These are the matrix products and the gradients of the embeddings. A GPU does the same. Otherwise a CPU
    without float16 units takes many times as long for such products, and any CPU sums the gradients of
    embeddings in float16. All else is PyTorch's float16: each operation computes in float32 and rounds its
    result. The backward pass belongs inside as well.
    """

    _SUMS = (
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.embedding_dense_backward.default,
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self._SUMS or args[0].dtype != torch.float16:
            return func(*args, **(kwargs or {}))
        wide = [
            part.float() if isinstance(part, Tensor) and part.is_floating_point() else part for part in args
        ]
        return func(*wide, **(kwargs or {})).half()


class Softmax(nn.Module):
    """``softmax(alpha * (scores - max(scores)))`` under a causal mask, as a module that a watch can name."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, scores: Tensor) -> Tensor:
        return stable_softmax(scores, alpha=self.alpha, causal=True)


class ScoredAttention(nn.Module):
    """The projections of ``attention`` around scores ``[B, H, T, T]`` that are written to memory.

    The scores are ``(q / (alpha * sqrt(D))) @ k^T`` in the dtype of q. With alpha 1 it is attention as most
    code of the time had it; 32 is PB-Relax.
    """

    def __init__(self, attention: Attention, alpha: float) -> None:
        super().__init__()
        self.num_heads, self.alpha = attention.num_heads, alpha
        self.query_key_value, self.dense = attention.query_key_value, attention.dense
        self.softmax = Softmax(alpha)

    def forward(
        self, x: Tensor, layout: ThreeRegionLayout | None, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        B, T, C = x.shape
        D = C // self.num_heads
        qkv = self.query_key_value(x).view(B, T, 3, self.num_heads, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q / (self.alpha * math.sqrt(D))) @ k.transpose(2, 3)
        return self.dense((self.softmax(scores) @ v).transpose(1, 2).reshape(B, T, C))


@dataclass(frozen=True)
class Techniques:
    """What keeps a training in float16 alive, or does not."""

    pb_relax: bool = False  # in every LayerNorm and in attention
    sandwich_norm: bool = False
    embedding_gradient: float = 1.0
    float32_trunk: bool = False  # as under PyTorch's autocast; else all activations are float16
    resblock_scaling: bool = False  # rather than a loss scale; needs the float32 trunk


@dataclass
class Sizes:
    """Largest absolute values of one forward pass, layer by layer: 0-d tensors until they are read."""

    trunk: list[Tensor] = field(default_factory=list)  # what a layer hands on
    scores: list[Tensor] = field(default_factory=list)  # of attention, as written to memory
    branches: list[Tensor] = field(default_factory=list)  # what attention and MLP give, before a norm ends it

    def read(self) -> dict[str, list[float]]:
        """The same as numbers, after one wait for the device."""
        named = {"trunk": self.trunk, "scores": self.scores, "branches": self.branches}
        numbers = iter(torch.stack([value for values in named.values() for value in values]).tolist())
        return {name: [next(numbers) for _ in values] for name, values in named.items()}

    def watch(self, layer: Layer) -> None:
        """Note the values of ``layer`` in every forward pass from now on."""
        attention = cast(ScoredAttention, layer.attention)
        layer.register_forward_hook(lambda _, inputs, out: self.trunk.append(_largest(out[0])))
        attention.softmax.register_forward_pre_hook(lambda _, inputs: self.scores.append(_largest(inputs[0])))
        for branch in (attention, layer.mlp):
            branch.register_forward_hook(lambda _, inputs, out: self.branches.append(_largest(out)))

    def clear(self) -> None:
        for values in (self.trunk, self.scores, self.branches):
            values.clear()


def _largest(x: Tensor) -> Tensor:
    return x.detach().abs().amax().float()


@dataclass(frozen=True)
class Observation:
    """One step: what came out, and where the first value that is not finite arose; empty if there is none."""

    loss: float
    scale: float  # the loss scale, or the smallest scale of a residual block
    sizes: dict[str, list[float]]  # as Sizes.read gives them
    overflow: str  # in the forward pass: float16 cannot go on with these weights
    bad_gradient: str  # in the backward pass alone: the step is skipped, and the next has a smaller scale
    dropped_blocks: int  # residual blocks without a step, under resblock scaling


class HalfTrainer:
    """One model and its float32 master copy; steps at a constant rate that say how large everything became.

    Args:
        config: the shape. PB-Relax and Sandwich-LN are as ``techniques`` has them.
        train: learning rate, betas, weight decay and clipping.
    """

    def __init__(
        self, config: ModelConfig, train: TrainConfig, techniques: Techniques, device: torch.device
    ) -> None:
        self.train, self.techniques, self.device = train, techniques, device
        relax: Any = "row" if techniques.pb_relax else None
        config = replace(config, pb_relax=relax, sandwich_norm=techniques.sandwich_norm)
        self.master = CogView(config).to(device).train()
        self.model = self.master if techniques.float32_trunk else copy.deepcopy(self.master).half()
        self.sizes = Sizes()
        for layer in cast("list[Layer]", list(self.model.transformer.layers)):
            alpha = ALPHA if techniques.pb_relax else 1
            layer.attention = cast(Attention, ScoredAttention(layer.attention, alpha))
            self.sizes.watch(layer)
        self.optimizer = make_optimizer(self.master, train)
        self.resblocks = ResblockScaling(self.model) if techniques.resblock_scaling else None
        self.scaler = None if techniques.resblock_scaling else torch.amp.GradScaler(device.type)

    def step(self, batch: Batch) -> Observation:
        """Forward, backward, and a step of the master copy if all gradients are finite."""
        batch = batch.to(self.device)
        if self.scaler is not None:
            scale = self.scaler.scale(torch.ones((), dtype=torch.float32, device=self.device))
        else:
            scale = torch.ones((), dtype=torch.float32, device=self.device)
        loss = self._gradient(batch, scale)
        sizes = self.sizes.read()
        is_finite = all(math.isfinite(value) for values in sizes.values() for value in values)
        if not (is_finite and loss.isfinite()):
            where = self._explain(batch, scale)
            return Observation(loss.item(), self._scale(), sizes, where, "", 0)
        shown, dropped = self._scale(), 0
        if self.resblocks is not None:
            dropped = int(self.resblocks.unscale())
        skipped = self._descend(loss).skipped.item()
        bad = self._explain(batch, scale) if skipped else ""
        return Observation(loss.item(), shown, sizes, "", bad, dropped)

    def _scale(self) -> float:
        if self.resblocks is not None:
            return self.resblocks.scales.min().item()
        return cast(torch.amp.GradScaler, self.scaler).get_scale()

    def _gradient(self, batch: Batch, scale: Tensor, watch: NonFiniteWatch | None = None) -> Tensor:
        """The loss; leaves its gradient, times the scale, at the parameters. The head works in float32."""
        table = self.model.word_embeddings.weight
        wide = self.techniques.float32_trunk
        self.sizes.clear()
        with (
            SumsInFloat32() if self.device.type == "cpu" else nullcontext(),
            nullcontext() if self.resblocks is None else self.resblocks.scaled(),
            shrunk_gradient(self.model.word_embeddings, self.techniques.embedding_gradient),
        ):
            with torch.autocast(self.device.type, torch.float16, enabled=wide):
                hidden = self.model(batch.tokens)
            top, head = (tensor.detach().float().requires_grad_() for tensor in (hidden, table))
            loss = linear_cross_entropy(top, head, batch.targets, token_weight=batch.weight)
            of_hidden, of_table = torch.autograd.grad(loss * scale, (top, head))
            if watch is not None:
                watch.look("the loss", loss)
            hidden.backward(of_hidden.to(hidden.dtype))
        table.grad = cast(Tensor, table.grad) + of_table.to(table.dtype)
        if watch is not None:
            watch.look("the gradient of word_embeddings.weight", table.grad)
        return loss.detach()

    def _descend(self, loss: Tensor) -> Descent:
        """A step of the master copy, whose rounded weights the model then has."""
        pairs = list(zip(self.master.parameters(), self.model.parameters(), strict=True))
        if self.model is not self.master:
            for mine, narrow in pairs:
                mine.grad, narrow.grad = cast(Tensor, narrow.grad).float(), None
        descent = descend(
            loss, self.master, self.optimizer, clip_norm=self.train.clip_norm, scaler=self.scaler
        )
        if self.model is not self.master:
            with torch.no_grad():
                for mine, narrow in pairs:
                    narrow.copy_(mine)
        return descent

    def _explain(self, batch: Batch, scale: Tensor) -> str:
        """Where the step's first value that is not finite arose: the step is taken once more to find out."""
        self.model.zero_grad(set_to_none=True)
        with NonFiniteWatch(self.model) as watch:
            self._gradient(batch, scale, watch)
        self.model.zero_grad(set_to_none=True)
        return watch.where or "the norm of the gradients"
