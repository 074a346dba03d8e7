# SPDX-License-Identifier: Apache-2.0
"""``_triton.Launch``: a kernel that is run directly is the one that Triton would run, on the same arguments.

Another process makes the calls, with a driver that launches nothing and tells what it was asked to launch.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import cogview_kernels
from cogview_kernels import ThreeRegionLayout, sandwich_layer_norm
from tests.helpers.triton_compile import Call, Silent, meta, without_interpreter

MODULES = [
    info.name
    for info in pkgutil.walk_packages(cogview_kernels.__path__, "cogview_kernels.")
    if info.name.endswith(("triton_kernels", "_triton")) and info.name != "cogview_kernels._triton"
]


@triton.jit(do_not_specialize=["seed"])
def _kernel(x_ptr, y_ptr, z_ptr, seed, n, m, scale, ADD: tl.constexpr, BLOCK: tl.constexpr):
    if seed.dtype.is_ptr():
        seed = tl.load(seed)
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n + m, other=0.0) * scale
    if y_ptr is not None:
        x += tl.load(y_ptr + i, mask=i < n + m, other=0.0)
    if z_ptr is not None:
        x -= tl.load(z_ptr + i, mask=i < n + m, other=0.0)
    tl.store(x_ptr + i, x + (seed % 2 if ADD else 0), mask=i < n)


@triton.jit
def _seedless_kernel(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, i, mask=i < n)


class Bench:
    """Calls a Launch, and asks Triton's own way to the kernel what it would have launched."""

    def __init__(self) -> None:
        from triton.runtime.jit import JITFunction

        from cogview_kernels import _triton

        self.silent, self.bound = Silent.activate(), 0
        self.differences: list[str] = []
        run, call = JITFunction.run, _triton.Launch.__call__
        bench = self

        def count_and_run(function: Any, *arguments: Any, **options: Any) -> Any:
            bench.bound += 1
            return run(function, *arguments, **options)

        def call_twice(launch: Any, *tensors: Any, seed: Any = None) -> None:
            call(launch, *tensors, seed=seed)
            bound = bench.bound
            seeds = () if seed is None else (seed,)
            launch.kernel[launch.grid](*tensors, *seeds, *launch.numbers, **launch.constants)
            bench.bound = bound
            ours, tritons = bench.silent.launched[-2:]
            if ours != tritons:
                bench.differences.append(f"{ours}, not {tritons}")

        JITFunction.run = count_and_run
        _triton.Launch.__call__ = call_twice  # type: ignore[method-assign]

    def ways(self, launch: Any, *tensors: Any, seed: Any = None) -> str:
        """How each of two calls reaches the kernel, and where it was another launch than Triton's."""
        found = []
        for _ in range(2):
            before = self.bound
            launch(*tensors, seed=seed)
            found += ["bound" if self.bound > before else "direct", *self.differences]
            self.differences.clear()
        return " ".join(found)


def _launch() -> Any:
    from cogview_kernels._triton import Launch

    # Numbers that Triton specialises on: a multiple of 16, and 1, which becomes a constant.
    return Launch(_kernel, (3, 2), (48, 1, 0.5), ADD=True, BLOCK=64, num_warps=2)


def arguments_in_turn(bench: Bench) -> dict[str, str]:
    launch = _launch()
    x, y = torch.empty(2, 64).unbind()
    on_device = torch.tensor([7, 8])
    ways = {
        "first": bench.ways(launch, x, y, None, seed=5),
        "other memory": bench.ways(launch, y, x, None, seed=5),
        "another dtype": bench.ways(launch, x.half(), y, None, seed=5),
        "None elsewhere": bench.ways(launch, x, None, y, seed=5),
        "no None": bench.ways(launch, x, y, y, seed=5),
    }
    # Triton would make a constant of a seed of 1, and note that 16 is a multiple of 16.
    for seed in (0, 1, 16, -1, 2**31 - 1, -(2**31)):
        ways[f"seed {seed}"] = bench.ways(launch, x, y, None, seed=seed)
    for seed in (2**31, 2**32, -(2**31) - 1, 2**63 - 1, -(2**63)):
        ways[f"wide seed {seed}"] = bench.ways(launch, x, y, None, seed=seed)
    ways["seed in memory"] = bench.ways(launch, x, y, None, seed=on_device[0])
    ways["seed in misaligned memory"] = bench.ways(launch, x, y, None, seed=on_device[1])
    ways["again"] = bench.ways(launch, x, y, None, seed=5)
    return ways


