# SPDX-License-Identifier: Apache-2.0
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import cogview.training.transformer
from cogview.config import TrainConfig
from cogview.data.rows import Rows
from cogview.data.tokens import TokenDataset
from cogview.training.transformer import TransformerTrainer, losses_of, sample_layouts, train
from cogview_kernels.linear_cross_entropy import native
from tests.model.helpers import VOCAB, heed_signals, small_model

CONFIG = TrainConfig(
    steps=12, batch_size=8, learning_rate=2e-3, text_weight=3.0, checkpoint_every=4, warmup_fraction=0.2
)


def dataset():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (20, 16), generator=generator)
    captions = [[[1 + index % 4, 7], [9, 1 + index % 4, 8]] for index in range(20)]
    return TokenDataset(VOCAB, Rows.in_memory(VOCAB, codes, captions), length=26)


def test_loss_is_the_weighted_cross_entropy_of_both_kinds():
    model = small_model(scale=5.0)
    batch = dataset().batch(0, 8, text_weight=3.0, caption_fraction=0.5, seed=0)
    layouts = sample_layouts(model.config, batch, torch.Generator().manual_seed(0))
    loss, image_loss, text_loss = losses_of(model, batch, layouts)

    logits = model.logits(model(batch.tokens, layout=layouts))
    each = F.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")
    real = batch.targets != VOCAB.pad
    image = real & (batch.tokens < VOCAB.num_image_codes)
    text = real & ~image
    expected = (each[image].sum() + 3 * each[text].sum()) / (image.sum() + 3 * text.sum())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(image_loss, each[image].mean().detach())
    torch.testing.assert_close(text_loss, each[text].mean().detach())
    gradients = [torch.autograd.grad(value, list(model.parameters())) for value in (loss, expected)]
    for fused, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-5)


def test_rows_lose_their_text_in_training_and_not_in_validation():
    trainer = TransformerTrainer(small_model(), dataset(), dataclasses.replace(CONFIG, text_dropout=0.6))
    options = {"text_weight": 3.0, "caption_fraction": CONFIG.caption_fraction, "seed": CONFIG.seed}
    whole, dropped = (dataset().batch(0, 8, text_dropout=share, **options).tokens for share in (0.0, 0.6))
    assert not torch.equal(whole, dropped)
    assert torch.equal(next(trainer.batches(0)).tokens, dropped)
    assert torch.equal(trainer._batches_of(dataset(), 8)(0).tokens, whole)


def test_codes_are_hidden_in_training_and_not_in_validation():
    trainer = TransformerTrainer(small_model(), dataset(), dataclasses.replace(CONFIG, code_dropout=0.5))
    plain = TransformerTrainer(small_model(), dataset(), CONFIG)
    hiding, whole = next(trainer.batches(3)), next(plain.batches(3))
    mask = VOCAB.command("MASK")
    is_hidden = hiding.tokens == mask
    assert is_hidden.any() and not (whole.tokens == mask).any()
    assert torch.equal(hiding.tokens[~is_hidden], whole.tokens[~is_hidden])
    assert torch.all(whole.tokens[is_hidden] < VOCAB.num_image_codes)
    for name in ("targets", "weight", "text_mask", "valid_mask"):
        assert torch.equal(getattr(hiding, name), getattr(whole, name))
    again = trainer.batches(2)
    next(again)
    assert torch.equal(next(again).tokens, hiding.tokens)  # a run that goes on hides the same
    options = {"text_weight": 3.0, "caption_fraction": CONFIG.caption_fraction, "seed": CONFIG.seed}
    assert torch.equal(trainer._batches_of(dataset(), 8)(0).tokens, dataset().batch(0, 8, **options).tokens)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_a_batch_in_parts_has_the_losses_and_the_gradient_of_the_whole(parts, precision):
    """The parts differ in their numbers of tokens of either kind, so that no mean of means is right."""
    results = []
    for accumulate in (1, parts):
        model = small_model(scale=5.0).train()
        config = dataclasses.replace(CONFIG, accumulate=accumulate, precision=precision)
        trainer = TransformerTrainer(model, dataset(), config)
        losses = trainer._gradient(3, next(trainer.batches(3)), None)
        results.append([*losses, *(parameter.grad for parameter in model.parameters())])
    batch = next(trainer.batches(3))
    assert len({part.weight.sum().item() for part in batch.split(parts)}) > 1
    rtol, atol = {"fp32": (1e-4, 1e-6), "fp16": (1e-2, 1e-3)}[precision]
    for whole, in_parts in zip(*results, strict=True):
        torch.testing.assert_close(in_parts, whole, rtol=rtol, atol=atol)


def test_training_in_parts_and_with_checkpointed_layers_learns_the_same(tmp_path):
    whole = train(small_model(), dataset(), CONFIG, tmp_path / "whole", progress=False)
    config = dataclasses.replace(CONFIG, accumulate=3)
    model = small_model(activation_checkpointing=True)
    parts = train(model, dataset(), config, tmp_path / "parts", progress=False)
    for name in whole:
        assert parts[name] == pytest.approx(whole[name], rel=1e-4)
    checkpointed = small_model(dropout=0.1, activation_checkpointing=True)
    assert train(checkpointed, dataset(), CONFIG, tmp_path / "c", progress=False) == train(
        small_model(dropout=0.1), dataset(), CONFIG, tmp_path / "d", progress=False
    )


