# SPDX-License-Identifier: Apache-2.0
"""Both tokenizers of a run, as its folder holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cogview.files import StrPath, digest, exists, load_tensors
from cogview.settings import load_tokenizer_settings, train_tokenizers_hint
from cogview.tokens.text_tokenizer import TextTokenizer
from cogview.tokens.vocab import Vocab
from cogview.tokens.vqgan import make_image_tokenizer
from cogview.tokens.vqvae import ImageTokenizer
from cogview.weights import load_weights

TEXT_TOKENIZER = "text_tokenizer.model"
IMAGE_TOKENIZER = "image_tokenizer.safetensors"


@dataclass
class Tokenizers:
    """Both tokenizers of a run and the id space that follows from them."""

    text: TextTokenizer
    image: ImageTokenizer
    vocab: Vocab
    fingerprint: str = ""  # of the files that they were read from


def load_tokenizers(folder: StrPath, device: str = "cpu") -> Tokenizers:
    """Both tokenizers of a run. FileNotFoundError or ValueError, each naming the file and the way out."""
    folder = Path(folder)
    image = load_image_tokenizer(folder, device)
    text = TextTokenizer.load(folder / TEXT_TOKENIZER)
    vocab = Vocab(image.config.num_codes, len(text))
    return Tokenizers(text, image, vocab, fingerprint_tokenizers(folder))


def load_image_tokenizer(folder: StrPath, device: str = "cpu") -> ImageTokenizer:
    """The image tokenizer of a run alone. Raises what :func:`load_tokenizers` raises."""
    folder = Path(folder)
    settings = load_tokenizer_settings(folder)
    if not exists(folder / IMAGE_TOKENIZER):
        raise FileNotFoundError(f"{folder} has no finished image tokenizer; {train_tokenizers_hint(folder)}")
    image = make_image_tokenizer(settings.image_tokenizer)
    tensors = load_tensors(folder / IMAGE_TOKENIZER)
    load_weights(image, tensors, folder / IMAGE_TOKENIZER)
    # It is small, and where it is damaged its codes would look as good as any.
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{folder / IMAGE_TOKENIZER} is damaged: {name} has numbers that are not finite")
    return image.to(device).eval()


def fingerprint_tokenizers(folder: StrPath) -> str:
    """What tells the tokenizers of one run from those of another, whatever their sizes."""
    return " ".join(digest(Path(folder) / name) for name in (TEXT_TOKENIZER, IMAGE_TOKENIZER))


def require_each_once(name: str, folders: Sequence[StrPath]) -> None:
    """ValueError if ``folders``, the argument ``name``, name one folder twice, be it in another spelling."""
    seen: dict[Path, StrPath] = {}
    for folder in folders:
        place = Path(folder).resolve()
        if place in seen:
            raise ValueError(f"{name} must name each run once, got {seen[place]} and {folder}")
        seen[place] = folder


def require_same_tokenizers(name: str, folders: Sequence[StrPath]) -> None:
    """ValueError if not all runs in ``folders``, the argument ``name``, have the tokenizers of the first."""
    first, *others = folders
    for folder in others:
        if fingerprint_tokenizers(folder) != fingerprint_tokenizers(first):
            raise ValueError(
                f"{name} must have the tokenizers of {first}, {folder} has others; begin both from one run"
            )
