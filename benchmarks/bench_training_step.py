# SPDX-License-Identifier: Apache-2.0
"""A whole training step: forward, backward, clipping and AdamW, against the same model in plain PyTorch.

All variants move the same weights by one optimizer, at a learning rate of 0: it does all its work, and every
step is from the same weights. Dropout and PB-Relax are off, so that the plain model computes the same; either
would cost it more than ours. 16 bits are autocast over float32 weights, as in training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.definitions import STEP, Benchmark, Case, Forward, Inputs, Variant, Work
from benchmarks.rivals import training_step as plain
from benchmarks.timing import Limits
from cogview.config import ThreeRegionConfig, TrainConfig
from cogview.model.transformer import CogView
from cogview.tokens.sequence import Batch
from cogview.training.flops import step_flops
from cogview.training.optim import make_optimizer
from cogview.training.precision import DTYPES, Precision
from cogview.training.transformer import losses_of, sample_layouts
from cogview_kernels import ThreeRegionLayout

_PRECISIONS = {dtype: name for name, dtype in DTYPES.items()}


def cases(device: torch.device, tiny: bool) -> list[Case]:
    chosen = shapes.STEP.on(device, tiny)
    dtypes = (torch.bfloat16,) if device.type == "cuda" else shapes.CPU_DTYPES
    if device.type == "cpu" and not (tiny or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        dtypes = (torch.float32,)  # PyTorch's products in 16 bits then take minutes
    return [Case(shape, dtype, STEP) for shape in chosen for dtype in dtypes]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    config, rows = case.shape.model, case.shape.B
    with device:
        model = CogView(config).train()
    T = case.shape.T
    tokens = torch.randint(config.vocab_size, (rows, T + 1), device=device)
    text = torch.zeros(rows, T, dtype=torch.bool, device=device)
    text[:, : case.shape.regions.text] = True
    weight = torch.ones(rows, T, device=device)
    batch = Batch(
        tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weight, text, torch.ones_like(text)
    )
    optimizer = make_optimizer(model, TrainConfig(learning_rate=0.0))
    values = {"model": model, "batch": batch, "optimizer": optimizer, "precision": _PRECISIONS[case.dtype]}
    return Inputs(values)


def layouts_of(x: Inputs, three_region: ThreeRegionConfig) -> list[ThreeRegionLayout]:
    """Drawn anew, as training draws them in every step, but always the same."""
    generator = torch.Generator(device=x.batch.tokens.device).manual_seed(0)
    config = dataclasses.replace(x.model.config, three_region=three_region)
    return sample_layouts(config, x.batch, generator)


def truth(inputs: Inputs, case: Case) -> tuple[Inputs, Forward]:
    return inputs, lambda: _in_float32(inputs, None)


def three_region_truth(inputs: Inputs, case: Case) -> tuple[Inputs, Forward]:
    return inputs, lambda: _in_float32(inputs, layouts_of(inputs, case.shape.regions.config))


def _in_float32(x: Inputs, layouts: list[ThreeRegionLayout] | None) -> tuple[Tensor, Tensor]:
    loss = plain.loss_of(x.model, x.batch, layouts)
    return loss, *torch.autograd.grad(loss, plain.first_gain(x.model))


def flops(case: Case, three_region: ThreeRegionConfig | None) -> Work:
    config = dataclasses.replace(case.shape.model, three_region=three_region)
    formula = "72 L C^2 N + 12 L C pairs + 6 N C V: products, attention, loss, without recomputation"
    return Work(step_flops(config, case.shape.B, case.shape.T).model, "matmul", formula)


def _dense(x: Inputs, case: Case) -> Forward:
    return _ours(x, lambda: None)


def _three_region(x: Inputs, case: Case) -> Forward:
    return _ours(x, lambda: layouts_of(x, case.shape.regions.config))


def _ours(x: Inputs, draw: Callable[[], list[ThreeRegionLayout] | None]) -> Forward:
    precision = Precision(x.precision, x.batch.tokens.device)

    def step() -> tuple[Tensor, Tensor]:
        layouts = draw()
        with precision.autocast():
            loss, *_ = losses_of(x.model, x.batch, layouts)
        return plain.descend_from(x, loss)

    return step


def limits(case: Case, device: torch.device) -> Limits:
    return Limits(5.0, 5, 20) if device.type == "cuda" else Limits(6.0, 3, 15)


_THREE_REGION = Variant(
    "cogview, three-region",
    _three_region,
    kind="backend",
    truth="three-region",
    work=lambda case, x: flops(case, case.shape.regions.config),
)
_SDPA = "attention by PyTorch's SDPA on a GPU, by our kernel on a CPU"
_DENSE = Variant("cogview, dense", _dense, kind="backend", note=_SDPA)

BENCHMARK = Benchmark(
    op="training_step",
    cases=cases,
    inputs=make_inputs,
    truths={"op": truth, "three-region": three_region_truth},
    backends=(),
    call=lambda function, x: function(x),
    rivals=(
        _THREE_REGION,
        _DENSE,
        plain.keeping_all(_THREE_REGION),
        plain.keeping_all(_DENSE),
        *plain.VARIANTS,
    ),
    work=lambda case, x: flops(case, None),
    baseline="plain PyTorch",
    limits=limits,
)