class Waits(TorchDispatchMode):
    """Notes the operations for whose result the host would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, kinds, arguments=(), named=None):
        if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "_unique2", "equal"):
            self.seen.append(function)
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_step_waits_for_the_device(precision, monkeypatch):
    # On the CPU alone, the loss looks whether the factor of its gradients is 1.
    monkeypatch.setattr(native, "scale", lambda gradient, factor: gradient.mul_(factor.view(1)))
    model = small_model(dropout=0.1, activation_checkpointing=True).train()
    config = dataclasses.replace(CONFIG, precision=precision, accumulate=2, embedding_gradient=0.5)
    trainer = TransformerTrainer(model, dataset(), config)
    batch = next(trainer.batches(0))
    with Waits() as waits:
        result = trainer.step(0, batch)
    assert not waits.seen
    with Waits() as waits:
        result.descent.loss.item()
    assert waits.seen


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_step_waits_for_a_gpu(precision):
    model = small_model(dropout=0.1, activation_checkpointing=True).train().cuda()
    config = dataclasses.replace(CONFIG, precision=precision, accumulate=2, embedding_gradient=0.5)
    trainer = TransformerTrainer(model, dataset(), config)
    first, second = itertools.islice(trainer.batches(0), 2)
    trainer.step(0, first)  # compiles kernels, which waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(1, second)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_layer_draws_its_own_pivots_and_all_text_is_among_them():
    batch = dataset().batch(0, 8, text_weight=1.0, caption_fraction=0.5, seed=0)
    first, second = sample_layouts(small_model().config, batch, torch.Generator().manual_seed(0))
    assert not torch.equal(first.pivots.sort().values, second.pivots.sort().values)
    for row in range(8):
        text = set(batch.text_mask[row].nonzero().flatten().tolist())
        assert text <= set(first.pivots[row].tolist())


def test_the_number_of_image_pivots_does_not_tell_how_long_the_text_will_be():
    batch = dataset().batch(1, 8, text_weight=1.0, caption_fraction=1.0, seed=0)
    assert len(set(batch.text_mask.sum(1).tolist())) > 1
    (layout, _) = sample_layouts(small_model().config, batch, torch.Generator().manual_seed(0))
    is_image = (batch.valid_mask & ~batch.text_mask).gather(1, layout.pivots)
    assert len(set(is_image.sum(1).tolist())) == 1 and is_image.any()


def test_training_learns(tmp_path):
    config = dataclasses.replace(CONFIG, steps=60)
    history = train(small_model(), dataset(), config, tmp_path, progress=False)
    assert sum(history["image_loss"][-5:]) < 0.8 * sum(history["image_loss"][:5])
    assert sum(history["text_loss"][-5:]) < 0.5 * sum(history["text_loss"][:5])
    assert list((tmp_path / "tensorboard").iterdir())


RUN = """
import sys, torch
torch.set_num_threads(1)
from tests.model.test_training_transformer import CONFIG, dataset, small_model, train
train(small_model(dropout=0.1), dataset(), CONFIG, sys.argv[1], progress=False)
"""


class Killed(Exception):
    pass


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_killed_run_resumes_to_the_same_losses(tmp_path, monkeypatch, dropout):
    whole = train(small_model(dropout=dropout), dataset(), CONFIG, tmp_path / "whole", progress=False)
    real = cogview.training.transformer.losses_of
    calls = []

    def dies_in_step_six(*arguments):
        calls.append(1)
        if len(calls) == 7:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(cogview.training.transformer, "losses_of", dies_in_step_six)
    with pytest.raises(Killed):
        train(small_model(dropout=dropout), dataset(), CONFIG, tmp_path / "killed", progress=False)
    monkeypatch.undo()
    model = small_model(seed=99, dropout=dropout)  # other weights: they must come from the checkpoint
    torch.rand(17)
    resumed = train(model, dataset(), CONFIG, tmp_path / "killed", progress=False)
    assert resumed == whole


def test_ctrl_c_finishes_the_step_saves_and_the_run_resumes(tmp_path):
    whole = train(small_model(dropout=0.1), dataset(), CONFIG, tmp_path / "whole", progress=False)
    root = Path(__file__).parents[2]
    code = RUN.replace("CONFIG, sys.argv[1]", "SLOW, sys.argv[1]").replace(
        "train(small",
        "import dataclasses, time, cogview.training.transformer\n"
        "SLOW = dataclasses.replace(CONFIG, checkpoint_every=1_000_000)\n"
        "real = cogview.training.transformer.losses_of\n"
        "def slow(*arguments):\n"
        "    print('step', flush=True); time.sleep(0.2)\n"
        "    return real(*arguments)\n"
        "cogview.training.transformer.losses_of = slow\n"
        "train(small",
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "cut")],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_signals,
    )
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline() == "step\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "finishing this step, then saving" in errors and "Interrupted: SIGINT" in errors
    saved = [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()]
    assert saved == ["step-00000003"]
    resumed = train(small_model(seed=5, dropout=0.1), dataset(), CONFIG, tmp_path / "cut", progress=False)
    for name in whole:
        assert resumed[name] == pytest.approx(whole[name], rel=1e-5)


def test_a_step_with_nan_changes_nothing(tmp_path, monkeypatch):
    real = cogview.training.transformer.losses_of
    model = small_model()
    config = dataclasses.replace(CONFIG, steps=3, checkpoint_every=100)
    seen = []

    def nan_in_step_one(*arguments):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        loss, image, text = real(*arguments)
        return (loss * float("nan") if len(seen) == 2 else loss), image, text

    monkeypatch.setattr(cogview.training.transformer, "losses_of", nan_in_step_one)
    train(model, dataset(), config, tmp_path, progress=False)
    assert any(not torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
    assert all(torch.equal(seen[1][name], seen[2][name]) for name in seen[1])
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
