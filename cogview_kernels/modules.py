# SPDX-License-Identifier: Apache-2.0
"""The ops as ``nn.Module``: parameters with PyTorch's names, shapes and first values."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn

from cogview_kernels import _checks
from cogview_kernels._hooks import is_unmodified
from cogview_kernels.layer_norm import layer_norm
from cogview_kernels.layout import ThreeRegionLayout
from cogview_kernels.linear_cross_entropy import linear_cross_entropy
from cogview_kernels.rms_norm import rms_norm
from cogview_kernels.sandwich_layer_norm import sandwich_layer_norm
from cogview_kernels.sandwich_rms_norm import sandwich_rms_norm
from cogview_kernels.three_region_attention import three_region_attention

__all__ = ["LinearCrossEntropy", "SandwichLayerNorm", "SandwichRMSNorm", "ThreeRegionAttention"]


class ThreeRegionAttention(nn.Module):
    """Self-attention with its projections, of which those of q, k and v are packed into one.

    Equals, with parameters of the same names and shapes, so that ``load_state_dict`` takes either's::

        attention = nn.MultiheadAttention(embed_dim, num_heads, dropout, bias, batch_first=True)
        hidden = ~layout.dense_mask(T).repeat_interleave(num_heads, 0)
        attention(x, x, x, attn_mask=hidden, need_weights=False)[0]

    for a layout whose ``pivot_bias`` is 0. Between the projections is :func:`three_region_attention`.

    Args:
        embed_dim: a multiple of ``num_heads``.
        num_heads: positive.
        dropout: in [0, 1), of the joint probabilities, in training mode.
        bias: whether both projections have one.
        device, dtype: of the parameters.

    ``forward(x, layout, starts=None)`` takes and gives ``[B, T, embed_dim]``; the packed projection is read
    in place. ``starts`` is for padding on the left, see there: a position before its sample's start sees
    nothing, so ``out_proj`` gives its bias there.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        _checks.check_count(op, "num_heads", num_heads, 1)
        _checks.check_count(op, "embed_dim", embed_dim, 1)
        if embed_dim % num_heads:
            raise ValueError(f"{op}: embed_dim must be a multiple of num_heads, {num_heads}, got {embed_dim}")
        _checks.check_probability(op, "dropout", dropout)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **options))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim, **options)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.MultiheadAttention`` begins."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.out_proj.reset_parameters()
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, layout: ThreeRegionLayout | None, starts: Tensor | None = None) -> Tensor:
        if x.dim() != 3 or x.shape[2] != self.embed_dim:
            expected = f"[B, T, {self.embed_dim}]"
            raise ValueError(f"{type(self).__name__}: x must be {expected}, got {tuple(x.shape)}")
        B, T, C = x.shape
        qkv = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        thirds = qkv.view(B, T, 3, self.num_heads, C // self.num_heads).unbind(2)
        q, k, v = (x.transpose(1, 2) for x in thirds)
        dropout_p = self.dropout if self.training else 0.0
        out = cast(Tensor, three_region_attention(q, k, v, layout, starts=starts, dropout_p=dropout_p))
        return self.out_proj(out.transpose(1, 2).reshape(B, T, C))

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}"


def _widened(parameter: Tensor, x: Tensor) -> Tensor:
    """In a dtype in which a norm of ``x`` takes it, as the fused call takes that of the branch."""
    return parameter.to(torch.promote_types(parameter.dtype, x.dtype))


