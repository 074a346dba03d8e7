# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cogview.config import ThreeRegionConfig
from cogview.training.flops import step_flops, visible_pairs
from cogview_kernels import ThreeRegionLayout, linear_cross_entropy
from tests.model.helpers import SMALL, small_model


def test_dense_attention_sees_the_causal_half():
    assert visible_pairs(5, None) == 15


@pytest.mark.parametrize("tokens", [1, 37, 40])
def test_three_regions_see_on_average_what_layouts_drawn_at_random_see(tokens):
    region = ThreeRegionConfig(block_size=4, window_blocks=2, num_pivots=12)
    draws = 400
    layout = ThreeRegionLayout.sample(
        torch.zeros(draws, tokens, dtype=torch.bool),
        region.num_pivots,
        block_size=4,
        window_blocks=2,
        generator=torch.Generator().manual_seed(0),
    )
    mean = layout.dense_mask(tokens).sum().item() / draws
    assert visible_pairs(tokens, region) == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_products_are_those_that_pytorch_counts(checkpointing):
    """Attention apart: the prediction has the mean over layouts, the counter the pairs of this one."""
    config = dataclasses.replace(SMALL, activation_checkpointing=checkpointing)
    model = small_model(activation_checkpointing=checkpointing).train()
    rows, tokens = 3, 20
    ids = torch.randint(config.vocab_size, (rows, tokens))
    pivots = ThreeRegionLayout.sample(torch.zeros_like(ids, dtype=torch.bool), 4, block_size=4)
    with FlopCounterMode(display=False) as counter:
        hidden = model(ids, layout=pivots)
        linear_cross_entropy(hidden, model.word_embeddings.weight, ids, backend="reference").backward()
    flops = step_flops(config, rows, tokens)
    again = flops.products / 3 if checkpointing else 0
    pairs = int(pivots.dense_mask(tokens).sum())
    seen = (14 + 4 * checkpointing) * config.num_layers * config.hidden_size * pairs
    assert counter.get_total_flops() == flops.products + flops.loss + again + seen
    attention = flops.hardware - flops.products - flops.loss - again
    assert attention == pytest.approx((7 + 2 * checkpointing) / 6 * flops.attention)
