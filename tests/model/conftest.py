# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the model package's tests."""

from __future__ import annotations

import pytest
import torch

import cogview.data.digits
from cogview.training.pipeline import TrainModel, TrainTokenizers, train_model, train_tokenizers
from tests.model.helpers import save_photos, tiny_preset


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
    save_photos(tmp_path / "photos")
    return tmp_path / "photos"
