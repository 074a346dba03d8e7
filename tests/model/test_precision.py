# SPDX-License-Identifier: Apache-2.0
"""Training in 16 bits: what is rounded and what is not, the loss scale, and where a bad step went wrong."""

import dataclasses
import json
from collections import Counter

import pytest
import torch
from torch import nn

import cogview.model.transformer
from cogview.files import load_tensors
from cogview.training.checkpoint import latest_checkpoint
from cogview.training.precision import NonFiniteWatch, Precision, fast_precision
from cogview.training.transformer import TransformerTrainer, train
from cogview_kernels import _device
from tests.model.helpers import small_model
from tests.model.test_training_transformer import CONFIG, dataset

NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def config(precision, **changes):
    return dataclasses.replace(CONFIG, precision=precision, **changes)


@pytest.fixture
def modest_scale(monkeypatch):
    """Scales begin where these small models do not overflow by themselves."""
    real = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, init_scale=1024.0: real(device, init_scale=init_scale)
    )


def dtypes_of(model):
    """Output dtypes by module name, of the next forward pass."""
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, inputs, out, name=name: seen.update({name: out}))
    return seen


@pytest.mark.parametrize("precision", NARROW)
def test_products_are_narrow_and_weights_trunk_and_losses_are_not(precision):
    model = small_model(dropout=0.1).train()
    trainer = TransformerTrainer(model, dataset(), config(precision))
    seen = dtypes_of(model)
    losses = trainer._gradient(0, next(trainer.batches(0)), trainer.precision.scaler)
    for name in ("attention.query_key_value", "attention", "mlp.dense_h_to_4h", "mlp"):
        assert seen[f"transformer.layers.1.{name}"].dtype == NARROW[precision]
    # What the next layer's product reads is narrow; what the model returns is not.
    assert [value.dtype for value in seen["transformer.layers.0"]] == [torch.float32, NARROW[precision]]
    assert [value.dtype for value in seen["transformer.layers.1"]] == [torch.float32] * 2
    assert {loss.dtype for loss in losses} == {torch.float32}
    for parameter in model.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("precision", NARROW)
def test_training_in_16_bits_follows_the_losses_of_32(tmp_path, modest_scale, precision):
    wide = train(small_model(), dataset(), config("fp32", steps=30), tmp_path / "wide", progress=False)
    model = small_model()
    narrow = train(model, dataset(), config(precision, steps=30), tmp_path / "narrow", progress=False)
    assert wide["image_loss"] != narrow["image_loss"]
    for name in ("image_loss", "text_loss"):
        assert narrow[name] == pytest.approx(wide[name], rel=0.01)
    saved = latest_checkpoint(tmp_path / "narrow" / "checkpoints")
    tensors = load_tensors(saved / "optimizer.safetensors")
    assert {tensor.dtype for tensor in (*tensors.values(), *model.state_dict().values())} == {torch.float32}


@pytest.mark.parametrize(
    ("precision", "changes"),
    [
        ("bf16", {}),
        ("fp16", {}),
        ("bf16", {"activation_checkpointing": True}),
        ("fp16", {"pb_relax": "tensor", "accumulate": 2}),
        ("fp16", {"resblock_scaling": True}),
    ],
    ids=str,
)
def test_norms_train_as_with_casts_around_them(tmp_path, modest_scale, monkeypatch, precision, changes):
    """They read branches, and give what products read, in 16 bits: losses and weights keep their bits."""
    real, found = cogview.model.transformer.sandwich_layer_norm, []

    def with_casts(branch, x, *parameters, normed_dtype, **options):
        dtypes[branch.dtype, normed_dtype] += 1
        return real(branch.float(), x, *parameters, **options)

    of_train = {name: value for name, value in changes.items() if hasattr(CONFIG, name)}
    of_model = {name: value for name, value in changes.items() if name not in of_train}
    for sandwich in (real, with_casts):
        monkeypatch.setattr(cogview.model.transformer, "sandwich_layer_norm", sandwich)
        if sandwich is with_casts:
            monkeypatch.setattr(cogview.model.transformer, "_as_read_by", lambda _, normed: normed)
        dtypes, model = Counter(), small_model(dropout=0.1, **of_model)
        folder = tmp_path / sandwich.__name__
        losses = train(model, dataset(), config(precision, steps=6, **of_train), folder, progress=False)
        found.append((losses, [*model.parameters()]))
    # Of four norms the last one gives what the model returns. Blocks with a scale each end in float32.
    narrow = dtypes[(NARROW[precision],) * 2]
    assert narrow == (0 if "resblock_scaling" in changes else 3 * dtypes.total() / 4)
    assert same(found[0][0], found[1][0])
    assert all(map(torch.equal, found[0][1], found[1][1]))


