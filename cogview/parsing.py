# SPDX-License-Identifier: Apache-2.0
"""From the words of a command line, and a file of settings, to the options of a verb."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import tyro

from cogview import options
from cogview.config import Preset, ThreeRegionConfig
from cogview.files import exists
from cogview.presets import default_preset, get_preset, implied_preset, with_vqgan
from cogview.settings import TOKENIZER_SETTINGS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VERBS: dict[str, type] = {
    "train-tokenizer": options.TrainTokenizer,
    "tokenize": options.Tokenize,
    "train": options.Train,
    "finetune": options.Finetune,
    "train-clip": options.TrainClip,
    "train-clip-gen": options.TrainClipGen,
    "plan": options.Plan,
    "generate": options.Generate,
    "clip-generate": options.ClipGenerate,
    "infill": options.Infill,
    "super-resolve": options.SuperResolve,
    "caption": options.Caption,
    "rerank": options.Rerank,
    "serve": options.Serve,
    "evaluate": options.Evaluate,
    "presets": options.Presets,
    "convert": options.Convert,
    "pack": options.Pack,
    "data": options.WriteData,
    "demo": options.Demo,
    "rank-curve": options.RankCurve,
    "judge-clip-gen": options.JudgeClipGen,
    "study": options.Study,
}
# Options of a verb that begins from a preset, in their short form, and what each is short for.
_OF_TRAINING = {
    **{
        name: f"train.{name}"
        for name in ("steps", "batch-size", "seed", "precision", "accumulate", "log-every", "keep")
    },
    "samples-every": "train.samples-every",
    "validation": "train.validation",
    "compile-layers": "train.compile-layers",
    "checkpoint-layers": "model.activation-checkpointing",
}
_NOT_OF_A_PLAN = ("seed", "log-every", "keep", "samples-every", "validation", "compile-layers")
SHORT: dict[type, dict[str, str]] = {
    options.TrainTokenizer: {
        name: f"image-tokenizer-train.{name}" for name in ("steps", "batch-size", "seed", "precision", "keep")
    },
    options.Train: _OF_TRAINING,
    options.TrainClipGen: {
        **{name: f"train.{name}" for name in ("steps", "batch-size", "seed", "precision", "keep")},
        "embedding-noise": "train.embedding-noise",
        "embedding-loss": "train.embedding-loss",
    },
    options.Plan: {name: full for name, full in _OF_TRAINING.items() if name not in _NOT_OF_A_PLAN},
}

NARROWEST = 40  # columns; below a few of them tyro lays out its help for ever
ONE_LINE = 1 << 14  # columns in which tyro breaks no number and no name, of which our line is made


def parse(verb: str, words: Sequence[str], description: str) -> Any:
    """The options of ``verb`` (a dataclass of :mod:`cogview.options`).

    ``--help`` prints the help and raises SystemExit. A mistake is one ValueError of one line.
    """
    kind = VERBS[verb]
    default: Any = {}
    words = list(words)
    if _last_value(words, "out") == "":
        raise ValueError("--out must name a file or a folder, got an empty name")
    if kind in SHORT:
        path = _last_value(words, "settings")
        if path is not None:
            words = _words_of_file(Path(path), kind) + words
        words = [_in_full(word, SHORT[kind]) for word in words]
        default = {"default": _defaults(kind, words)}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), _shape_of_words(_asks_help(words)):
            return tyro.cli(
                kind,
                prog=f"cogview {verb}",
                description=description,
                args=words,
                config=(tyro.conf.AvoidSubcommands,),
                **default,
            )
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise
        said = _one_line(complaint.getvalue(), f"cogview {verb}")
        raise ValueError(f"{said}{_guess(said, SHORT.get(kind, ()))}; see cogview {verb} --help") from None


@contextlib.contextmanager
def _shape_of_words(is_help: bool) -> Iterator[None]:
    """Within the block, help fits into the terminal, and an error is what :func:`_one_line` knows.

    tyro draws the box of an error in other characters where standard output takes no UTF-8.
    """
    utf8 = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    output = contextlib.nullcontext() if is_help else contextlib.redirect_stdout(utf8)
    with output, _columns(NARROWEST if is_help else ONE_LINE):
        yield


@contextlib.contextmanager
def _columns(least: int) -> Iterator[None]:
    """Within the block, what tyro takes for the width of the terminal is no less."""
    before = os.environ.get("COLUMNS")
    if shutil.get_terminal_size().columns < least:
        os.environ["COLUMNS"] = str(least)
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


def _asks_help(words: Sequence[str]) -> bool:
    return bool({"-h", "--help"} & set(words))


def _defaults(kind: type, words: Sequence[str]) -> Any:
    """The options of a verb as its preset has them: what the words then override."""
    preset = _preset(kind, words)
    names = [field.name for field in dataclasses.fields(kind)]
    if "attention" in names:
        attention = _last_value(words, "attention")
        if attention is not None:
            three_region = preset.model.three_region or ThreeRegionConfig()
            changed = None if attention == "dense" else three_region
            preset = replace(preset, model=replace(preset.model, three_region=changed))
    if "kind" in names and _last_value(words, "kind") == "vqgan":
        preset = with_vqgan(preset)
    own = set()
    if kind is options.TrainClipGen:
        own = {"train"}
        # CLIP-GEN learns no rows without an embedding, which guidance would weigh.
        preset = replace(preset, sampling=replace(preset.sampling, guidance=1.0))
    parts = {name: getattr(preset, name) for name in names if hasattr(preset, name) and name not in own}
    parts |= {name: tyro.MISSING for name in ("data", "out", "clip") if name in names}
    return kind(start=preset, **parts)


def _preset(kind: type, words: Sequence[str]) -> Preset:
    """The preset that is named, else the one of a run's tokenizers, else the one for the data.

    The one of a run's tokenizers has their sizes, also where it is named, as in the ``train.toml`` of a run.
    """
    name, out = _last_value(words, "preset"), _last_value(words, "out")
    named = None if name is None else get_preset(name)
    reads_run = kind in (options.Train, options.TrainClipGen)
    of_run = Path(out) if reads_run and out is not None and not _asks_help(words) else None
    if of_run is not None and (named is None or exists(of_run / TOKENIZER_SETTINGS)):
        implied = implied_preset(of_run)
        if named is None or named.name == implied.name:
            return implied
    if named is not None:
        return named
    return default_preset(_last_value(words, "data") or "")


def _last_value(words: Sequence[str], name: str) -> str | None:
    """What ``--name value`` or ``--name=value`` gives, the last one if there are several."""
    found = None
    for word, following in zip_longest(words, words[1:]):
        if word == f"--{name}":
            found = following
        elif word.startswith(f"--{name}="):
            found = word.partition("=")[2]
    return found


def _guess(said: str, short: Collection[str]) -> str:
    """The short form that an unrecognized option may be meant for: tyro does not know these, so to guess."""
    unknown = re.match(r"unrecognized options: --([\w-]+)", said)
    near = difflib.get_close_matches(unknown[1], short, n=1, cutoff=0.7) if unknown else []
    return f"; did you mean --{near[0]}" if near and "Perhaps you meant" not in said else ""


def _in_full(word: str, short: Mapping[str, str]) -> str:
    name, equals, value = word.partition("=")
    plain = name[:2] == "--" and name[2:].removeprefix("no-")
    if not plain or plain not in short:
        return word
    table, _, option = short[plain].rpartition(".")
    negation = "no-" if name == f"--no-{plain}" else ""
    return f"--{table}.{negation}{option}{equals}{value}"


def _words_of_file(path: Path, kind: type) -> list[str]:
    """A TOML file as words of a command line. What belongs to another verb with settings is left out."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"settings file not found: {path}") from None
    except OSError as error:
        raise OSError(f"--settings {path} cannot be read: {error.strerror}; it takes a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    known = {field.name for each in SHORT for field in dataclasses.fields(each)}
    short = {name.replace("-", "_") for names in SHORT.values() for name in names}
    for name in content:
        # What is no option would be taken for a switch of the command line, such as --help.
        if name.replace("-", "_") not in (known | short) - {"settings"}:
            raise ValueError(f"{path} sets {name!r}, which is no option that a settings file can hold")
    others = known - {field.name for field in dataclasses.fields(kind)}
    return [
        word
        for name, value in content.items()
        if name.replace("-", "_") not in others
        for word in _words_of(name, value)
    ]


def _words_of(name: str, value: Any) -> Iterator[str]:
    name = name.replace("_", "-")
    if isinstance(value, dict):
        for inner, content in value.items():
            yield from _words_of(f"{name}.{inner}", content)
    elif isinstance(value, bool):
        table, dot, flag = name.rpartition(".")
        yield f"--{table}{dot}{flag if value else 'no-' + flag}"
    elif isinstance(value, list):
        for entry in value:
            if not isinstance(entry, (str, int, float)) or str(entry).startswith("--"):
                raise ValueError(
                    f"{name} in the settings file has {entry!r}, which is neither a number nor a text, or "
                    "begins with --"
                )
        yield from (f"--{name}", *map(str, value))
    else:
        yield f"--{name}={value}"


def _full_option(found: re.Match[str]) -> str:
    """The start of an error of a nested dataclass, with the option in place of its field."""
    return f"--{found[1]}.{found[2].replace('_', '-')} must"


def _one_line(box: str, prog: str) -> str:
    """What tyro says in a box of several lines, without the parts that only repeat the help."""
    sections: list[list[str]] = [[]]
    for line in box.splitlines():
        text = line.strip("│ ")
        if set(text) <= set("─╭╮╰╯"):
            sections.append([])
        elif not line.startswith(("╭", "╰")):
            sections[-1].append(text)
    said = [" ".join(section) for section in sections if section]
    said = [text for text in said if not text.startswith(("For full helptext", "Argument helptext"))]
    # The name of the whole dataclass says nothing to the user; that of a nested one is the option's table.
    text = re.sub(r"^Error parsing [A-Z]\w*: ", "", "; ".join(said))
    text = re.sub(r"^Error parsing ([a-z][\w.-]*): (\w+) must", _full_option, text)
    text = re.sub(
        r"^Error parsing (--\S+): invalid literal for int.*: ", r"\1 must be a whole number, got ", text
    )
    text = re.sub(r"^Error parsing (--\S+): could not convert.*: ", r"\1 must be a number, got ", text)
    text = text.replace(f"Missing from {prog}:", "missing:")
    return text[:1].lower() + text[1:]