def misaligned(bench: Bench) -> list[str]:
    """Launched first on aligned and on misaligned memory."""
    x, y = torch.empty(2, 68).unbind()
    found = []
    for order in ((0, 1, 0), (1, 0, 1)):
        launch = _launch()
        found += [bench.ways(launch, y[:64], x[first : first + 64], None, seed=5) for first in order]
    return found


def watched_and_on_a_stream(bench: Bench) -> list[Any]:
    from triton import knobs

    launch = _launch()
    x, y = torch.empty(2, 64).unbind()
    found: list[Any] = [bench.ways(launch, x, y, None, seed=5)]
    knobs.runtime.launch_enter_hook.add(print)
    found.append(bench.ways(launch, x, y, None, seed=5))
    knobs.runtime.launch_enter_hook.remove(print)
    found.append(bench.ways(launch, x, y, None, seed=5))
    bench.silent.stream = 7
    found += [bench.ways(launch, x, y, None, seed=5), bench.silent.launched[-2][2]]
    bench.silent.stream = 0
    return found


class OnTheSecond(torch.Tensor):
    """Of another GPU than others are on."""

    def get_device(self) -> int:
        return 1


def on_two_gpus(bench: Bench) -> list[str]:
    """The driver here takes each chip for another GPU."""
    from cogview_kernels._triton import Launch

    launch, x = Launch(_seedless_kernel, (1,), (48,), BLOCK=64), torch.empty(64)
    found = []
    for arch, kind in ((90, torch.Tensor), (80, OnTheSecond), (90, torch.Tensor)):
        bench.silent.become(arch)
        found.append(bench.ways(launch, x.as_subclass(kind)))
    return found


def without_a_seed(bench: Bench) -> str:
    from cogview_kernels._triton import Launch

    return bench.ways(Launch(_seedless_kernel, (1,), (48,), BLOCK=64), torch.empty(64))


def seeds_that_triton_specialises(_: Bench) -> list[str]:
    from triton.runtime.jit import JITFunction

    kernels = [
        kernel
        for module in MODULES
        for kernel in vars(importlib.import_module(module)).values()
        if isinstance(kernel, JITFunction) and kernel.__module__ == module
    ]
    seeds = [(k, p) for k in kernels for p in k.params if p.name == "seed" and k.__name__.endswith("_kernel")]
    assert len(seeds) >= 4
    return [k.__name__ for k, p in seeds if not p.do_not_specialize]


def _calls() -> Iterator[Call]:
    """Each op on memory of its own, which nothing reads."""
    grad = {"requires_grad": True}
    bf16 = {"dtype": torch.bfloat16}
    layout = ThreeRegionLayout(torch.arange(40)[None], 64, 2)
    dropout = {"dropout_p": 0.1, "seed": 2**40}
    rows = torch.empty(2, 40, 256, **bf16, **grad)
    parameters = torch.empty(4, 256, **bf16, **grad)
    yield Call("stable_softmax", (torch.empty(40, 256, **bf16, **grad),), {}, 90)
    yield Call("layer_norm", (rows[0], *parameters[:2]), {"pb_relax": "tensor"}, 90)
    yield Call("sandwich_layer_norm", (*rows, *parameters), dropout, 90)
    yield Call("rms_norm", (rows[0], parameters[0]), {"weight_offset": 1.0}, 90)
    yield Call("sandwich_rms_norm", (*rows, parameters[0]), dropout, 90)
    q = torch.empty(1, 2, 1, 64, **bf16)
    cache = torch.empty(2, 1, 2, 2000, 64, **bf16)
    for N in (1, 9):
        yield Call("decode_linear", (torch.empty(N, 256, **bf16), torch.empty(40, 256, **bf16)), {}, 90)
    yield Call("decode_attention", (q, *cache, torch.tensor([2000])), {"layout": layout}, 90)
    yield Call(
        "three_region_attention", (*torch.empty(3, 1, 2, 300, 64, **bf16, **grad), layout), dropout, 90
    )
    outputs, lses = torch.empty(2, 1, 2, 40, 64, **bf16, **grad), torch.empty(2, 1, 2, 40, **grad)
    yield Call("merge_attention", (list(outputs), list(lses)), {}, 90)