class Overflows:
    """In the chosen steps, the output of attention in layer 1 is beyond float16, whatever the loss scale."""

    def __init__(self, model, steps):
        self.steps, self.calls = steps, 0
        dense = model.transformer.layers[1].attention.dense
        dense.register_forward_hook(lambda _, inputs, out: out * (3e38 if self.now else 1))
        self.now = False
        self.real = TransformerTrainer._gradient

    def __call__(self, trainer, step, *arguments):
        self.now = step in self.steps
        return self.real(trainer, step, *arguments)


def overflowing(monkeypatch, model, steps):
    overflows = Overflows(model, steps)
    monkeypatch.setattr(
        TransformerTrainer, "_gradient", lambda trainer, *arguments: overflows(trainer, *arguments)
    )


def state_of(folder):
    return json.loads((latest_checkpoint(folder / "checkpoints") / "state.json").read_text())


def same(mine, theirs):
    """Equality in which NaN, the loss of a skipped step, equals itself."""
    return json.dumps(mine) == json.dumps(theirs)


def test_a_resumed_run_has_the_losses_and_the_scale_of_an_uninterrupted_one(
    tmp_path, modest_scale, monkeypatch, capsys
):
    half, whole = config("fp16", steps=12, checkpoint_every=6), tmp_path / "whole"
    model = small_model(dropout=0.1)
    overflowing(monkeypatch, model, (2, 3, 8))
    expected = train(model, dataset(), half, whole, progress=False)
    assert state_of(whole)["trainer"]["scale"] == 1024 / 8
    assert state_of(whole)["trainer"]["_growth_tracker"] == 3
    assert state_of(whole)["skipped_steps"] == 3
    capsys.readouterr()

    cut = small_model(dropout=0.1)
    overflowing(monkeypatch, cut, (2, 3, 8))
    real, steps = TransformerTrainer.step, []

    def dies(trainer, step, batch):
        steps.append(step)
        if len(steps) == 8:
            raise RuntimeError("killed")
        return real(trainer, step, batch)

    monkeypatch.setattr(TransformerTrainer, "step", dies)
    with pytest.raises(RuntimeError, match="killed"):
        train(cut, dataset(), half, tmp_path / "cut", progress=False)
    assert state_of(tmp_path / "cut")["trainer"]["scale"] == 1024 / 4
    other = small_model(seed=9, dropout=0.1)
    overflowing(monkeypatch, other, (2, 3, 8))
    assert same(train(other, dataset(), half, tmp_path / "cut", progress=False), expected)
    assert same(state_of(tmp_path / "cut"), state_of(whole))
    shown = capsys.readouterr().err
    assert "3 of 12 steps skipped" in shown
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_skipped_step_names_the_module_where_it_began(tmp_path, modest_scale, monkeypatch, capsys):
    model = small_model()
    overflowing(monkeypatch, model, (1,))
    train(model, dataset(), config("fp16", steps=2), tmp_path, progress=False)
    shown = capsys.readouterr().err
    where = "the output of transformer.layers.1.attention.dense"
    assert f"step 1: loss nan, gradient norm nan; step skipped, as {where} was not finite" in shown


