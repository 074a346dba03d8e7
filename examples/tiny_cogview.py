# SPDX-License-Identifier: Apache-2.0
"""CogView itself, from tokens: it learns to draw a square in the colour and at the place that its text names.

An image is 8 x 8 codes of four colours; the text is two tokens. Training takes three-region attention, and is
compared with dense attention.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from cogview import CogView
from cogview.config import ModelConfig
from cogview_kernels import ThreeRegionLayout, linear_cross_entropy

SIDE, COLOURS, PLACES, ROWS, STEPS, TIMED = 8, 4, 4, 8, 250, 20
TEXT = 2  # tokens before the image: a colour and a place
VOCAB = COLOURS + COLOURS + PLACES  # codes first, then the words for colours, then those for places

torch.manual_seed(0)


def batch() -> Tensor:
    """``[ROWS, TEXT + SIDE^2]``: text, then the codes in raster order."""
    colour, place = torch.randint(1, COLOURS, (ROWS,)), torch.randint(PLACES, (ROWS,))
    images = torch.zeros(ROWS, 2, SIDE // 2, 2, SIDE // 2, dtype=torch.int64)
    images[torch.arange(ROWS), place // 2, :, place % 2] = colour[:, None, None]
    text = torch.stack([COLOURS + colour, 2 * COLOURS + place], 1)
    return torch.cat([text, images.flatten(1)], 1)


def train(steps: int, *, sparse: bool) -> tuple[CogView, float, float]:
    """The model, its last loss, and the median seconds of a step."""
    torch.manual_seed(1)
    T = TEXT + SIDE * SIDE
    model = CogView(ModelConfig(2, 64, 2, vocab_size=VOCAB, max_positions=T, dropout=0.0, init_std=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    is_text = torch.arange(T - 1).expand(ROWS, -1) < TEXT
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        tokens = batch()
        layout = ThreeRegionLayout.sample(is_text, 16, block_size=8, window_blocks=2) if sparse else None
        hidden = model(tokens[:, :-1], layout=layout)
        loss = linear_cross_entropy(hidden, model.word_embeddings.weight, tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return model.eval(), loss.item(), statistics.median(times)


@torch.no_grad()
def draw(model: CogView, colour: int, place: int) -> Tensor:
    """The likeliest image for a text, code by code."""
    tokens = torch.tensor([[COLOURS + colour, 2 * COLOURS + place]])
    for _ in range(SIDE * SIDE):
        code = model.logits(model(tokens)[:, -1], last=COLOURS).argmax(-1)
        tokens = torch.cat([tokens, code[:, None]], 1)
    return tokens[0, TEXT:].view(SIDE, SIDE)


_, _, dense_seconds = train(TIMED, sparse=False)
model, loss, seconds = train(STEPS, sparse=True)
image = draw(model, colour=3, place=1)
print("\n".join("".join(" .o#"[code] for code in row) for row in image.tolist()))
wanted = torch.zeros(SIDE, SIDE, dtype=torch.int64)
wanted[: SIDE // 2, SIDE // 2 :] = 3
print(f"loss {loss:.3f}; {(image == wanted).float().mean().item():.0%} of the codes are as the text asks")
print(f"ratio: a step is {dense_seconds / seconds:.2f}x as fast as with dense attention")
