# SPDX-License-Identifier: Apache-2.0
"""What a training will take, before anyone rents a machine: does it fit, how long does a step take.

The arithmetic is in ``flops`` and ``memory``; here it meets a number of GPUs and becomes words. No PyTorch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from cogview.config import ModelConfig, TrainConfig
from cogview.training.flops import StepFlops, step_flops
from cogview.training.memory import MicroBatch, Moment, count_parameters, step_memory

GIB = 2**30
# TFLOP/s of large matrix products on an H100: measured in 16 bits (benchmarks/results), by its data sheet in
# float32.
H100_TFLOPS = {"fp32": 67.0, "bf16": 790.0, "fp16": 790.0}
# Of this ceiling, what attention reaches, forward and backward together (benchmarks/results, H100: 0.19 to
# 0.36 in three regions, 0.18 to 0.37 dense by PyTorch's default kernel).
ATTENTION_SHARE = 0.25


@dataclass(frozen=True)
class Cluster:
    """The machine: ``gpus`` of ``memory`` GiB each, and what they reach.

    ``tflops`` is the rate of large matrix products, ``utilization`` the share of it that a step reaches in
    its products and all that lies between them. ``headroom`` is the share of the memory that is left to what
    is no tensor: the CUDA context, buffers of libraries, the allocator's own waste.
    """

    gpus: int = 1
    memory: float = 80.0
    tflops: float = H100_TFLOPS["bf16"]
    utilization: float = 0.45
    headroom: float = 0.1

    def __post_init__(self) -> None:
        ranges = {
            "gpus": ("at least 1", self.gpus >= 1),
            "memory": ("above 0 and finite", 0 < self.memory < math.inf),
            "tflops": ("above 0 and finite", 0 < self.tflops < math.inf),
            "utilization": ("above 0 and at most 1", 0 < self.utilization <= 1),
            "headroom": ("at least 0 and below 1", 0 <= self.headroom < 1),
        }
        for name, (expected, holds) in ranges.items():
            if not holds:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")

    @property
    def usable(self) -> float:
        """Bytes of one GPU that tensors may take."""
        return self.memory * (1 - self.headroom) * GIB


@dataclass(frozen=True)
class Forecast:
    """What the training of ``model`` by ``train`` takes on ``cluster``.

    Raises:
        ValueError: more GPUs than rows of a batch.
    """

    model: ModelConfig
    train: TrainConfig
    cluster: Cluster

    def __post_init__(self) -> None:
        if self.cluster.gpus > self.train.batch_size:
            raise ValueError(
                f"gpus must be at most batch_size {self.train.batch_size}, got {self.cluster.gpus}: each "
                "takes at least one row of a batch"
            )

    @property
    def tokens(self) -> int:
        """Of a row."""
        return self.model.max_positions - 1

    @property
    def rows(self) -> int:
        """Of a micro batch on one GPU as the options have it; some have one less."""
        return math.ceil(self.train.batch_size / self.cluster.gpus / self.train.accumulate)

    @property
    def flops(self) -> StepFlops:
        """Of one step on all GPUs together."""
        return step_flops(self.model, self.train.batch_size)

    @property
    def step_seconds(self) -> float:
        """Products at ``utilization``, attention at the share that was measured, communication hidden."""
        flops = self.flops
        share_of_attention = flops.attention / (flops.attention + flops.products)
        attention = flops.attention + share_of_attention * flops.recomputed
        seconds = (flops.hardware - attention) / self.cluster.utilization + attention / ATTENTION_SHARE
        return seconds / (self.cluster.gpus * self.cluster.tflops * 1e12)

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation that follows from the above."""
        return self.flops.model / (self.step_seconds * self.cluster.gpus * self.cluster.tflops * 1e12)

    def memory(self, rows: int, *, accumulates: bool) -> Moment:
        """The fullest moment of one GPU with micro batches of ``rows``."""
        size = 4 if self.train.precision == "fp32" else 2
        batch = MicroBatch(rows, self.tokens, size, accumulates, self.cluster.gpus)
        return step_memory(self.model, batch)

    def fits(self) -> bool:
        """Whether a step fits as the options have it."""
        held = self.memory(self.rows, accumulates=self.train.accumulate > 1)
        return held.total <= self.cluster.usable

    def largest_rows(self) -> int:
        """Rows of the largest micro batch that fits beside gradients of an earlier one; 0 if none does."""
        low, high = 0, self.train.batch_size + 1
        while high - low > 1:
            middle = (low + high) // 2
            holds = self.memory(middle, accumulates=True).total <= self.cluster.usable
            low, high = (middle, high) if holds else (low, middle)
        return low

    def parts_that_fit(self) -> int:
        """The smallest ``accumulate`` with which a step fits; 0 if none does."""
        if dataclasses.replace(self, train=dataclasses.replace(self.train, accumulate=1)).fits():
            return 1
        rows = self.largest_rows()
        return max(2, math.ceil(math.ceil(self.train.batch_size / self.cluster.gpus) / rows)) if rows else 0

    def gpus_that_fit(self) -> int:
        """The smallest power of two of GPUs on which a step fits with some ``accumulate``; 0 if none does."""
        gpus = 1
        while gpus <= self.train.batch_size:
            if gpus >= self.cluster.gpus:
                cluster = dataclasses.replace(self.cluster, gpus=gpus)
                if dataclasses.replace(self, cluster=cluster).parts_that_fit():
                    return gpus
            gpus *= 2
        return 0


