# SPDX-License-Identifier: Apache-2.0
"""Run by `make wheel-check` outside the checkout: the installed wheel works with PyTorch alone."""

import pathlib

import torch

import cogview_kernels
from cogview_kernels import info

ROOT = pathlib.Path(__file__).resolve().parents[1]
installed = pathlib.Path(cogview_kernels.__file__).resolve()
assert installed.parent != ROOT / "cogview_kernels", f"this is the checkout, not the wheel: {installed}"

scores = torch.randn(4, 100, requires_grad=True)
probs = cogview_kernels.stable_softmax(scores, backend="cpu")
torch.testing.assert_close(probs, torch.softmax(scores, -1))
probs.square().sum().backward()
print(info.describe())
print("smoke test passed")
