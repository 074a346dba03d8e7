# SPDX-License-Identifier: Apache-2.0
"""The public function: meaning, validation, choice of backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from cogview_kernels import _backends, _checks, _sharding
from cogview_kernels._torch_ops import values_are_readable
from cogview_kernels.linear_cross_entropy.objective import Objective
from cogview_kernels.linear_cross_entropy.op import backend_module, linear_cross_entropy_op
from cogview_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference

if TYPE_CHECKING:
    from typing_extensions import Unpack

_OP = "linear_cross_entropy"
_BACKENDS = ("triton", "cpu", "chunked", "reference")


def _limit(backend: str, hidden: Tensor) -> str:
    return "" if backend == "reference" else backend_module(backend).limit(backend, hidden)


class _Arguments(TypedDict, total=False):
    """Those that do not change what is returned."""

    bias: Tensor | None
    token_weight: Tensor | None
    reduction: str
    ignore_index: int
    label_smoothing: float
    softcap: float | None
    z_loss: float
    vocab_range: tuple[int, int] | None
    extra_memory: float
    backend: str | None


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    return_losses: Literal[False] = ...,
    return_predicted_tokens: Literal[False] = ...,
    **arguments: Unpack[_Arguments],
) -> Tensor: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    return_losses: Literal[True],
    return_predicted_tokens: Literal[True],
    **arguments: Unpack[_Arguments],
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    return_losses: Literal[True],
    return_predicted_tokens: Literal[False] = ...,
    **arguments: Unpack[_Arguments],
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    return_losses: Literal[False] = ...,
    return_predicted_tokens: Literal[True],
    **arguments: Unpack[_Arguments],
) -> tuple[Tensor, Tensor]: ...


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    vocab_range: tuple[int, int] | None = None,
    return_losses: bool = False,
    return_predicted_tokens: bool = False,
    extra_memory: float = 0.0,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Cross-entropy of a linear layer's output, without ever holding its ``[N, V]`` logits.

    Equals, in float32 and exactly (no gradient is dropped as too small)::

        logits = F.linear(hidden, weight, bias)
        logits = softcap * tanh(logits / softcap)                   # with softcap
        losses = F.cross_entropy(
            logits, target, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing
        )
        losses += z_loss * logits.logsumexp(-1) ** 2                # where target != ignore_index
        weighted = token_weight * losses
        weighted                                                    # reduction="none"
        weighted.sum()                                              # reduction="sum"
        weighted.sum() / token_weight[target != ignore_index].sum() # reduction="mean"

    A gradient is made, and memory taken for it, only for those of ``hidden``, ``weight`` and ``bias`` that
    require one: a frozen head, or a frozen body, saves a third of the work.

    Args:
        hidden: ``[..., C]``; float32, float16 or bfloat16 (float64 by the reference).
        weight: ``[V, C]``, of the dtype of ``hidden``. Under autocast both are cast as ``F.linear`` would.
        target: ``[...]`` int64, each in the range of ids or ``ignore_index``. Checked on CPU tensors in eager
            mode; elsewhere a target outside has a loss of infinity.
        bias: ``[V]``, of the dtype of ``hidden``, or None.
        token_weight: ``[...]``, any floating dtype, or None for ones; no gradient flows to it. A token of
            weight 0 costs nothing on the CPU: its logits are not computed.
        reduction: "none", "sum" or "mean".
        ignore_index: the target of tokens that do not count.
        label_smoothing: from 0 to 1, as in ``F.cross_entropy``: this share of the target's one is spread
            evenly over all ids (those of ``vocab_range``).
        softcap: above 0, or None: logits stay between ``-softcap`` and ``softcap``.
        z_loss: at least 0; keeps the softmax's denominator near 1. The term is a part of the loss and of the
            losses that are returned.
        vocab_range: ``(start, stop)``: the softmax is over these ids alone, so that the padded tail of a
            vocabulary, or all but the image codes, is as if it were not there. Its weights get no gradient.
        return_losses: also return the tokens' losses, so that the losses of text and image tokens can be
            logged from the pass that trains. It costs nothing, whereas the backward pass of
            ``reduction="none"`` makes the logits a second time.
        return_predicted_tokens: also return the id of each token's largest logit, for its accuracy. It takes
            no further product.
        extra_memory: the share of the logits' memory that may be held beyond the gradients; a piece of 28 MB
            (56 MB in float32, on the CPU 112) is in any case. With less memory more logits are made twice.
            For 8,704 tokens, C = 2,560 and V = 58,240, whose logits take 1.0 GB in 16 bits, the price of both
            directions on a GPU is::

                extra_memory     0      0.12   0.5    1
                MB beyond          29    119    507  1,014
                matrix products  3.71   3.62   3.23  3
                time on an H100  1.53   1.53   1.43  1.14   in times of three products

            The logits of C tokens or fewer are never made twice. Nor are any in float32, where more memory
            makes fewer and larger products, nor in bfloat16 on AMD's processors with AVX512-BF16 where there
            is room for a byte for each element of ``weight`` and the logits of 128 tokens.
        backend: "triton", "cpu", "chunked" or "reference"; None takes the best for the device.

    Returns:
        The loss in float32 (float64 for float64): ``[...]`` for "none", else a scalar. Where nothing counts,
        or the weights of what counts sum to 0, "mean" is NaN, as in PyTorch, and its gradients are 0.
        With ``return_losses`` or ``return_predicted_tokens`` a tuple of the loss and, in this order, what was
        asked for: ``losses`` ``[...]``, float32, detached, are not multiplied by ``token_weight``, and 0 at
        tokens that do not count (ignored, or of weight 0); ``predicted_tokens`` ``[...]``, int64, are -1
        there, and one of the largest where logits are equal.

    Raises:
        TypeError: a dtype above is not met.
        ValueError: a shape or range above is not met, or devices differ.
        NotImplementedError: the named backend does not take float64; "triton" takes fewer than 2^31 rows.
            A DTensor that is cut along C.
        RuntimeError: the named backend cannot run here; the message says why.

    Source: CogView, arXiv:2105.13290, section 2.2 (one softmax over text and image tokens); label smoothing:
    arXiv:1512.00567, section 7; soft capping: Gemma 2, arXiv:2408.00118, section 2; z-loss: PaLM,
    arXiv:2204.02311, section 5.
    """
    if torch._C._is_any_autocast_enabled():
        hidden, weight, bias = _checks.autocast(hidden, weight, bias)
    _check_tensors(hidden, weight, bias, target, token_weight)
    _checks.check_choice(_OP, "reduction", reduction, ("none", "sum", "mean"))
    _check_numbers(label_smoothing, softcap, z_loss, extra_memory)
    _checks.check_int(_OP, "ignore_index", ignore_index)
    _checks.check_bool(_OP, "return_losses", return_losses)
    _checks.check_bool(_OP, "return_predicted_tokens", return_predicted_tokens)
    start, stop = _checked_range(vocab_range, target, len(weight), ignore_index)
    if _sharding.is_sharded(hidden, backend):
        options = {
            "reduction": reduction,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "softcap": softcap,
            "z_loss": z_loss,
            "vocab_range": vocab_range,
            "return_losses": return_losses,
            "return_predicted_tokens": return_predicted_tokens,
            "extra_memory": extra_memory,
            "backend": backend,
        }
        return _in_parts(hidden, weight, bias, target, token_weight, options)
    objective = Objective(label_smoothing, softcap or 0.0, z_loss)
    chosen = _backends.choose(_OP, _BACKENDS, backend, hidden.device, _limit, hidden)
    if chosen == "reference":
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        with _checks.no_autocast(hidden.device):
            loss, losses, predicted = linear_cross_entropy_reference(
                hidden.to(wide),
                weight.to(wide),
                target,
                bias=None if bias is None else bias.to(wide),
                token_weight=token_weight,
                reduction=reduction,
                ignore_index=ignore_index,
                objective=objective,
                vocab_range=(start, stop),
            )
    else:
        coefficient, nothing_counts = _coefficients(target, token_weight, ignore_index, reduction)
        loss, losses, predicted, *_ = linear_cross_entropy_op(
            hidden.flatten(0, -2) if hidden.dim() != 1 else hidden[None],
            weight,
            bias,
            target.flatten(),
            coefficient.flatten(),
            start,
            stop,
            *objective,
            reduction != "none",
            *(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)),
            return_predicted_tokens,
            extra_memory,
            chosen,
        )
        if nothing_counts is None:
            loss = loss.view(target.shape)
        else:
            # Gradients of 0 go back from here even where the caller divides by a number of tokens that is 0.
            loss = loss.masked_fill(nothing_counts, torch.nan if reduction == "mean" else 0)
    if not (return_losses or return_predicted_tokens):
        return loss
    returned = (losses.detach(), return_losses), (predicted, return_predicted_tokens)
    return loss, *(x.view(target.shape) for x, asked_for in returned if asked_for)


