# SPDX-License-Identifier: Apache-2.0
"""The public function: meaning, validation, choice of backend."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from cogview_kernels import _backends, _checks
from cogview_kernels._torch_ops import values_are_readable
from cogview_kernels.linear_cross_entropy.op import backend_module, linear_cross_entropy_op
from cogview_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference

_OP = "linear_cross_entropy"
_BACKENDS = ("triton", "cpu", "chunked", "reference")


def _limit(backend: str, hidden: Tensor) -> str:
    return "" if backend == "reference" else backend_module(backend).limit(backend, hidden)


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    vocab_range: tuple[int, int] | None = None,
    return_losses: Literal[False] = False,
    extra_memory: float = 0.0,
    backend: str | None = None,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    vocab_range: tuple[int, int] | None = None,
    return_losses: Literal[True],
    extra_memory: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    vocab_range: tuple[int, int] | None = None,
    return_losses: bool = False,
    extra_memory: float = 0.0,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of a linear layer's output, without ever holding its ``[N, V]`` logits.

    Equals, in float32 and exactly (no gradient is dropped as too small)::

        losses = F.cross_entropy(hidden @ weight.T, target, reduction="none", ignore_index=ignore_index)
        weighted = token_weight * losses
        weighted                                                    # reduction="none"
        weighted.sum()                                              # reduction="sum"
        weighted.sum() / token_weight[target != ignore_index].sum() # reduction="mean"

    Args:
        hidden: ``[..., C]``; float32, float16 or bfloat16 (float64 by the reference).
        weight: ``[V, C]``, of the dtype of ``hidden``. Under autocast both are cast as ``F.linear`` would.
        target: ``[...]`` int64, each in the range of ids or ``ignore_index``. Checked on CPU tensors in eager
            mode; elsewhere a target outside has a loss of infinity.
        token_weight: ``[...]``, any floating dtype, or None for ones; no gradient flows to it. A token of
            weight 0 costs nothing on the CPU: its logits are not computed.
        reduction: "none", "sum" or "mean".
        ignore_index: the target of tokens that do not count.
        vocab_range: ``(start, stop)``: the softmax is over these ids alone, so that the padded tail of a
            vocabulary, or all but the image codes, is as if it were not there. Its weights get no gradient.
        return_losses: also return the tokens' losses, so that the losses of text and image tokens can be
            logged from the pass that trains. It costs nothing, whereas the backward pass of
            ``reduction="none"`` makes the logits a second time.
        extra_memory: the share of the logits' memory that may be held beyond the gradients; a small piece, at
            most 3 %, is in any case. With less memory more logits are made twice. For 8,704 tokens, C = 2,560
            and V = 58,240, whose logits take 1.0 GB in 16 bits, the price of both directions on a GPU is::

                extra_memory     0      0.12   0.5    1
                MB beyond          29    119    507  1,014
                matrix products  3.71   3.62   3.23  3
                time on an H100  1.53   1.53   1.43  1.14   in times of three products

            The logits of C tokens or fewer are never made twice. Nor are any in float32, where more memory
            makes fewer and larger products.
        backend: "triton", "cpu", "chunked" or "reference"; None takes the best for the device.

    Returns:
        The loss in float32 (float64 for float64): ``[...]`` for "none", else a scalar. Where nothing counts,
        or the weights of what counts sum to 0, "mean" is NaN, as in PyTorch, and its gradients are 0.
        With ``return_losses`` ``(loss, losses)``: ``losses`` ``[...]``, float32, detached, are not multiplied
        by ``token_weight``, and 0 at tokens that do not count (ignored, or of weight 0).

    Raises:
        TypeError: a dtype above is not met.
        ValueError: a shape or range above is not met, or devices differ.
        NotImplementedError: the named backend does not take float64.
        RuntimeError: the named backend cannot run here; the message says why.

    Source: CogView, arXiv:2105.13290, section 2.2 (one softmax over text and image tokens).
    """
    if isinstance(hidden, Tensor) and _checks.is_autocast(hidden.device):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    _check(hidden, weight, target, token_weight, reduction, ignore_index, vocab_range, extra_memory)
    chosen = _backends.choose(_OP, _BACKENDS, backend, hidden.device, _limit, hidden)
    if chosen == "reference":
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        with _checks.no_autocast(hidden.device):
            loss, losses = linear_cross_entropy_reference(
                hidden.to(wide),
                weight.to(wide),
                target,
                token_weight=token_weight,
                reduction=reduction,
                ignore_index=ignore_index,
                vocab_range=vocab_range,
            )
        return (loss, losses) if return_losses else loss
    coefficient = (target != ignore_index).float()
    if token_weight is not None:
        coefficient = torch.where(target != ignore_index, token_weight.detach().float(), 0)
    nothing_counts = None
    if reduction == "mean":
        total = coefficient.sum()
        nothing_counts = total == 0
        # Divided before the gradients are made, so that the usual backward pass need not multiply them.
        coefficient = coefficient / torch.where(nothing_counts, 1, total)
    elif reduction == "sum":
        nothing_counts = ~coefficient.any()
    loss, losses, *_ = linear_cross_entropy_op(
        hidden.flatten(0, -2) if hidden.dim() != 1 else hidden[None],
        weight,
        target.flatten(),
        coefficient.flatten(),
        *(vocab_range or (0, weight.shape[0])),
        reduction != "none",
        torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad),
        extra_memory,
        chosen,
    )
    if nothing_counts is None:
        loss = loss.view(target.shape)
    else:
        # Gradients of 0 go back from here even where the caller divides by a number of tokens that is 0.
        loss = loss.masked_fill(nothing_counts, torch.nan if reduction == "mean" else 0)
    return (loss, losses.detach().view(target.shape)) if return_losses else loss


def _check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    vocab_range: tuple[int, int] | None,
    extra_memory: float,
) -> None:
    _checks.check_float(_OP, "hidden", hidden)
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
    if not extra_memory >= 0:
        raise ValueError(
            f"{_OP}: extra_memory must be a share of the logits' memory, 0 or more, got {extra_memory}; "
            "try 1 to keep them all"
        )
    V = weight.shape[0]
    start, stop = vocab_range or (0, V)
    if not 0 <= start < stop <= V:
        raise ValueError(f"{_OP}: vocab_range must be 0 <= start < stop <= {V}, got {vocab_range}")
    if values_are_readable(target):
        outside = (target != ignore_index) & ((target < start) | (target >= stop))
        if outside.any():
            raise ValueError(
                f"{_OP}: target must be in [{start}, {stop}) or ignore_index ({ignore_index}), "
                f"got {int(target[outside][0])}"
            )
