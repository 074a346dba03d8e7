# SPDX-License-Identifier: Apache-2.0
"""How much a ranking of candidates gains with their number.

Source: CogView (arXiv:2105.13290), figure 9: the quality of the best of N candidates by CapLoss. A *picker*
chooses one of the first N candidates of each prompt: CapLoss, chance, or a judge that looks at all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

COUNTS = (1, 2, 4, 8, 16, 32, 60)


class CurvePoint(NamedTuple):
    """What one picker gets out of so many candidates."""

    picker: str
    candidates: int
    right: float  # share of picks that show what was asked for
    distance: float  # Frechet distance of the picks from real pictures


def costs_of_pickers(losses: Mapping[str, Tensor], is_right: Tensor, seed: int) -> dict[str, Tensor]:
    """For each picker a cost ``[P, M]`` of every candidate, of which it picks the one that costs least.

    Args:
        losses: CapLoss ``[P, M]`` of each model that ranks, by its name.
        is_right: bool ``[P, M]``, what a judge says of each candidate.

    The judge picks the first candidate that is right, and the first one where none is: a bound on what any
    ranking can reach. Chance picks by costs that have nothing to do with the candidates.
    """
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(is_right.shape, generator=generator, dtype=torch.float64)
    return {**losses, "chance": chance, "the judge": (~is_right).double()}


def picks(cost: Tensor, count: int) -> Tensor:
    """The places ``[P, M // count]`` of the picks among the candidates of each whole group of ``count``."""
    prompts, candidates = cost.shape
    groups = candidates // count
    first = torch.arange(groups) * count
    return cost[:, : groups * count].view(prompts, groups, count).argmin(2) + first


def rank_curve(
    costs: Mapping[str, Tensor],
    is_right: Tensor,
    distance_of: Callable[[Tensor], float],
    *,
    counts: Sequence[int] = COUNTS,
    tell: Callable[[], object] = lambda: None,
) -> list[CurvePoint]:
    """All pickers with all numbers of candidates that there are.

    The share that is right is the mean over all whole groups of candidates, so it is as sure for few of them
    as for many. The distance is that of one pick a prompt, from the first group: sets of one size for every
    number of candidates, since the Frechet distance of a smaller set is larger.

    Args:
        distance_of: the distance of the set of the candidates at places ``[P]``, one of each prompt.
        tell: called after each point.
    """
    curve = []
    for picker, cost in costs.items():
        for count in counts:
            if count <= cost.shape[1]:
                places = picks(cost, count)
                right = is_right.gather(1, places).double().mean().item()
                curve.append(CurvePoint(picker, count, right, distance_of(places[:, 0])))
                tell()
    return curve
