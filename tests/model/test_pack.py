# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from cogview.cli import main
from cogview.commands.pack import pack_run
from cogview.evaluation.cap_loss import caption_loss
from cogview.run import PRETRAINED, load_run


@pytest.fixture(scope="module")
def packed(run_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "run"
    size = pack_run(run_folder, out)
    assert size == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return out


def test_a_packed_run_is_the_run_with_rounded_weights(run_folder, packed):
    run, small = load_run(run_folder, "cpu"), load_run(packed, "cpu")
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(small.model.state_dict()[name], tensor.bfloat16().float()), name
    assert small.tokenizers.fingerprint == run.tokenizers.fingerprint
    assert (small.sampling, small.max_text_tokens) == (run.sampling, run.max_text_tokens)
    run.model.load_state_dict(small.model.state_dict())
    # Of given codes: matrix products may round in another order where weights lie elsewhere in memory, and
    # one other code that is drawn changes all behind it.
    config = run.tokenizers.image.config
    codes = torch.arange(2 * config.codes_per_image).view(2, -1) % config.num_codes
    text = [run.pieces("a seven")] * 2
    losses = [caption_loss(one.model, one.tokenizers.vocab, codes, text) for one in (run, small)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_it_holds_nothing_else(packed):
    files = sorted(path.relative_to(packed).as_posix() for path in packed.rglob("*") if path.is_file())
    checkpoint = files[0].rpartition("/")[0]
    assert files == [
        f"{checkpoint}/model.safetensors",
        f"{checkpoint}/state.json",
        "image_tokenizer.safetensors",
        "model.json",
        "text_tokenizer.model",
        "tokenizers.json",
    ]


def test_command_and_its_mistakes(run_folder, tmp_path, capsys):
    out = tmp_path / "new"
    assert main(["pack", "--run", str(run_folder), "--out", str(out)]) == 0
    assert "MiB" in capsys.readouterr().out
    assert main(["pack", "--run", str(run_folder), "--out", str(out)]) == 2
    assert "new exists; name another, or remove it" in capsys.readouterr().err
    assert main(["pack", "--run", str(tmp_path / "none"), "--out", str(tmp_path / "other")]) == 2
    assert "run folder not found" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_the_run_that_ships_draws(tmp_path):
    out = tmp_path / "tiger.png"
    assert main(["generate", "a tiger", "--num", "2", "--device", "cpu", "--out", str(out)]) == 0
    assert out.stat().st_size > 0
    size = sum(path.stat().st_size for path in PRETRAINED.rglob("*") if path.is_file())
    assert size < 24 << 20, "what every installation downloads"
