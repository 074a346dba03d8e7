# SPDX-License-Identifier: Apache-2.0
"""Memory of a training step, from the shape of the model alone: what lives when most does. No PyTorch here.

Counted are the bytes of tensors, each from the operation that makes it to the one that needs it last; the
step holds most at one of a few moments. What is no tensor is not counted: the CUDA context, the buffers of
libraries, and what PyTorch's allocator holds beyond the tensors in it. Attention is taken to keep no scores;
PyTorch's dense attention on the CPU keeps them where there is dropout.

Letters: N tokens of a micro batch, C width. The trunk is float32 in every precision. What LayerNorms read of
branches and give to products is an activation, but for the last norm, which gives float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from cogview.config import ModelConfig

WEIGHTS, GRADIENTS, STATE = "weights", "gradients", "optimizer state"
COPIES = "16-bit copies of weights"
TRUNK, PRODUCTS, ATTENTION, MLP = (
    "activations: trunk and norms",
    "activations: inputs of products",
    "activations: attention",
    "activations: mlp",
)
CHECKPOINTS = "activations: checkpoints"
LOSS, WORK, GATHERED = "loss: gradients, a piece of logits", "passing values", "gathered from other GPUs"

_FLOAT = 4
_LOSS_PIECE = 14 * 2**20  # logits that the loss holds at a time, see linear_cross_entropy

Bytes = Counter[str]  # by the name of the part


@dataclass(frozen=True)
class MicroBatch:
    """What one GPU holds at a time: ``rows`` of ``tokens``, of a model that ``gpus`` share by FSDP.

    ``size`` is the bytes of an activation: 4, or 2 for bf16 and fp16. ``accumulates``: gradients of an
    earlier micro batch are there already.
    """

    rows: int
    tokens: int
    size: int = 4
    accumulates: bool = False
    gpus: int = 1


@dataclass(frozen=True)
class Moment:
    """What lives at one moment of a step, in bytes by part; ``name`` says when."""

    name: str
    parts: Bytes

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters: of one layer, of the word embeddings, and of the rest of the root."""

    layer: int
    words: int
    rest: int
    layers: int

    @property
    def total(self) -> int:
        return self.layers * self.layer + self.words + self.rest


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Parameters of ``CogView(config)``, which is not built; the head is tied and counts once."""
    C = config.hidden_size
    layer = 12 * C * C + 9 * C + 8 * C  # products, their biases, four LayerNorms
    rest = config.max_positions * C + 2 * C
    return ParameterCounts(layer, config.vocab_size * C, rest, config.num_layers)


def step_memory(config: ModelConfig, batch: MicroBatch) -> Moment:
    """The moment of a step at which most memory is held on one GPU."""
    return max(_moments(_Step(config, batch)), key=lambda moment: moment.total)


class _Step:
    """Sizes, in bytes, that several moments are made of."""

    def __init__(self, config: ModelConfig, batch: MicroBatch) -> None:
        self.config, self.batch = config, batch
        self.count = count_parameters(config)
        N, C = batch.rows * batch.tokens, config.hidden_size
        self.trunk = _FLOAT * N * C  # a state of the trunk
        self.activation = batch.size * N * C  # an activation of the same width
        self.is_16_bit = batch.size < _FLOAT
        self.lse = _FLOAT * N * config.num_heads
        self.stats = 16 * N  # of a sandwich: two means, two deviations
        products = 12 * C * C  # weights of a layer
        # FSDP gathers weights in 16 bits and lets them go; autocast keeps a copy of what it finds in float32.
        self.copies = 2 * products if self.is_16_bit and batch.gpus == 1 else 0
        self.unit = batch.size * products  # what FSDP gathers at a time
        self.words = _FLOAT * self.count.words
        self.layer_gradients = _FLOAT * self.count.layer

    def persistent(self) -> Bytes:
        """What lives throughout the step."""
        shards = self.batch.gpus
        weights = _FLOAT * self.count.total // shards
        parts = Bytes({WEIGHTS: weights, STATE: 2 * weights})
        if self.batch.accumulates:
            parts[GRADIENTS] = weights
        return parts

    def saved_by_layer(self) -> Bytes:
        """What the forward pass of a layer keeps for its backward pass."""
        return Bytes(
            {
                PRODUCTS: 2 * self.activation,  # normed, for qkv and for the mlp
                ATTENTION: 4 * self.activation + self.lse,  # q, k, v, out
                MLP: 8 * self.activation,  # before and after GELU
                TRUNK: 2 * self.activation + 2 * self.trunk + 2 * self.stats,  # both branches, both sums
                COPIES: self.copies,
            }
        )

    def kept_by_layer(self) -> Bytes:
        """The same, or what a checkpoint keeps instead: the trunk and its norm."""
        if self.config.activation_checkpointing:
            return Bytes({CHECKPOINTS: self.trunk + self.activation})
        return self.saved_by_layer()

    def kept_by_embeddings(self) -> Bytes:
        """The first state of the trunk, unless that is a checkpoint already, and its dropout mask."""
        mask = Bytes({TRUNK: self.trunk // 4 if self.config.dropout else 0})
        return mask if self.config.activation_checkpointing else mask + Bytes({TRUNK: self.trunk})

    def gathered(self, backward: bool) -> Bytes:
        """What FSDP gathers: embeddings and norms, which stay, and the weights of two layers, as those of the
        next come while this one computes. In the backward pass also a layer's gradients, and the float32
        buffers from which their sum over the GPUs is taken, this layer's and the one's before."""
        if self.batch.gpus == 1:
            return Bytes()
        gradients = self.unit + 2 * self.layer_gradients if backward else 0
        return Bytes({GATHERED: self.words + _FLOAT * self.count.rest + 2 * self.unit + gradients})


def _times(factor: int, parts: Bytes) -> Bytes:
    return Bytes({name: factor * size for name, size in parts.items()})


def _moments(step: _Step) -> Iterator[Moment]:
    """Every moment that can be the largest of a step."""
    L, gpus = step.config.num_layers, step.batch.gpus
    always = step.persistent()
    kept = _times(L, step.kept_by_layer()) + step.kept_by_embeddings()
    yield Moment("the loss", always + kept + _in_loss(step) + step.gathered(False))
    yield Moment("the gradient of the loss", always + kept + _after_loss(step) + step.gathered(True))
    pending = Bytes({GRADIENTS: step.words})  # of the words, until those of the embeddings are added
    for done, name in ((0, "backward, last layer"), (L - 1, "backward, first layer")):
        kept = _times(L - done, step.kept_by_layer()) + step.kept_by_embeddings() + pending
        if not step.batch.accumulates:
            kept[GRADIENTS] += done * step.layer_gradients // gpus
        in_layer = _in_backward_of_layer(step, last=done == 0, first=done == L - 1)
        yield Moment(name, always + kept + in_layer + step.gathered(True))
    gradients = 0 if step.batch.accumulates else L * step.layer_gradients // gpus
    last = Bytes({GRADIENTS: gradients + 2 * step.words, WORK: 2 * step.trunk})
    if gpus > 1:
        last[GATHERED] += step.words
    yield Moment("backward, embeddings", always + last)
    gradients = 0 if step.batch.accumulates else _FLOAT * step.count.total // gpus
    yield Moment("optimizer", always + Bytes({GRADIENTS: gradients}))


def _in_loss(step: _Step) -> Bytes:
    logits = step.batch.rows * step.batch.tokens * step.config.vocab_size
    words = step.count.words * step.batch.size
    parts = Bytes({LOSS: step.trunk + step.activation + words + min(logits, _LOSS_PIECE) * step.batch.size})
    if step.is_16_bit:
        parts[LOSS] += step.activation
        parts[COPIES] += words
    return parts


def _after_loss(step: _Step) -> Bytes:
    """Gradients in float32 beside those that the loss made."""
    words = step.count.words * step.batch.size
    parts = Bytes({LOSS: step.activation + words})
    if step.is_16_bit:
        parts += Bytes({GRADIENTS: step.words, WORK: step.trunk})
    return parts


def _in_backward_of_layer(step: _Step, last: bool, first: bool) -> Bytes:
    """What the backward pass of a layer holds beyond what was kept, when that is most."""
    change, most = 0, 0
    for allocated, freed in _backward_of_layer(step, last, first):
        most = max(most, change + allocated)
        change += allocated - freed
    if not step.config.activation_checkpointing:
        return Bytes({WORK: most})
    again = step.saved_by_layer()
    if not (first and step.is_16_bit):
        again[PRODUCTS] -= step.activation  # the checkpoint itself, but for the first norm, which is cast
    return again + Bytes({WORK: most})


def _backward_of_layer(step: _Step, last: bool, first: bool) -> Iterator[tuple[int, int]]:
    """Bytes that each operation allocates, then frees, from the layer's end to its beginning."""
    t, a, C = step.trunk, step.activation, step.config.hidden_size
    cast = step.is_16_bit

    def product(inputs: int, outputs: int) -> Iterator[tuple[int, int]]:
        """Gradient of a linear layer of as many widths in and out."""
        weight = _FLOAT * inputs * outputs * C * C
        yield inputs * a, 0
        copy = weight // 2 if cast else 0
        yield weight + copy, outputs * a + inputs * a + 2 * copy

    def sandwich(gradients: int) -> Iterator[tuple[int, int]]:
        """From the gradients of trunk and norm, beside the branch and the sum that were kept."""
        yield a + t, gradients + a + t

    gradients = t if last else t + a  # the loss brings one of the norm alone, in float32
    yield gradients, 0
    yield from sandwich(gradients)
    yield from product(4, 1)
    yield 4 * a, 8 * a  # GELU
    yield from product(1, 4)
    yield from sandwich(t + a)
    yield from product(1, 1)
    yield 3 * a, 4 * a  # attention
    yield 3 * a, 3 * a  # its three gradients as one
    yield from product(1, 3)
    if first and cast:
        yield t, a
