# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a training step, from the shape of the model alone. No PyTorch here.

Letters: B rows, T tokens a row, C width, L layers, V vocabulary. A product of [m, k] and [k, n] is 2 m k n
FLOPs. A backward pass has two products for each one of the forward pass, so a step has three.
"""

from __future__ import annotations

from dataclasses import dataclass

from cogview.config import ModelConfig, ThreeRegionConfig


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step, forward and backward.

    ``products``: the four linear layers of each layer. ``attention``: scores and weighted sums, of visible
    pairs of query and key alone. ``loss``: the products with the word embeddings. ``recomputed``: what is
    computed a second time to save memory: checkpointed layers, and the scores in attention's backward pass.
    """

    products: float
    attention: float
    loss: float
    recomputed: float

    @property
    def model(self) -> float:
        """What no implementation can do without. Divided by the time of a step and the peak rate of the
        device, it is the MFU (model FLOPs utilisation; PaLM, arXiv:2204.02311, appendix B)."""
        return self.products + self.attention + self.loss

    @property
    def hardware(self) -> float:
        """What is computed."""
        return self.model + self.recomputed


def visible_pairs(tokens: int, three_region: ThreeRegionConfig | None) -> float:
    """Pairs of a query and a key that it sees, in a row of ``tokens``: causal, or expected in three regions.

    The expectation takes pivots as spread evenly. Text before the image makes them more for most queries,
    text behind it fewer; training has both orders.
    """
    if three_region is None:
        return tokens * (tokens + 1) / 2
    size, pivots = three_region.block_size, min(three_region.num_pivots, tokens)
    pairs = 0.0
    for start in range(0, tokens, size):
        queries = min(size, tokens - start)
        window_start = max(0, start - (three_region.window_blocks - 1) * size)
        before = start - window_start + pivots * window_start / tokens
        pairs += queries * before + queries * (queries + 1) / 2
    return pairs


def step_flops(config: ModelConfig, rows: int, tokens: int | None = None) -> StepFlops:
    """FLOPs of a training step of ``config`` over ``rows`` of ``tokens`` each (by default a full row).

    Example, for a log: ``step_flops(config, rows).model / seconds / peak_flops`` is the MFU.
    """
    tokens = config.max_positions - 1 if tokens is None else tokens
    C, L = config.hidden_size, config.num_layers
    products = 2 * 12 * C * C * L * rows * tokens
    scores = 2 * C * L * rows * visible_pairs(tokens, config.three_region)
    loss = 2 * C * config.vocab_size * rows * tokens
    again = products + 2 * scores if config.activation_checkpointing else 0
    return StepFlops(3 * products, 6 * scores, 3 * loss, again + scores)
