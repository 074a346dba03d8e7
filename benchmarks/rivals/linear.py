# SPDX-License-Identifier: Apache-2.0
"""A linear layer of few rows and its GELU in plain PyTorch."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from benchmarks.definitions import Case, Forward, Inputs, Variant

PLAIN = "F.linear and F.gelu"


def _plain(x: Inputs, case: Case) -> Forward:
    return lambda: functools.reduce(
        torch.add, (F.gelu(F.linear(x.x, weight, x.bias), approximate="tanh") for weight in x.weights)
    )


VARIANTS = (Variant(PLAIN, _plain),)
