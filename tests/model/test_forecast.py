# SPDX-License-Identifier: Apache-2.0
import dataclasses
import re

import pytest

from cogview import cli
from cogview.presets import PRESETS
from cogview.training.forecast import Cluster, Forecast, in_words

BASE = PRESETS["base"]


def base(gpus=8, memory=80.0, precision="bf16", checkpointing=True, **train):
    model = dataclasses.replace(BASE.model, activation_checkpointing=checkpointing)
    train = dataclasses.replace(BASE.train, precision=precision, **train)
    return Forecast(model, train, Cluster(gpus, memory))


def test_the_parts_that_it_names_fit_and_fewer_do_not():
    forecast = base(batch_size=640)
    assert not forecast.fits()
    parts = forecast.parts_that_fit()

    def in_parts(number):
        return dataclasses.replace(forecast, train=dataclasses.replace(forecast.train, accumulate=number))

    assert parts > 1 and in_parts(parts).fits() and not in_parts(parts - 1).fits()
    assert in_parts(parts).rows <= forecast.largest_rows()
    assert f"--accumulate {parts} makes it fit" in in_words(forecast)


def test_a_batch_that_fits_as_it_is_needs_no_option():
    text = in_words(base(batch_size=64))
    assert "a micro batch of 8 rows a GPU needs" in text and "makes it fit" not in text


@pytest.mark.parametrize(
    ("forecast", "way_out"),
    [
        (base(1, 72.0, checkpointing=False, batch_size=8), "\n--checkpoint-layers makes it fit"),
        (base(2, 16.0, batch_size=8), "\n--gpus 8 makes it fit"),
        (base(1, 1.0, batch_size=8), "no number of GPUs of that memory makes it fit"),
    ],
)
def test_it_names_the_way_out_where_not_even_one_row_fits(forecast, way_out):
    assert not forecast.parts_that_fit()
    assert way_out in in_words(forecast)


def test_twice_the_gpus_halve_the_time_and_checkpoints_cost_a_third_more_products():
    once, twice = base(8), base(16)
    assert once.step_seconds == pytest.approx(2 * twice.step_seconds)
    assert once.mfu == pytest.approx(twice.mfu)
    plain = base(8, checkpointing=False)
    assert 1.25 < once.step_seconds / plain.step_seconds < 4 / 3


def test_a_step_without_attention_runs_at_the_utilization():
    forecast = base(8, checkpointing=False)
    narrow = dataclasses.replace(forecast.model, max_positions=3)
    assert dataclasses.replace(forecast, model=narrow).mfu == pytest.approx(0.45, rel=0.01)


def test_the_command_takes_the_options_of_training(capsys):
    words = ["--preset=base", "--gpus=8", "--memory=80", "--batch-size=64", "--precision=bf16"]
    assert cli.main(["plan", *words, "--attention", "three-region", "--model.num-layers", "24"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("24 layers of width 2560: 2,0")
    assert "64 rows of 1,088 tokens in bf16, three-region attention, layers checkpointed" in text
    parts = dict(re.findall(r"^  (\w[\w ,:-]*?) +([\d.]+) GiB$", text, re.MULTILINE))
    total = float(parts.pop("sum"))
    assert sum(map(float, parts.values())) == pytest.approx(total, abs=0.05)


def test_the_command_needs_no_option(capsys):
    assert cli.main(["plan"]) == 0
    assert "6 layers of width 256" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "gpus must be at least 1, got 0"),
        (["--headroom", "1"], "headroom must be at least 0 and below 1, got 1.0"),
        (["--gpus", "64", "--batch-size", "32"], "gpus must be at most batch_size 32, got 64"),
    ],
)
def test_a_mistake_is_one_line(words, message, capsys):
    assert cli.main(["plan", *words]) == 2
    assert capsys.readouterr().err.startswith(f"cogview plan: --{message}")
