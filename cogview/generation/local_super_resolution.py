# SPDX-License-Identifier: Apache-2.0
"""Enlarges whole pictures to twice the side in six rounds, each of which draws codes all over the picture.

Source: CogView2, arXiv:2204.14217, section 3.3 (local parallel autoregressive generation): a code is drawn
from what earlier rounds have drawn around it. The order within a tile of four by four is that of ordered
dithering, so that the codes of a round lie far apart. CogView2's own tile is of six by six.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cogview.generation.engine import DrawOptions
from cogview.generation.sampling import Noise, choose
from cogview.generation.super_resolution import Small
from cogview.model.local_grid import LocalGrid
from cogview.model.transformer import CogView
from cogview.seeding import derive_seed
from cogview.tokens.sequence import local_enlargement_prefix, masked_codes
from cogview.tokens.vocab import Vocab

# The order of codes in a tile (Bayer, 1973), and how many of the tile are drawn after each round.
ORDER = ((0, 8, 2, 10), (12, 4, 14, 6), (3, 11, 1, 9), (15, 7, 13, 5))
DRAWN = (1, 2, 4, 7, 11, 16)


def rounds_of(side: int) -> Tensor:
    """In which round each code is drawn, int64 ``[side, side]``."""
    repeats = -(-side // 4)
    order = torch.tensor(ORDER, device="cpu").repeat(repeats, repeats)[:side, :side].contiguous()
    return torch.bucketize(order, torch.tensor(DRAWN, device="cpu"), right=True)


@torch.no_grad()
def enlarge_locally(
    model: CogView, vocab: Vocab, pictures: Sequence[Small], room: int, options: DrawOptions
) -> Tensor:
    """The codes of ``pictures``, all of one size, at twice the side; int64 ``[N, 2 low, 2 low]``.

    ``room``: tokens of the longest text of the rows that the model learned from. A picture's outcome depends
    on its codes, text and seed, not on the other pictures. ``options.on_step`` hears of the codes drawn.
    Leaves the model in eval mode. FloatingPointError if the model's numbers are not finite.
    """
    model.eval()
    device = model.word_embeddings.weight.device
    parts = [
        _enlarged(model, vocab, pictures[first : first + options.max_batch], room, options, device)
        for first in range(0, len(pictures), options.max_batch)
    ]
    return torch.cat(parts)


def _enlarged(
    model: CogView,
    vocab: Vocab,
    pictures: Sequence[Small],
    room: int,
    options: DrawOptions,
    device: torch.device,
) -> Tensor:
    low = pictures[0].codes.shape[0]
    side = 2 * low
    prefixes = [
        local_enlargement_prefix(vocab, room, picture.pieces, picture.codes.flatten().tolist())
        for picture in pictures
    ]
    grid = LocalGrid(low, len(prefixes[0]))
    prefix = torch.tensor(prefixes, device=device)
    codes = masked_codes(vocab, side).expand(len(pictures), -1).to(device).clone()
    seeds = [derive_seed(picture.seed, "local enlargement") for picture in pictures]
    noise = Noise(torch.tensor(seeds, device=device), side * side, vocab.num_image_codes)
    positions, number = grid.positions().to(device), rounds_of(side).flatten().to(device)
    for index in range(len(DRAWN)):
        places = (number == index).nonzero()[:, 0]
        hidden = model(torch.cat([prefix, codes], dim=1), positions=positions, layout=grid)
        logits = model.logits(hidden[:, grid.prefix :][:, places], 0, vocab.num_image_codes)
        if not bool(logits.isfinite().all()):
            raise FloatingPointError(
                "the model's logits are not finite (NaN or infinite): its weights are damaged, or overflow "
                f"in this precision, {hidden.dtype}"
            )
        at = places.expand(len(pictures), -1)
        codes.scatter_(1, at, choose(logits, options.sampling, noise, at))
        if options.on_step is not None:
            options.on_step(at.numel())
    return codes.view(-1, side, side)
