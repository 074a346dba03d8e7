# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters

from cogview import cli
from cogview.training.compilation import compiled_layers, require_compiler
from cogview.training.transformer import TransformerTrainer, train
from tests.model.helpers import small_model
from tests.model.test_training_transformer import CONFIG, dataset

STEPS = dataclasses.replace(CONFIG, steps=3, compile_layers=True)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def test_compiled_layers_train_to_the_same_losses_whether_checkpointed_or_not(fresh_compiler, tmp_path):
    eager = dataclasses.replace(STEPS, compile_layers=False)
    plain = train(small_model(), dataset(), eager, tmp_path / "plain", progress=False)
    histories = []
    for checkpointing in (False, True):
        model = small_model(activation_checkpointing=checkpointing)
        folder = tmp_path / str(checkpointing)
        histories.append(train(model, dataset(), STEPS, folder, progress=False))
    assert histories[0] == histories[1]
    for name in ("image_loss", "text_loss"):
        assert histories[0][name] == pytest.approx(plain[name], rel=1e-5)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1, "each layer was compiled by itself"


def test_of_layers_in_16_bits_the_last_is_compiled_by_itself(fresh_compiler, tmp_path):
    """It gives a norm in float32; all others are alike."""
    steps = dataclasses.replace(STEPS, steps=1, precision="bf16")
    train(small_model(num_layers=5), dataset(), steps, tmp_path, progress=False)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2


def test_the_module_that_failed_is_found_inside_a_compiled_layer(fresh_compiler):
    """Compiled code calls no hooks on what is inside it, so the step is repeated as it is written."""
    model = small_model()
    with compiled_layers(model):
        trainer = TransformerTrainer(model, dataset(), CONFIG)
        with torch.no_grad():
            model.transformer.layers[1].mlp.dense_h_to_4h.weight[0, 0] = torch.inf
        batch = next(trainer.batches(0))
        assert "layers.1.mlp" in trainer.explain(0, batch, {})
    assert not counters["stats"], "something was compiled"
    assert all("forward" not in vars(layer) for layer in model.transformer.layers)


def test_without_a_compiler_one_line_says_what_to_do(monkeypatch, tmp_path, run_folder, capsys):
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    words = ["train", "--data", "digits", "--out", str(run_folder), "--compile-layers", "--device", "cpu"]
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("cogview train: --compile-layers needs a compiler") and error.count("\n") == 1
    monkeypatch.delenv("CXX")
    monkeypatch.setattr("shutil.which", lambda name: "/bin/g++" if name == "g++" else None)
    require_compiler("cpu")
    with pytest.raises(ValueError, match="gcc or clang was not found"):
        require_compiler("cuda")
