# SPDX-License-Identifier: Apache-2.0
"""The precision in which a trained model draws and reads."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from cogview.model.transformer import CogView

Precision = Literal["fp32", "bf16", "fp16", "int8"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16}


def in_precision(model: CogView, precision: Precision) -> CogView:
    """The model with its weights, activations and cache in ``precision``, changed in place.

    "int8" is bf16 with the weights of the linear layers in 8 bits, one scale for each output, by torchao;
    the embedding, which is also the head, stays in bf16.

    ValueError for another name, ModuleNotFoundError without torchao.
    """
    if precision not in get_args(Precision):
        known = ", ".join(get_args(Precision))
        raise ValueError(f"precision must be one of {known}, got {precision!r}")
    model = model.to(DTYPES[precision])
    if precision == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
    return model
