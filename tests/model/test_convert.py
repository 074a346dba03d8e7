# SPDX-License-Identifier: Apache-2.0
import dataclasses
import shutil
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import cogview
from cogview.cli import main
from cogview.commands.convert import Convert, convert, left_behind
from cogview.config import ModelConfig
from cogview.files import ASIDE, load_tensors
from cogview.model.transformer import CogView
from cogview.presets import PRESETS
from cogview.settings import ModelSettings, TokenizerSettings, write_settings
from cogview.tokens.text_tokenizer import TextTokenizer
from cogview.tokens.vocab import Vocab
from cogview.weights import load_weights
from tests.model.original import (
    LossScaler,
    Original,
    random_image_tokenizer,
    random_original,
    save_original,
)

SIZES = {"rows": 128, "width": 32, "heads": 4}
NAMES_OF_RANKS = "{}/20000/mp_rank_{:02d}_model_states.pt"


def tiny(ranks: int = 1, **changes) -> Original:
    return random_original(ranks, **{**SIZES, **changes})


def saved(tmp_path: Path, model: Original, name: str = "original", **others) -> Path:
    save_original(model, tmp_path / name, **others)
    return tmp_path / name


def converted(source: Path, **options) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file that ``source`` is converted into."""
    out = source.parent / f"{source.stem}-{len(list(source.parent.iterdir()))}.safetensors"
    convert(Convert(source, out, num_heads=4, progress=False, **options))
    return load_tensors(out)


def logits(tensors: dict[str, torch.Tensor], tokens: torch.Tensor, heads: int = 4) -> torch.Tensor:
    rows, width = tensors["word_embeddings.weight"].shape
    model = CogView(ModelConfig(2, width, heads, rows, 40, pb_relax="tensor")).eval()
    load_weights(model, tensors, "test")
    with torch.no_grad():
        return model.logits(model(tokens))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_logits_are_those_of_the_original_and_it_gets_its_files_back(tmp_path, ranks):
    original = tiny(ranks)
    source = saved(tmp_path, original)
    tokens = torch.randint(0, 128 * ranks, (3, 40), generator=torch.Generator().manual_seed(0))
    expected = original.logits(tokens)
    tensors = converted(source)
    assert expected.abs().max() > 5
    torch.testing.assert_close(logits(tensors, tokens), expected, rtol=0, atol=1e-4)

    out = tmp_path / "back"
    convert(Convert(source, out, "original", num_heads=4, ranks=ranks, progress=False))
    assert (out / "latest_checkpointed_iteration.txt").read_text() == "20000"
    for rank, state in enumerate(original.states):
        content = torch.load(NAMES_OF_RANKS.format(out, rank), weights_only=True)
        assert content["iteration"] == 20000
        assert content["module"].keys() == state.keys()
        assert all(torch.equal(content["module"][name], state[name]) for name in state)


def test_any_number_of_ranks_becomes_any_other(tmp_path):
    source = saved(tmp_path, tiny(1, rows=256), "one", iteration=0)
    whole = converted(source)
    convert(Convert(source, tmp_path / "zero", "original", num_heads=4, progress=False))
    assert (tmp_path / "zero" / "release" / "mp_rank_00_model_states.pt").is_file()
    for ranks in (4, 2, 1):
        out = tmp_path / f"ranks-{ranks}"
        save_file(whole, tmp_path / f"{ranks}.safetensors")
        convert(
            Convert(
                tmp_path / f"{ranks}.safetensors", out, "original", num_heads=4, ranks=ranks, progress=False
            )
        )
        assert (out / "latest_checkpointed_iteration.txt").read_text() == "release"
        sizes = [file.stat().st_size for file in out.glob("release/*")]
        assert len(sizes) == ranks
        assert sum(sizes) < 2 * (tmp_path / f"{ranks}.safetensors").stat().st_size
        again = converted(out)
        rows = again.pop("word_embeddings.weight")
        assert all(torch.equal(again[name], whole[name]) for name in again)
        assert len(rows) == max(256, 128 * ranks)
        assert torch.equal(rows[:256], whole["word_embeddings.weight"])
        # Rows that no token uses are no likelier than those that training has left unused.
        assert torch.equal(rows[256:], rows[255:256].expand(len(rows) - 256, -1))


@pytest.mark.parametrize("ranks", [1, 4])
def test_rows_that_ranks_have_added_to_the_released_vocabulary_are_dropped(tmp_path, ranks):
    original = tiny(ranks, rows=58368 // ranks if ranks > 1 else 58240, width=8, heads=4, layers=1)
    tensors = converted(saved(tmp_path, original))
    rows = torch.cat([state["word_embeddings.weight"] for state in original.states])
    assert torch.equal(tensors["word_embeddings.weight"], rows[: Vocab().padded_size])


def test_names_prefixes_and_other_files_of_the_same_weights(tmp_path):
    original = tiny(1)
    state = original.states[0]
    half = {name: tensor.half() for name, tensor in state.items()}
    expected = converted(saved(tmp_path, Original([half], 4), "plain"))
    assert all(torch.equal(expected[name], half[name]) for name in half)  # fp16 stays fp16

    prefixed = saved(tmp_path, Original([half], 4), "prefixed", prefix="module.")
    later = {("transformer." if "word_" in name else "") + name: tensor for name, tensor in half.items()}
    sat = saved(tmp_path, Original([later], 4), "sat")
    (sat / "latest_checkpointed_iteration.txt").rename(sat / "latest")
    bare = tmp_path / "bare.bin"
    torch.save(OrderedDict((name, nn.Parameter(tensor)) for name, tensor in half.items()), bare)
    old = tmp_path / "old.pt"
    torch.save(half, old, _use_new_zipfile_serialization=False)
    file = sat / "20000" / "mp_rank_00_model_states.pt"
    for source in (prefixed, sat, sat / "20000", file, bare, old):
        tensors = converted(source)
        assert tensors.keys() == half.keys(), source
        assert all(torch.equal(tensors[name], half[name]) for name in half), source


def test_the_library_reads_and_writes_the_same_safetensors(tmp_path):
    state = tiny(1).states[0]
    mixed = {name: tensor.half() if "norm" in name else tensor for name, tensor in state.items()}
    ours = converted(saved(tmp_path, Original([mixed], 4)))
    save_file(mixed, tmp_path / "theirs.safetensors")
    theirs = load_file(tmp_path / "theirs.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    [file] = tmp_path.glob("original-*.safetensors")
    assert file.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_the_image_tokenizer_goes_there_and_back(tmp_path, capsys):
    state = random_image_tokenizer()
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "vqvae.pt")
    file = tmp_path / "vqvae.safetensors"
    assert main(["convert", str(tmp_path / "vqvae.pt"), "--out", str(file)]) == 0
    assert "tensors of an image tokenizer\n" in capsys.readouterr().out
    assert main(["convert", str(file), "--out", str(tmp_path / "back.pt"), "--to", "original"]) == 0
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.fixture(scope="module")
def released_run(tmp_path_factory, data_folder):
    """A run folder from the three files of a release, at a tiny size but with the released text tokenizer."""
    text = data_folder / "cog-pretrain.model"
    if not text.exists():
        pytest.skip(f"the released tokenizer is not at {text}")
    folder = tmp_path_factory.mktemp("released")
    vocab = Vocab(16, len(TextTokenizer.load(text)))
    assert vocab.padded_size % 256  # Two ranks have rows that one rank has not.
    original = random_original(2, rows=(vocab.padded_size + 128) // 2, width=64, heads=1, positions=50)
    halves = [{name: tensor.half() for name, tensor in state.items()} for state in original.states]
    save_original(Original(halves, heads=1), folder / "original")
    torch.save(random_image_tokenizer(), folder / "vqvae.pt")
    out = str(folder / "run")
    tokenizers = ["--text-tokenizer", str(text), "--image-tokenizer", str(folder / "vqvae.pt")]
    assert main(["convert", str(folder / "original"), "--out", out, *tokenizers, "--image-size", "32"]) == 0
    return folder / "run"


def test_a_converted_run_draws_and_describes(released_run, tmp_path, capsys):
    run = cogview.load_run(released_run, "cpu")
    assert run.model.config == ModelConfig(2, 64, 1, 50048, 50, pb_relax="tensor")
    assert (run.max_text_tokens, run.tokenizers.image.config.codes_per_image) == (29, 16)
    weights = released_run / "checkpoints/step-00020000/model.safetensors"
    assert {tensor.dtype for tensor in load_tensors(weights).values()} == {torch.float16}
    whole = torch.cat([state["word_embeddings.weight"] for state in _ranks(released_run.parent / "original")])
    assert torch.equal(run.model.word_embeddings.weight, whole[:50048].float())

    picture = str(tmp_path / "tiger.png")
    text = "一只老虎在踢足球"
    assert main(["generate", "--run", str(released_run), text, "--num", "2", "--out", picture]) == 0
    capsys.readouterr()
    assert main(["caption", "--run", str(released_run), picture]) == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"{picture}\t")
    # The released models have learned no end of a caption.
    assert cogview.load_run(released_run, "cpu").caption_tokens == 20


def test_a_run_goes_back_to_the_original(released_run, tmp_path):
    out = tmp_path / "back"
    assert main(["convert", str(released_run), "--out", str(out), "--to", "original"]) == 0
    [state] = _ranks(out)
    torch.testing.assert_close(
        state, load_tensors(released_run / "checkpoints/step-00020000/model.safetensors")
    )


def test_what_weights_alone_do_not_tell_is_told(tmp_path):
    assert left_behind(tmp_path) == ()  # It is no run, so nothing is known beside the weights.
    digits, base = PRESETS["digits"], PRESETS["base"]
    _write_run_settings(tmp_path, digits, digits.model)
    told = " ".join(left_behind(tmp_path))
    assert f"--num-heads {digits.model.num_heads}" in told and "three-region attention" in told
    assert f"--image-size {digits.image_tokenizer.image_size}" in told and "pb_relax = row" in told
    assert str(tmp_path / "text_tokenizer.model") in told
    _write_run_settings(tmp_path, base, dataclasses.replace(base.model, pb_relax="tensor"))
    assert len(left_behind(tmp_path)) == 1  # the tokenizers


def _write_run_settings(folder, preset, model):
    tokenizers = TokenizerSettings("x", 9, preset.image_tokenizer, preset.image_tokenizer_train)
    write_settings(folder / "tokenizers.json", tokenizers)
    write_settings(folder / "model.json", ModelSettings("x", model, preset.sampling, 5, preset.train))


def _ranks(folder):
    return [torch.load(file, weights_only=False)["module"] for file in sorted(folder.glob("20000/mp_rank_*"))]


class TouchesAFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w')",))


def refused(capsys, source, out, *options) -> str:
    """The one line that says why, with nothing left behind."""
    capsys.readouterr()
    assert main(["convert", str(source), "--out", str(out), *map(str, options)]) == 2
    *progress, line = capsys.readouterr().err.strip().splitlines()
    assert all(shown.startswith("convert: tensor ") for shown in progress)
    assert not out.exists()
    assert not out.with_name(out.name + ASIDE).exists()
    return line.removeprefix("cogview convert: ")


def test_objects_of_a_training_are_skipped_without_their_module(tmp_path, monkeypatch):
    module = types.ModuleType("deepspeed")
    module.deepspeed = LossScaler
    original = tiny(1)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "deepspeed", module)
        source = saved(tmp_path, original, optimizer={"loss_scaler": LossScaler()}, lr_scheduler=[LossScaler])
    assert "deepspeed" not in sys.modules
    tensors = converted(source)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in original.states[0].items())


@pytest.mark.parametrize("place", ["optimizer", "module", "itself", "old format"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, capsys, place):
    touched = tmp_path / "touched"
    code = TouchesAFile(touched)
    state = dict(tiny(1).states[0])
    content = {
        "optimizer": {"module": state, "optimizer": code},
        "module": {"module": {**state, "word_embeddings.weight": code}},
        "itself": code,
        "old format": {"module": state, "optimizer": code},
    }[place]
    torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=place != "old format")
    line = refused(capsys, tmp_path / "evil.pt", tmp_path / "x.safetensors")
    assert "evil.pt cannot be read safely as weights: it " in line
    assert "holds code" in line and line.endswith("exec; nothing of it was run")
    assert not touched.exists()


def test_damaged_and_other_files_are_one_clear_line(tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    source = saved(tmp_path, tiny(1))
    file = source / "20000" / "mp_rank_00_model_states.pt"
    whole = file.read_bytes()
    for size in (len(whole) - 5, len(whole) // 2, 100):
        file.write_bytes(whole[:size])
        assert "is truncated: its end is missing; fetch it again" in refused(capsys, source, out)
    for content in (b"", b"nonsense", b"hello"):
        file.write_bytes(content)
        said = refused(capsys, source, out)
        assert "cannot be read safely as weights" in said and "no file of torch.save" in said
    file.unlink()
    assert "has no mp_rank_00_model_states.pt" in refused(capsys, source, out)
    shutil.rmtree(source / "20000")
    assert "names the folder '20000', which is not there" in refused(capsys, source, out)
    (source / "latest_checkpointed_iteration.txt").write_text("../original")
    assert "names the folder '../original', which is not there" in refused(capsys, source, out)
    assert "give the .pt file itself" in refused(capsys, tmp_path / "original" / "..", out)
    assert "weights not found" in refused(capsys, tmp_path / "absent.pt", out)
    torch.save([1, 2], tmp_path / "list.pt")
    assert "does not hold a state dict" in refused(capsys, tmp_path / "list.pt", out)
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    assert "is not a safetensors file, or is damaged" in refused(capsys, tmp_path / "bad.safetensors", out)


def test_unknown_architectures_name_what_is_known(tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    state = tiny(1).states[0]
    file = tmp_path / "x.pt"
    torch.save({"gpt.h.0.weight": torch.zeros(2), "gpt.h.1.weight": torch.zeros(2)}, file)
    line = refused(capsys, file, out)
    assert "unknown architecture; known are CogView (" in line
    assert "SwissArmyTransformer" in line and "VQ-VAE" in line
    assert line.endswith("the first unexpected names are ['gpt.h.0.weight', 'gpt.h.1.weight']")
    torch.save({**state, "mixins.attention_plus.dense.0.weight": torch.zeros(2)}, file)
    assert "unexpected names are ['mixins.attention_plus.dense.0.weight']" in refused(capsys, file, out)
    torch.save({name: tensor for name, tensor in state.items() if "layers.1.mlp" not in name}, file)
    assert "does not hold this model: 4 tensors missing" in refused(capsys, file, out, "--num-heads", 4)
    tokenizer = random_image_tokenizer()
    torch.save({**tokenizer, "dec.blocks.6.bias": torch.zeros(4)}, file)
    assert "dec.blocks.6.bias must be [3], got [4]" in refused(capsys, file, out)
    strange = torch.zeros(3, dtype=torch.complex64)
    torch.save({**tokenizer, "dec.blocks.6.bias": strange}, file)
    assert "dec.blocks.6.bias has the dtype torch.complex64" in refused(capsys, file, out)
    torch.save({"quantize_t.embed": torch.zeros(2, 2)}, file)
    assert "is no whole image tokenizer" in refused(capsys, file, out)


def test_ranks_that_do_not_belong_together_are_refused(tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    source = saved(tmp_path, tiny(4))
    files = [Path(NAMES_OF_RANKS.format(source, rank)) for rank in range(4)]
    kept = {file: file.read_bytes() for file in files}
    files[2].unlink()
    assert refused(capsys, source, out).endswith("original/20000 has no mp_rank_02_model_states.pt")
    files[3].unlink()
    assert "has 2 of 4 model-parallel ranks" in refused(capsys, files[0], out)
    for file, content in kept.items():
        file.write_bytes(content)
    other = torch.load(files[1], weights_only=False)
    torch.save({**other, "iteration": 10000}, files[1])
    line = refused(capsys, source, out)
    assert "of different iterations" in line and "rank_01_model_states.pt has 10000" in line
    name = "transformer.layers.0.mlp.dense_h_to_4h.bias"
    other["module"][name] = torch.zeros(5)
    torch.save(other, files[1])
    assert f"do not belong together: {name} is [32]" in refused(capsys, source, out)
    del other["module"][name]
    torch.save(other, files[1])
    assert f"lacks {name}, which another rank has" in refused(capsys, source, out)


def test_options_that_do_not_fit(tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    source = saved(tmp_path, tiny(1))
    torch.save(random_image_tokenizer(), tmp_path / "vqvae.pt")
    assert "--ranks must be at least 1, got 0" in refused(capsys, source, out, "--ranks", 0)
    assert "--ranks belongs to --to original" in refused(capsys, source, out, "--ranks", 2)
    assert "--out must end with .safetensors" in refused(capsys, source, tmp_path / "run")
    one = ("--text-tokenizer", "x.model")
    assert "--to original writes no safetensors" in refused(capsys, source, out, "--to", "original")
    assert "needs both --text-tokenizer and --image-tokenizer" in refused(
        capsys, source, tmp_path / "run", *one
    )
    both = (*one, "--image-tokenizer", tmp_path / "vqvae.pt")
    assert "leave the tokenizers out" in refused(capsys, source, tmp_path / "y", *both, "--to", "original")
    assert "text tokenizer not found: x.model" in refused(
        capsys, source, tmp_path / "run", *both, "--num-heads", 4
    )
    image = tmp_path / "vqvae.pt"
    assert "is an image tokenizer; a run folder begins with" in refused(
        capsys, image, tmp_path / "run", *both
    )
    split = ("--to", "original", "--ranks", 2)
    assert "is not split into ranks" in refused(capsys, image, tmp_path / "y", *split)
    assert "width 32 must be a multiple of --num-heads 5" in refused(capsys, source, out, "--num-heads", 5)
    heads = refused(capsys, source, tmp_path / "y", "--num-heads", 1, *split)
    assert "--num-heads 1, and that of --ranks 2" in heads
    text = tmp_path / "text.model"
    TextTokenizer.train(["a tiger", "a cat"], 60).save(text)
    out = tmp_path / "run"
    belonging = ("--text-tokenizer", text, "--image-tokenizer", image, "--num-heads", 4)
    large = saved(tmp_path, tiny(1, rows=200), "large")
    assert "has 200 vocabulary rows, 16 codes and" in refused(capsys, large, out, *belonging)
    assert "40 positions, too few for a text and the 1024 codes of 256 px" in refused(
        capsys, source, out, *belonging
    )
    out.mkdir()
    assert main(["convert", str(source), "--out", str(out), *map(str, belonging)]) == 2
    assert "run exists; name another, or remove it" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["original", "safetensors"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, capsys, to):
    resource = pytest.importorskip("resource", reason="file sizes are limited as POSIX does it")
    source = saved(tmp_path, tiny(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        line = refused(capsys, source, tmp_path / f"x.{to}", "--to", to, "--num-heads", 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in line if to == "safetensors" else "cannot be written" in line
