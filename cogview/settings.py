# SPDX-License-Identifier: Apache-2.0
"""What a run was set up with: ``tokenizers.json`` and ``model.json`` in its folder.

A run that goes on must go on with the same settings: others would give a model that neither describes.
Beside them, ``train-tokenizer.toml`` and ``train.toml`` hold all options as ``--settings`` reads them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from cogview.config import (
    ImageTokenizerConfig,
    ImageTokenizerTrainConfig,
    ModelConfig,
    Preset,
    SamplingConfig,
    TrainConfig,
)
from cogview.files import StrPath, exists, read_json, write_json, write_text

TOKENIZER_SETTINGS = "tokenizers.json"
MODEL_SETTINGS = "model.json"
TOKENIZER_OPTIONS = "train-tokenizer.toml"
MODEL_OPTIONS = "train.toml"
OPTIONS_OF = {TOKENIZER_SETTINGS: TOKENIZER_OPTIONS, MODEL_SETTINGS: MODEL_OPTIONS}

# Settings that may differ when a run goes on, by their names in these files and in ``demo.json``: how a run
# is computed, shown and kept, how it draws, how long it trains, and where its data and its CLIP lie.
# Checkpoints know these themselves by their fingerprint. All other settings make the model what it is: they
# must stay.
MAY_CHANGE = frozenset(
    {
        *("data", "clip", "preset", "name", "finetuned.run"),
        *(f"sampling.{name}" for name in ("temperature", "top_k", "top_p", "guidance")),
        "model.activation_checkpointing",
        *("train.steps", "train.checkpoint_every", "train.keep", "train.accumulate", "train.log_every"),
        *("train.samples_every", "train.sample_texts", "train.compile_layers"),
        *(f"image_tokenizer_train.{name}" for name in ("steps", "checkpoint_every", "keep")),
    }
)

T = TypeVar("T")


@dataclass(frozen=True)
class TokenizerSettings:
    """Data, sizes and schedule of both tokenizers of a run."""

    data: str
    text_pieces: int
    image_tokenizer: ImageTokenizerConfig
    image_tokenizer_train: ImageTokenizerTrainConfig
    preset: str = ""  # name of the preset that these come from


@dataclass(frozen=True)
class Finetuned:
    """What a run was finetuned for, and from which run."""

    task: str
    run: str
    caption: str | None = None  # of every picture, in place of the captions of the data


@dataclass(frozen=True)
class ModelSettings:
    """Data of a run's transformer, its shape, its training, and how it samples unless told otherwise."""

    data: str
    model: ModelConfig
    sampling: SamplingConfig
    max_text_tokens: int
    train: TrainConfig
    caption_tokens: int | None = None  # length of a caption, for a model that never learned to end one
    finetuned: Finetuned | None = None  # None: trained from random weights


def plain(settings: Any) -> Any:
    """Dataclasses, tuples and paths as JSON would give them back."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        settings = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    if isinstance(settings, dict):
        return {key: plain(value) for key, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [plain(value) for value in settings]
    return str(settings) if isinstance(settings, Path) else settings


def build(kind: type[T], content: Any) -> T:
    """The dataclass ``kind`` from what :func:`plain` made of it; absent fields take their defaults.

    TypeError or ValueError for a field that is missing, unknown, of another type or out of range.
    """
    if not isinstance(content, dict):
        raise TypeError(f"{kind.__name__} must be a table of settings, got {content!r}")
    hints = typing.get_type_hints(kind)
    unknown = [name for name in content if name not in hints]
    if unknown:
        raise TypeError(
            f"{kind.__name__} has no field {unknown[0]!r}; a newer version of cogview may have written it"
        )
    values = {name: _value(name, hints[name], value) for name, value in content.items()}
    missing = [
        one.name
        for one in dataclasses.fields(cast(Any, kind))
        if one.name not in content
        and one.init
        and one.default is dataclasses.MISSING
        and one.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise TypeError(f"missing in {kind.__name__}: {', '.join(missing)}")
    return kind(**values)


def _value(name: str, hint: Any, value: Any) -> Any:
    # Only a run that is read needs it: presets, which the benchmarks of kernels look at, do not.
    from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

    if typing.get_origin(hint) in (types.UnionType, typing.Union) and value is not None:
        hint = next(choice for choice in typing.get_args(hint) if choice is not type(None))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and value is not None:
        return build(hint, value)
    if typing.get_origin(hint) is dict and isinstance(value, dict):
        return {key: _value(f"{name}.{key}", typing.get_args(hint)[1], part) for key, part in value.items()}
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        value = tuple(value)
    is_misplaced_bool = isinstance(value, bool) and hint in (int, float)
    try:
        if is_misplaced_bool:
            raise TypeCheckError("a bool is no number")
        check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError:
        expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise TypeError(f"{name} must be of type {expected}, got {value!r}") from None
    return value


def read_built(kind: type[T], path: StrPath) -> T:
    """The dataclass that a JSON file of a run holds, which the command writes anew where there is none.

    FileNotFoundError if absent, ValueError if damaged.
    """
    content = read_json(path)
    try:
        return build(kind, content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; remove it") from None


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {prefix: settings}
    return {
        k: v for key, value in settings.items() for k, v in _flat(value, f"{prefix}.{key}".strip(".")).items()
    }


def check_settings(path: StrPath, settings: Any, said_as: Mapping[str, str] | None = None) -> None:
    """ValueError that names the first difference if the file ``path`` holds other settings.

    Writes nothing; no file, no difference. What ``MAY_CHANGE`` lists is no difference either. ``said_as`` are
    the names under which the user knows settings that bear another, such as those of options.
    """
    path = Path(path)
    if not exists(path):
        return
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it must be a table of settings, got {content!r}; restore it")
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        # A run of an earlier version lacks the fields that came later: they have their defaults. Where the
        # file does not fit the dataclass at all, the comparison below names what differs.
        with contextlib.suppress(TypeError, ValueError):
            content = plain(build(type(settings), content))
    then, now = _flat(content), _flat(plain(settings))
    for key in [*now, *(key for key in then if key not in now)]:
        if then.get(key) != now.get(key) and key.removeprefix("preset.") not in MAY_CHANGE:
            name = (said_as or {}).get(key, key)
            name, before, after = _difference(name, then.get(key), now.get(key))
            options = path.parent / OPTIONS_OF.get(path.name, "")
            where = f" (--settings {shlex.quote(str(options))})" if options.is_file() else ""
            raise ValueError(
                f"{path.parent} was started with {name} = {before!r}, now {after!r}; "
                f"repeat the same settings{where} to go on with it, or choose another folder"
            )


def _difference(name: str, then: Any, now: Any) -> tuple[str, Any, Any]:
    """What of two settings differs: of long lists, such as those of prompts, their length or one entry."""
    if not (isinstance(then, list) and isinstance(now, list)) or max(len(then), len(now)) < 2:
        return name, then, now
    if len(then) != len(now):
        return f"number of {name}", len(then), len(now)
    place = next(place for place, pair in enumerate(zip(then, now, strict=True)) if pair[0] != pair[1])
    return f"{name}[{place}]", then[place], now[place]


def write_settings(path: StrPath, settings: Any) -> None:
    """Write a run's settings: to be called once training can start, so that a mistake binds no folder."""
    write_json(path, plain(settings))


