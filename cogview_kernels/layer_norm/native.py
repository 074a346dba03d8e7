# SPDX-License-Identifier: Apache-2.0
"""LayerNorm through the compiled extension, on the CPU and on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cogview_kernels import _extension
from cogview_kernels._norms import rows
from cogview_kernels._norms.rows import Affine, NormOptions


def limit(backend: str, x: Tensor) -> str:
    """Why the kernels cannot take ``x``; empty when they can."""
    return rows.limit(backend, "x", x)


def prepare(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, pb_relax: str | None
) -> Callable[..., Tensor] | None:
    """See :class:`cogview_kernels._torch_ops.Op`: a function of the first three."""
    if not rows.are_direct(x, weight, bias):
        return None
    kernel, threads, empty_like = (
        _extension.native.layer_norm_fwd_cpu,
        torch.get_num_threads,
        torch.empty_like,
    )
    options = rows.options(NormOptions(eps, pb_relax))

    def run(x, weight, bias):
        y = empty_like(x)
        kernel(x.data_ptr(), y.data_ptr(), weight, bias, 0, x, options, rows.NO_WORKSPACE, threads())
        return y

    return run


def forward(
    x: Tensor, y: Tensor, affine: Affine, stats: Tensor | None, options: NormOptions, backend: str
) -> None:
    """Fills ``y`` and ``stats`` [2, rows], which may be None on the CPU; everything is contiguous."""
    floats, workspace = rows.workspace(x, backend, 1 if options.pb_relax == "tensor" else 0)
    _extension.call(
        "layer_norm_fwd",
        backend,
        x.data_ptr(),
        y.data_ptr(),
        affine.weight,
        affine.bias,
        0 if stats is None else stats.data_ptr(),
        x,
        rows.options(options),
        workspace,
    )
    del floats


def backward(
    dy: Tensor,
    x: Tensor,
    dx: Tensor,
    weight: Tensor | None,
    gradients: Affine,
    stats: Tensor,
    backend: str,
) -> None:
    """Fills ``dx`` and what there is of ``gradients``; everything is contiguous."""
    floats, workspace = rows.workspace(x, backend, 2 * x.shape[-1])
    _extension.call(
        "layer_norm_bwd",
        backend,
        dy.data_ptr(),
        x.data_ptr(),
        dx.data_ptr(),
        weight,
        gradients.weight,
        gradients.bias,
        stats.data_ptr(),
        x,
        workspace,
    )
    del floats