def ops_called_twice(bench: Bench) -> dict[str, list[int | str]]:
    """How many launches of each call Triton bound, and where another launch than Triton's was made."""
    bound: dict[str, list[int | str]] = {}
    for call in _calls():
        for _ in range(2):
            before = bench.bound
            bench.silent.run(call)
            bound.setdefault(call.op, []).extend((bench.bound - before, *bench.differences))
            bench.differences.clear()
    return bound


def one_gradient_of_two(bench: Bench) -> list[int]:
    """How many launches of a backward pass Triton bound, whose first gradient nobody brings."""
    found = []
    for _ in range(2):
        x = torch.empty(40, 256, dtype=torch.bfloat16, requires_grad=True)
        _, normed = sandwich_layer_norm(x, x, None, None, None, None, backend="triton")
        before = bench.bound
        torch.autograd.grad(normed, x, torch.empty_like(normed))
        found.append(bench.bound - before)
    return found


def _large_calls() -> Iterator[Call]:
    """Of more samples, rows, tokens or outputs than 65,535 programs take."""
    B, N = 70_000, 2**23
    rows, vector = meta(N, 64, grad=True), meta(64, grad=True)
    yield Call("stable_softmax", (rows,), {}, 90)
    yield Call("layer_norm", (rows, vector, vector), {"pb_relax": "tensor"}, 90)
    yield Call("sandwich_layer_norm", (rows, rows, *[vector] * 4), {"pb_relax": "tensor"}, 90)
    yield Call("rms_norm", (rows, vector), {}, 90)
    yield Call("sandwich_rms_norm", (rows, rows, vector, vector), {}, 90)
    loss = {"bias": meta(16, grad=True), "extra_memory": 1.0}
    yield Call("linear_cross_entropy", (rows, meta(16, 64, grad=True), meta(N, dtype=torch.int64)), loss, 90)
    yield Call("decode_linear", (meta(1, 64), meta(N, 64)), {}, 90)
    lengths = meta(B, dtype=torch.int64)
    yield Call("decode_attention", (meta(B, 1, 1, 64), *[meta(B, 1, 40, 64)] * 2, lengths), {}, 90)
    layout = ThreeRegionLayout(meta(B, 8, dtype=torch.int64), 8, 2)
    heads = [meta(B, 2, 64, 64, grad=True) for _ in range(3)]
    yield Call("three_region_attention", (*heads, layout), {}, 90)
    yield Call("local_attention_2d", (*heads, (8, 8), (3, 3)), {}, 90)
    lses = [meta(B, 2, 64, dtype=torch.float32, grad=True) for _ in range(3)]
    yield Call("merge_attention", (heads, lses), {}, 90)


def grids_of_large_inputs(bench: Bench) -> dict[str, list[tuple[int, ...]]]:
    grids: dict[str, list[tuple[int, ...]]] = {}
    for call in _large_calls():
        before = len(bench.silent.launched)
        bench.silent.run(call)
        grids.setdefault(call.op, []).extend(grid for _, grid, *_ in bench.silent.launched[before:])
    return grids


