# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of a linear layer: eager, torch.compile, PyTorch's chunked one, Liger, Cut Cross-Entropy."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.definitions import FORWARD, Case, Forward, Inputs, Variant
from benchmarks.rivals import needs

# Gemma 2's cap, PaLM's z-loss.
OPTIONS = {"softcap": 30.0, "z_loss": 1e-4, "label_smoothing": 0.1}


def eager(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Logits in the working dtype, the softmax in float32, as mixed-precision training does it."""
    logits = F.linear(hidden, weight, bias).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, target, label_smoothing=label_smoothing)
    return loss + z_loss * logits.logsumexp(-1).square().mean() if z_loss else loss


def _eager(x: Inputs, case: Case) -> Forward:
    return lambda: eager(x.hidden, x.weight, x.target, x.values.get("bias"), **x.options)


def _compiled(x: Inputs, case: Case) -> Forward:
    function = torch.compile(eager, dynamic=False)
    return lambda: function(x.hidden, x.weight, x.target, x.values.get("bias"), **x.options)


def _plain(why_not: Callable[[Case, torch.device], str]) -> Callable[[Case, torch.device], str]:
    """``why_not`` of a rival that does not have all the options."""

    def also(case: Case, device: torch.device) -> str:
        return "has no z-loss or no soft capping" if case.shape.options else why_not(case, device)

    return also


def _fused_why_not(case: Case, device: torch.device) -> str:
    if not hasattr(F, "linear_cross_entropy"):
        return "this PyTorch has no F.linear_cross_entropy (2.13 has)"
    slow = device.type == "cpu" and case.shape.V > 10_000
    return "takes more than 10 seconds a call on a CPU" if slow else ""


def _fused(x: Inputs, case: Case) -> Forward:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda: F.linear_cross_entropy(x.hidden, x.weight, x.target, options=options)


def _liger(x: Inputs, case: Case) -> Forward:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    options = dict(x.options)
    if options:
        options["lse_square_scale"] = options.pop("z_loss")
    return lambda: liger_fused_linear_cross_entropy(
        x.hidden, x.weight, x.target, bias=x.values.get("bias"), **options
    )


def _cut(implementation: str):
    def prepare(x: Inputs, case: Case) -> Forward:
        from cut_cross_entropy import linear_cross_entropy

        return lambda: linear_cross_entropy(x.hidden, x.weight, x.target, impl=implementation)

    return prepare


def _matrix_products(x: Inputs, case: Case) -> Forward:
    """The products alone, as PyTorch makes them, into memory that is there."""
    hidden, weight = x.hidden.detach(), x.weight.detach()
    logits = hidden @ weight.T
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def forward() -> Tensor:
        torch.mm(hidden, weight.T, out=logits)
        if case.direction == FORWARD:
            return logits
        torch.mm(logits, weight, out=dhidden)
        torch.mm(logits.T, hidden, out=dweight)
        return dhidden

    return forward


_cut_why_not = _plain(needs("cut_cross_entropy", gpu=True))
VARIANTS = (
    Variant("eager", _eager),
    Variant("torch.compile", _compiled),
    Variant("F.linear_cross_entropy", _fused, why_not=_plain(_fused_why_not)),
    Variant("Liger", _liger, why_not=needs("liger_kernel", gpu=True)),
    Variant("Cut Cross-Entropy", _cut("cce"), why_not=_cut_why_not, note="drops small gradients"),
    Variant("Cut Cross-Entropy, exact", _cut("cce_exact"), why_not=_cut_why_not),
    Variant("matrix products alone", _matrix_products, kind="bound", note="needed in any case"),
)
