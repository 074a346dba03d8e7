# SPDX-License-Identifier: Apache-2.0
"""What a run was set up with: ``tokenizers.json`` and ``model.json`` in its folder.

A run that goes on must go on with the same settings: others would give a model that neither describes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cogview.config import (
    ImageTokenizerConfig,
    ImageTokenizerTrainConfig,
    ModelConfig,
    SamplingConfig,
    TrainConfig,
)
from cogview.files import StrPath, read_json, write_json

TOKENIZER_SETTINGS = "tokenizers.json"
MODEL_SETTINGS = "model.json"

T = TypeVar("T")


@dataclass(frozen=True)
class TokenizerSettings:
    """Data, sizes and schedule of both tokenizers of a run."""

    data: str
    text_pieces: int
    image_tokenizer: ImageTokenizerConfig
    image_tokenizer_train: ImageTokenizerTrainConfig
    preset: str = field(default="", compare=False)  # name of the preset that these come from


@dataclass(frozen=True)
class ModelSettings:
    """Data of a run's transformer, its shape, its training, and how it samples unless told otherwise."""

    data: str
    model: ModelConfig
    sampling: SamplingConfig
    max_text_tokens: int
    train: TrainConfig
    caption_tokens: int | None = None  # length of a caption, for a model that never learned to end one


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

    TypeError or ValueError for a field that is missing, unknown or out of range.
    """
    if not isinstance(content, dict):
        raise TypeError(f"{kind.__name__} must be a table of settings, got {content!r}")
    hints = typing.get_type_hints(kind)
    unknown = [name for name in content if name not in hints]
    if unknown:
        raise TypeError(f"{kind.__name__} has no field {unknown[0]!r}")
    return kind(**{name: _value(hints[name], value) for name, value in content.items()})


def _value(hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union) and value is not None:
        hint = next(choice for choice in typing.get_args(hint) if choice is not type(None))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and value is not None:
        return build(hint, value)
    return tuple(value) if isinstance(value, list) else value


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {prefix: settings}
    return {
        k: v for key, value in settings.items() for k, v in _flat(value, f"{prefix}.{key}".strip(".")).items()
    }


def _free(settings: Any, prefix: str = "") -> Iterator[str]:
    """The keys of :func:`_flat` whose dataclass field has ``compare=False``."""
    if not dataclasses.is_dataclass(settings) or isinstance(settings, type):
        return
    for part in dataclasses.fields(settings):
        key = f"{prefix}.{part.name}".strip(".")
        if part.compare:
            yield from _free(getattr(settings, part.name), key)
        else:
            yield key


def check_settings(path: StrPath, settings: Any) -> None:
    """ValueError that names the first difference if the file ``path`` holds other settings.

    Writes nothing; no file, no difference. A dataclass field with ``compare=False``, at any depth, is no
    setting of the run, so it may differ.
    """
    path = Path(path)
    if not path.exists():
        return
    content = read_json(path)
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        # A run of an earlier version lacks the fields that came later: they have their defaults. Where the
        # file does not fit the dataclass at all, the comparison below names what differs.
        with contextlib.suppress(TypeError, ValueError):
            content = plain(build(type(settings), content))
    then, now = _flat(content), _flat(plain(settings))
    free = set(_free(settings))
    for key in [*now, *(key for key in then if key not in now)]:
        if then.get(key) != now.get(key) and key not in free:
            raise ValueError(
                f"{path.parent} was started with {key} = {then.get(key)!r}, now {now.get(key)!r}; "
                "repeat the same settings to go on with it, or choose another folder"
            )


def write_settings(path: StrPath, settings: Any) -> None:
    """Write a run's settings: to be called once training can start, so that a mistake binds no folder."""
    write_json(path, plain(settings))


def claim_settings(path: StrPath, settings: Any) -> None:
    """Write a run's settings, or check that a run to be resumed has the same ones."""
    check_settings(path, settings)
    if not Path(path).exists():
        write_settings(path, settings)


def _load(kind: type[T], path: Path, hint: str) -> T:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"run folder not found: {path.parent}; {hint}")
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}; {hint}")
    try:
        return build(kind, read_json(path))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def train_tokenizers_hint(folder: StrPath) -> str:
    """What to do about a run folder without tokenizers."""
    return f"train the tokenizers first: cogview train-tokenizer --out {shlex.quote(str(folder))}"


def train_model_hint(folder: StrPath) -> str:
    """What to do about a run folder without a model."""
    return f"train the model first: cogview train --out {shlex.quote(str(folder))}"


def load_tokenizer_settings(folder: StrPath) -> TokenizerSettings:
    """Settings of a run's tokenizers. FileNotFoundError or ValueError naming the file and the way out."""
    return _load(TokenizerSettings, Path(folder) / TOKENIZER_SETTINGS, train_tokenizers_hint(folder))


def load_model_settings(folder: StrPath) -> ModelSettings:
    """Settings of a run's transformer. FileNotFoundError or ValueError naming the file and the way out."""
    return _load(ModelSettings, Path(folder) / MODEL_SETTINGS, train_model_hint(folder))
