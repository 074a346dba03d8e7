# SPDX-License-Identifier: Apache-2.0
"""Several processes that train one model: its weights are sharded over them (FSDP2), and so are the rows.

``torchrun`` starts the processes, its *ranks*. Each calls the same functions as a single process does; what
differs is asked here. A process that is alone, or the only rank, gets the answers of one rank, and nothing
is communicated. Every function marked "all ranks together" blocks until all ranks have called it.

A step has the batch, the layouts and the losses that it would have with one rank: each rank takes its rows
of the batch, divides by what counts in the whole of it, and the gradients are added up. Weights after it
differ by the rounding of that sum. Dropout masks differ from rank to rank, hence from those of one rank.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cogview.launch import started_ranks

Value = TypeVar("Value")


def _are_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def num_ranks() -> int:
    """How many processes train together; 1 for a process that is alone."""
    return dist.get_world_size() if _are_joined() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if _are_joined() else 0


def is_first() -> bool:
    """Whether this is the rank that speaks, and that writes what is written once."""
    return rank() == 0


@contextmanager
def joined_ranks(device: torch.device | str) -> Iterator[None]:
    """Within the block, the ranks that ``torchrun`` started with this one can talk to each other.

    Over NCCL where ``device`` is a GPU, which has to be another one for each rank of a machine, and over gloo
    on the CPU. A process group that exists already is used and kept. Without ``torchrun`` nothing happens.
    """
    if _are_joined() or started_ranks() == 1:
        yield
        return
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # What the host has to know, such as whether to stop, goes over gloo: no rank waits for its GPU for that.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, **_meeting_place())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _meeting_place() -> dict[str, Any]:
    """Where the ranks leave their addresses for each other; empty for PyTorch's default.

    torchrun keeps one store for all its attempts (PyTorch issue 135712): after a restart a rank may find the
    address of a dead one there. On one machine, a name for each attempt keeps them apart. On several, the
    attempts of the machines have different numbers.
    """
    environment = os.environ
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    if environment["GROUP_WORLD_SIZE"] != "1":
        if environment["TORCHELASTIC_MAX_RESTARTS"] != "0":
            warnings.warn(
                "on several machines, --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the "
                "environment of torchrun",
                stacklevel=2,
            )
        return {}
    ranks = started_ranks()
    store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), ranks, False)
    name = f"attempt {environment['TORCHELASTIC_RESTART_COUNT']}"
    return {"store": dist.PrefixStore(name, store), "rank": int(environment["RANK"]), "world_size": ranks}


def wait_for_all() -> None:
    """Returns once all ranks have called it."""
    any_rank(False)


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is true on some rank. All ranks together."""
    if num_ranks() == 1:
        return flag
    raised = torch.tensor(int(flag))
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised)


def of_all_ranks(value: Value) -> list[Value]:
    """The ``value`` of each rank, in their order. All ranks together."""
    if num_ranks() == 1:
        return [value]
    values: list[Any] = [None] * num_ranks()
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of the ranks' tensors, in place. All ranks together; the host does not wait for a GPU."""
    if num_ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def require_rows(batch_size: int, parts: int) -> None:
    """ValueError unless each part on each rank has a row of the batch."""
    if num_ranks() > 1 and batch_size < num_ranks() * parts:
        raise ValueError(
            f"batch_size must be at least the {num_ranks()} ranks times the {parts} parts of --accumulate, "
            f"got {batch_size}; start fewer ranks or take a larger batch"
        )


def shard_model(model: nn.Module, units: list[list[nn.Module]], dtype: torch.dtype) -> None:
    """Spread the float32 weights of ``model`` over the ranks, to be gathered where they are needed.

    Args:
        units: modules whose weights are gathered together, unit by unit, and in ``dtype``. A unit must be
            used by nothing but the calls of its modules. All other weights are gathered in float32, once a
            step.
        dtype: what autocast would round the weights to. Gradients are summed in float32.

    The gradient of a step is the sum of those of the ranks. All ranks together, with the same weights;
    nothing happens on one rank.
    """
    if num_ranks() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    # PyTorch 2.13 warns of in-place changes to what a unit returns. Nothing here makes any.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(next(model.parameters()).device.type, (num_ranks(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The losses are divided by the counts of the whole batch already. gloo knows no other factor.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is spread over ranks, a DTensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` itself, or what its parts on the ranks make up; then all ranks together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gathered_on_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole of each tensor, in the first rank's host memory; nothing elsewhere. All ranks together."""
    gathered = {}
    for name, tensor in tensors.items():
        everything = whole(tensor)
        if is_first():
            gathered[name] = everything.cpu()
    return gathered


def own_part(tensor: Tensor) -> Tensor:
    """``tensor`` itself, or the part of it that this rank has."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


class _Silence:
    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None

    def __enter__(self) -> _Silence:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def only_first(make: Callable[[], Value]) -> Value:
    """What ``make`` gives on the first rank; on the others something that takes every call and does nothing.

    It is for what shows or locks something, a context manager whose methods return nothing.
    """
    return make() if is_first() else cast(Value, _Silence())
