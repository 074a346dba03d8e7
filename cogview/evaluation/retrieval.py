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
    gap = f"embedding gap {found['embedding gap']:.3f}, cosine of pairs {found['cosine of pairs']:.3f}"
    return f"{shares} (of {found['pairs']:.0f}); {gap}"


def measure_retrieval(clip: Clip, pairs: Pairs, size: int, device: str = "cpu") -> dict[str, float]:
    """:func:`retrieval` among ``pairs``, each with its first caption in Latin letters, and the embedding gap.

    The gap is the distance between the mean of all pictures and that of all texts, which CLIP does not close
    (Liang et al., arXiv:2203.02053); two points on the unit sphere are at most 2 apart.
    """
    captions = [latin_captions(pairs.captions(index)) for index in range(len(pairs))]
    kept = [index for index, texts in enumerate(captions) if texts]
    images = embed_images(clip, torch.stack([pairs.image(index, size) for index in kept]), device)
    texts = clip.of_texts([captions[index][0] for index in kept]).cpu()
    gap = (images.mean(0) - texts.mean(0)).norm().item()
    cosine = (images * texts).sum(1).mean().item()
    return {**retrieval(images, texts), "embedding gap": gap, "cosine of pairs": cosine, "pairs": len(kept)}
