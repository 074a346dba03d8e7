# SPDX-License-Identifier: Apache-2.0
"""Several ranks against one process. What they do is in ``ranks.py``; most tests here share one run of it."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cogview
from cogview.cli import main
from cogview.device import usable_device
from cogview.files import load_tensors
from cogview.training import distributed
from cogview.training.transformer import train
from tests.model.helpers import small_model
from tests.model.ranks import WANDERING, data, dataset, model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_folder):
    """What the ranks left behind: ``report.json``, the trainings ``wandering`` and ``mixed``, and ``run``."""
    folder = tmp_path_factory.mktemp("ranks")
    others = shutil.ignore_patterns("checkpoints", "model.json", "tensorboard")
    shutil.copytree(run_folder, folder / "run", ignore=others)
    program = (
        "import sys; from pathlib import Path; from tests.model.ranks import report; "
        "report(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(folder / "run")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def result(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """History, weights and validation losses of a training that one process does at once."""
    trained, folder = model(0), tmp_path_factory.mktemp("alone")
    history = train(trained, data(), WANDERING, folder, progress=False)
    return history, trained.state_dict(), validation_losses(folder)


def validation_losses(folder):
    """By kind and step, what TensorBoard has; of a step that was done twice, the last."""
    events = EventAccumulator(str(folder / "tensorboard" / "train")).Reload()
    kinds = ("image_loss", "text_loss")
    return {
        (kind, event.step): event.value
        for kind in kinds
        for event in events.Scalars(f"train/validation_{kind}")
    }


def test_a_killed_rank_restarts_all_and_a_signal_to_one_stops_all_after_the_same_step(folder, result):
    assert result["four"] == [{"attempt": 1, "outcome": "SIGINT"}] * 4
    assert [rank["outcome"] for rank in result["two"]] == ["SIGTERM", "SIGINT"]
    assert result["one"] == [{"outcome": "SIGINT"}]
    shards = {
        path.name: len(list(path.glob("optimizer-*")))
        for path in (folder / "wandering/checkpoints").iterdir()
    }
    assert shards == {
        "step-00000004": 4,
        "step-00000007": 4,
        "step-00000008": 2,
        "step-00000009": 2,
        "step-00000010": 0,
        "step-00000012": 4,
    }


def test_four_then_two_then_one_then_four_ranks_learn_what_one_process_learns(folder, result, alone):
    """Sums over the ranks round otherwise than sums over the rows: 1e-7 of a gradient, hence of a step.

    One third of the attention's input bias is that of the keys, whose gradient is 0 but for rounding, so that
    AdamW turns noise into steps. They matter to no output and are left out.
    """
    history, weights, validation = alone
    for rank in result["four again"]:
        for name in history:
            assert rank["outcome"][name] == pytest.approx(history[name], rel=2e-6)
    by_ranks = validation_losses(folder / "wandering")
    assert {key: by_ranks[key] for key in validation} == pytest.approx(validation, rel=2e-6)
    saved = load_tensors(folder / "wandering/checkpoints/step-00000012/model.safetensors")
    assert saved.keys() == weights.keys()
    for name, weight in weights.items():
        if name.endswith("query_key_value.bias"):
            keys = slice(32, 64)
            saved[name][keys] = weight[keys]
        torch.testing.assert_close(saved[name], weight, rtol=1e-5, atol=1e-6)


def test_in_float16_all_ranks_skip_a_step_and_halve_the_scale_together(folder, result):
    for rank in result["two"]:
        for name, values in result["mixed alone"].items():
            assert rank["mixed"][name] == pytest.approx(values, rel=1e-3)
    together, alone = (
        json.loads((folder / name / "checkpoints/step-00000004/state.json").read_text())
        for name in ("mixed", "mixed alone")
    )
    skipped = alone["skipped_steps"]  # The first scale may be too large as well.
    assert skipped >= 1 and alone["trainer"]["scale"] == 2.0 ** (16 - skipped)
    assert together["skipped_steps"] == skipped and together["trainer"] == alone["trainer"]
    first, second = (rank["mixed errors"] for rank in result["two"])
    assert "step 2: loss nan, gradient norm nan; step skipped, as the loss was not finite\n" in first
    assert "after 4 steps, validation: image_loss" in first
    # A processor without products in float16 is told of, once, with the line of code below it.
    warned = 2 * first.count("no matrix products in fp16")
    assert warned in (0, 2) and len(first.splitlines()) == skipped + 2 + warned and second == ""


def test_the_command_speaks_once_and_leaves_a_run_like_any_other(folder, result):
    first, second = result["two"]
    assert first["exit"] == second["exit"] == 0
    assert first["said"].count("model trained") == first["said"].count("train: step 2 of 2") == 1
    assert second["said"] == ""
    run = cogview.load_run(folder / "run", "cpu")
    assert len(run.model.transformer.layers) == 1
    assert len(list((folder / "run/tensorboard/train").iterdir())) == 1


def test_what_ranks_saved_is_read_without_pickle_and_refused_where_it_is_damaged(
    folder, tmp_path, monkeypatch
):
    saved = tmp_path / "copy/checkpoints/step-00000007"
    shutil.copytree(folder / "wandering/checkpoints/step-00000007", saved)
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(torch, "load", None)
    history = train(model(9), dataset(), WANDERING, tmp_path / "copy", progress=False)
    assert len(history["image_loss"]) == 12
    shutil.rmtree(tmp_path / "copy/checkpoints/step-00000012")
    shutil.rmtree(tmp_path / "copy/checkpoints/step-00000008")
    (saved / "optimizer-00002-of-00004.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"optimizer-00002-of-00004.safetensors has 7 of \d+ bytes"):
        train(model(9), dataset(), WANDERING, tmp_path / "copy", progress=False)


def test_a_whole_layer_is_no_unit_of_fsdp_and_the_error_says_what_is():
    from torch.distributed.fsdp import fully_shard

    tokens = torch.zeros(1, 8, dtype=torch.int64)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        expected = small_model()(tokens)
        wrong, right = small_model(), small_model()
        for layer in wrong.transformer.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(wrong, mesh=mesh)
        with pytest.raises(ValueError, match=r"each of model.sharding_units\(\), then with the model"):
            wrong(tokens)
        for unit in right.sharding_units():
            fully_shard(unit, mesh=mesh)
        fully_shard(right, mesh=mesh)
        assert torch.equal(right(tokens), expected)
    finally:
        dist.destroy_process_group()


def test_every_part_on_every_rank_needs_a_row(monkeypatch):
    monkeypatch.setattr(distributed, "num_ranks", lambda: 4)
    distributed.require_rows(8, 2)
    with pytest.raises(ValueError, match="at least the 4 ranks times the 2 parts of --accumulate, got 7"):
        distributed.require_rows(7, 2)


def test_torchrun_gives_each_rank_its_gpu_and_starts_no_other_verb(monkeypatch, capsys):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    tried = []
    monkeypatch.setattr(torch, "zeros", lambda size, device: tried.append(device) or torch.ones(size))
    assert usable_device("cuda") == "cuda:1" and tried == ["cuda:1"]
    assert main(["demo"]) == 2 and capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert main(["demo"]) == 2
    assert "demo is one process; start it without torchrun" in capsys.readouterr().err
