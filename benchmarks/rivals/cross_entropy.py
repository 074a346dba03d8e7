# SPDX-License-Identifier: Apache-2.0
"""Linear cross-entropy as eager PyTorch, torch.compile, F.linear_cross_entropy, Liger and CCE do it.

"bare products" is the yardstick: the matrix products of the task and nothing else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import FORWARD, Case, Forward, Inputs, Variant
from benchmarks.rivals import needs


def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def eager_in_dtype(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def _calls(function):
    return lambda inputs, case: lambda: function(inputs.hidden, inputs.weight, inputs.target)


def _compiled(inputs: Inputs, case: Case) -> Forward:
    return _calls(torch.compile(eager, dynamic=False))(inputs, case)


def _torch_chunked(inputs: Inputs, case: Case) -> Forward:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda: F.linear_cross_entropy(inputs.hidden, inputs.weight, inputs.target, options=options)


def _no_torch_chunked(case, device):
    if not hasattr(F, "linear_cross_entropy"):
        return f"PyTorch {torch.__version__} has no F.linear_cross_entropy"
    # Ten seconds and more a call at the CPU's shape.
    return "" if device.type == "cuda" or case.shape.V < 1000 else "takes more than 10 s a call on a CPU"


def _liger(inputs: Inputs, case: Case) -> Forward:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def call() -> Tensor:
        out = LigerFusedLinearCrossEntropyFunction.apply(inputs.hidden, inputs.weight, inputs.target)
        return out[0] if isinstance(out, tuple) else out

    return call


def _cut(inputs: Inputs, case: Case) -> Forward:
    from cut_cross_entropy import linear_cross_entropy

    # cce_exact does not drop small gradients, as the library's default does.
    return lambda: linear_cross_entropy(inputs.hidden, inputs.weight, inputs.target, impl="cce_exact")


class BareProducts(torch.autograd.Function):
    """The logits, then ``dhidden`` and ``dweight`` of them: no softmax, so what it returns is no loss."""

    @staticmethod
    def forward(ctx, hidden, weight):
        logits = torch.mm(hidden, weight.T)
        ctx.save_for_backward(hidden, weight, logits)
        return logits[0, 0].float()

    @staticmethod
    def backward(ctx, dloss):
        hidden, weight, logits = ctx.saved_tensors
        return torch.mm(logits, weight), torch.mm(logits.T, hidden)


def _bare(inputs: Inputs, case: Case) -> Forward:
    if case.direction == FORWARD:
        return lambda: torch.mm(inputs.hidden, inputs.weight.T)[0, 0].float()
    return lambda: BareProducts.apply(inputs.hidden, inputs.weight)


EAGER = "eager"
VARIANTS = (
    Variant(EAGER, _calls(eager_in_dtype), note="loss and logits in the working dtype"),
    Variant("eager, float32 loss", _calls(eager)),
    Variant("torch.compile", _compiled),
    Variant("F.linear_cross_entropy", _torch_chunked, why_not=_no_torch_chunked, note="default options"),
    Variant("Liger", _liger, why_not=needs("liger_kernel", gpu=True)),
    Variant("Cut Cross-Entropy", _cut, why_not=needs("cut_cross_entropy", gpu=True), note="cce_exact"),
    Variant("bare products", _bare, truth="bare", note="a yardstick, no loss: the matrix products alone"),
)