def errors_of_rows_past_32_bits(bench: Bench) -> dict[str, str]:
    rows, errors = meta(2**31, 8), {}
    heads, lses = meta(2**15, 2**10, 2**6, 8), meta(2**15, 2**10, 2**6, dtype=torch.float32)
    for call in (
        Call("stable_softmax", (rows,), {}, 90),
        Call("layer_norm", (rows, None, None), {}, 90),
        Call("sandwich_layer_norm", (rows, rows, *[None] * 4), {}, 90),
        Call("rms_norm", (rows, None), {}, 90),
        Call("sandwich_rms_norm", (rows, rows, None, None), {}, 90),
        Call("linear_cross_entropy", (rows, meta(1, 8), meta(2**31, dtype=torch.int64)), {}, 90),
        Call("merge_attention", ([heads] * 2, [lses] * 2), {}, 90),
    ):
        errors[call.op] = "no error"
        try:
            bench.silent.run(call)
        except NotImplementedError as error:
            errors[call.op] = str(error)
    return errors


def all_of_them() -> dict[str, Any]:
    bench = Bench()
    functions = (
        arguments_in_turn,
        misaligned,
        watched_and_on_a_stream,
        on_two_gpus,
        without_a_seed,
        seeds_that_triton_specialises,
        ops_called_twice,
        one_gradient_of_two,
        grids_of_large_inputs,
        errors_of_rows_past_32_bits,
    )
    return {function.__name__: function(bench) for function in functions}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return without_interpreter(all_of_them)


def test_what_is_run_directly(found):
    ways = found["arguments_in_turn"]
    anew = {"first", "another dtype", "None elsewhere", "no None", "wide seed 2147483648", "seed in memory"}
    assert ways == {name: "bound direct" if name in anew else "direct direct" for name in ways}


def test_a_misaligned_tensor_is_bound_each_time(found):
    aligned_first = ["bound direct", "bound bound", "direct direct"]
    misaligned_first = ["bound bound", "bound direct", "bound bound"]
    assert found["misaligned"] == aligned_first + misaligned_first


def test_hooks_see_each_launch_and_the_stream_is_the_current_one(found):
    ways = ["bound direct", "bound bound", "direct direct", "direct direct"]
    assert found["watched_and_on_a_stream"] == [*ways, 7]


def test_each_gpu_runs_the_kernel_that_was_loaded_on_it(found):
    assert found["on_two_gpus"] == ["bound direct", "bound direct", "direct direct"]


def test_kernels_without_a_seed(found):
    assert found["without_a_seed"] == "bound direct"


def test_triton_specialises_on_no_seed(found):
    """It would make another kernel for a seed of 1 or for a multiple of 16."""
    assert found["seeds_that_triton_specialises"] == []


def test_second_calls_of_the_ops_are_direct(found):
    assert found["ops_called_twice"] == {
        "stable_softmax": [2, 0],
        "layer_norm": [4, 0],
        "sandwich_layer_norm": [3, 0],
        "rms_norm": [3, 0],
        "sandwich_rms_norm": [2, 0],  # the sums of its partial sums are launched as those of rms_norm
        "decode_linear": [1, 0, 1, 0],
        "decode_attention": [1, 0],
        "three_region_attention": [6, 0],
        "merge_attention": [2, 0],
    }


def test_a_gradient_that_nobody_brings(found):
    """The stream of a launch is that of its first tensor."""
    assert found["one_gradient_of_two"] == [1, 0]


def test_grids_of_large_inputs_grow_along_x_alone(found):
    """CUDA takes 2^31 - 1 programs along x, and 65,535 along y and z, where only a few are."""
    grids = found["grids_of_large_inputs"]
    assert len(grids) == 11 and all(grids.values())
    for op, launches in grids.items():
        for x, y, z in launches:
            assert x < 2**31 and y <= 4 and z == 1, (op, x, y, z)


def test_rows_past_32_bits_are_refused(found):
    """Kernels number rows in 32 bits."""
    for op, error in found["errors_of_rows_past_32_bits"].items():
        assert error.startswith(f"{op}: the triton backend takes "), error
        assert error.endswith("of fewer than 2^31 rows, got 2147483648; split the batch"), error
