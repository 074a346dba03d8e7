# SPDX-License-Identifier: Apache-2.0
"""RMSNorm through the compiled extension, on the CPU and on NVIDIA GPUs."""

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
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    round_before_weight: bool,
    pb_relax: str | None,
) -> Callable[..., Tensor] | None:
    """See :class:`cogview_kernels._torch_ops.Op`: a function of the first two."""
    if not rows.are_direct(x, weight):
        return None
    kernel, threads, empty_like = _extension.native.rms_norm_fwd_cpu, torch.get_num_threads, torch.empty_like
    options = rows.rms_options(NormOptions(eps, pb_relax, weight_offset, round_before_weight))

    def run(x, weight):
        y = empty_like(x)
        kernel(x.data_ptr(), y.data_ptr(), weight, 0, x, options, rows.NO_WORKSPACE, threads())
        return y

    return run


def forward(
    x: Tensor, y: Tensor, affine: Affine, stats: Tensor | None, options: NormOptions, backend: str
) -> None:
    """Fills ``y`` and ``stats`` [1, rows], which may be None on the CPU; everything is contiguous."""
    floats, workspace = rows.workspace(x, backend, 1 if options.pb_relax == "tensor" else 0)
    _extension.call(
        "rms_norm_fwd",
        backend,
        x.data_ptr(),
        y.data_ptr(),
        affine.weight,
        0 if stats is None else stats.data_ptr(),
        x,
        rows.rms_options(options),
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
    weight_offset: float,
    backend: str,
) -> None:
    """Fills ``dx`` and what there is of ``gradients``; everything is contiguous."""
    floats, workspace = rows.workspace(x, backend, x.shape[-1])
    _extension.call(
        "rms_norm_bwd",
        backend,
        dy.data_ptr(),
        x.data_ptr(),
        dx.data_ptr(),
        weight,
        weight_offset,
        gradients.weight,
        stats.data_ptr(),
        x,
        workspace,
    )
    del floats
