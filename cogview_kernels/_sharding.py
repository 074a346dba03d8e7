# SPDX-License-Identifier: Apache-2.0
"""DTensors: each rank computes its part of an op whose parts do not need one another.

One tensor of a call leads. It may be cut along some of its dimensions (samples, heads, rows), and the others
are cut as it is, or lie whole on every rank. So nothing is sent, forward or backward: the gradient of what
lies whole is ``Partial``, a sum over ranks that PyTorch makes where somebody needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

_OtherTensor = TypeVar("_OtherTensor", Tensor, Tensor | None)


def is_sharded(x: Tensor, backend: str | None) -> bool:
    """Whether a call that ``x`` leads is computed in parts. Plain PyTorch knows DTensors itself."""
    # By name, because to import DTensor takes a second.
    return type(x).__name__ == "DTensor" and backend != "reference"


class Parts:
    """How the DTensor ``leader``, the argument ``name``, is cut along dimensions that are among ``dims``.

    A method's ``dims`` are those of its tensor: for each of them the dimension of the leader with which it is
    cut, or None.
    """

    def __init__(self, op: str, name: str, leader: Any, dims: Sequence[int]) -> None:
        from torch.distributed.tensor import Replicate, Shard

        self.op, self.name, self.leader = op, name, leader
        for placement in leader.placements:
            if type(placement) is not Replicate and not (type(placement) is Shard and placement.dim in dims):
                ways = ", ".join([f"Shard({dim})" for dim in dims] + ["Replicate()"])
                self.refuse(
                    f"{name} must be placed as one of {ways} along each dimension of the mesh, got "
                    f"{leader.placements}; redistribute it"
                )

    @classmethod
    def of_rows(cls, op: str, name: str, leader: Any, pb_relax: str | None, dropout_p: float = 0.0) -> Parts:
        """Of a norm: every dimension but the last."""
        parts = cls(op, name, leader, range(leader.dim() - 1))
        if pb_relax == "tensor" and any(p.is_shard() for p in leader.placements):
            parts.refuse(f"pb_relax='tensor' takes the maximum over all ranks' parts of {name}; use 'row'")
        parts.check_no_dropout(dropout_p)
        return parts

    def refuse(self, reason: str) -> NoReturn:
        raise NotImplementedError(
            f"{self.op}: {reason}, or let each rank compute its part inside "
            "torch.distributed.tensor.experimental.local_map"
        )

    def check_no_dropout(self, dropout_p: float) -> None:
        if dropout_p:
            self.refuse(
                f"dropout_p must be 0 where {self.name} is a DTensor, because each rank would draw a mask of "
                f"its own, got {dropout_p}"
            )

    def of(self, name: str, x: _OtherTensor, dims: Sequence[int | None] = ()) -> _OtherTensor:
        """What this rank has of the argument ``name``; what is no DTensor lies whole on every rank."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        if x is None:
            return x
        mesh, placements = self.leader.device_mesh, self._placements(dims, Replicate())
        self._check_sizes(name, x, dims)
        if not isinstance(x, DTensor):
            if x.requires_grad and torch.is_grad_enabled():
                raise TypeError(
                    f"{self.op}: {name} must be a DTensor to have a gradient, as {self.name} is, got a tensor"
                )
            whole = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim)
            return whole.redistribute(mesh, placements).to_local()
        if x.device_mesh != mesh or x.placements != placements:
            raise ValueError(
                f"{self.op}: {name} must be placed as {placements} on {mesh} to go with {self.name}, "
                f"got {x.placements} on {x.device_mesh}; redistribute it"
            )
        return x.to_local(grad_placements=self._placements(dims, Partial()))

    def join(self, outputs: Any, dims: Sequence[int], *, summed: bool = False) -> Any:
        """The DTensor of which ``outputs`` is this rank's part, with ``summed`` its summand; or several."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        if isinstance(outputs, tuple):
            return tuple(self.join(x, dims, summed=summed) for x in outputs)
        if outputs is None:
            return None
        placements = self._placements(dims, Partial() if summed else Replicate())
        shape = torch.Size(
            self.leader.shape[dim] if self._ranks(dim) > 1 else size
            for size, dim in zip(outputs.shape, dims, strict=False)
        )
        shape += outputs.shape[len(dims) :]
        stride, size = [0] * len(shape), 1
        for i in sorted(range(len(shape)), key=lambda i: (outputs.stride(i), -i)):
            stride[i], size = size, size * max(shape[i], 1)
        mesh = self.leader.device_mesh
        return DTensor.from_local(outputs, mesh, placements, shape=shape, stride=tuple(stride))

    def _placements(self, dims: Sequence[int | None], uncut: Any) -> tuple[Any, ...]:
        """Of a tensor of these dimensions: ``uncut`` where the mesh cuts the leader along none of them."""
        from torch.distributed.tensor import Shard

        return tuple(
            p if p.is_replicate() else Shard(dims.index(p.dim)) if p.dim in dims else uncut
            for p in self.leader.placements
        )

    def _ranks(self, dim: int) -> int:
        """Into how many parts the leader is cut along ``dim``."""
        mesh, ranks = self.leader.device_mesh, 1
        for i, placement in enumerate(self.leader.placements):
            if placement.is_shard(dim):
                ranks *= mesh.size(i)
        return ranks

    def _check_sizes(self, name: str, x: Tensor, dims: Sequence[int | None]) -> None:
        """Parts of one number belong together: of as many, or both of a multiple of the ranks."""
        for i, dim in enumerate(dims):
            if dim is None:
                continue
            size, ranks = self.leader.shape[dim], self._ranks(dim)
            if x.shape[i] != size and (x.shape[i] % ranks or size % ranks):
                self.refuse(
                    f"to be cut along dimension {dim} by {ranks} ranks, {self.name} and {name} must have a "
                    f"multiple of {ranks} there, got {size} and {x.shape[i]}; place both as Replicate() there"
                )
