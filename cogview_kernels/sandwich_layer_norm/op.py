# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.cogview_kernels.sandwich_layer_norm``: schemas, fake tensors, and what is saved.

Saved for the backward: the branch, the new residual (an output, so it costs nothing more), the seed, and both
norms' means and reciprocal deviations in float32 (16 bytes a row).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from cogview_kernels._dropout import Dropout
from cogview_kernels._norms.rows import Affine, BackwardRows, ForwardRows, NormOptions, Norms
from cogview_kernels._torch_ops import Op
from cogview_kernels.sandwich_layer_norm import native


def backend_module(backend: str) -> ModuleType:
    """The module whose ``forward``, ``backward`` and ``limit`` serve ``backend``."""
    if backend == "triton":
        from cogview_kernels.sandwich_layer_norm import triton_kernels

        return triton_kernels
    return native


def _rows_out(residual: Tensor, normed_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    residual_out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    return residual_out, torch.empty_like(residual_out, dtype=normed_dtype)


def _results(residual: Tensor, normed_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows = residual.numel() // residual.shape[-1]
    stats = torch.empty(4, rows, dtype=torch.float32, device=residual.device)
    return *_rows_out(residual, normed_dtype), stats


def _forward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    _, residual, _, _, _, _, normed_dtype, *_ = arguments
    results = _results(residual, normed_dtype)
    _fill(results, *arguments)
    return results


def _without_stats(*arguments):
    """As :func:`_forward`, an allocation less. Interpreted kernels save their statistics always."""
    _, residual, _, _, _, _, normed_dtype, *_, backend = arguments
    if backend != "cpu":
        return _forward(*arguments)
    results = *_rows_out(residual, normed_dtype), None
    _fill(results, *arguments)
    return results


def _forward_fake(branch, residual, post_weight, post_bias, pre_weight, pre_bias, normed_dtype, *_):
    return _results(residual, normed_dtype)


def _fill(
    results: tuple[Tensor, Tensor, Tensor | None],
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    _: torch.dtype,
    eps: float,
    pb_relax: str | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> None:
    residual_out, normed, stats = results
    if branch.numel() > 0:
        rows = ForwardRows(branch.contiguous(), residual.contiguous(), residual_out, normed)
        norms = Norms(Affine(post_weight, post_bias).contiguous(), Affine(pre_weight, pre_bias).contiguous())
        options, dropout = NormOptions(eps, pb_relax), Dropout.of(dropout_p, seed)
        backend_module(backend).forward(rows, norms, stats, options, dropout, backend)


def _backward(
    dresidual_out: Tensor | None,
    dnormed: Tensor | None,
    branch: Tensor,
    residual_out: Tensor,
    stats: Tensor,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    needs_dpost_weight: bool,
    needs_dpre_weight: bool,
) -> tuple[Tensor, ...]:
    dbranch = torch.empty_like(branch, memory_format=torch.contiguous_format)
    dresidual = torch.empty_like(residual_out, memory_format=torch.contiguous_format)
    post, pre = Affine(post_weight, post_bias), Affine(pre_weight, pre_bias)
    gradients = Norms(
        Affine(post_weight if needs_dpost_weight else None, post_bias).gradients(),
        Affine(pre_weight if needs_dpre_weight else None, pre_bias).gradients(),
    )
    if branch.numel() > 0:
        rows = BackwardRows(
            None if dresidual_out is None else dresidual_out.contiguous(),
            None if dnormed is None else dnormed.contiguous(),
            branch.contiguous(),
            residual_out.contiguous(),
            dbranch,
            dresidual,
        )
        norms, dropout = Norms(post.contiguous(), pre.contiguous()), Dropout.of(dropout_p, seed)
        backend_module(backend).backward(rows, norms, gradients, stats, dropout, backend)
    else:
        gradients.post.fill_with_zeros()
        gradients.pre.fill_with_zeros()
    return dbranch, dresidual, *gradients.post.outputs(stats), *gradients.pre.outputs(stats)


def _backward_fake(
    dresidual_out, dnormed, branch, residual_out, stats, post_weight, post_bias, pre_weight, pre_bias, *rest
):
    *_, needs_dpost_weight, needs_dpre_weight = rest
    dbranch = torch.empty_like(branch, memory_format=torch.contiguous_format)
    dresidual = torch.empty_like(residual_out, memory_format=torch.contiguous_format)
    dpost = Affine(post_weight if needs_dpost_weight else None, post_bias).gradients().outputs(stats)
    dpre = Affine(pre_weight if needs_dpre_weight else None, pre_bias).gradients().outputs(stats)
    return dbranch, dresidual, *dpost, *dpre


def _save(ctx, arguments, outputs):
    branch, _, *parameters, _, _, _, ctx.dropout_p, seed, ctx.backend = arguments
    residual_out, _, stats = outputs
    return branch, residual_out, stats, *parameters, seed


def _differentiate(ctx, saved, dresidual_out, dnormed, _):
    *tensors, post_weight, post_bias, pre_weight, pre_bias, seed = saved
    needed = ctx.needs_input_grad[2:6]
    # A bias is wanted only for the sake of its gradient.
    parameters = post_weight, post_bias if needed[1] else None, pre_weight, pre_bias if needed[3] else None
    dbranch, dresidual, *gradients = sandwich_layer_norm_backward_op(
        dresidual_out, dnormed, *tensors, *parameters, ctx.dropout_p, seed, ctx.backend, needed[0], needed[2]
    )
    gradients = (d if wanted else None for d, wanted in zip(gradients, needed, strict=True))
    return dbranch, dresidual, *gradients, *(None,) * 6


sandwich_layer_norm_op = Op(
    "sandwich_layer_norm(Tensor branch, Tensor residual, Tensor? post_weight, Tensor? post_bias,"
    " Tensor? pre_weight, Tensor? pre_bias, ScalarType normed_dtype, float eps, str? pb_relax,"
    " float dropout_p, Tensor? seed, str backend) -> (Tensor, Tensor, Tensor)",
    kernel=_forward,
    fake=_forward_fake,
    save=_save,
    backward=_differentiate,
    unsaved=_without_stats,
)
sandwich_layer_norm_backward_op = Op(
    "sandwich_layer_norm_backward(Tensor? dresidual_out, Tensor? dnormed, Tensor branch, Tensor residual_out,"
    " Tensor stats, Tensor? post_weight, Tensor? post_bias, Tensor? pre_weight, Tensor? pre_bias,"
    " float dropout_p, Tensor? seed, str backend, bool needs_dpost_weight, bool needs_dpre_weight)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward,
    fake=_backward_fake,
)
