# SPDX-License-Identifier: Apache-2.0
"""Runs of PyTorch code that round otherwise: with sums in another order, with intermediate results rounded.

Each is a context in which a function is called, its backward pass included.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose results PyTorch rounds. Others move numbers, or choose among them.
_ARITHMETIC = {
    *(
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "neg",
        "pow",
        "square",
        "sqrt",
        "rsqrt",
        "reciprocal",
        "exp",
        "log",
    ),
    *("mm", "bmm", "addmm", "baddbmm", "sum", "mean", "var_mean", "nll_loss_forward"),
}
aten = torch.ops.aten
# Operations of several steps, which PyTorch computes in float32 at least and rounds at their end.
_FUSED = torch._decomp.get_decompositions(
    [
        *(aten._softmax, aten._softmax_backward_data, aten._log_softmax, aten._log_softmax_backward_data),
        *(aten.logsumexp, aten.native_layer_norm, aten.native_layer_norm_backward),
    ]
)


class RoundedIntermediates(TorchDispatchMode):
    """Rounds the float64 results of arithmetic to the precision of ``dtype``, times a number of [1, 2)."""

    def __init__(self, seed: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.random, self.dtype = random.Random(seed), dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if steps := _FUSED.get(func):
            with RoundedIntermediates(self.random.random(), torch.promote_types(self.dtype, torch.float32)):
                out = steps(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
            if func.overloadpacket.__name__ not in _ARITHMETIC:
                return out
        if isinstance(out, Tensor):
            return self.round(out, self.dtype)
        if func is aten.native_layer_norm.default:  # mean and rstd stay in float32
            return self.round(out[0], self.dtype), *out[1:]
        return tuple(self.round(x, self.dtype) if isinstance(x, Tensor) else x for x in out)

    def round(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Equal numbers are rounded alike, zeros and infinities stay, and nothing overflows (Veltkamp)."""
        if x.dtype != torch.float64:
            return x
        scale = 1 + self.random.random()
        split = x * (scale * (torch.finfo(dtype).eps / torch.finfo(torch.float64).eps + 1))
        rounded = (split - (split - x * scale)) / scale
        return torch.where(torch.isfinite(rounded), rounded, x)


def in_one_chain(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with each sum one chain of multiply-adds."""
    total = a.new_zeros(*a.shape[:-1], b.shape[-1])
    for i in range(a.shape[-1]):
        total = torch.addcmul(total, a[..., i : i + 1], b[..., i : i + 1, :])
    return total


class SumsInAnotherOrder(TorchDispatchMode):
    """Permutes the dimension over which an operation sums.

    Float32 products on a GPU are also taken in one chain, as kernels without matrix units take them.
    Libraries may split long sums, which errs less: on an H100 eager attention over heads of 256 errs by
    0.65e-7, and PyTorch's own fused attention by 1.5e-7."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        other = getattr(self, f"other_{func.overloadpacket.__name__.strip('_')}", None)
        return func(*args, **kwargs) if other is None else other(func, *args, **kwargs)

    def _order(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        order = torch.randperm(x.shape[dim] if x.dim() else 1, generator=self.generator).to(x.device)
        return order, order.argsort()

    def other_mm(self, func: Any, a: Tensor, b: Tensor) -> Tensor:
        order, _ = self._order(a, -1)
        a, b = a.index_select(-1, order), b.index_select(-2, order)
        return in_one_chain(a, b) if a.is_cuda and a.dtype == torch.float32 else func(a, b)

    other_bmm = other_mm

    def other_sum(
        self, func: Any, x: Tensor, dims: Sequence[int] | None = None, *rest: Any, **options: Any
    ) -> Any:
        for dim in dims or range(x.dim()):
            x = x.index_select(dim, self._order(x, dim)[0])
        return func(x, *rest, **options) if dims is None else func(x, dims, *rest, **options)

    other_logsumexp = other_sum

    def other_softmax(self, func: Any, x: Tensor, dim: int, *rest: Any) -> Tensor:
        order, back = self._order(x, dim)
        return func(x.index_select(dim, order), dim, *rest).index_select(dim, back)

    other_log_softmax = other_softmax

    def other_softmax_backward_data(self, func: Any, dy: Tensor, y: Tensor, dim: int, *rest: Any) -> Tensor:
        order, back = self._order(y, dim)
        dx = func(dy.index_select(dim, order), y.index_select(dim, order), dim, *rest)
        return dx.index_select(dim, back)

    other_log_softmax_backward_data = other_softmax_backward_data

    def other_native_layer_norm(
        self, func: Any, x: Tensor, shape: Any, weight: Any, bias: Any, eps: float
    ) -> Any:
        order, back = self._order(x, -1)
        parameters = (None if p is None else p.index_select(0, order) for p in (weight, bias))
        y, *stats = func(x.index_select(-1, order), shape, *parameters, eps)
        return y.index_select(-1, back), *stats

    def other_native_layer_norm_backward(
        self, func: Any, dy: Tensor, x: Tensor, shape: Any, mean: Tensor, rstd: Tensor, *rest: Any
    ) -> Any:
        weight, bias, asked = rest
        order, back = self._order(x, -1)
        dy, x = (t.index_select(-1, order) for t in (dy, x))
        weight, bias = (None if p is None else p.index_select(0, order) for p in (weight, bias))
        if x.dim() > 1:
            rows, rows_back = self._order(x, 0)
            dy, x, mean, rstd = (t.index_select(0, rows) for t in (dy, x, mean, rstd))
        dx, dweight, dbias = func(dy, x, shape, mean, rstd, weight, bias, asked)
        if x.dim() > 1 and dx is not None:
            dx = dx.index_select(0, rows_back)
        return tuple(None if t is None else t.index_select(-1, back) for t in (dx, dweight, dbias))
