# SPDX-License-Identifier: Apache-2.0
"""The Inception Score: pictures of clear things, of many kinds.

Source: arXiv:1606.03498. With another network than Inception it is another figure.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Score(NamedTuple):
    """Mean and standard deviation over the splits."""

    mean: float
    deviation: float


class InceptionScore:
    """``exp(mean_x KL(p(y|x) || p(y)))``, over ``splits`` parts of the pictures, in constant memory.

    Part ``i`` has the pictures from number ``i * total // splits`` to ``(i + 1) * total // splits``, as in
    torch-fidelity without shuffling.

    Args:
        total: how many pictures will come.
    """

    def __init__(self, total: int, splits: int = 10) -> None:
        if not 1 <= splits <= total:
            raise ValueError(f"splits must be from 1 to the number of pictures {total}, got {splits}")
        self._ends = [(split + 1) * total // splits for split in range(splits)]
        self._total, self._seen = total, 0
        self._probabilities: list[Tensor] = []  # sum of p(y|x) over each part
        self._information = [0.0] * splits  # sum of p(y|x) log p(y|x) over pictures and classes of each part

    def update(self, logits: Tensor) -> None:
        """Add the logits ``[N, classes]`` of the next pictures."""
        logs = logits.detach().to("cpu", torch.float64).log_softmax(1)
        if self._seen + len(logs) > self._total:
            raise ValueError(f"more pictures came than the {self._total} that were told")
        if not self._probabilities:
            self._probabilities = [torch.zeros(logs.shape[1], dtype=torch.float64) for _ in self._ends]
        while len(logs):
            split = next(place for place, end in enumerate(self._ends) if end > self._seen)
            taken = min(len(logs), self._ends[split] - self._seen)
            part, logs = logs[:taken], logs[taken:]
            self._probabilities[split] += part.exp().sum(0)
            self._information[split] += (part.exp() * part).sum().item()
            self._seen += taken

    def result(self) -> Score:
        """ValueError unless all pictures have come."""
        if self._seen != self._total:
            raise ValueError(f"{self._seen} pictures came of the {self._total} that were told")
        scores, start = [], 0
        for end, summed, information in zip(self._ends, self._probabilities, self._information, strict=True):
            count = end - start
            overall = summed / count
            divergence = information / count - torch.special.xlogy(overall, overall).sum().item()
            scores.append(divergence)
            start = end
        each = torch.tensor(scores, dtype=torch.float64).exp()
        return Score(each.mean().item(), each.std(correction=0).item())
