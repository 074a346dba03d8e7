# SPDX-License-Identifier: Apache-2.0
"""A run: the folder that training writes and that generation, captioning and reranking read.

::

    runs/x/
      tokenizers.json              data, sizes and schedule of both tokenizers
      text_tokenizer.model         SentencePiece
      image_tokenizer.safetensors  VQ-VAE
      model.json                   shape of the transformer, its training and sampling
      checkpoints/step-00000400/   weights, optimizer, losses so far
      tensorboard/                 scalars
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cogview.config import ImageTokenizerConfig, ModelConfig, SamplingConfig, ThreeRegionConfig
from cogview.model.transformer import CogView
from cogview.tokens.text_tokenizer import TextTokenizer
from cogview.tokens.vocab import Vocab
from cogview.tokens.vqvae import ImageTokenizer
from cogview.training.checkpoint import latest_checkpoint, load_tensors, load_weights, read_json, write_json

TOKENIZER_SETTINGS = "tokenizers.json"
MODEL_SETTINGS = "model.json"
TEXT_TOKENIZER = "text_tokenizer.model"
IMAGE_TOKENIZER = "image_tokenizer.safetensors"


@dataclass
class Tokenizers:
    """Both tokenizers of a run and the id space that follows from them."""

    text: TextTokenizer
    image: ImageTokenizer
    vocab: Vocab


@dataclass
class Run:
    """A trained model with all it needs to draw and to read pictures."""

    model: CogView
    tokenizers: Tokenizers
    sampling: SamplingConfig
    max_text_tokens: int


def _plain(settings: Any) -> Any:
    """Dataclasses and tuples as JSON would give them back."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        settings = dataclasses.asdict(settings)
    if isinstance(settings, dict):
        return {key: _plain(value) for key, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [_plain(value) for value in settings]
    return settings


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {prefix: settings}
    return {
        k: v for key, value in settings.items() for k, v in _flat(value, f"{prefix}.{key}".strip(".")).items()
    }


def claim_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write a run's settings, or check that a run to be resumed has the same ones.

    Raises ValueError that names the first difference: going on with other settings would give a model
    that neither describes.
    """
    settings = _plain(settings)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
        return
    then, now = _flat(read_json(path)), _flat(settings)
    for key in [*now, *(key for key in then if key not in now)]:
        if then.get(key) != now.get(key):
            raise ValueError(
                f"{path.parent} was started with {key} = {then.get(key)!r}, now {now.get(key)!r}; "
                "repeat the same settings to go on with it, or choose another folder"
            )


def _settings(path: Path, hint: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}; {hint}")
    return read_json(path)


def load_tokenizers(folder: Path, device: str = "cpu") -> Tokenizers:
    """Both tokenizers of a run. FileNotFoundError or ValueError, each naming the file and the way out."""
    if not folder.is_dir():
        raise FileNotFoundError(f"run folder not found: {folder}")
    hint = "train the tokenizers first: cogview train-tokenizer --out " + str(folder)
    settings = _settings(folder / TOKENIZER_SETTINGS, hint)
    try:
        config = ImageTokenizerConfig(**settings["image_tokenizer"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / TOKENIZER_SETTINGS} is damaged: {error}") from None
    if not (folder / IMAGE_TOKENIZER).is_file():
        raise FileNotFoundError(f"{folder} has no finished image tokenizer; {hint}")
    image = ImageTokenizer(config)
    load_weights(image, load_tensors(folder / IMAGE_TOKENIZER), folder / IMAGE_TOKENIZER)
    text = TextTokenizer.load(folder / TEXT_TOKENIZER)
    return Tokenizers(text, image.to(device).eval(), Vocab(config.num_codes, len(text)))


def _train_hint(folder: Path) -> str:
    return f"train the model first: cogview train --out {folder}"


def load_settings(folder: Path) -> tuple[ModelConfig, SamplingConfig, int]:
    """Model shape, sampling and longest text of a run. FileNotFoundError or ValueError naming the file."""
    if not folder.is_dir():
        raise FileNotFoundError(f"run folder not found: {folder}")
    path = folder / MODEL_SETTINGS
    settings = _settings(path, _train_hint(folder))
    try:
        shape = dict(settings["model"])
        three_region = shape.pop("three_region")
        config = ModelConfig(
            **shape, three_region=None if three_region is None else ThreeRegionConfig(**three_region)
        )
        return config, SamplingConfig(**settings["sampling"]), int(settings["max_text_tokens"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def load_run(folder: Path, device: str = "cpu") -> Run:
    """Tokenizers and the latest weights of a run, in eval mode, for generation.

    FileNotFoundError or ValueError, each naming the file and the way out.
    """
    tokenizers = load_tokenizers(folder, device)
    config, sampling, max_text_tokens = load_settings(folder)
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise FileNotFoundError(f"{folder} has no checkpoint yet; {_train_hint(folder)}")
    with torch.device("meta"):
        model = CogView(config)
    model.to_empty(device="cpu")
    weights = checkpoint / "model.safetensors"
    load_weights(model, load_tensors(weights), weights)
    return Run(model.to(device).eval(), tokenizers, sampling, max_text_tokens)