def _in_parts(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_weight: Tensor | None,
    options: dict[str, Any],
) -> Any:
    """Of DTensors, cut along tokens. A mean takes one number from the other ranks: how much counts there."""
    rows = range(hidden.dim() - 1)
    parts = _sharding.Parts(_OP, "hidden", hidden, rows)
    target = parts.of("target", target, rows)
    token_weight = parts.of("token_weight", token_weight, rows)
    nothing_counts = None
    if options["reduction"] == "mean":
        counted, _ = _coefficients(target, token_weight, options["ignore_index"], "sum")
        total = parts.join(counted.sum(), (), summed=True).full_tensor()
        nothing_counts = total == 0
        token_weight = counted / torch.where(nothing_counts, 1, total)
        options = options | {"reduction": "sum"}
    results = linear_cross_entropy(
        parts.of("hidden", hidden, rows),
        parts.of("weight", weight),
        target,
        bias=parts.of("bias", bias),
        token_weight=token_weight,
        **options,
    )
    loss, *of_tokens = results if isinstance(results, tuple) else (results,)
    if options["reduction"] == "none":
        loss = parts.join(loss, rows)
    else:
        loss = loss if nothing_counts is None else loss.masked_fill(nothing_counts, torch.nan)
        loss = parts.join(loss, (), summed=True)
    return (loss, *parts.join(tuple(of_tokens), rows)) if of_tokens else loss


