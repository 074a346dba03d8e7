# SPDX-License-Identifier: Apache-2.0
"""A run: the folder that training writes and that generation, captioning and reranking read.

::

    runs/x/
      tokenizers.json              data, sizes and schedule of both tokenizers
      train-tokenizer.toml         all options of that training, for ``--settings``
      text_tokenizer.model         SentencePiece
      image_tokenizer.safetensors  VQ-VAE
      model.json                   shape of the transformer, its training and sampling
      rows/                        pictures and captions that are trained on, as tokens
      train.toml                   all options of that training, for ``--settings``
      checkpoints/step-00000400/   weights, optimizer, losses so far; the last three, unless told otherwise
      tensorboard/                 curves and sample pictures
      training.lock                held by the training at work in the folder, if there is one
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from cogview.config import SamplingConfig
from cogview.data.image_files import Picture, pixels_of
from cogview.device import usable_device
from cogview.evaluation.cap_loss import caption_loss
from cogview.evaluation.rerank import rerank
from cogview.files import StrPath
from cogview.generation.captions import generate_captions
from cogview.generation.engine import DrawOptions
from cogview.generation.text_to_image import generate_codes
from cogview.images import picture_grid, to_picture
from cogview.model.transformer import CogView
from cogview.progress import Progress
from cogview.settings import ModelSettings, load_model_settings, train_model_hint
from cogview.tokens.sequence import fit_text
from cogview.tokens.tokenizers import Tokenizers, load_tokenizers
from cogview.training.checkpoint import (
    CHECKPOINTS,
    MODEL,
    check_origin,
    latest_checkpoint,
    read_state,
    verified_tensors,
)
from cogview.weights import load_weights

MAX_BATCH = 256  # rows that are decoded or scored together


@dataclass
class Run:
    """A trained model with all it needs to draw and to read pictures.

    Where a method takes texts, a ``str`` is one text and a list is several. Where it takes images, a
    file's path, a PIL picture or a tensor ``[3, H, W]`` (uint8, or floats in [0, 1]) is one image, and a
    list or a tensor ``[N, 3, H, W]`` is several. One in gives one out, a list gives a list.
    """

    model: CogView
    tokenizers: Tokenizers
    sampling: SamplingConfig  # how the run draws unless told otherwise
    max_text_tokens: int
    caption_tokens: int | None = None  # of a caption at most; None: max_text_tokens

    def generate(
        self,
        texts: str | Sequence[str],
        *,
        num: int = 16,
        seed: int = 0,
        sampling: SamplingConfig | None = None,
        ranked: bool = True,
        progress: bool = False,
    ) -> tuple[list, list]:
        """Draw ``num`` pictures for each text: ``(images, losses)``, best first.

        Args:
            texts: one text or several.
            num: pictures per text.
            seed: another seed gives other pictures; the same one gives the same, in batches of any size.
            sampling: temperature, top-k and top-p; None as the run was set up (``run.sampling``).
            ranked: False keeps the order of drawing.
            progress: show how far the drawing is, on standard error.

        Returns the pictures (PIL, RGB) and the CapLoss of each, the mean negative log-likelihood of the
        text given the picture in nats per token. For one text two lists of ``num``, for several texts two
        lists of such lists. A part of a text that the text tokenizer does not know gives a warning.

        Raises:
            ValueError: an empty text, one of more than ``run.max_text_tokens`` tokens, ``num`` below 1.
            TypeError: texts that are neither ``str`` nor a list of them.
        """
        several = _listed(texts)
        if num < 1:
            raise ValueError(f"num must be at least 1, got {num}")
        pieces = [self.pieces(text) for text in several]
        for text in several:
            unknown = self.tokenizers.text.unknown_pieces(text)
            if unknown:
                message = f'"{text}" has parts the model never learned: {" ".join(unknown)}'
                warnings.warn(message, stacklevel=2)
        num_codes = self.tokenizers.image.config.codes_per_image
        total = len(pieces) * num * num_codes
        with Progress(total, "draw", unit="code", enabled=progress) as bar:
            options = DrawOptions(sampling or self.sampling, seed, MAX_BATCH, bar.update)
            codes = generate_codes(
                self.model, self.tokenizers.vocab, pieces, num_codes, num_candidates=num, options=options
            )
        order, losses = rerank(self.model, self.tokenizers.vocab, pieces, codes)
        if ranked:
            losses = losses.gather(1, order)
            codes = codes.gather(1, order[..., None].expand_as(codes))
        images = self.decode(codes)
        return (images[0], losses[0].tolist()) if isinstance(texts, str) else (images, losses.tolist())

    @overload
    def caption(self, images: Picture, *, progress: bool = ...) -> str: ...
    @overload
    def caption(self, images: list[Any] | tuple[Any, ...], *, progress: bool = ...) -> list[str]: ...
    def caption(self, images, *, progress=False):
        """The model's description of each image: the likeliest token at every step.

        Raises what :meth:`encode` raises.
        """
        texts, _ = self.describe(_listed_images(images), progress=progress)
        return texts[0] if _is_one_image(images) else texts

    def describe(self, images: Sequence[Picture], *, progress: bool = False) -> tuple[list[str], list[float]]:
        """What :meth:`caption` says of several images, and the CapLoss of each (NaN for an empty text)."""
        codes = self.encode(list(images))
        vocab = self.tokenizers.vocab
        room = self.caption_tokens or self.max_text_tokens
        total = len(codes) * room
        with Progress(total, "describe", unit="token", enabled=progress) as bar:
            options = DrawOptions(sampling=None, max_batch=MAX_BATCH, on_step=bar.update)
            texts = generate_captions(self.model, vocab, codes, max_text_tokens=room, options=options)
        losses = [float("nan")] * len(texts)
        said = [index for index, text in enumerate(texts) if text]
        found = caption_loss(self.model, vocab, codes[said], [texts[index] for index in said])
        for index, loss in zip(said, found.tolist(), strict=True):
            losses[index] = loss
        return [self.tokenizers.text.decode(text) for text in texts], losses

    def rerank(self, texts: str | Sequence[str], images: Sequence) -> list:
        """The order of images by CapLoss: places in ``images``, the best one first.

        Several texts give several orders. Each text then orders its own images, if ``images`` is a list
        of as many lists (as :meth:`generate` returns it), else all of them. Raises what :meth:`cap_loss`
        raises.
        """
        if isinstance(texts, str):
            losses = self.cap_loss(texts, images)
            return sorted(range(len(losses)), key=losses.__getitem__)
        several = _listed(texts)
        has_own = len(images) == len(several) and all(isinstance(own, (list, tuple)) for own in images)
        return [
            self.rerank(text, own)
            for text, own in zip(several, images if has_own else [images] * len(several), strict=True)
        ]

    def cap_loss(self, texts: str | Sequence[str], images: Sequence[Picture]) -> list[float]:
        """CapLoss of each image: the mean negative log-likelihood of its text, in nats per token.

        Args:
            texts: one text for all images, or one for each.

        Raises:
            ValueError: an empty text, one that is too long, or not as many texts as images; and what
                :meth:`encode` raises.
        """
        pictures = _listed_images(images)
        several = [texts] * len(pictures) if isinstance(texts, str) else _listed(texts)
        if len(several) != len(pictures):
            raise ValueError(f"texts must be one or as many as images ({len(pictures)}), got {len(several)}")
        pieces = [self.pieces(text) for text in several]
        codes = self.encode(pictures)
        return caption_loss(self.model, self.tokenizers.vocab, codes, pieces).tolist()

    def encode(self, images: Picture | Sequence[Picture]) -> Tensor:
        """Codes of images, int64 ``[num_codes]`` for one and ``[N, num_codes]`` for several.

        An image of another size is scaled so that its shorter side fits, and cropped at the centre.

        Raises:
            FileNotFoundError: a path that leads to no file.
            ValueError: a file that is no image, or a tensor that is not ``[3, H, W]``.
            TypeError: an image that is neither a path nor a PIL picture nor a tensor.
        """
        tokenizer = self.tokenizers.image
        pictures = _listed_images(images)
        parts = [torch.empty(0, tokenizer.config.codes_per_image, dtype=torch.int64)]
        for start in range(0, len(pictures), MAX_BATCH):
            chunk = pictures[start : start + MAX_BATCH]
            pixels = torch.stack([pixels_of(picture, tokenizer.config.image_size) for picture in chunk])
            parts.append(tokenizer.encode(pixels.to(tokenizer.mean)).flatten(1).cpu())
        codes = torch.cat(parts)
        return codes[0] if _is_one_image(images) else codes

    def decode(self, codes: Tensor) -> Any:
        """Codes as PIL pictures: one for ``[num_codes]``, lists of lists for each dimension before it.

        Raises:
            ValueError: codes outside the codebook, or not ``num_codes`` in the last dimension.
        """
        return _pictures(self.pixels(codes))

    def pixels(self, codes: Tensor) -> Tensor:
        """Codes ``[..., num_codes]`` as pixels ``[..., 3, S, S]``, floats in [0, 1].

        Raises what :meth:`decode` raises.
        """
        tokenizer = self.tokenizers.image
        grid, num_codes = tokenizer.config.grid, tokenizer.config.num_codes
        if codes.shape[-1:] != (grid * grid,):
            raise ValueError(f"codes must be [..., {grid * grid}], got {list(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < num_codes:
            span = f"{int(codes.min())}..{int(codes.max())}"
            raise ValueError(f"codes must be in [0, {num_codes}), got {span}")
        pixels = tokenizer.decode(codes.reshape(-1, grid, grid).to(tokenizer.mean.device))
        return pixels.view(*codes.shape[:-1], *pixels.shape[1:])

    def pieces(self, text: str) -> list[int]:
        """A text as piece ids; ValueError if it is empty or has too many for the model."""
        pieces = self.tokenizers.text.encode(text)
        if not pieces:
            raise ValueError("the text is empty")
        return fit_text(pieces, self.max_text_tokens)


def load_run(folder: StrPath, device: str | None = None) -> Run:
    """The run of a folder that ``cogview train`` or ``cogview demo`` wrote, with its latest weights.

    Args:
        device: where it works, such as ``"cpu"``; by default an NVIDIA GPU where one answers.

    FileNotFoundError or ValueError, each naming the file and the way out.
    """
    folder, device = Path(folder), usable_device(device)
    tokenizers = load_tokenizers(folder, device)
    settings = load_model_settings(folder)
    checkpoint = latest_checkpoint(folder / CHECKPOINTS)
    if checkpoint is None:
        raise FileNotFoundError(f"{folder} has no checkpoint yet; {train_model_hint(folder)}")
    check_origin(checkpoint, {"tokenizers": tokenizers.fingerprint})
    with torch.device("meta"):
        model = CogView(settings.model)
    load_weights(model, verified_tensors(checkpoint, MODEL, read_state(checkpoint)), checkpoint / MODEL)
    return Run(
        model.to(device).eval(),
        tokenizers,
        settings.sampling,
        settings.max_text_tokens,
        settings.caption_tokens,
    )


SAMPLES = 4  # pictures of each text on a sheet of samples


def sample_sheet(
    model: CogView, tokenizers: Tokenizers, settings: ModelSettings, texts: Sequence[str]
) -> Any:
    """A PIL picture with a row of drawings for each text, best first; the same noise every time."""
    run = Run(model, tokenizers, settings.sampling, settings.max_text_tokens)
    images, _ = run.generate(list(texts), num=SAMPLES)
    return picture_grid([image for row in images for image in row], SAMPLES)


def _pictures(pixels: Tensor) -> Any:
    return to_picture(pixels) if pixels.dim() == 3 else [_pictures(part) for part in pixels]


def _listed(texts: str | Sequence[str]) -> list[str]:
    several = [texts] if isinstance(texts, str) else texts
    if not isinstance(several, Sequence) or not all(isinstance(text, str) for text in several):
        raise TypeError(f"texts must be a str or a list of str, got {texts!r}")
    return list(several)


def _is_one_image(images: Picture | Sequence[Picture]) -> bool:
    return images.dim() == 3 if isinstance(images, Tensor) else not isinstance(images, (list, tuple))


def _listed_images(images: Picture | Sequence[Picture]) -> list[Picture]:
    return [images] if _is_one_image(images) else list(images)  # type: ignore[arg-type, list-item]
