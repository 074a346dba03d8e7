# SPDX-License-Identifier: Apache-2.0
import errno
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

import cogview.commands.verbs
import cogview.run
from cogview.cli import main
from cogview.commands import generate
from cogview.files import load_tensors
from cogview.generation import text_to_image
from cogview.parsing import VERBS
from cogview.presets import PRESETS
from cogview.terminal import in_one_line
from cogview.tokens import tokenizers
from cogview.training.checkpoint import load_model
from tests.model.helpers import heed_signals

ROOT = Path(__file__).parents[2]


def mistake(capsys, *arguments):
    """Exit code 2 and one line on stderr, which is returned."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


def test_generate_caption_and_rerank(run_folder, tmp_path, capsys):
    for index in range(2):
        out = tmp_path / f"{index}.png"
        arguments = [
            "generate",
            "--run",
            str(run_folder),
            "a handwritten seven",
            "--num",
            "1",
            "--out",
            str(out),
        ]
        assert main([*arguments, "--seed", str(index)]) == 0
        with Image.open(out) as picture:
            assert picture.size == (64, 64)
    grid = tmp_path / "deep" / "grid.png"
    texts = ["a handwritten seven", "手写数字七"]
    assert main(["generate", "--run", str(run_folder), *texts, "--num", "3", "--out", str(grid)]) == 0
    with Image.open(grid) as picture:
        assert picture.size == (3 * 68 + 4, 2 * 68 + 4)
    images = [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    capsys.readouterr()
    assert main(["caption", "--run", str(run_folder), *images]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["rerank", "--run", str(run_folder), "a seven", *images]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["1", "2"]
    assert float(lines[0][2].split()[1]) <= float(lines[1][2].split()[1])


def test_generation_options_take_effect(run_folder, tmp_path):
    def picture(*options):
        out = tmp_path / "x.png"
        out.unlink(missing_ok=True)
        text = "a handwritten seven"
        assert (
            main(["generate", "--run", str(run_folder), text, "--num", "2", "--out", str(out), *options]) == 0
        )
        with Image.open(out) as read:
            return read.tobytes()

    assert picture() == picture()
    assert picture() != picture("--seed", "1")
    likeliest = picture("--temperature", "0")
    assert likeliest == picture("--top-k", "1", "--seed", "1") == picture("--temperature", "1e-39")
    assert picture("--parallel", "5") == picture("--top-k", str(2**64)) == picture()
    assert picture("--guidance", "1000") != picture()
    assert picture("--seed", "-7") != picture("--seed", str(10**40)) != picture()


def test_parts_of_a_text_that_were_never_learned_are_named(run_folder, tmp_path, capsys):
    out = str(tmp_path / "x.png")
    assert main(["generate", "--run", str(run_folder), "a Ω", "--num", "1", "--out", out]) == 0
    assert "never learned: Ω" in capsys.readouterr().err


SEVEN = "a handwritten seven"


def test_a_folder_gets_a_png_of_each_picture_that_says_what_drew_it(run_folder, tmp_path, capsys):
    out = tmp_path / "pictures"
    command = ["generate", "--run", str(run_folder), SEVEN, "手写数字七", "--num", "3", "--seed", "5"]
    assert main([*command, "--out", str(out), "--json", "--verbose"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert sorted(os.listdir(out)) == [*(f"{t}-{n:04d}.png" for t in (1, 2) for n in range(3)), "sheet.png"]
    assert len(report["pictures"]) == 6
    for entry in report["pictures"]:
        with Image.open(entry["file"]) as picture:
            assert picture.size == (16, 16)
            about = {"prompt": entry["text"], "seed": "5", "candidate": str(entry["candidate"])}
            assert picture.text == {**about, "cap_loss": f"{entry['cap_loss']:.4f}"}
    losses = [entry["cap_loss"] for entry in report["pictures"][:3]]
    assert losses == sorted(losses)
    assert report["seconds"] > 0 and set(report["bytes"]) == {"weights", "cache"}
    assert "memory: weights" in captured.err
    assert "has pictures already; --force" in mistake(capsys, *command, "--out", out)


def test_a_part_of_a_picture_is_drawn_anew(run_folder, tmp_path, capsys):
    Image.new("RGB", (30, 20), "gray").save(tmp_path / "photo.png")
    mask = Image.new("L", (30, 20))
    mask.paste(255, (15, 0, 30, 20))
    mask.save(tmp_path / "mask.png")
    out = str(tmp_path / "x.png")
    command = ["infill", "--run", str(run_folder), SEVEN, str(tmp_path / "photo.png"), "--num", "2"]
    assert main([*command, "--mask", str(tmp_path / "mask.png"), "--out", out]) == 0
    assert main([*command, "--keep-top", "0.5", "--out", out, "--force", "--stream"]) == 0
    with Image.open(out) as picture:
        assert picture.size == (2 * 68 + 4, 68 + 4)
    assert "either --mask or --keep-top is needed" in mistake(capsys, *command)
    no_white = ["--mask", tmp_path / "photo.png", "--out", tmp_path / "y.png"]
    Image.new("L", (20, 20)).save(tmp_path / "mask.png")
    square = ["--mask", tmp_path / "mask.png", "--out", tmp_path / "y.png"]
    assert "got 20 x 20 pixels for a picture of 30 x 20 pixels" in mistake(capsys, *command, *square)
    Image.new("L", (30, 20)).save(tmp_path / "photo.png")
    assert "mask must have a white part" in mistake(capsys, *command, *no_white)


def test_words_and_names_do_not_act_on_the_terminal(run_folder, tmp_path, capsys):
    out = tmp_path / "a\nb.png"
    words = "a handwritten\tseven\x1b[31m \u2028"
    assert main(["generate", "--run", str(run_folder), words, "--num", "1", "--out", str(out)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith('"a handwritten\\tseven\\x1b[31m \\u2028": 1 picture')
    assert second == f"written: {tmp_path}/a\\nb.png" and out.exists()
    for command in (["caption", str(out)], ["rerank", SEVEN, str(out)]):
        assert main([command[0], "--run", str(run_folder), *command[1:]]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert "a\\nb.png\t" in line and line.count("\t") == 2
    assert in_one_line("👩\u200d🚀 老虎") == "👩\u200d🚀 老虎"


@pytest.fixture
def hears_ctrl_c():
    """A shell starts what runs in the background deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