def _coefficients(
    target: Tensor, token_weight: Tensor | None, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor | None]:
    """What each token's loss is multiplied by before they are summed, and whether nothing is summed."""
    coefficient = (target != ignore_index).float()
    if token_weight is not None:
        coefficient = torch.where(target != ignore_index, token_weight.detach().float(), 0)
    if reduction == "none":
        return coefficient, None
    if reduction == "sum":
        return coefficient, ~coefficient.any()
    total = coefficient.sum()
    nothing_counts = total == 0
    # Divided before the gradients are made, so that the usual backward pass need not multiply them.
    return coefficient / torch.where(nothing_counts, 1, total), nothing_counts


def _check_tensors(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, token_weight: Tensor | None
) -> None:
    _checks.check_float(_OP, "hidden", hidden)
    _checks.check_rows(_OP, "hidden", hidden)
    _checks.check_tensors(_OP, weight=weight, target=target)
    _checks.check_tensors(_OP, or_none=True, bias=bias, token_weight=token_weight)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{_OP}: weight must be [V, C] with C = {hidden.shape[-1]}, the last dimension of hidden, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{_OP}: bias must be [V] with V = {weight.shape[0]}, the first dimension of weight, "
            f"got {tuple(bias.shape)}"
        )
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(f"{_OP}: {name} must be {hidden.dtype}, as hidden is, got {x.dtype}; cast one")
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
    others = {"weight": weight, "bias": bias, "target": target, "token_weight": token_weight}
    for name, x in others.items():
        if x is not None:
            _checks.check_same_device(_OP, name, x, "hidden", hidden)


def _check_numbers(label_smoothing: float, softcap: float | None, z_loss: float, extra_memory: float) -> None:
    _checks.check_finite_number(_OP, "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{_OP}: label_smoothing must be from 0 to 1, got {label_smoothing}")
    if softcap is not None:
        _checks.check_finite_number(_OP, "softcap", softcap, positive=True)
    _checks.check_finite_number(_OP, "z_loss", z_loss)
    if not z_loss >= 0:
        raise ValueError(f"{_OP}: z_loss must be at least 0, got {z_loss}; try 1e-4")
    _checks.check_finite_number(_OP, "extra_memory", extra_memory)
    if not extra_memory >= 0:
        raise ValueError(
            f"{_OP}: extra_memory must be a share of the logits' memory, 0 or more, got {extra_memory}; "
            "try 1 to keep them all"
        )


def _checked_range(
    vocab_range: tuple[int, int] | None, target: Tensor, V: int, ignore_index: int
) -> tuple[int, int]:
    start, stop = 0, V
    if vocab_range is not None:
        sides = ("start", "stop")
        start, stop = _checks.checked_pair(_OP, "vocab_range", vocab_range, sides, 0, or_none=True)
    if not 0 <= start < stop <= V:
        raise ValueError(f"{_OP}: vocab_range must be 0 <= start < stop <= {V}, got {vocab_range}")
    if values_are_readable(target):
        outside = (target != ignore_index) & ((target < start) | (target >= stop))
        if outside.any():
            raise ValueError(
                f"{_OP}: target must be in [{start}, {stop}) or ignore_index ({ignore_index}), "
                f"got {int(target[outside][0])}"
            )
    return start, stop