def in_words(forecast: Forecast) -> str:
    """The forecast for a terminal."""
    return "\n".join(
        [
            *_subject(forecast),
            "",
            *_memory_lines(forecast),
            "",
            *_time_lines(forecast),
            "",
            *_grounds(forecast),
        ]
    )


def _subject(forecast: Forecast) -> Iterator[str]:
    model, train, cluster = forecast.model, forecast.train, forecast.cluster
    parameters = count_parameters(model).total
    attention = "dense" if model.three_region is None else "three-region"
    layers = "checkpointed" if model.activation_checkpointing else "not checkpointed"
    yield f"{model.num_layers} layers of width {model.hidden_size}: {parameters:,} parameters"
    yield (
        f"a step: {train.batch_size:,} rows of {forecast.tokens:,} tokens in {train.precision}, {attention} "
        f"attention, layers {layers}"
    )
    yield f"on {cluster.gpus} x {cluster.memory:g} GiB, {cluster.usable / GIB:.1f} GiB of each for tensors"


def _memory_lines(forecast: Forecast) -> Iterator[str]:
    parts = forecast.parts_that_fit()
    asked, rows = forecast.train.accumulate, forecast.rows
    fits = forecast.fits()
    held = forecast.memory(rows, accumulates=asked > 1)
    verdict = "fits" if fits else "does NOT fit"
    yield f"a micro batch of {rows} rows a GPU needs {held.total / GIB:.1f} GiB: {verdict}"
    largest = forecast.largest_rows()
    if not fits and parts:
        rows = math.ceil(forecast.train.batch_size / forecast.cluster.gpus / parts)
        held = forecast.memory(rows, accumulates=parts > 1)
        yield f"--accumulate {parts} makes it fit: micro batches of {rows} rows, {held.total / GIB:.1f} GiB"
    elif not fits:
        held = forecast.memory(1, accumulates=True)
        yield f"even one row needs {held.total / GIB:.1f} GiB"
        yield _way_out(forecast)
    if largest:
        yield f"the largest micro batch that fits has {largest} rows"
    yield ""
    yield f"the fullest moment of a GPU, {held.name}:"
    for name, size in sorted(held.parts.items(), key=lambda part: -part[1]):
        if size:
            yield f"  {name:<36}{size / GIB:9.2f} GiB"
    yield f"  {'sum':<36}{held.total / GIB:9.2f} GiB"


def _way_out(forecast: Forecast) -> str:
    """The options under which one row fits: those that cost time before those that cost money."""
    checkpointed = dataclasses.replace(
        forecast, model=dataclasses.replace(forecast.model, activation_checkpointing=True)
    )
    options = [] if forecast.model.activation_checkpointing else ["--checkpoint-layers"]
    in_16_bits = dataclasses.replace(
        checkpointed, train=dataclasses.replace(forecast.train, precision="bf16")
    )
    candidates = [(checkpointed, options), (in_16_bits, [*options, "--precision bf16"])]
    gpus = checkpointed.gpus_that_fit()
    if gpus:
        cluster = dataclasses.replace(forecast.cluster, gpus=gpus)
        candidates.append((dataclasses.replace(checkpointed, cluster=cluster), [*options, f"--gpus {gpus}"]))
    for candidate, named in candidates:
        parts = candidate.parts_that_fit()
        if parts:
            return " ".join([*named, f"--accumulate {parts}"] if parts > 1 else named) + " makes it fit"
    return "no number of GPUs of that memory makes it fit"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400.0), ("hours", 3_600.0), ("minutes", 60.0), ("s", 1.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{1000 * seconds:.1f} ms"


def _time_lines(forecast: Forecast) -> Iterator[str]:
    train, flops, seconds = forecast.train, forecast.flops, forecast.step_seconds
    share = {
        name: f"{100 * value / flops.model:.0f} %"
        for name, value in (("layers", flops.products), ("attention", flops.attention), ("loss", flops.loss))
    }
    tokens = train.batch_size * forecast.tokens
    yield (
        f"a step: {flops.model / 1e12:,.1f} TFLOP ({', '.join(f'{n} {v}' for n, v in share.items())}), and "
        f"{flops.recomputed / 1e12:,.1f} computed again to save memory"
    )
    yield f"  {_duration(seconds)}, {tokens / seconds:,.0f} tokens/s, MFU {100 * forecast.mfu:.0f} %"
    billions = train.steps * tokens / 1e9
    yield f"{train.steps:,} steps, {billions:,.2f} billion tokens: {_duration(train.steps * seconds)}"


def _grounds(forecast: Forecast) -> Iterator[str]:
    cluster = forecast.cluster
    yield (
        f"Assumed: products and what lies between them at {cluster.utilization:g} of {cluster.tflops:g} "
        f"TFLOP/s (--utilization, --tflops), attention at {ATTENTION_SHARE:g}; communication between GPUs "
        "hidden. No whole step was measured on a GPU yet; the memory was, on a CPU."
    )
    if forecast.train.precision == "fp32":
        yield "--precision bf16 computes several times faster on a GPU with tensor cores."