def test_a_second_ctrl_c_does_not_end_the_writing(run_folder, tmp_path, capsys, monkeypatch):
    """Both come while a batch is drawn; the second one when the finished pictures are written."""
    real, finish = text_to_image.decode, generate._Pictures.finish

    def decode(*arguments):
        if drawn:
            os.kill(os.getpid(), signal.SIGINT)
        drawn.append(1)
        return real(*arguments)

    def write(pictures):
        os.kill(os.getpid(), signal.SIGINT)
        finish(pictures)

    drawn = []
    monkeypatch.setattr(text_to_image, "decode", decode)
    monkeypatch.setattr(generate._Pictures, "finish", write)
    command = ["generate", "--run", str(run_folder), SEVEN, "--num", "9", "--max-batch", "2"]
    assert main([*command, "--out", str(tmp_path / "x.png")]) == 130
    assert "interrupted; 2 of 9 pictures were finished" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["x.png"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_what_a_signal_ends_leaves_nothing_half_done(signum, run_folder, tmp_path, capsys, monkeypatch):
    def ended(*_):
        assert os.listdir(tmp_path) == ["x.cogview.tmp"]
        os.kill(os.getpid(), signum)

    monkeypatch.setattr("cogview.commands.pack.complete_checkpoint", ended)
    monkeypatch.setattr(generate._Pictures, "add", lambda *_: os.kill(os.getpid(), signum))
    before = signal.signal(signum, signal.SIG_DFL)
    try:
        for words in (["pack"], ["generate", SEVEN, "--num", "2"]):
            assert main([*words, "--run", str(run_folder), "--out", str(tmp_path / "x")]) == 128 + signum
            assert capsys.readouterr().err.splitlines()[-1] == "interrupted; nothing was written"
            assert os.listdir(tmp_path) == [] and signal.getsignal(signum) is signal.SIG_DFL
        monkeypatch.setattr(cogview.commands.verbs, "presets", lambda _: os.kill(os.getpid(), signum))
        signal.signal(signum, signal.SIG_IGN)
        assert main(["presets"]) == 0  # as under nohup
    finally:
        signal.signal(signum, before)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("hears_ctrl_c")
def test_a_signal_waits_until_a_library_is_loaded(signum, tmp_path, capsys, monkeypatch):
    name = f"loads_slowly_{signum.name}"
    sends = "import os, time; os.kill(os.getpid(), {}); time.sleep(0.2); loaded = True"
    (tmp_path / f"{name}.py").write_text(sends.format(int(signum)))
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.getsignal(signum)

    def load(given):
        importlib.import_module(name)
        time.sleep(5)

    monkeypatch.setattr(cogview.commands.verbs, "presets", load)
    assert main(["presets"]) == 128 + signum
    assert capsys.readouterr().err.strip() == "interrupted; nothing was written"
    assert sys.modules.pop(name).loaded and signal.getsignal(signum) is before


def test_an_interrupted_command_says_that_something_is_saved_only_where_there_is(
    tmp_path, capsys, monkeypatch
):
    def interrupted(given):
        raise KeyboardInterrupt

    monkeypatch.setattr(cogview.commands.verbs, "study", interrupted)
    words = ["study", "stability", "--out", str(tmp_path / "x")]
    assert main(words) == 130
    assert (
        f"interrupted; nothing was finished yet, and nothing is in {tmp_path / 'x'}"
        in capsys.readouterr().err
    )
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "settings.json").touch()
    assert main(words) == 130
    assert f"what is finished is saved in {tmp_path / 'x'}. Run the same" in capsys.readouterr().err


