# SPDX-License-Identifier: Apache-2.0
"""The program behind ``test_dtensor.py``: two ranks compute in parts what each computes whole as well.

``python -m tests.kernels.ranks FOLDER`` writes ``FOLDER/report.json``: for each call what is wrong with it on
either rank, or nothing.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import cogview_kernels as ck

SAMPLES, HEADS, WHOLE = Shard(0), Shard(1), Replicate()


@dataclass(frozen=True)
class Call:
    """``function`` of the tensors, each with its placement; None is a plain tensor that every rank has."""

    function: Callable[..., Any]
    tensors: dict[str, tuple[Tensor, Placement | None]]
    outputs: Sequence[Placement]
    frozen: Sequence[str] = ()  # what has no gradient, integers apart


def attention(placement: Placement, B: int = 3, *, beside: Placement | None = None, **options: Any) -> Call:
    """Two query heads a key head, padding on the left, more than one block."""
    q, k, v = torch.randn(B, 4, 40, 16), torch.randn(B, 2, 40, 16), torch.randn(B, 2, 40, 16)
    pivots = torch.stack([torch.randperm(40)[:6] for _ in range(B)])
    starts = torch.arange(B) * 3

    def function(q, k, v, pivots, starts):
        layout = ck.ThreeRegionLayout(pivots, 8, 2, 0.5)
        return ck.three_region_attention(q, k, v, layout, starts=starts, return_lse=True, **options)

    # What belongs to samples is not cut by heads.
    beside = WHOLE if beside is not None and placement == HEADS else beside
    tensors = {"q": (q, placement), "k": (k, placement), "v": (v, placement)}
    return Call(function, tensors | {"pivots": (pivots, beside), "starts": (starts, beside)}, [placement] * 2)


def decoding(placement: Placement, beside: Placement | None) -> Call:
    q, k, v = torch.randn(4, 4, 2, 16), torch.randn(4, 2, 24, 16), torch.randn(4, 2, 24, 16)
    pivots = torch.stack([torch.randperm(20)[:4] for _ in range(4)])
    lengths, starts = torch.tensor([24, 20, 17, 9]), torch.arange(4)

    def function(q, k, v, lengths, pivots, starts):
        layout = ck.ThreeRegionLayout(pivots, 4, 2)
        return ck.decode_attention(q, k, v, lengths, layout=layout, starts=starts)

    tensors = {"q": (q, placement), "k": (k, placement), "v": (v, placement)}
    numbers = {"lengths": lengths, "pivots": pivots, "starts": starts}
    numbers_placed = {name: (x, beside) for name, x in numbers.items()}
    return Call(function, tensors | numbers_placed, [placement], frozen=["q", "k", "v"])


def local_attention(placement: Placement) -> Call:
    shapes = {"q": (2, 4, 24, 16), "extra_k": (2, 2, 5, 16), "extra_v": (2, 2, 5, 16)}
    shapes |= {"k": (2, 2, 24, 16), "v": (2, 2, 24, 16)}
    tensors = {name: (torch.randn(shape), placement) for name, shape in shapes.items()}

    def function(q, k, v, **extra):
        return ck.local_attention_2d(q, k, v, (4, 6), (3, 3), return_lse=True, **extra)

    mask = torch.rand(2, 5) < 0.7
    return Call(function, {**tensors, "extra_mask": (mask, None)}, [placement] * 2)


def merging(placement: Placement) -> Call:
    names = {f"out{i}": torch.randn(2, 4, 5, 16) for i in range(2)}
    names |= {f"lse{i}": torch.randn(2, 4, 5) for i in range(2)}

    def function(out0, out1, lse0, lse1):
        return ck.merge_attention([out0, out1], [lse0, lse1], return_lse=True)

    return Call(function, {name: (x, placement) for name, x in names.items()}, [placement] * 2)


def norm(
    function: Callable[..., Any], activations: int, weights: int, placement: Placement, B: int = 3
) -> Call:
    tensors = {f"x{i}": (torch.randn(B, 6, 32), placement) for i in range(activations)}
    parameters = {f"weight{i}": (torch.rand(32) + 0.5, WHOLE) for i in range(weights)}

    def by_position(**given):
        return function(*given.values())

    return Call(by_position, tensors | parameters, [placement] * activations)


def softmax(placement: Placement, mask: Placement | None, **options: Any) -> Call:
    seen = torch.rand(2, 1, 5, 9) < 0.7
    tensors = {"scores": (torch.randn(2, 4, 5, 9), placement), "mask": (seen, mask)}
    return Call(lambda scores, mask: ck.stable_softmax(scores, mask=mask, **options), tensors, [placement])


def cross_entropy(
    reduction: str, placement: Placement = SAMPLES, targets: Placement | None = None, **options: Any
) -> Call:
    """Ranks have different numbers of tokens that count."""
    hidden, weight, bias = torch.randn(3, 4, 16), torch.randn(20, 16), torch.randn(20)
    target, token_weight = torch.randint(20, (3, 4)), torch.rand(3, 4)
    target[2, 1:] = -100

    def function(hidden, weight, bias, target, token_weight):
        return ck.linear_cross_entropy(
            hidden, weight, target, bias=bias, token_weight=token_weight, reduction=reduction, z_loss=1e-2,
            return_losses=True, return_predicted_tokens=True, **options,
        )  # fmt: skip

    tensors = {"hidden": (hidden, placement), "weight": (weight, WHOLE), "bias": (bias, WHOLE)}
    tensors |= {"target": (target, targets), "token_weight": (token_weight, targets)}
    loss = placement if reduction == "none" else Partial()
    return Call(function, tensors, [loss, placement, placement], frozen=["token_weight"])


def nothing_counts(call: Call) -> Call:
    """Where a mean over no token is NaN and its gradients are 0."""
    target, placement = call.tensors["target"]
    return replace(call, tensors=call.tensors | {"target": (torch.full_like(target, -100), placement)})


def compiled(call: Call) -> Call:
    """Traced whole; what Inductor would make of the rest is not the matter here."""
    return replace(call, function=torch.compile(call.function, backend="aot_eager", fullgraph=True))


def narrow(op: Callable[..., Any]) -> Callable[..., Any]:
    """A 16-bit branch on a float32 residual, as autocast gives it."""

    def function(branch, *others):
        return op(branch.bfloat16(), *others, normed_dtype=torch.bfloat16)

    return function


def sequence_parallel_rms(x, weight):
    return ck.rms_norm(x, weight, weight_offset=1.0, pb_relax="row")


def calls() -> dict[str, Call]:
    """A sample more on one rank than on the other, unless said otherwise."""
    return {
        "attention-samples": attention(SAMPLES),
        "attention-samples-with-pivots": attention(SAMPLES, beside=SAMPLES),
        "attention-heads": attention(HEADS),
        "attention-heads-with-pivots": attention(HEADS, beside=SAMPLES),
        "attention-whole": attention(WHOLE),
        "attention-a-rank-without-samples": attention(SAMPLES, B=1),
        "decode-samples": decoding(SAMPLES, None),
        "decode-samples-with-lengths": decoding(SAMPLES, SAMPLES),
        "decode-heads": decoding(HEADS, None),
        "local-samples": local_attention(SAMPLES),
        "local-heads": local_attention(HEADS),
        "merge-samples": merging(SAMPLES),
        "merge-heads": merging(HEADS),
        "layer_norm": norm(ck.layer_norm, 1, 2, SAMPLES),
        "layer_norm-positions": norm(ck.layer_norm, 1, 2, Shard(1)),
        "layer_norm-whole": norm(ck.layer_norm, 1, 2, WHOLE),
        "layer_norm-a-rank-without-rows": norm(ck.layer_norm, 1, 2, SAMPLES, B=1),
        "rms_norm": norm(sequence_parallel_rms, 1, 1, Shard(1)),
        "sandwich_layer_norm": norm(ck.sandwich_layer_norm, 2, 4, SAMPLES),
        "sandwich_rms_norm": norm(ck.sandwich_rms_norm, 2, 2, Shard(1)),
        "sandwich_layer_norm-narrow": norm(narrow(ck.sandwich_layer_norm), 2, 4, SAMPLES),
        "sandwich_rms_norm-narrow": norm(narrow(ck.sandwich_rms_norm), 2, 2, SAMPLES),
        "softmax-samples": softmax(SAMPLES, SAMPLES),
        "softmax-heads": softmax(HEADS, None, causal=True),
        "softmax-rows": softmax(Shard(2), Shard(2), scale=0.5),
        "cross_entropy-mean": cross_entropy("mean"),
        "cross_entropy-sum": cross_entropy("sum", Shard(1), Shard(1), softcap=5.0),
        "cross_entropy-none": cross_entropy("none", label_smoothing=0.1),
        "cross_entropy-nothing-counts": nothing_counts(cross_entropy("mean")),
        "compiled-attention": compiled(attention(HEADS)),
        "compiled-decode": compiled(decoding(SAMPLES, SAMPLES)),
        "compiled-local": compiled(local_attention(HEADS)),
        "compiled-merge": compiled(merging(SAMPLES)),
        "compiled-sandwich_rms_norm": compiled(norm(ck.sandwich_rms_norm, 2, 2, Shard(1))),
        "compiled-softmax": compiled(softmax(HEADS, None, causal=True)),
        "compiled-cross_entropy": compiled(cross_entropy("mean")),
    }  # fmt: skip


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def loss_of(outputs: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    """Whose gradient is another for every element of every output that has one."""
    pairs = zip(outputs, factors, strict=True)
    return torch.stack([(output * factor).sum() for output, factor in pairs if output.requires_grad]).sum()


def placed(x: Tensor, placement: Placement | None, mesh: DeviceMesh) -> Tensor:
    return x.clone() if placement is None else distribute_tensor(x, mesh, [placement])


def check(call: Call, mesh: DeviceMesh) -> None:
    """The parts together are what one process gives, in values and gradients."""
    alone = {name: x.clone() for name, (x, _) in call.tensors.items()}
    parts = {name: placed(x, placement, mesh) for name, (x, placement) in call.tensors.items()}
    wanted = [name for name, x in alone.items() if x.is_floating_point() and name not in call.frozen]
    for name in wanted:
        alone[name].requires_grad_()
        parts[name].requires_grad_()
    expected, outputs = as_tuple(call.function(**alone)), as_tuple(call.function(**parts))
    for output, right, placement in zip(outputs, expected, call.outputs, strict=True):
        assert isinstance(output, DTensor) and output.placements == (placement,), (output, placement)
        assert output.shape == right.shape, (output.shape, right.shape)
        torch.testing.assert_close(output.full_tensor(), right, equal_nan=True)
    if not wanted:
        return
    factors = [torch.randn(x.shape) for x in expected]
    loss_of(expected, factors).backward()
    loss_of(outputs, [distribute_tensor(x, mesh, [WHOLE]) for x in factors]).backward()
    lead = next(placement for _, placement in call.tensors.values())
    for name in wanted:
        gradient, placement = parts[name].grad, call.tensors[name][1]
        expected_placement = Partial() if placement == WHOLE != lead else placement
        assert gradient.placements == (expected_placement,), (name, gradient.placements)
        torch.testing.assert_close(gradient.full_tensor(), alone[name].grad)


def run(rank: int, folder: Path) -> None:
    """Writes ``folder/RANK.json``. Ranks draw the same numbers and check the same calls in the same order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    wrong = {}
    for name, call in calls().items():
        try:
            check(call, mesh)
            wrong[name] = ""
        except Exception:  # Whatever it is, the report names the call, and the others are checked as well.
            wrong[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(wrong))
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked, before PyTorch has started a thread, because to import PyTorch takes seconds.
    other = multiprocessing.get_context("fork").Process(target=run, args=(1, Path(sys.argv[1])), daemon=True)
    other.start()
    run(0, Path(sys.argv[1]))
    other.join()
