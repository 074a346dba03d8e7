# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.cogview_kernels.sandwich_rms_norm``: schemas, fake tensors, and what is saved.

Saved for the backward: the branch, the seed, and each norm's reciprocal root mean squares in float32 (4 bytes
a row); with a norm after the addition also the new residual (an output, so it costs nothing more).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from cogview_kernels._dropout import Dropout
from cogview_kernels._norms.rows import Affine, BackwardRows, ForwardRows, NormOptions, Norms
from cogview_kernels._torch_ops import Op
from cogview_kernels.sandwich_rms_norm import native


def backend_module(backend: str) -> ModuleType:
    """The module whose ``forward``, ``backward`` and ``limit`` serve ``backend``."""
    if backend == "triton":
        from cogview_kernels.sandwich_rms_norm import triton_kernels

        return triton_kernels
    return native


def _norms(post_weight: Tensor | None, pre_weight: Tensor | None) -> Norms:
    return Norms(Affine(post_weight, None), Affine(pre_weight, None))


def _rows_out(
    residual: Tensor, pre_weight: Tensor | None, normed_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``normed`` is empty where there is no norm for it."""
    residual_out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    if pre_weight is None:
        return residual_out, residual.new_empty(0, dtype=normed_dtype)
    return residual_out, torch.empty_like(residual_out, dtype=normed_dtype)


def _results(
    residual: Tensor, pre_weight: Tensor | None, normed_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    norms, rows = 1 if pre_weight is None else 2, residual.numel() // residual.shape[-1]
    stats = torch.empty(norms, rows, dtype=torch.float32, device=residual.device)
    return *_rows_out(residual, pre_weight, normed_dtype), stats


def _forward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    _, residual, _, pre_weight, normed_dtype, *_ = arguments
    results = _results(residual, pre_weight, normed_dtype)
    _fill(results, *arguments)
    return results


def _without_stats(*arguments):
    """As :func:`_forward`, an allocation less. Interpreted kernels save their statistics always."""
    _, residual, _, pre_weight, normed_dtype, *_, backend = arguments
    if backend != "cpu":
        return _forward(*arguments)
    results = *_rows_out(residual, pre_weight, normed_dtype), None
    _fill(results, *arguments)
    return results


def _forward_fake(branch, residual, post_weight, pre_weight, normed_dtype, *_):
    return _results(residual, pre_weight, normed_dtype)


def _fill(
    results: tuple[Tensor, Tensor, Tensor | None],
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor | None,
    pre_weight: Tensor | None,
    _: torch.dtype,
    eps: float,
    weight_offset: float,
    round_before_weight: bool,
    pb_relax: str | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> None:
    residual_out, normed, stats = results
    if branch.numel() > 0:
        rows = ForwardRows(
            branch.contiguous(), residual.contiguous(), residual_out, None if pre_weight is None else normed
        )
        norms = _norms(post_weight, pre_weight).contiguous()
        options = NormOptions(eps, pb_relax, weight_offset, round_before_weight)
        dropout = Dropout.of(dropout_p, seed)
        backend_module(backend).forward(rows, norms, stats, options, dropout, backend)


def _gradients(
    branch: Tensor, residual_out: Tensor | None, wanted: Norms
) -> tuple[Tensor, Tensor | None, Norms]:
    """Room for those of the rows and of the ``wanted`` weights."""
    dbranch = torch.empty_like(branch, memory_format=torch.contiguous_format)
    dresidual = None
    if residual_out is not None:
        dresidual = torch.empty_like(residual_out, memory_format=torch.contiguous_format)
    return dbranch, dresidual, Norms(wanted.post.gradients(), wanted.pre.gradients())


def _outputs(
    dbranch: Tensor, dresidual: Tensor | None, gradients: Norms, stats: Tensor
) -> tuple[Tensor, ...]:
    """As the op returns them: empty tensors where there is nothing."""
    dpost, dpre = (affine.outputs(stats)[0] for affine in gradients)
    return dbranch, dbranch.new_empty(0) if dresidual is None else dresidual, dpost, dpre


def _backward(
    dresidual_out: Tensor | None,
    dnormed: Tensor | None,
    branch: Tensor,
    residual_out: Tensor | None,
    stats: Tensor,
    post_weight: Tensor | None,
    pre_weight: Tensor | None,
    weight_offset: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    needs_dpost_weight: bool,
    needs_dpre_weight: bool,
) -> tuple[Tensor, ...]:
    norms = _norms(post_weight, pre_weight)
    wanted = _norms(post_weight if needs_dpost_weight else None, pre_weight if needs_dpre_weight else None)
    dbranch, dresidual, gradients = _gradients(branch, residual_out, wanted)
    if branch.numel() > 0:
        rows = BackwardRows(
            None if dresidual_out is None else dresidual_out.contiguous(),
            None if dnormed is None else dnormed.contiguous(),
            branch.contiguous(),
            None if residual_out is None else residual_out.contiguous(),
            dbranch,
            dresidual,
        )
        backend_module(backend).backward(
            rows, norms.contiguous(), gradients, stats, weight_offset, Dropout.of(dropout_p, seed), backend
        )
    else:
        gradients.post.fill_with_zeros()
        gradients.pre.fill_with_zeros()
    return _outputs(dbranch, dresidual, gradients, stats)


def _backward_fake(dresidual_out, dnormed, branch, residual_out, stats, post_weight, pre_weight, *rest):
    *_, needs_dpost_weight, needs_dpre_weight = rest
    wanted = _norms(post_weight if needs_dpost_weight else None, pre_weight if needs_dpre_weight else None)
    return _outputs(*_gradients(branch, residual_out, wanted), stats)


def _save(ctx, arguments, outputs):
    branch, _, post_weight, pre_weight, _, _, ctx.weight_offset, *rest = arguments
    _, _, ctx.dropout_p, seed, ctx.backend = rest
    residual_out, _, stats = outputs
    return branch, None if pre_weight is None else residual_out, stats, post_weight, pre_weight, seed


def _differentiate(ctx, saved, dresidual_out, dnormed, _):
    *tensors, seed = saved
    residual_out, needed = tensors[1], ctx.needs_input_grad[2:4]
    if residual_out is None:
        dnormed = None  # there is no such output
    dbranch, dresidual, dpost, dpre = sandwich_rms_norm_backward_op(
        dresidual_out, dnormed, *tensors, ctx.weight_offset, ctx.dropout_p, seed, ctx.backend, *needed
    )
    if residual_out is None:
        dresidual = dresidual_out
    dweights = dpost if needed[0] else None, dpre if needed[1] else None
    return dbranch, dresidual, *dweights, *(None,) * 8


sandwich_rms_norm_op = Op(
    "sandwich_rms_norm(Tensor branch, Tensor residual, Tensor? post_weight, Tensor? pre_weight,"
    " ScalarType normed_dtype, float eps, float weight_offset, bool round_before_weight, str? pb_relax,"
    " float dropout_p, Tensor? seed, str backend) -> (Tensor, Tensor, Tensor)",
    kernel=_forward,
    fake=_forward_fake,
    save=_save,
    backward=_differentiate,
    unsaved=_without_stats,
)
sandwich_rms_norm_backward_op = Op(
    "sandwich_rms_norm_backward(Tensor? dresidual_out, Tensor? dnormed, Tensor branch, Tensor? residual_out,"
    " Tensor stats, Tensor? post_weight, Tensor? pre_weight, float weight_offset, float dropout_p,"
    " Tensor? seed, str backend, bool needs_dpost_weight, bool needs_dpre_weight)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward,
    fake=_backward_fake,
)