def test_ctrl_c_keeps_the_pictures_that_are_finished(run_folder, tmp_path, capsys, monkeypatch):
    drawn = []

    def decode(*arguments):
        drawn.append(1)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    real = text_to_image.decode
    monkeypatch.setattr(text_to_image, "decode", decode)
    command = ["generate", "--run", str(run_folder), SEVEN, "--num", "9", "--max-batch", "2"]
    assert main([*command, "--out", str(tmp_path / "x.png")]) == 130
    error = capsys.readouterr().err
    assert f"interrupted; 4 of 9 pictures were finished: {tmp_path / 'x.png'}" in error
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (4 * 68 + 4, 68 + 4)
    drawn[:] = [1, 1]
    assert main([*command, "--out", str(tmp_path / "y.png")]) == 130
    assert "nothing was written" in capsys.readouterr().err and not (tmp_path / "y.png").exists()

    def interrupted_at_the_end(model, rows, task, options):
        real(model, rows, task, options)
        raise KeyboardInterrupt

    monkeypatch.setattr(text_to_image, "decode", interrupted_at_the_end)
    assert main([*command, "--out", str(tmp_path / "z.png"), "--stream"]) == 130
    assert "the unfinished pictures are in" in capsys.readouterr().err and (tmp_path / "z.png").exists()


def test_out_is_looked_at_before_anything_is_loaded(tmp_path, capsys):
    command = ["generate", "--run", tmp_path / "absent", SEVEN]
    (tmp_path / "x.png").write_text("kept")
    assert "x.png exists; --force" in mistake(capsys, *command, "--out", tmp_path / "x.png")
    assert "--out must be a .png file" in mistake(capsys, *command, "--out", tmp_path / "x.jpg")
    assert "both mean standard output" in mistake(capsys, *command, "--json", "--out", "-")
    assert "--num must be at most 100,000, got 100,000,000,000" in mistake(
        capsys, *command, "--num", 10**11, "--out", tmp_path / "y.png"
    )
    for option, value in (("--num", 0), ("--parallel", 0), ("--max-batch", 0), ("--guidance", "nan")):
        assert f"{option} must be at least" in mistake(capsys, *command, option, value)
    assert "got an empty name" in mistake(capsys, *command, "--out", "")
    assert (tmp_path / "x.png").read_text() == "kept"


