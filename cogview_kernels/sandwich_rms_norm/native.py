# SPDX-License-Identifier: Apache-2.0
"""Sandwich-RMSNorm through the compiled extension, on the CPU and on NVIDIA GPUs."""

from __future__ import annotations

from torch import Tensor

from cogview_kernels import _extension
from cogview_kernels._dropout import Dropout, native_arguments
from cogview_kernels._norms import rows as shared
from cogview_kernels._norms.rows import BackwardRows, ForwardRows, NormOptions, Norms


def limit(backend: str, branch: Tensor) -> str:
    """Why the kernels cannot take ``branch``; empty when they can."""
    return shared.limit(backend, "branch", branch)


def forward(
    rows: ForwardRows,
    norms: Norms,
    stats: Tensor | None,
    options: NormOptions,
    dropout: Dropout | None,
    backend: str,
) -> None:
    """Fills ``residual_out``, ``normed`` and ``stats`` [norms, rows], which may be None on the CPU;
    everything is contiguous."""
    per_block = 2 if options.pb_relax == "tensor" else 0
    floats, workspace = shared.workspace(rows.branch, backend, per_block)
    _extension.call(
        "sandwich_rms_norm_fwd",
        backend,
        *shared.forward_addresses(rows),
        [norm.weight for norm in norms],
        0 if stats is None else stats.data_ptr(),
        rows.residual_out,
        shared.rms_options(options),
        native_arguments(dropout),
        workspace,
    )
    del floats


def backward(
    rows: BackwardRows,
    norms: Norms,
    gradients: Norms,
    stats: Tensor,
    weight_offset: float,
    dropout: Dropout | None,
    backend: str,
) -> None:
    """Fills ``dbranch``, ``dresidual`` and what there is of ``gradients``; everything is contiguous."""
    floats, workspace = shared.workspace(rows.branch, backend, 2 * rows.branch.shape[-1])
    _extension.call(
        "sandwich_rms_norm_bwd",
        backend,
        *shared.backward_addresses(rows),
        [norm.weight for norm in norms],
        weight_offset,
        [norm.weight for norm in gradients],
        stats.data_ptr(),
        rows.trunk(),
        native_arguments(dropout),
        workspace,
    )
    del floats
