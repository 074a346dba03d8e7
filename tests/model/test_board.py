# SPDX-License-Identifier: Apache-2.0
"""What TensorBoard is given, and trainings that go on without it."""

import dataclasses
import sys

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cogview.training import speed
from cogview.training.board import Board
from cogview.training.transformer import train
from tests.model.helpers import small_model
from tests.model.test_training_transformer import CONFIG, dataset

SHORT = dataclasses.replace(CONFIG, steps=4, samples_every=2)


def test_curves_and_samples_that_change_no_loss(tmp_path):
    def draw():
        torch.manual_seed(1234)
        return Image.new("RGB", (5, 4), "red")

    shown = train(small_model(dropout=0.1), dataset(), SHORT, tmp_path / "a", draw=draw, progress=False)
    assert shown == train(small_model(dropout=0.1), dataset(), SHORT, tmp_path / "b", progress=False)
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard"), {"images": 0}).Reload()
    scalars = ("image_loss", "text_loss", "learning_rate", "gradient_norm")
    rates = ("tokens_per_second", "teraflops_per_second", "peak_memory_gb")
    assert set(events.Tags()["scalars"]) == {f"train/{name}" for name in (*scalars, *rates)}
    assert [event.value for event in events.Scalars("train/image_loss")] == pytest.approx(shown["image_loss"])
    assert all(event.value > 0 for name in rates for event in events.Scalars(f"train/{name}"))
    samples = events.Images("train/samples")
    assert [(image.step, image.width, image.height) for image in samples] == [(2, 5, 4), (4, 5, 4)]


def test_without_tensorboard_a_training_goes_on_and_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    history = train(small_model(), dataset(), SHORT, tmp_path, progress=False)
    assert len(history["image_loss"]) == 4
    assert capsys.readouterr().err.count("the package tensorboard is not installed") == 1


def test_a_folder_that_refuses_the_curves_is_told_once(tmp_path):
    (tmp_path / "file").write_text("")
    told = []
    with Board(tmp_path / "file" / "tensorboard", 0, told.append) as board:
        board.scalar("x", 1.0, 0)
        board.picture("y", Image.new("RGB", (2, 2)), 0)
    (line,) = told
    assert "no more curves" in line and "Not a directory" in line


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("Tesla V100-SXM2-32GB", torch.float16, 125),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5),
        ("NVIDIA A10", torch.float16, 125),
        ("NVIDIA L40S", torch.float16, 362),
        ("NVIDIA L4", torch.float16, 121),
        ("NVIDIA GH200 480GB", torch.bfloat16, 989),
        # Names that hold those of others, and are none of them.
        ("NVIDIA RTX A4000", torch.float16, 0),
        ("NVIDIA RTX A1000", torch.float16, 0),
        ("NVIDIA L40", torch.float16, 0),
        ("NVIDIA T400", torch.float16, 0),
        ("a chip of tomorrow", torch.float16, 0),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_name(monkeypatch, name, dtype, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert speed.peak_flops(torch.device("cuda"), dtype) == teraflops * 1e12
    assert speed.peak_flops(torch.device("cpu"), dtype) == 0
