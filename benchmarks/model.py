# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.model``: generation and a training step of a whole preset, with random weights.

Milliseconds a token that every row of a batch gets, and milliseconds and tokens a second of a training step,
with the optimizer's, in bfloat16. A first generation and a first step are not timed: they compile kernels.
Each line is printed before the next measurement begins.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import environment, timing
from cogview.config import ModelConfig, SamplingConfig, ThreeRegionConfig, TrainConfig
from cogview.generation.engine import DrawOptions, Task, decode, prefill
from cogview.model.transformer import CogView
from cogview.presets import PRESETS
from cogview.tokens.sequence import Batch
from cogview.training.loop import Descent, backward, descend
from cogview.training.optim import make_optimizer
from cogview.training.transformer import losses_of, sample_layouts

TINY = ModelConfig(
    num_layers=1, hidden_size=64, num_heads=2, vocab_size=128, max_positions=33,
    three_region=ThreeRegionConfig(block_size=8, window_blocks=2, num_pivots=12),
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """``batches`` are drawn from after a prompt of ``prompt`` tokens, ``new`` tokens a row."""

    prompt: int = 64
    new: int = 64
    batches: tuple[int, ...] = (1, 16)
    rows: int = 8  # of a training step
    repeat: int = 3


def seconds(run: Callable[[], object], device: torch.device) -> float:
    timing.synchronize(device)
    start = time.perf_counter()
    run()
    timing.synchronize(device)
    return time.perf_counter() - start


def generation(model: CogView, sizes: Sizes, batch: int, device: torch.device) -> str:
    model.eval()
    prompts = [list(range(sizes.prompt))] * batch
    codes = [range(min(8192, model.config.vocab_size))]
    task, options = Task(codes, sizes.new, list(range(batch))), DrawOptions(SamplingConfig())

    def prompt():
        return prefill(model, prompts, sizes.new)

    def draw(rows) -> float:
        return seconds(lambda: decode(model, rows, task, options), device)

    draw(prompt())
    reading = statistics.median(seconds(prompt, device) for _ in range(sizes.repeat))
    drawing = statistics.median(draw(prompt()) for _ in range(sizes.repeat)) / sizes.new
    of_prompt = f"prompt of {sizes.prompt} {1e3 * reading:.2f} ms"
    return f"generation, {batch} rows: {of_prompt}, token {1e3 * drawing:.3f} ms"


def random_batch(config: ModelConfig, sizes: Sizes, device: torch.device) -> Batch:
    T = config.max_positions - 1
    tokens = torch.randint(config.vocab_size, (sizes.rows, T + 1), device=device)
    text = torch.zeros(sizes.rows, T, dtype=torch.bool, device=device)
    text[:, : T // 16] = True
    weight = torch.ones(sizes.rows, T, device=device)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weight, text, torch.ones_like(text))


def training(model: CogView, sizes: Sizes, device: torch.device) -> str:
    model.train()
    optimizer = make_optimizer(model, TrainConfig())
    batch = random_batch(model.config, sizes, device)
    generator = torch.Generator(device=device)
    descents: list[Descent] = []

    def step() -> None:
        layouts = sample_layouts(model.config, batch, generator)
        loss, *_ = losses_of(model, batch, layouts)
        backward(loss)
        descents.append(descend(loss, model, optimizer, clip_norm=1.0))

    step()
    took = statistics.median(seconds(step, device) for _ in range(sizes.repeat))
    # Asked after the timing: the answer waits for the device.
    if any(bool(descent.skipped) for descent in descents):
        raise RuntimeError("a training step changed nothing: its loss or a gradient was not finite")
    rows, T = batch.tokens.shape
    return f"training step, {rows} rows of {T}: {1e3 * took:.0f} ms, {rows * T / took:.0f} tokens/s"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="base")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: to see that everything runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    sizes = Sizes(prompt=4, new=2, batches=(2,), rows=2, repeat=1) if chosen.tiny else Sizes()
    torch.manual_seed(0)
    with device:
        model = CogView(TINY if chosen.tiny else PRESETS[chosen.preset].model).to(torch.bfloat16)
    name = "tiny" if chosen.tiny else chosen.preset
    print(f"{name}, {model.num_parameters():,} parameters, {environment.device_name(device)}", flush=True)
    for batch in sizes.batches:
        print(generation(model, sizes, batch, device), flush=True)
    print(training(model, sizes, device), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