def test_a_gradient_that_only_its_scale_made_too_large_is_found_at_that_scale():
    model = small_model()
    trainer = TransformerTrainer(model, dataset(), config("fp16"))
    trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    batch = next(trainer.batches(0))
    model.train()
    result = trainer.step(0, batch)
    assert result.descent.skipped and result.descent.loss.isfinite()
    assert trainer.precision.scaler.get_scale() == 2.0**29
    before = [parameter.clone() for parameter in model.parameters()]
    where = trainer.explain(0, batch, {"loss_scale": result.board_only["loss_scale"].item()})
    assert where.startswith("the gradient of the output of ")
    assert trainer.explain(0, batch, {"loss_scale": 1.0}) == ""
    assert trainer.precision.scaler.get_scale() == 2.0**29
    for mine, theirs in zip(before, model.parameters(), strict=True):
        assert torch.equal(mine, theirs) and theirs.grad is None


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.between = 1.0

    def forward(self, x):
        return self.second(self.first(x) * self.between)


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        ("nothing", ""),
        ("input", "the input of the model"),
        ("between", "the input of second"),
        ("weight", "the output of first"),
        ("gradient", "the gradient of the output of second"),
    ],
)
def test_the_watch_names_the_first_place_in_order(spoil, where):
    model = Chain()
    x = torch.ones(1, 2) * (float("nan") if spoil == "input" else 1)
    if spoil == "between":
        model.between = float("inf")
    if spoil == "weight":
        model.first.weight.data[0, 0] = float("inf")
    with NonFiniteWatch(model) as watch:
        y = model(x)
        (y * 0).sum().sqrt().backward() if spoil == "gradient" else y.sum().backward()
    assert watch.where == where
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert not model.first.weight._backward_hooks


def test_a_precision_that_is_not_there_is_one_clear_error(monkeypatch):
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, fp16, got 'int8'"):
        Precision("int8", "cpu")
    with pytest.raises(ValueError, match="fp16 cannot be used on meta: PyTorch has no autocast for meta"):
        Precision("fp16", "meta")
    real = torch.get_autocast_dtype
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    with pytest.raises(ValueError, match=r"fp16 cannot be used on cpu: this PyTorch \(.*\) has no such"):
        Precision("fp16", "cpu")
    monkeypatch.setattr(torch, "get_autocast_dtype", real)
    Precision("fp16", "cpu")


@pytest.mark.parametrize(("has", "expected"), [(True, "bf16"), (False, "fp32")])
def test_the_fast_precision_of_a_cpu_is_bfloat16_where_it_has_matrix_units(monkeypatch, has, expected):
    told = {"avx2": True, "amx_bf16": has}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    assert fast_precision("cpu") == expected
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64"})
    assert fast_precision(torch.device("cpu")) == "fp32"
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert fast_precision("cpu") == "fp32"


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_processor_that_emulates_a_precision_is_named(monkeypatch, name, recwarn):
    monkeypatch.setattr(_device, "emulates", lambda dtype: dtype != torch.float32)
    with pytest.warns(UserWarning, match=f"no matrix products in {name}.*--precision fp32 is faster"):
        Precision(name, "cpu")
    recwarn.clear()
    Precision("fp32", "cpu")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    Precision(name, "cpu")
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(_device, "emulates", lambda dtype: False)
    Precision(name, "cpu")
    assert not recwarn.list


def test_a_gpu_without_bfloat16_is_told_what_it_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
    with pytest.raises(ValueError, match="Tesla V100 has no bfloat16; fp16 is what it has"):
        Precision("bf16", "cuda")
    assert fast_precision("cuda") == "fp32"


def test_a_checkpoint_without_a_loss_scale_is_refused_in_one_line(tmp_path):
    train(small_model(), dataset(), config("fp32", steps=2), tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"step-00000002 holds no loss scale .* cannot go on in fp16"):
        train(small_model(), dataset(), config("fp16", steps=4), tmp_path, progress=False)
