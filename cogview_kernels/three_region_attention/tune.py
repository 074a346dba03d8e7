# SPDX-License-Identifier: Apache-2.0
"""``python -m cogview_kernels.three_region_attention.tune [D ...]``: tunes the Triton kernels on this GPU.

For each head size (default 64 and 128), dtype and dropout (by default off and on), compiles every
configuration that can be worth it (:func:`configurations`, up to a hundred a kernel, in as many processes as
there are processors), times them on the shape of CogView's super-resolution, and prints the fastest and the
row to put into ``launch_config.DEFAULTS``. With ``--save`` all of this is also in a file, which grows with
each combination. Results also stay in the cache file, where ``COGVIEW_KERNELS_AUTOTUNE=1`` finds them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cogview_kernels.layout import ThreeRegionLayout
from cogview_kernels.three_region_attention import forward_hopper, launch_config
from cogview_kernels.three_region_attention.api import three_region_attention
from cogview_kernels.three_region_attention.launch_config import KERNELS, Config

B, H, T, P = 4, 40, 4224, 768
BLOCK_SIZE, WINDOW_BLOCKS = 128, 6


@dataclass(frozen=True)
class Problem:
    """What decides over the tiles of the kernels."""

    D: int
    dtype: torch.dtype
    dropout_p: float
    B: int = B

    @property
    def bits(self) -> int:
        return 32 if self.dtype == torch.float32 else 16

    def run(self, device: torch.device) -> None:
        """One call with its backward: each kernel is launched once."""
        text = torch.zeros(self.B, T, dtype=torch.bool, device=device)
        layout = ThreeRegionLayout.sample(text, P, block_size=BLOCK_SIZE, window_blocks=WINDOW_BLOCKS)
        q, k, v = (
            torch.randn(self.B, H, T, self.D, device=device, dtype=self.dtype, requires_grad=True)
            for _ in range(3)
        )
        out = three_region_attention(q, k, v, layout, dropout_p=self.dropout_p, seed=0, backend="triton")
        assert isinstance(out, torch.Tensor)
        out.backward(torch.randn_like(out))


def configurations(kernel: str, arch: int, D: int, bits: int) -> list[Config]:
    """All that fit into shared memory and whose accumulators leave a thread registers for the rest."""
    tile_sizes, steps = ((64, 128), (32, 64, 128)) if bits == 16 else ((32, 64), (16, 32, 64))
    width = launch_config.padded(D)
    found = []
    for tile in tile_sizes:  # rows of the accumulators
        for step in steps:  # what a turn of the loop brings
            for warps in (4, 8):
                accumulators = {"fwd": 1, "dq": 1}.get(kernel, 2) * width + {"fwd": 1}.get(kernel, 2) * step
                if tile * accumulators > 200 * 32 * warps or tile < 16 * warps // 2:
                    continue
                for stages in (1, 2, 3, 4):
                    rows = tile * (1 if kernel == "fwd" else 2) + 2 * stages * step
                    if rows * width * bits // 8 > launch_config.SHARED_MEMORY[arch]:
                        continue
                    moves = (step, tile) if kernel.startswith("dkv") else (tile, step)
                    config = Config(*moves, warps, stages)
                    found += [config, replace(config, maxnreg=128 if warps == 8 else 168)]
    return found


@contextmanager
def _choosing(choose) -> Iterator[None]:
    """Every kernel is one of Triton's, and ``choose`` is asked for its configuration."""
    original, takes = launch_config.choose, forward_hopper.takes
    launch_config.choose, forward_hopper.takes = choose, lambda *_: False
    try:
        yield
    finally:
        launch_config.choose, forward_hopper.takes = original, takes


def compile_some(problem: Problem, wanted: list[tuple[str, Config]], device: torch.device) -> int:
    """Launches the ``wanted`` configurations on one sample, so that Triton keeps them on disk."""
    problem = replace(problem, B=1)
    compiled = 0

    def choose(kernel, device, *rest):
        nonlocal compiled
        *_, launch = rest
        for name, config in wanted:
            if name == kernel:
                compiled += launch_config.fits(launch, config)
        return launch_config.shipped(
            kernel,
            launch_config.architecture(device),
            problem.D,
            problem.bits,
            BLOCK_SIZE,
            problem.dropout_p > 0,
        )

    with _choosing(choose):
        problem.run(device)
    return compiled


def tune(
    problem: Problem, device: torch.device, kernels: tuple[str, ...] = KERNELS, processes: int = 1
) -> dict[str, list[tuple[float, Config]]]:
    """Of each kernel the milliseconds of every configuration that runs, the fastest first."""
    arch = launch_config.architecture(device)
    every = {kernel: configurations(kernel, arch, problem.D, problem.bits) for kernel in kernels}
    if processes > 1:
        wanted = [(kernel, config) for kernel in kernels for config in every[kernel]]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            parts = [wanted[i::processes] for i in range(processes)]
            for _ in pool.map(compile_some, [problem] * processes, parts, [device] * processes):
                pass
    times: dict[str, list[tuple[float, Config]]] = {}

    def choose(kernel, device, *rest):
        *_, launch = rest
        if kernel in every:
            found = [(launch_config.milliseconds(launch, config), config) for config in every[kernel]]
            times[kernel] = sorted((x for x in found if x[0] < float("inf")), key=lambda x: x[0])
            return times[kernel][0][1]
        return launch_config.shipped(kernel, arch, problem.D, problem.bits, BLOCK_SIZE, problem.dropout_p > 0)

    with _choosing(choose):
        problem.run(device)
    for kernel, found in times.items():
        launch_config.keep(
            kernel, device, problem.D, problem.bits, BLOCK_SIZE, problem.dropout_p > 0, found[0][1]
        )
    return times


DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cogview_kernels.three_region_attention.tune",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("D", type=int, nargs="*", default=[64, 128], help="head sizes")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1], help="probabilities")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that compile")
    parser.add_argument("--save", type=Path, metavar="FILE", help="for what is printed")
    return parser.parse_args(arguments)


def report(problem: Problem, arch: int, times: dict[str, list[tuple[float, Config]]]) -> str:
    """The fastest five of each kernel, and the row for ``launch_config.DEFAULTS``."""
    lines = []
    for kernel, found in times.items():
        fastest = ", ".join(f"{config} {ms:.3f} ms" for ms, config in found[:5])
        lines.append(f"  {kernel} of {len(found)}: {fastest}")
    row = " ".join(str(found[0][1]) for found in times.values())
    key = f"({launch_config.padded(problem.D)}, {problem.dropout_p > 0})"
    return "\n".join([*lines, f'({arch}, {problem.bits}): {key}: _row("{row}")'])


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    device = torch.device("cuda")
    arch = launch_config.architecture(device)
    text = f"{torch.cuda.get_device_name()}, results in {launch_config.cache_file()}"
    print(text)
    for D in options.D:
        for dtype in options.dtypes:
            for dropout_p in options.dropout:
                problem = Problem(D, DTYPES[dtype], dropout_p)
                found = report(problem, arch, tune(problem, device, processes=options.processes))
                print(found, flush=True)
                text += f"\n{found}"
                if options.save:
                    options.save.write_text(text + "\n")


if __name__ == "__main__":
    main()