UNWRITABLE = "/proc/cogview"  # no file can be made there whatever its permissions say


@pytest.mark.parametrize(
    "words",
    [
        ["train-tokenizer", "--data", "digits"],
        ["tokenize", "--data", "digits", "--run", "absent"],
        ["train-clip", "--data", "digits"],
        ["finetune", "captioning", "--data", "digits", "--run", "RUN"],
        ["clip-generate", "a", "--run", "absent"],
        ["super-resolve", "a.png", "--run", "absent"],
        ["evaluate", "absent", "absent"],
        ["pack", "--run", "absent"],
        ["convert", "absent", "--to", "original"],
        ["data", "emoji"],
        ["demo"],
        ["demo", "--data", "emoji"],
        ["rank-curve", "--run", "absent"],
        ["judge-clip-gen", "absent"],
        ["study", "stability"],
        ["study", "tokenizers"],
        ["study", "vqgan"],
        ["study", "style", "--runs", "absent"],
    ],
    ids=" ".join,
)
def test_every_command_looks_at_out_before_it_works(words, run_folder, tmp_path, capsys, monkeypatch):
    if not os.path.isdir("/proc/self"):
        pytest.skip("there is no /proc here")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("a.png")
    words = [str(run_folder) if word == "RUN" else word for word in words]
    line = mistake(capsys, *words, "--out", UNWRITABLE)
    assert f"--out {UNWRITABLE} cannot be written: no file can be made in /proc" in line
    assert "--out must" in mistake(capsys, *words, "--out", "") and os.listdir() == ["a.png"]


def test_what_a_command_reads_is_not_spoiled_by_what_it_writes(run_folder, photos, tmp_path, capsys):
    (tmp_path / "link").symlink_to(photos)
    before = sorted(os.listdir(photos))
    words = ["tokenize", "--data", photos, "--run", run_folder, "--out"]
    for out in (photos, tmp_path / "link"):
        assert "holds pictures with captions, which would be taken for rows" in mistake(capsys, *words, out)
    words = ["evaluate", photos, photos, "--out"]
    for out in (photos, tmp_path / "link" / "figures"):
        assert "what is written there would count among them" in mistake(capsys, *words, out)
    assert "it keeps its own drawings there" in mistake(
        capsys, "rank-curve", "--run", run_folder, "--out", run_folder
    )
    assert "its own report would be replaced" in mistake(
        capsys, "judge-clip-gen", run_folder, "--out", run_folder
    )
    assert sorted(os.listdir(photos)) == before