def tokenizer_options(settings: TokenizerSettings) -> dict[str, Any]:
    """The options of ``cogview train-tokenizer`` that give these settings."""
    options = plain(settings)
    if settings.image_tokenizer.vqgan is not None:
        return {**options, "kind": "vqgan"}
    for table in ("image_tokenizer", "image_tokenizer_train"):
        del options[table]["vqgan"]
    return options


def model_options(data: str, preset: Preset) -> dict[str, Any]:
    """The options of ``cogview train`` that give this preset; what follows from the data is left out."""
    model = plain(preset.model)
    del model["vocab_size"], model["max_positions"]
    attention = "dense" if model["three_region"] is None else "three-region"
    if model["three_region"] is None:
        del model["three_region"]
    return {
        "data": data,
        "preset": preset.name,
        "attention": attention,
        "min_text_tokens": preset.min_text_tokens,
        "max_text_tokens": preset.max_text_tokens,
        "model": model,
        "train": plain(preset.train),
        "sampling": plain(preset.sampling),
    }


def write_options(path: StrPath, options: Mapping[str, Any]) -> None:
    """Write all options of a training, but its folder and device, as TOML that ``--settings`` reads."""
    import tomli_w

    path = Path(path)
    verb = path.name.removesuffix(".toml")
    head = (
        f"# All options of this run. Another one like it: cogview {verb} --settings {path.name} --out NEW\n"
    )
    if path.name == MODEL_OPTIONS:
        head += f"# NEW must hold tokenizers: {TOKENIZER_OPTIONS} beside this file gives others like these.\n"
    given = {name: value for name, value in options.items() if name != "preset" or value}
    text = head + tomli_w.dumps(_without_none(given))
    write_text(path, text.encode(errors="replace").decode())  # TOML has no spelling of what is no UTF-8.


def _without_none(value: Any) -> Any:
    """TOML has no null; on the command line and in these files it is the word None."""
    if isinstance(value, dict):
        return {name: _without_none(part) for name, part in value.items()}
    return "None" if value is None else value


def claim_settings(path: StrPath, settings: Any, said_as: Mapping[str, str] | None = None) -> None:
    """Write a run's settings, or check, as :func:`check_settings`, that one to be resumed has the same."""
    check_settings(path, settings, said_as)
    if not Path(path).exists():
        write_settings(path, settings)


def load_settings(kind: type[T], path: Path, hint: str) -> T:
    """What :func:`write_settings` wrote.

    FileNotFoundError with the ``hint`` where there is no such file, ValueError for a damaged one.
    """
    if not exists(path.parent):
        raise FileNotFoundError(f"run folder not found: {path.parent}; {hint}")
    if not exists(path):
        raise FileNotFoundError(f"{path.parent} has no {path.name}; {hint}")
    try:
        return build(kind, read_json(path))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or of another version: {error}") from None


def train_tokenizers_hint(folder: StrPath) -> str:
    """What to do about a run folder without tokenizers."""
    return f"train the tokenizers first: cogview train-tokenizer --data DATA --out {shlex.quote(str(folder))}"


def train_model_hint(folder: StrPath) -> str:
    """What to do about a run folder without a model."""
    return f"train the model first: cogview train --data DATA --out {shlex.quote(str(folder))}"


def load_tokenizer_settings(folder: StrPath) -> TokenizerSettings:
    """Settings of a run's tokenizers. FileNotFoundError or ValueError naming the file and the way out."""
    return load_settings(TokenizerSettings, Path(folder) / TOKENIZER_SETTINGS, train_tokenizers_hint(folder))


def load_model_settings(folder: StrPath) -> ModelSettings:
    """Settings of a run's transformer. FileNotFoundError or ValueError naming the file and the way out."""
    return load_settings(ModelSettings, Path(folder) / MODEL_SETTINGS, train_model_hint(folder))