class _LayerNorm(nn.LayerNorm):
    """An ``nn.LayerNorm`` that takes PB-Relax."""

    def __init__(
        self,
        size: int,
        eps: float,
        pb_relax: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(size, eps, device=device, dtype=dtype)
        self.pb_relax = pb_relax

    def forward(self, x: Tensor) -> Tensor:
        affine = _widened(self.weight, x), _widened(self.bias, x)
        return layer_norm(x, *affine, eps=self.eps, pb_relax=self.pb_relax)


class _RMSNorm(nn.RMSNorm):
    """An ``nn.RMSNorm`` with the options of :func:`rms_norm`. Its weight begins at ``1 - weight_offset``."""

    eps: float
    weight_offset = 0.0  # while the class that it comes from begins
    round_before_weight = False
    pb_relax: str | None = None

    def __init__(
        self,
        size: int,
        eps: float,
        weight_offset: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(size, eps, device=device, dtype=dtype)
        self.weight_offset = weight_offset
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1 - self.weight_offset)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(
            x,
            _widened(self.weight, x),
            eps=self.eps,
            weight_offset=self.weight_offset,
            round_before_weight=self.round_before_weight,
            pb_relax=self.pb_relax,
        )


class _Sandwich(nn.Module):
    """Two norms and the sum between them: fused, unless a norm was replaced or hooks must see it called.

    Hooks do more than listen: those of FSDP, pruning and spectral norm make the weights of the norm.
    """

    post: _LayerNorm | _RMSNorm
    pre: _LayerNorm | _RMSNorm
    dropout: float

    def reset_parameters(self) -> None:
        """What its two norms do by themselves, in whatever order an initialisation walks."""
        for norm in (self.post, self.pre):
            norm.reset_parameters()

    def forward(
        self, branch: Tensor, residual: Tensor, normed_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        norms = self.post, self.pre
        if all(isinstance(norm, (_LayerNorm, _RMSNorm)) and is_unmodified(norm) for norm in norms):
            return self._fused(branch, residual, normed_dtype)
        residual_out = residual + self.post(nn.functional.dropout(branch, self.dropout, self.training))
        return residual_out, self.pre(residual_out).to(normed_dtype or residual_out.dtype)

    def _fused(
        self, branch: Tensor, residual: Tensor, normed_dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class SandwichLayerNorm(_Sandwich):
    """The end of one Sandwich-LayerNorm branch and the start of the next, :func:`sandwich_layer_norm`.

    Equals, with ``post`` and ``pre`` of type ``nn.LayerNorm(normalized_size, eps)``, PB-Relax apart::

        residual_out = residual + post(F.dropout(branch, dropout))
        normed = pre(residual_out)

    Args:
        normalized_size: C of ``[..., C]``.
        eps, pb_relax: see :func:`cogview_kernels.layer_norm`.
        dropout: in [0, 1), of the branch, in training mode.
        device, dtype: of the parameters.

    ``forward(branch, residual, normed_dtype=None)`` gives ``(residual_out, normed)``, see there.
    Where ``post`` or ``pre`` was replaced or has hooks (of FSDP on it alone, or of pruning), the two are
    called one after the other.
    """

    post: _LayerNorm
    pre: _LayerNorm

    def __init__(
        self,
        normalized_size: int,
        eps: float = 1e-5,
        pb_relax: str | None = "row",
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        _checks.check_count(op, "normalized_size", normalized_size, 1)
        _checks.check_finite_number(op, "eps", eps, positive=True)
        _checks.check_choice(op, "pb_relax", pb_relax, (None, "row", "tensor"))
        _checks.check_probability(op, "dropout", dropout)
        self.pb_relax, self.dropout = pb_relax, dropout
        self.post = _LayerNorm(normalized_size, eps, pb_relax, device, dtype)
        self.pre = _LayerNorm(normalized_size, eps, pb_relax, device, dtype)

    def _fused(
        self, branch: Tensor, residual: Tensor, normed_dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        parameters = (self.post.weight, self.post.bias, self.pre.weight, self.pre.bias)
        return sandwich_layer_norm(
            branch,
            residual,
            *parameters,
            eps=self.post.eps,
            pb_relax=self.pb_relax,
            dropout_p=self.dropout if self.training else 0.0,
            normed_dtype=normed_dtype,
        )

    def extra_repr(self) -> str:
        return f"pb_relax={self.pb_relax!r}, dropout={self.dropout}"


class SandwichRMSNorm(_Sandwich):
    """The same with RMSNorm, :func:`sandwich_rms_norm`, as in Gemma 2 and 3, GLM-4 and OLMo 2.

    Equals, with ``post`` and ``pre`` of type ``nn.RMSNorm(normalized_size, eps)``, but for ``pb_relax``::

        residual_out = residual + post(F.dropout(branch, dropout))
        normed = pre(residual_out)

    Args:
        normalized_size: C of ``[..., C]``.
        eps: positive.
        weight_offset: is added to both weights; the weights begin at ``1 - weight_offset`` (Gemma: 1, and 0).
        round_before_weight, pb_relax: see :func:`cogview_kernels.rms_norm` (GLM: True, and None).
        dropout: in [0, 1), of the branch, in training mode.
        device, dtype: of the parameters.

    ``forward(branch, residual, normed_dtype=None)`` gives ``(residual_out, normed)``, see there.
    Where ``post`` or ``pre`` was replaced or has hooks (of FSDP on it alone, or of pruning), the two are
    called one after the other.
    """

    post: _RMSNorm
    pre: _RMSNorm

    def __init__(
        self,
        normalized_size: int,
        eps: float = 1e-6,
        weight_offset: float = 0.0,
        round_before_weight: bool = False,
        pb_relax: str | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        _checks.check_count(op, "normalized_size", normalized_size, 1)
        _checks.check_rms_options(op, eps, weight_offset, round_before_weight, pb_relax)
        _checks.check_probability(op, "dropout", dropout)
        self.weight_offset, self.round_before_weight = weight_offset, round_before_weight
        self.pb_relax, self.dropout = pb_relax, dropout
        self.post = _RMSNorm(normalized_size, eps, weight_offset, device, dtype)
        self.pre = _RMSNorm(normalized_size, eps, weight_offset, device, dtype)
        for norm in (self.post, self.pre):
            norm.round_before_weight, norm.pb_relax = round_before_weight, pb_relax

    def _fused(
        self, branch: Tensor, residual: Tensor, normed_dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        residual_out, normed = sandwich_rms_norm(
            branch,
            residual,
            self.post.weight,
            self.pre.weight,
            eps=self.post.eps,
            weight_offset=self.weight_offset,
            round_before_weight=self.round_before_weight,
            pb_relax=self.pb_relax,
            dropout_p=self.dropout if self.training else 0.0,
            normed_dtype=normed_dtype,
        )
        return residual_out, cast(Tensor, normed)

    def extra_repr(self) -> str:
        return (
            f"weight_offset={self.weight_offset}, round_before_weight={self.round_before_weight}, "
            f"pb_relax={self.pb_relax!r}, dropout={self.dropout}"
        )


class LinearCrossEntropy(nn.Module):
    """A head and its loss in one, :func:`linear_cross_entropy`; the logits are never held.

    Equals, with ``head`` of type ``nn.Linear(in_features, num_classes, bias)``, whose parameters it has::

        F.cross_entropy(head(hidden).flatten(0, -2), target.flatten(), **options)

    Args:
        in_features: C of ``hidden`` ``[..., C]``.
        num_classes: V.
        bias: whether the head has one.
        device, dtype: of the parameters.
        options: keyword arguments of :func:`cogview_kernels.linear_cross_entropy`, the same at every call.

    ``forward(hidden, target)`` gives what that function gives. Where the head is tied to an embedding,
    ``head.weight = embedding.weight`` afterwards.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        _checks.check_count(op, "in_features", in_features, 1)
        _checks.check_count(op, "num_classes", num_classes, 1)
        known = inspect.signature(linear_cross_entropy).parameters.values()
        names = [one.name for one in known if one.kind is one.KEYWORD_ONLY and one.name != "bias"]
        for name in options:
            if name not in names:
                raise TypeError(f"{op}: options must be among {', '.join(names)}, got {name}")
        _checks.check_choice(op, "reduction", options.get("reduction", "mean"), ("none", "sum", "mean"))
        self.options = options
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Linear`` begins: uniform within ``1 / sqrt(in_features)``."""
        bound = self.weight.shape[1] ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, hidden: Tensor, target: Tensor) -> Any:
        return linear_cross_entropy(hidden, self.weight, target, bias=self.bias, **self.options)

    def extra_repr(self) -> str:
        V, C = self.weight.shape
        return f"{C}, {V}, bias={self.bias is not None}"
