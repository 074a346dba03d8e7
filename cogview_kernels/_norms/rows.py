# SPDX-License-Identifier: Apache-2.0
"""Rows of a norm: which kernels take them, and what compiled code gets of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cogview_kernels import _checks, _device

PB_RELAX_CODES = {None: 0, "row": 1, "tensor": 2}

# Kernels for a GPU keep a row in the registers of one block; kMaxWidth in csrc/norms/norm.h.
GPU_MAX_WIDTH = 4096


class NormOptions(NamedTuple):
    """The last two are of RMSNorm alone: what is added to weights, and whether a normalised row is rounded to
    its dtype before it is multiplied by them."""

    eps: float
    pb_relax: str | None
    weight_offset: float = 0.0
    round_before_weight: bool = False


class Affine(NamedTuple):
    """Weight and bias of a norm, or their gradients; either may be None."""

    weight: Tensor | None
    bias: Tensor | None

    def contiguous(self) -> Affine:
        weight, bias = self
        if (weight is None or weight.is_contiguous()) and (bias is None or bias.is_contiguous()):
            return self
        return Affine(
            None if weight is None else weight.contiguous(), None if bias is None else bias.contiguous()
        )

    def gradients(self) -> Affine:
        """Room for the gradients of what there is."""
        return Affine(
            *(None if p is None else torch.empty_like(p, memory_format=torch.contiguous_format) for p in self)
        )

    def fill_with_zeros(self) -> None:
        for p in self:
            if p is not None:
                p.zero_()

    def outputs(self, like: Tensor) -> tuple[Tensor, ...]:
        """As an op returns them: an empty tensor where there is none."""
        return tuple(like.new_empty(0) if p is None else p for p in self)


class Norms(NamedTuple):
    """What the norm on the branch has, and the norm on the new residual; or their gradients."""

    post: Affine
    pre: Affine

    def contiguous(self) -> Norms:
        return Norms(self.post.contiguous(), self.pre.contiguous())


class ForwardRows(NamedTuple):
    """Of a sandwich. RMSNorm's may end with the addition: then there is no ``normed``.

    The trunk is ``residual`` and ``residual_out``, of one dtype. Where that is float32, ``branch`` may have
    16 bits, and ``normed`` the dtype of either."""

    branch: Tensor
    residual: Tensor
    residual_out: Tensor
    normed: Tensor | None


class BackwardRows(NamedTuple):
    """Of a sandwich. Either of the first two may be None, which stands for zeros. Where the sandwich ends
    with the addition, there is neither ``residual_out`` nor ``dresidual``, which is ``dresidual_out`` then.
    """

    dresidual_out: Tensor | None
    dnormed: Tensor | None
    branch: Tensor
    residual_out: Tensor | None
    dbranch: Tensor
    dresidual: Tensor | None

    def trunk(self) -> Tensor:
        """Rows of the trunk's dtype, which is not always that of the branch."""
        rows = self.dresidual_out if self.dresidual is None else self.dresidual
        assert rows is not None
        return rows


def limit(backend: str, name: str, x: Tensor) -> str:
    """Why the kernels of ``backend`` cannot take the rows of ``x``; empty when they can."""
    if backend != "cpu" and x.shape[-1] > GPU_MAX_WIDTH:
        return (
            f"the {backend} backend holds a row in registers and takes {name} of at most {GPU_MAX_WIDTH} "
            f"columns, got {x.shape[-1]}; leave backend= out, or use backend='reference'"
        )
    return "" if x.dtype in _checks.FLOATS else _checks.kernel_dtype_limit(backend, name, x)


# ---- for compiled code


def options(given: NormOptions) -> tuple[float, int]:
    return given.eps, PB_RELAX_CODES[given.pb_relax]


def rms_options(given: NormOptions) -> tuple[float, int, float, bool]:
    eps, pb_relax, weight_offset, round_before_weight = given
    return eps, PB_RELAX_CODES[pb_relax], weight_offset, round_before_weight


def forward_addresses(rows: ForwardRows) -> tuple[Tensor | int | None, ...]:
    """Addresses of the trunk's rows. The others are read as tensors, since their dtypes matter too."""
    branch, residual, residual_out, normed = rows
    return branch, residual.data_ptr(), residual_out.data_ptr(), normed


def backward_addresses(rows: BackwardRows) -> tuple[Tensor | int | None, ...]:
    """The same for the backward pass."""
    dresidual_out, dnormed, branch, *rest = rows
    address = 0 if dresidual_out is None else dresidual_out.data_ptr()
    return address, dnormed, branch, *(0 if x is None else x.data_ptr() for x in rest)


NO_WORKSPACE = (0, 0)  # of the CPU


def are_direct(*tensors: Tensor | None) -> bool:
    """Whether kernels of the CPU take all of these as they lie; the first one holds the rows."""
    assert tensors[0] is not None
    return tensors[0].numel() > 0 and all(x is None or x.is_contiguous() for x in tensors)


def blocks(x: Tensor) -> int:
    """Persistent blocks of a CUDA kernel over the rows of ``x``: two for each multiprocessor."""
    return min(x.numel() // x.shape[-1], 2 * _device.multiprocessors(x.device))


def workspace(x: Tensor, backend: str, per_block: int) -> tuple[Tensor | None, tuple[int, int]]:
    """Room for ``per_block`` floats of each block: a tensor to keep alive, and its address and the number of
    blocks. The CPU needs none."""
    if backend == "cpu":
        return None, NO_WORKSPACE
    number = blocks(x)
    floats = x.new_empty(number * per_block, dtype=torch.float32)
    return floats, (floats.data_ptr(), number)
