# SPDX-License-Identifier: Apache-2.0
"""How the loss of a token follows from its logits, beyond plain cross-entropy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Objective(NamedTuple):
    """``label_smoothing`` of ``F.cross_entropy``, Gemma's ``softcap`` (0 for none) and PaLM's ``z_loss``."""

    label_smoothing: float = 0.0
    softcap: float = 0.0
    z_loss: float = 0.0

    def capped(self, logits: Tensor) -> Tensor:
        return self.softcap * (logits / self.softcap).tanh() if self.softcap else logits

    def losses(self, stats: Tensor, ids: int) -> Tensor:
        """Those of tokens in float32, from what :class:`pieces.Steps` has reduced their logits of ``ids`` ids
        to. Differences from the largest logit are small, so that little is lost when they are subtracted."""
        logit_max, total, picked = stats[:3]
        log_total = total.log()
        losses = log_total - (picked - logit_max)
        if self.label_smoothing:
            mean = log_total - stats[3] / ids
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * mean
            # A smoothing of 1 would make NaN of the infinite loss of a target that is no id.
            losses = losses.masked_fill(picked == -torch.inf, torch.inf)
        if self.z_loss:
            losses = losses + self.z_loss * (logit_max + log_total).square()
        return losses


PLAIN = Objective()