def test_a_folder_that_has_gone_under_the_command_is_one_line(tmp_path, capsys, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    said = "cogview presets: the folder in which this began has been removed; cd to another"
    assert mistake(capsys, "presets") == said


def closed(stream, *words):
    """The command as a process of its own, started with a stream that is closed, as by ``2>&-``."""
    return subprocess.run(
        [sys.executable, "-m", "cogview", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: os.close(stream),
    )


def test_closed_streams_are_no_failure(run_folder, tmp_path):
    words = ["generate", "--run", run_folder, SEVEN, "--num", 1, "--out"]
    assert closed(2, *words, tmp_path / "x.png").returncode == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.format == "PNG"
    assert closed(2, "trian").returncode == 2
    done = closed(1, "presets", "--help")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"standard output is closed; name a file" in closed(1, *words, "-").stderr


@pytest.mark.parametrize("is_buffered", [True, False])
@pytest.mark.parametrize(
    "words", [["presets"], ["presets", "--help"], ["--version"], ["pack", "--run", "RUN", "--out", "x"]]
)
def test_a_full_disk_behind_standard_output_is_one_line(
    words, is_buffered, run_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = [str(run_folder) if word == "RUN" else word for word in words]
    with io.TextIOWrapper(open("/dev/full", "wb", buffering=-1 if is_buffered else 0)) as full:
        full.reconfigure(write_through=not is_buffered)
        monkeypatch.setattr(sys, "stdout", full)
        assert main(words) == 2
        monkeypatch.undo()
    (line,) = capsys.readouterr().err.splitlines()
    assert "standard output cannot be written: No space left on device; make room there" in line


@pytest.mark.parametrize(
    ("verb", "place"), [("tokenize", "data.row_writer._Files.append"), ("data", "data.export.png_bytes")]
)
def test_a_full_disk_is_told_with_its_place_and_the_way_out(
    verb, place, photos, run_folder, tmp_path, capsys, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"cogview.{place}", full)
    words = {"tokenize": ["--data", photos, "--run", run_folder], "data": ["emoji"]}[verb]
    assert mistake(capsys, verb, *words, "--out", tmp_path / "x") == (
        f"cogview {verb}: --out {tmp_path / 'x'} cannot be written: No space left on device; make room there "
        "and repeat the command, or write to another place"
    )


def test_a_full_disk_is_not_told_of_the_file_that_is_copied(run_folder, tmp_path, capsys, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source, None, target)

    monkeypatch.setattr("cogview.commands.pack.shutil.copyfile", full)
    line = mistake(capsys, "pack", "--run", run_folder, "--out", tmp_path / "x")
    assert line.startswith(
        f"cogview pack: {tmp_path}/x.cogview.tmp/text_tokenizer.model cannot be written: No"
    )
    assert os.listdir(tmp_path) == []


def test_a_dash_writes_the_picture_to_standard_output(run_folder, capsysbinary):
    assert main(["generate", "--run", str(run_folder), SEVEN, "--num", "1", "--out", "-"]) == 0
    captured = capsysbinary.readouterr()
    with Image.open(io.BytesIO(captured.out)) as picture:
        assert picture.format == "PNG"
    assert b"1 picture, CapLoss" in captured.err


@pytest.mark.parametrize("encoding", ["ascii", "gbk"])
def test_a_terminal_that_lacks_a_character_is_no_failure(run_folder, tmp_path, monkeypatch, encoding):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    text = "七 \U0001f600"
    assert (
        main(["generate", "--run", str(run_folder), text, "--num", "1", "--out", str(tmp_path / "x.png")])
        == 0
    )
    terminal.flush()
    assert b"\\U0001f600" in terminal.buffer.getvalue()


def test_a_text_that_is_no_text_is_one_line(run_folder, tmp_path, capsys):
    out = ["--out", tmp_path / "x.png"]
    not_utf8 = os.fsdecode(b"a \xff")
    assert "is not valid UTF-8" in mistake(capsys, "generate", "--run", run_folder, not_utf8, *out)
    Image.new("RGB", (9, 9)).save(tmp_path / "p.png")
    assert "is not valid UTF-8" in mistake(
        capsys, "rerank", "--run", run_folder, "\ud800", tmp_path / "p.png"
    )
    assert main(["rerank", "--run", str(run_folder), "Ω", str(tmp_path / "p.png")]) == 0
    assert "never learned: Ω" in capsys.readouterr().err


def test_captions_are_told_as_they_come_and_as_json(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cogview.run, "READ_TOGETHER", 2)
    paths = [tmp_path / f"{index}.png" for index in range(5)]
    for path in paths:
        Image.new("RGB", (16, 16), "gray").save(path)
    paths[4].write_text("no picture")
    command = ["caption", "--run", run_folder, "--json", "--beams", "2"]
    assert main([str(word) for word in (*command, *paths)]) == 2
    captured = capsys.readouterr()
    told = [json.loads(line) for line in captured.out.splitlines()]
    assert [entry["file"] for entry in told] == [str(path) for path in paths[:4]]
    assert set(told[0]) == {"file", "text", "cap_loss"}
    assert "4.png cannot be read as an image" in captured.err
    assert main(["rerank", "--run", str(run_folder), SEVEN, *map(str, paths[:2]), "--json"]) == 0
    ranked = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["place"] for entry in ranked] == [1, 2]


def test_the_sheet_among_drawn_pictures_is_left_out_and_told(run_folder, tmp_path, capsys):
    out = tmp_path / "drawn"
    words = ["generate", "--run", str(run_folder), SEVEN, "--num", "2", "--out", str(out)]
    assert main(words) == 0
    paths = sorted(map(str, out.glob("*.png")))
    assert [os.path.basename(path) for path in paths] == ["0000.png", "0001.png", "sheet.png"]
    for command in (["rerank", "--run", str(run_folder), SEVEN], ["caption", "--run", str(run_folder)]):
        capsys.readouterr()
        assert main([*command, *paths, "--json"]) == 0
        said = capsys.readouterr()
        told = [json.loads(line)["file"] for line in said.out.splitlines()]
        assert sorted(told) == paths[:2]
        assert f"left out: {paths[2]}, a sheet" in said.err
    assert main(["caption", "--run", str(run_folder), paths[2], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == paths[2]


def test_a_reader_that_has_gone_ends_the_command_quietly(run_folder, tmp_path, capsys, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    Image.new("RGB", (16, 16), "gray").save(tmp_path / "p.png")
    with open(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["caption", "--run", str(run_folder), str(tmp_path / "p.png")]) == 141
    assert "Error" not in capsys.readouterr().err


def test_a_model_of_no_numbers_is_one_line(run_folder, tmp_path, capsys, monkeypatch):
    def of_model(path, model):
        load_model(path, model)
        model.get_parameter("transformer.final_layernorm.bias").data[0] = torch.nan

    def of_tokenizer(path):
        tensors = load_tensors(path)
        tensors["enc_b.blocks.0.bias"][0] = torch.nan
        return tensors

    for module, loader, damaged in (
        (cogview.run, "load_model", of_model),
        (tokenizers, "load_tensors", of_tokenizer),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, loader, damaged)
            assert main(["generate", "--run", str(run_folder), SEVEN, "--out", str(tmp_path / "x.png")]) == 2
        errors = capsys.readouterr().err
        assert "not finite" in errors.splitlines()[-1] and "Traceback" not in errors
        assert not (tmp_path / "x.png").exists()


def test_a_folder_of_pictures_from_start_to_end(photos, tmp_path, capsys):
    out = str(tmp_path / "my run")
    common = ["--data", str(photos), "--out", out, "--steps", "2", "--batch-size", "4"]
    assert main(["train-tokenizer", *common, "--skip-bad"]) == 0
    assert f"cogview train --data {photos} --out '{out}' --skip-bad\n" in capsys.readouterr().out
    assert main(["train", *common]) == 0
    shown = capsys.readouterr().out
    assert f"cogview generate --run '{out}' 'a text' --out out.png" in shown
    assert main(["generate", "--run", out, "a photo", "--num", "2", "--out", str(tmp_path / "x.png")]) == 0
    assert main(["train", *common[:-3], "3", *common[-2:]]) == 0
    # Other settings would describe neither the old nor the new run.
    line = mistake(capsys, "train", *common[:-1], "3")
    assert "was started with train.batch_size = 4, now 3" in line
    assert f"repeat the same settings (--settings '{out}/train.toml') to go on" in line
    settings = ["--settings", f"{out}/train.toml", "--out", out, "--steps", "3"]
    assert main(["train", *settings]) == 0


def test_mistakes_give_one_clear_line(run_folder, photos, tmp_path, capsys):
    text = "a handwritten seven"
    assert "run folder not found" in mistake(capsys, "generate", "--run", tmp_path / "absent", text)
    assert "cogview train --data DATA --out" in mistake(
        capsys, "generate", "--run", _only_tokenizers(run_folder, tmp_path), text
    )
    assert "data folder not found" in mistake(
        capsys, "train-tokenizer", "--data", tmp_path / "absent", "--out", tmp_path / "r"
    )
    assert "cogview train-tokenizer" in mistake(capsys, "train", "--data", photos, "--out", tmp_path)
    assert (
        "unknown preset 'huge'; known presets: digits, emoji, emoji-64, small, card, tutorial, base, fashion"
        in mistake(capsys, "train", "--data", photos, "--out", tmp_path / "r", "--preset", "huge")
    )
    assert "image not found" in mistake(capsys, "caption", "--run", run_folder, tmp_path / "absent.png")
    assert "image not found: xxx" in mistake(capsys, "caption", "--run", run_folder, "x" * 300)
    assert "run folder not found: xxx" in mistake(capsys, "caption", "--run", "x" * 300, photos / "0.png")
    (tmp_path / "new.cogview.tmp").touch()
    taken = mistake(capsys, "pack", "--run", run_folder, "--out", tmp_path / "new")
    assert taken == f"cogview pack: Not a directory: '{tmp_path / 'new.cogview.tmp'}'"
    folder = mistake(capsys, "rerank", "--run", run_folder, text, tmp_path)
    assert f"image must be a file, got the folder {tmp_path}" in folder
    (tmp_path / "bad.png").write_text("not an image")
    assert "cannot be read as an image" in mistake(
        capsys, "rerank", "--run", run_folder, text, tmp_path / "bad.png"
    )
    assert "the text is empty" in mistake(capsys, "generate", "--run", run_folder, " ")
    assert f"at most {PRESETS['digits'].min_text_tokens} fit" in mistake(
        capsys, "generate", "--run", run_folder, "seven " * 20
    )
    assert "temperature must be a finite number, 0 (the likeliest token) or above" in mistake(
        capsys, "generate", "--run", run_folder, text, "--temperature", "-1"
    )
    for device in ("nonsense", "xla", "privateuseone"):
        error = mistake(capsys, "generate", "--run", run_folder, text, "--device", device)
        assert f"device {device} cannot be used here" in error and "give cpu" in error and len(error) < 400


def test_an_option_is_named_as_it_is_typed(run_folder, photos, tmp_path, capsys):
    out = ["--out", tmp_path / "x"]
    finetune = ["finetune", "captioning", "--run", run_folder, "--data", photos, *out]
    for words, said in (
        (["study", "tokenizers", "--learning-rate", "nan", *out], "--learning-rate must be above 0"),
        (
            ["study", "stability", "--learning-rate", "inf", *out],
            "--learning-rate must be above 0 and finite",
        ),
        (["plan", "--gpus", "0"], "plan: --gpus must be at least 1, got 0"),
        (["plan", "--memory", "inf"], "plan: --memory must be above 0 and finite, got inf"),
        ([*finetune, "--learning-rate", "nan"], "finetune: --learning-rate must be finite"),
        ([*finetune, "--workers", "-1"], "finetune: --workers must be"),
        (["rerank", "a", tmp_path], "rerank: image must be a file"),
    ):
        assert said in mistake(capsys, *words)


def test_help_without_docstrings_shows_no_python():
    """As under ``python -OO``, where a dataclass gets its signature for a docstring."""
    for words in (["study", "--help"], ["--help"]):
        command = [sys.executable, "-OO", "-m", "cogview", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0 and "Annotated" not in done.stdout and "Literal" not in done.stdout


def test_a_warning_that_is_to_be_an_error_is_one_line(run_folder, tmp_path, capsys):
    words = ["generate", "--run", run_folder, "狗", "--num", 1, "--out", tmp_path / "x.png"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert "has parts the model never learned" in mistake(capsys, *words)


def test_too_little_memory_is_one_line(capsys, monkeypatch):
    def allocate(given):
        torch.empty(1 << 60)

    monkeypatch.setattr(cogview.commands.verbs, "presets", allocate)
    assert "not enough memory: " in mistake(capsys, "presets")


def test_more_guesses_than_codes_are_as_many_as_there_are(run_folder, tmp_path):
    drawn = []
    for parallel in ("1", str(10**20)):
        out = tmp_path / f"{parallel}.png"
        words = ["--num", "1", "--parallel", parallel, "--out", str(out)]
        assert main(["generate", "--run", str(run_folder), SEVEN, *words]) == 0
        drawn.append(Image.open(out).tobytes())
    assert drawn[0] == drawn[1]


def _only_tokenizers(run_folder, tmp_path):
    folder = tmp_path / "only-tokenizers"
    folder.mkdir()
    for name in ("tokenizers.json", "text_tokenizer.model", "image_tokenizer.safetensors"):
        shutil.copy(run_folder / name, folder)
    return folder


@pytest.mark.parametrize(
    "file",
    [
        "image_tokenizer.safetensors",
        "text_tokenizer.model",
        "tokenizers.json",
        "model.json",
        "checkpoints/step-00000006/model.safetensors",
    ],
)
def test_a_corrupt_file_gives_one_clear_line(run_folder, tmp_path, capsys, file):
    broken = tmp_path / "broken"
    shutil.copytree(run_folder, broken)
    (broken / file).write_bytes(b"{ nonsense")
    assert Path(file).name in mistake(capsys, "generate", "--run", broken, "a handwritten seven")


def test_help_and_mistakes_need_no_pytorch():
    calls = [[], ["--help"], ["trian"], ["super-resolve", "a.png"], ["train", "--data=x", "--out=absent"]]
    calls += [[verb, "--help"] for verb in VERBS]
    code = (
        "import sys\nfrom cogview.cli import main\n"
        f"for words in {calls!r}:\n"
        "    try: main(words)\n"
        "    except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("example:") == len(VERBS)
    assert "small     64 px" in done.stdout
    assert "--steps              --train.steps" in done.stdout
    assert "--steps       --image-tokenizer-train.steps" in done.stdout
    assert "--checkpoint-layers  --model.activation-checkpointing" in done.stdout
    mistakes = done.stderr[done.stderr.index("cogview: which command") :].splitlines()
    assert [line.partition(";")[0] for line in mistakes] == [
        f"cogview: which command? one of {', '.join(VERBS)}",
        "cogview: unknown command 'trian'",
        "cogview super-resolve: missing: --run RUN run folder of "
        + '"cogview train" or "cogview demo" (required)',
        "cogview train: run folder not found: absent",
    ]


def test_ctrl_c_says_what_is_saved_and_the_same_command_goes_on(photos, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "cogview", "train-tokenizer", "--data", str(photos), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heed_signals
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("tensorboard/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert f"saved in {out}" in errors
    assert "Run the same command again" in errors
    assert len(list(out.glob("tokenizer-checkpoints/step-*"))) == 1


def test_without_its_extra_the_command_says_in_one_line_which_one_to_install():
    code = "import sys\nsys.modules['tyro'] = None\nfrom cogview.cli import main\nsys.exit(main())"
    command = [sys.executable, "-c", code, "generate", "--run", "x", "a text"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "cogview: the model package needs tyro, which is not installed: "
        "pip install 'cogview-kernels[model]'\n"
    )


def test_generate_shows_its_progress(run_folder, tmp_path, capsys):
    arguments = ["generate", "--run", str(run_folder), "a handwritten seven", "--num", "2"]
    assert main([*arguments, "--out", str(tmp_path / "x.png")]) == 0
    assert "draw: code 32 of 32" in capsys.readouterr().err


def test_presets_are_listed_with_their_sizes(capsys):
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(PRESETS)]] == list(PRESETS)
    (card,) = (line for line in lines if line.startswith("card"))
    assert "92.3 M" in card and "40 + 256 tokens" in card and "one 24 GB card" in card
    held = float(re.search(r"([\d.]+)  128 px", card)[1])
    assert 1 < held < 20  # GiB: room is left on the card for what is no tensor


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("cogview 0.")
