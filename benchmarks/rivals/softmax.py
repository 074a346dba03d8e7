# SPDX-License-Identifier: Apache-2.0
"""PB-Relax softmax as eager PyTorch, torch.compile, Liger and quack do it."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.definitions import Case, Forward, Inputs, Variant
from benchmarks.rivals import needs


def pb_relax(scores: Tensor, alpha: float, mask: Tensor | None) -> Tensor:
    """The formula as one would write it; rows that see nothing are left to chance."""
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    scores = alpha * (scores - scores.amax(-1, keepdim=True).detach())
    return torch.softmax(scores, -1)


def plain(scores: Tensor, alpha: float, mask: Tensor | None) -> Tensor:
    """No protection from overflow."""
    scores = alpha * scores
    return torch.softmax(scores if mask is None else scores.masked_fill(~mask, float("-inf")), -1)


def _eager(function):
    return lambda inputs, case: lambda: function(inputs.scores, inputs.alpha, inputs.mask)


def _biased(inputs: Inputs, case: Case) -> Forward:
    """The mask as a bias that is made beforehand: one pass before the softmax. Eager can do no less."""
    bias = torch.zeros_like(inputs.mask, dtype=case.dtype).masked_fill(~inputs.mask, float("-inf"))
    return lambda: torch.softmax(torch.add(bias, inputs.scores, alpha=inputs.alpha), -1)


def _compiled(inputs: Inputs, case: Case) -> Forward:
    function = torch.compile(pb_relax, dynamic=False)
    return lambda: function(inputs.scores, inputs.alpha, inputs.mask)


def _liger(inputs: Inputs, case: Case) -> Forward:
    from liger_kernel.ops.softmax import LigerSoftmaxFunction

    return lambda: LigerSoftmaxFunction.apply(inputs.alpha * inputs.scores)


def _quack(inputs: Inputs, case: Case) -> Forward:
    from quack.softmax import softmax

    rows = inputs.scores.flatten(0, -2)
    return lambda: softmax(inputs.alpha * rows).view_as(inputs.scores)


def _unmasked(module: str):
    installed = needs(module, gpu=True)

    def why_not(case, device):
        return installed(case, device) or ("no causal mask" if hasattr(case.shape, "T") else "")

    return why_not


def _no_mask(case, device):
    return "" if hasattr(case.shape, "T") else "no mask here"


PLAIN = "without PB-relax: overflows where PB-relax does not"
VARIANTS = (
    Variant("eager PB-relax", _eager(pb_relax)),
    Variant("torch.compile PB-relax", _compiled),
    Variant("eager softmax", _eager(plain), note=PLAIN),
    Variant("eager softmax, mask as bias", _biased, why_not=_no_mask, note=PLAIN),
    Variant("Liger softmax", _liger, why_not=_unmasked("liger_kernel"), note="without PB-relax"),
    Variant("quack softmax", _quack, why_not=_unmasked("quack"), note="without PB-relax"),
)
