# SPDX-License-Identifier: Apache-2.0
"""Local attention in two dimensions through the compiled extension, on the CPU."""

from __future__ import annotations

from torch import Tensor

from cogview_kernels import _checks, _extension
from cogview_kernels._dropout import Dropout, native_arguments
from cogview_kernels.local_attention_2d.window import Keys, Window

LARGEST_HEAD = 256


def limit(backend: str, q: Tensor, keys: Keys, window: Window) -> str:
    """Why the kernels cannot take a call, and the way out; empty when they can."""
    if q.dtype not in _checks.FLOATS:
        return f"{_checks.kernel_dtype_limit(backend, 'q', q)}; use backend='sdpa'"
    if q.shape[3] > LARGEST_HEAD:
        return (
            f"the {backend} backend takes head sizes up to {LARGEST_HEAD}, got {q.shape[3]}; "
            "use backend='sdpa'"
        )
    if max(window.queries, window.keys + keys.extra_k.shape[2]) >= 2**30:
        return f"the {backend} backend takes fewer than 2^30 queries and keys; use backend='sdpa'"
    return ""


def _shared(
    q: Tensor, keys: Keys, mask: Tensor | None, window: Window, scale: float, dropout: Dropout | None
):
    """What both directions take, from the mask of the extra keys on."""
    B, H, _, D = q.shape
    return (
        0 if mask is None else mask.data_ptr(),
        (B, H, keys.k.shape[1], D, keys.extra_k.shape[2]),
        (
            window.height,
            window.width,
            window.row_radius,
            window.column_radius,
            window.query_scale,
            window.causal,
        ),
        scale,
        native_arguments(dropout),
        _extension.DTYPE_CODES[q.dtype],
    )


def forward(
    q: Tensor,
    keys: Keys,
    window: Window,
    scale: float,
    dropout: Dropout | None,
    outputs: tuple[Tensor, Tensor, Tensor],
    backend: str,
) -> None:
    """Fills ``outputs``, out and lse. Peaks there are none. Rows of all tensors are contiguous."""
    out, lse, _ = outputs
    mask = None if keys.extra_mask is None else keys.extra_mask.contiguous()
    _extension.call(
        "local_attention_2d_fwd",
        backend,
        (q, *keys[:4]),
        out,
        lse.data_ptr(),
        *_shared(q, keys, mask, window, scale, dropout),
    )


def backward(
    q: Tensor,
    keys: Keys,
    window: Window,
    scale: float,
    dropout: Dropout | None,
    saved: tuple[Tensor, Tensor, Tensor],
    doutputs: tuple[Tensor, Tensor | None],
    gradients: tuple[Tensor, ...],
    backend: str,
) -> None:
    """Fills ``gradients``, of q and of the first four of ``keys``. ``saved`` are the outputs of the forward,
    ``doutputs`` the gradients of out and lse. Rows are contiguous."""
    (out, lse, _), (dout, dlse) = saved, doutputs
    mask = None if keys.extra_mask is None else keys.extra_mask.contiguous()
    _extension.call(
        "local_attention_2d_bwd",
        backend,
        (q, *keys[:4], out, dout),
        lse.data_ptr(),
        0 if dlse is None else dlse.data_ptr(),
        gradients,
        *_shared(q, keys, mask, window, scale, dropout),
    )
