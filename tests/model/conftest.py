# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the model package's tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import cogview.data.digits
from cogview.training.pipeline import TrainModel, TrainTokenizers, train_model, train_tokenizers
from tests.model.helpers import tiny_preset


@pytest.fixture
def default_dtype():
    """``default_dtype(dtype)`` sets PyTorch's default until the test ends."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def one_copy_of_each_digit():
    """Training on an eighth of the digits data: each scan without its altered copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cogview.data.digits, "TRAINING_COPIES", 1)
        yield


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """A run on the digits with next to no training. Tests read it and write nothing into it."""
    out = tmp_path_factory.mktemp("run")
    options = {"data": "digits", "out": out, "preset": tiny_preset(), "device": "cpu", "progress": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cogview.data.digits, "TRAINING_COPIES", 1)
        train_tokenizers(TrainTokenizers(**options))
        train_model(TrainModel(**options))
    return out


@pytest.fixture
def photos(tmp_path):
    """A folder of six pictures with captions."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    lines = [f"{index}.png\ta photo of thing number {index}" for index in range(6)]
    (folder / "captions.tsv").write_text("\n".join(lines))
    return folder
