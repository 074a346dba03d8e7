# SPDX-License-Identifier: Apache-2.0
"""Training wholly in float16, and the study of it: what is emulated, what is seen to overflow, and where."""

import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import cogview.evaluation.study as study
from cogview.cli import main
from cogview.config import TrainConfig
from cogview.evaluation.half import ALPHA, HalfTrainer, ScoredAttention, SumsInFloat32, Techniques
from cogview.evaluation.study import StabilityStudy, StudySize, finding, place, study_stability
from cogview.files import write_json
from cogview.training.loop import descend
from cogview.training.optim import make_optimizer
from tests.model.helpers import small_model
from tests.model.test_training_transformer import dataset

TINY = StudySize(study._shape(2, 32, 2), batch_size=2, steps=2, learning_rate=0.2)
BATCH = dataset().batch(0, 4, text_weight=1.0, caption_fraction=0.0, seed=0)


SUMS = ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "embedding_dense_backward")


class DtypesOfSums(TorchDispatchMode):
    """The dtype of every long sum that is computed within the block."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split("::")[1] in SUMS:
            self.seen.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def trainer(**techniques):
    torch.manual_seed(0)
    config = TrainConfig(learning_rate=0.01, batch_size=4)
    model = small_model(three_region=None).config
    return HalfTrainer(model, config, Techniques(**techniques), torch.device("cpu"))


def test_long_sums_of_float16_are_rounded_once_in_both_passes():
    a, b = (torch.randn(2, 5, 7).half().requires_grad_() for _ in range(2))
    with DtypesOfSums() as sums, SumsInFloat32():
        out = a @ b.transpose(1, 2)
        out.sum().backward()
    assert sums.seen == [torch.float32] * 3
    assert torch.equal(out, (a.float() @ b.float().transpose(1, 2)).half())
    assert a.grad.dtype == torch.float16
    table = torch.zeros(3, 2, dtype=torch.float16, requires_grad=True)
    with SumsInFloat32():
        torch.nn.functional.embedding(torch.ones(4096, dtype=torch.int64), table).sum().backward()
    assert table.grad[1].tolist() == [4096, 4096]  # In float16, 2048 + 1 is 2048.


@pytest.mark.parametrize("float32_trunk", [False, True])
def test_a_step_keeps_to_its_dtypes_and_moves_the_master_copy(float32_trunk):
    one = trainer(pb_relax=True, sandwich_norm=True, float32_trunk=float32_trunk)
    outputs = []
    one.model.transformer.layers[0].register_forward_hook(lambda _, inputs, out: outputs.append(out[0]))
    before = one.master.word_embeddings.weight.clone()
    one.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with DtypesOfSums() as sums:
        seen = one.step(BATCH)
    assert not seen.overflow and not seen.bad_gradient and seen.scale == 1024
    assert set(sums.seen) == {torch.float32}
    assert outputs[0].dtype == (torch.float32 if float32_trunk else torch.float16)
    assert {weight.dtype for weight in one.master.parameters()} == {torch.float32}
    assert not torch.equal(one.master.word_embeddings.weight, before)
    for mine, narrow in zip(one.master.parameters(), one.model.parameters(), strict=True):
        assert torch.equal(mine if float32_trunk else mine.half(), narrow)


@pytest.mark.parametrize("alpha", [1, ALPHA])
def test_scored_attention_is_the_attention_of_the_model(alpha):
    model = small_model(scale=5.0)
    attention = model.transformer.layers[0].attention
    x = torch.randn(2, 9, 64)
    torch.testing.assert_close(ScoredAttention(attention, alpha)(x, None), attention(x, None))


def test_it_trains_as_float32_does():
    one = trainer(sandwich_norm=True, pb_relax=True)
    one.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain = copy.deepcopy(one.master)
    optimizer = make_optimizer(plain, one.train)
    wide = []
    for _ in range(4):
        logits = plain.logits(plain(BATCH.tokens))
        each = F.cross_entropy(logits.transpose(1, 2), BATCH.targets, reduction="none")
        loss = (each * BATCH.weight).sum() / BATCH.weight.sum()
        loss.backward()
        wide.append(descend(loss, plain, optimizer, clip_norm=one.train.clip_norm).loss.item())
    narrow = [one.step(BATCH).loss for _ in range(4)]
    assert narrow != wide
    assert narrow == pytest.approx(wide, rel=5e-3)
    assert narrow[-1] < narrow[0] - 0.05


LAYER = "transformer.layers.1."


@pytest.mark.parametrize(
    ("name", "factor", "techniques", "where"),
    [
        ("attention.query_key_value.weight", 1e3, {}, "attention scores, layer 1"),
        ("attention.query_key_value.weight", 1e3, {"pb_relax": True}, ""),
        ("attention.query_key_value.weight", 1e3, {"float32_trunk": True}, "attention scores, layer 1"),
        ("attention.dense.weight", 3e7, {}, "attention, layer 1"),
        ("mlp.dense_4h_to_h.weight", 3e8, {"sandwich_norm": True}, "MLP, layer 1"),
    ],
)
def test_an_overflow_is_told_by_its_place(name, factor, techniques, where):
    one = trainer(**techniques)
    weight = dict(one.model.named_parameters())[LAYER + name]
    with torch.no_grad():
        weight.copy_((weight.float() * factor).clamp(-6e4, 6e4))
    before = one.master.word_embeddings.weight.clone()
    one.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    seen = one.step(BATCH)
    assert place(seen.overflow) == where
    assert torch.equal(one.master.word_embeddings.weight, before) == bool(where)


def test_the_trunk_overflows_between_two_modules_and_is_named():
    one = trainer()
    with torch.no_grad():
        one.model.transformer.layers[0].mlp.dense_4h_to_h.bias.fill_(6e4)
        one.model.transformer.layers[1].attention.dense.bias.fill_(6e4)
    assert place(one.step(BATCH).overflow) == "main branch, layer 1"


def test_a_loss_scale_that_is_too_large_skips_the_step_and_is_no_overflow():
    one = trainer()
    one.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = copy.deepcopy(one.master.state_dict())
    seen = one.step(BATCH)
    assert not seen.overflow
    assert seen.bad_gradient.startswith("the gradient of ")
    assert one.scaler.get_scale() == 2.0**39
    for name, tensor in one.master.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert seen.sizes["trunk"] and len(seen.sizes["branches"]) == 4


def test_numbers_that_no_training_takes_bind_no_folder(tmp_path, capsys):
    out = tmp_path / "out"
    for name in ("stability", "tokenizers"):
        for option, value, said in (
            ("seeds", 10**20, "a whole number from 1 to 10,000, got 1"),
            ("steps", 10**20, "from 1 to 99,999,999, got 1"),
            ("learning-rate", 1e39, "finite, from 0 to 1,000,000,000, got 1"),
        ):
            assert main(["study", name, "--out", str(out), f"--{option}", str(value)]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"cogview study: --{option} must be {said}")
    assert not out.exists()


@pytest.fixture
def two_variants(monkeypatch):
    chosen = {name: study.VARIANTS[name] for name in ("both", "neither, float32 trunk, resblock scaling")}
    monkeypatch.setattr(study, "VARIANTS", chosen)
    monkeypatch.setitem(study.SIZES, "small", TINY)


def test_an_interrupted_study_goes_on_after_its_last_finished_run(
    two_variants, tmp_path, monkeypatch, capsys
):
    done = []
    real = study._run

    def interrupted(options, variant, *rest):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(variant)
        return real(options, variant, *rest)

    command = ["study", "stability", "--out", str(tmp_path), "--seeds", "1", "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(study, "_run", interrupted)
        assert main(command) == 130
    assert "Run the same command again" in capsys.readouterr().err
    monkeypatch.setattr(study, "_run", lambda *given: done.append(given[1]) or real(*given))
    assert main(command) == 0
    assert done == list(study.VARIANTS)
    shown = capsys.readouterr().out
    assert "both: 1 of 1 runs go on to the end" in shown
    for name in study.VARIANTS:
        assert f"{name} " in shown
    records = json.loads((tmp_path / "stability.json").read_text())
    assert [len(record["loss"]) for record in records] == [2, 2]
    assert len((tmp_path / "stability.csv").read_text().splitlines()) == 3
    with Image.open(tmp_path / "stability.png") as picture:
        assert min(picture.size) > 500
    with pytest.raises(ValueError, match=r"started with size\.learning_rate = 0\.2, now 0\.1"):
        study_stability(StabilityStudy(tmp_path, dataclasses.replace(TINY, learning_rate=0.1), 1, "cpu"))


@pytest.mark.parametrize(
    "damage", [{"variant": "neither"}, {"loss": ["x"]}, {"largest": {}}, {"overflow": {"step": 1}}, None]
)
def test_a_damaged_record_of_a_training_is_one_clear_error(tmp_path, damage):
    lists = {name: [1.0] for name in ("trunk", "scores", "branches")}
    content = {
        "variant": "both",
        "seed": 0,
        "steps": 1,
        "overflow": None,
        "bad_gradients": [],
        "dropped_blocks": 0,
        "loss": [1.0],
        "scale": [1.0],
        "largest": lists,
        "largest_by_layer": lists,
    }
    path = tmp_path / "both-seed0.json"
    write_json(path, content)
    assert study._read_run(path, "both", 0) == content
    write_json(path, {} if damage is None else {**content, **damage})
    with pytest.raises(ValueError, match=r"both-seed0\.json is damaged: .*; remove it$"):
        study._read_run(path, "both", 0)


def record(variant, where):
    overflow = where and {"step": 3, "where": where}
    return {"variant": variant, "seed": 0, "overflow": overflow}


def test_the_finding_says_plainly_what_does_not_agree():
    trunk, scores = (
        "the output of transformer.layers.3",
        "the input of transformer.layers.3.attention.softmax",
    )
    places = {"neither": trunk, "PB-Relax": trunk, "Sandwich-LN": scores, "both": None}
    agrees = finding([record(name, where) for name, where in places.items()])
    assert "unlike" not in agrees and "Sandwich-LN: 1 of 1 runs overflow in the attention" in agrees
    places["neither"] = scores
    assert "neither: 0 of 1 runs overflow in the main branch, unlike the paper's;" in finding(
        [record(name, where) for name, where in places.items()]
    )
