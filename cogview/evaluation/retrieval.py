# SPDX-License-Identifier: Apache-2.0
"""How well a CLIP finds the picture of a text among many, and the text of a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cogview.data.pairs import Pairs
from cogview.files import StrPath
from cogview.perception.clip import Clip, embed_images
from cogview.training.clip import latin_captions

RANKS = (1, 10)
GAP = ("embedding gap", "cosine of pairs", "cosine of others")


def retrieval(images: Tensor, texts: Tensor, ranks: Sequence[int] = RANKS) -> dict[str, float]:
    """Shares of texts, and of pictures, whose counterpart is among the nearest 1 and 10 by cosine.

    Args:
        images: ``[N, D]`` of length 1.
        texts: ``[N, D]``, the text of each picture.
    """
    cosines = texts @ images.t()
    found: dict[str, float] = {}
    for name, rows in (("image of a text", cosines), ("text of an image", cosines.t())):
        # How many are at least as near as the right one: a tie is no success.
        places = (rows >= rows.diagonal()[:, None]).sum(1)
        found |= {f"{name}, at {rank}": (places <= rank).double().mean().item() for rank in ranks}
    return found


def held_out(data: StrPath) -> dict[str, Pairs]:
    """The pictures that no training on built-in ``data`` sees, by what they are; none for other data."""
    if str(data) != "emoji":
        return {}
    from cogview.data.emoji import held_out_combinations, held_out_lines

    return {
        "held-out combinations of drawing and skin tone": held_out_combinations(),
        "held-out line drawings": held_out_lines(),
    }


def in_words(found: Mapping[str, float]) -> str:
    """What :func:`measure_retrieval` found, on one line."""
    shares = ", ".join(f"{name} {share:.1%}" for name, share in found.items() if ", at " in name)
    return f"{shares} (of {found['pairs']:.0f}); {gap_in_words(found)}"


def gap_in_words(found: Mapping[str, float]) -> str:
    """What :func:`embedding_gap` found, on one line."""
    return ", ".join(f"{name} {found[name]:.3f}" for name in GAP)


def embedding_gap(images: Tensor, texts: Tensor) -> dict[str, float]:
    """How far texts lie from pictures in the space of CLIP (Liang et al., arXiv:2203.02053).

    Args:
        images: ``[N, D]`` of length 1, at least 2.
        texts: ``[N, D]``, the text of each picture.

    Returns the mean cosine of texts with their own pictures, that with all other pictures, and the distance
    between the mean of all pictures and that of all texts, which CLIP does not close; two points on the unit
    sphere are at most 2 apart.
    """
    cosines = texts @ images.t()
    own, all_of_them = cosines.diagonal().sum(), cosines.sum()
    others = (all_of_them - own) / (len(images) * (len(images) - 1))
    gap = (images.mean(0) - texts.mean(0)).norm()
    return dict(zip(GAP, (gap.item(), own.item() / len(images), others.item()), strict=True))


def measure_retrieval(clip: Clip, pairs: Pairs, size: int, device: str = "cpu") -> dict[str, float]:
    """:func:`retrieval` and :func:`embedding_gap` of ``pairs``, by their first captions in Latin letters."""
    captions = [latin_captions(pairs.captions(index)) for index in range(len(pairs))]
    kept = [index for index, texts in enumerate(captions) if texts]
    images = embed_images(clip, torch.stack([pairs.image(index, size) for index in kept]), device)
    texts = clip.of_texts([captions[index][0] for index in kept]).cpu()
    return {**retrieval(images, texts), **embedding_gap(images, texts), "pairs": len(kept)}
