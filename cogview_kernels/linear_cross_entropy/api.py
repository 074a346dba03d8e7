# SPDX-License-Identifier: Apache-2.0
"""The public function: meaning, validation, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels import _backends, _checks
from cogview_kernels.linear_cross_entropy.autograd import linear_cross_entropy_op
from cogview_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference

_OP = "linear_cross_entropy"
_SUPPORTED = ("triton", "cpu", "chunked", "reference")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    vocab_range: tuple[int, int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of a linear layer's output, without ever holding its ``[N, V]`` logits.

    Equals, in float32 and exactly (no gradient is dropped as too small)::

        losses = token_weight * F.cross_entropy(
            hidden @ weight.T, target, reduction="none", ignore_index=ignore_index
        )
        losses                                                    # reduction="none"
        losses.sum()                                              # reduction="sum"
        losses.sum() / token_weight[target != ignore_index].sum() # reduction="mean"

    Args:
        hidden: ``[..., C]``; float32, float16 or bfloat16 (float64 with ``backend="reference"``).
        weight: ``[V, C]``, of the dtype of ``hidden``. Under autocast both are cast as ``F.linear`` would.
        target: ``[...]`` int64, each in the range of ids or ``ignore_index``. Checked on CPU tensors in eager
            mode; elsewhere a target outside has a loss of infinity.
        token_weight: ``[...]``, any floating dtype, or None for ones; no gradient flows to it. A token of
            weight 0 costs nothing on the CPU: its logits are not computed.
        reduction: "none", "sum" or "mean". "none" gives the losses of text and image tokens from one pass.
        ignore_index: the target of tokens that do not count.
        vocab_range: ``(start, stop)``: the softmax is over these ids alone, so that the padded tail of a
            vocabulary, or all but the image codes, is as if it were not there. Its weights get no gradient.
        backend: "triton", "cpu", "chunked" or "reference"; None takes the best for the device.

    Returns:
        The loss in float32 (float64 for float64): ``[...]`` for "none", else a scalar. With nothing that
        counts "mean" is NaN, as in PyTorch.

    Raises:
        TypeError: a dtype above is not met.
        ValueError: a shape or range above is not met, or devices differ.
        RuntimeError: the named backend cannot run here; the message says why.

    Source: CogView, arXiv:2105.13290, section 2.2 (one softmax over text and image tokens).
    """
    if isinstance(hidden, Tensor) and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    _check(hidden, weight, target, token_weight, reduction, ignore_index, vocab_range, backend)
    chosen = _backends.choose(_OP, _SUPPORTED, backend, hidden.device)
    if chosen == "reference":
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        return linear_cross_entropy_reference(
            hidden.to(wide),
            weight.to(wide),
            target,
            token_weight=token_weight,
            reduction=reduction,
            ignore_index=ignore_index,
            vocab_range=vocab_range,
        )
    coefficient = (target != ignore_index).float()
    if token_weight is not None:
        coefficient = torch.where(target != ignore_index, token_weight.detach().float(), 0)
    total = coefficient.sum() if reduction == "mean" else None
    if total is not None:
        # Divided before the gradients are made, so that the usual backward pass need not multiply them.
        coefficient = coefficient / torch.where(total == 0, 1, total)
    loss = linear_cross_entropy_op(
        hidden.flatten(0, -2) if hidden.dim() != 1 else hidden[None],
        weight,
        target.flatten(),
        coefficient.flatten(),
        vocab_range or (0, weight.shape[0]),
        reduction != "none",
        chosen,
    )
    if reduction == "none":
        return loss.view(target.shape)
    # NaN where nothing counts.
    return loss if total is None else loss * (total / total)


def _check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    vocab_range: tuple[int, int] | None,
    backend: str | None,
) -> None:
    _checks.check_float(_OP, "hidden", hidden, double=backend == "reference")
    _checks.check_rows(_OP, "hidden", hidden)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{_OP}: weight must be [V, C] with C = {hidden.shape[-1]}, the last dimension of hidden, "
            f"got {tuple(weight.shape)}"
        )
    if weight.dtype != hidden.dtype:
        raise TypeError(f"{_OP}: weight must be {hidden.dtype}, as hidden is, got {weight.dtype}; cast one")
    if target.dtype != torch.int64:
        raise TypeError(f"{_OP}: target must be torch.int64, got {target.dtype}; try target.long()")
    for name, x in (("target", target), ("token_weight", token_weight)):
        if x is not None and x.shape != hidden.shape[:-1]:
            raise ValueError(
                f"{_OP}: {name} must have shape {tuple(hidden.shape[:-1])}, that of hidden without its last "
                f"dimension, got {tuple(x.shape)}"
            )
    if token_weight is not None and not token_weight.dtype.is_floating_point:
        raise TypeError(f"{_OP}: token_weight must be floating, got {token_weight.dtype}; try .float()")
    for name, x in (("weight", weight), ("target", target), ("token_weight", token_weight)):
        if x is not None:
            _checks.check_same_device(_OP, name, x, "hidden", hidden)
    _checks.check_choice(_OP, "reduction", reduction, ("none", "sum", "mean"))
    V = weight.shape[0]
    start, stop = vocab_range or (0, V)
    if not 0 <= start < stop <= V:
        raise ValueError(f"{_OP}: vocab_range must be 0 <= start < stop <= {V}, got {vocab_range}")
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = (target != ignore_index) & ((target < start) | (target >= stop))
        if outside.any():
            raise ValueError(
                f"{_OP}: target must be in [{start}, {stop}) or ignore_index ({ignore_index}), "
                f"got {int(target[outside][0])}"
            )
