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

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from PIL import Image
from torch import Tensor

from cogview.config import MOST_PICTURES, SamplingConfig
from cogview.data.image_files import Picture, pixels_of, upright_size
from cogview.device import require_values, usable_device
from cogview.evaluation.cap_loss import caption_loss
from cogview.files import StrPath
from cogview.generation.captions import generate_captions
from cogview.generation.engine import GREEDY, DrawOptions
from cogview.generation.infill import keep_outside, keep_top, require_same_proportions
from cogview.generation.local_super_resolution import enlarge_locally
from cogview.generation.super_resolution import Small, codes_to_draw, enlarge
from cogview.generation.text_to_image import Candidates, Request, draw_candidates
from cogview.images import picture_grid, to_picture, undrawn_is_white
from cogview.model.memory import rows_that_fit
from cogview.model.precision import Precision, in_precision
from cogview.model.transformer import CogView
from cogview.progress import Progress
from cogview.settings import ModelSettings, load_model_settings, train_model_hint
from cogview.tokens.sequence import fit_text
from cogview.tokens.tokenizers import Tokenizers, load_tokenizers
from cogview.training.checkpoint import CHECKPOINTS, check_origin, load_model, require_checkpoint
from cogview.weights import without_values

MAX_BATCH = 256  # rows that are decoded or scored together
READ_TOGETHER = 64  # pictures that are read and described before the first of them is told
_WHOLE_NUMBERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Drawing(NamedTuple):
    """A picture that was drawn, and what draws it again."""

    image: Image.Image
    text: str
    seed: int
    candidate: int  # its number among the pictures of its text and seed, from 0
    loss: float  # CapLoss, nats per token
    codes: Tensor  # [num_codes]


class Caption(NamedTuple):
    """What the model says of a picture."""

    text: str
    loss: float  # CapLoss of the text, NaN where there is none


@dataclass(kw_only=True)
class Run:
    """A trained model with all it needs to draw and to read pictures.

    Where a method takes texts, a ``str`` is one text and a list is several. Where it takes images, a
    file's path, a PIL picture or a tensor ``[3, H, W]`` (uint8, or floats in [0, 1]) is one image, and a
    list or a tensor ``[N, 3, H, W]`` is several. One in gives one out, a list gives a list.

    Numbers of the model that are not finite are a FloatingPointError, in every method.
    """

    model: CogView
    tokenizers: Tokenizers
    sampling: SamplingConfig  # how the run draws unless told otherwise
    max_text_tokens: int
    caption_tokens: int | None = None  # of a caption at most; None: max_text_tokens
    text_dropout: float = 0.0  # share of rows that it was trained on without their text, for guidance
    finetuned_for: str | None = None  # a task of ``cogview finetune``

    @overload
    def generate(
        self,
        texts: str,
        *,
        num: int = ...,
        seed: int | Sequence[int] = ...,
        sampling: SamplingConfig | None = ...,
        guidance: float | None = ...,
        ranked: bool = ...,
        progress: bool = ...,
    ) -> tuple[list[Image.Image], list[float]]: ...
    @overload
    def generate(
        self,
        texts: list[str] | tuple[str, ...],
        *,
        num: int = ...,
        seed: int | Sequence[int] = ...,
        sampling: SamplingConfig | None = ...,
        guidance: float | None = ...,
        ranked: bool = ...,
        progress: bool = ...,
    ) -> tuple[list[list[Image.Image]], list[list[float]]]: ...
    def generate(self, texts, *, num=16, seed=0, sampling=None, guidance=None, ranked=True, progress=False):
        """Draw ``num`` pictures for each text: ``(images, losses)``, best first.

        Args:
            texts: one text or several.
            num: pictures per text.
            seed: another seed gives other pictures; the same one gives the same, whatever else is drawn
                with them. One for all texts, or one for each.
            sampling: temperature, top-k, top-p and guidance; None as the run was set up (``run.sampling``).
            guidance: above 1 the text counts for more, at the price of variety and twice the time; None is
                that of ``sampling``. For runs that were trained with ``text_dropout``.
            ranked: False keeps the order of drawing.
            progress: show how far the drawing is, on standard error.

        Returns the pictures (PIL, RGB) and the CapLoss of each, the mean negative log-likelihood of the
        text given the picture in nats per token. For one text two lists of ``num``, for several texts two
        lists of such lists. A part of a text that the text tokenizer does not know gives a warning.
        :meth:`draw` gives more: each picture as soon as it is drawn, its codes, and partial pictures.

        Raises:
            ValueError: an empty text, one of more than ``run.max_text_tokens`` tokens or that is not
                valid Unicode, ``num`` below 1 or above 100,000, not as many seeds as texts.
            TypeError: texts that are neither ``str`` nor a list of them.
        """
        several = listed_texts(texts)
        seeds = list(seed) if isinstance(seed, Iterable) else [seed] * len(several)
        requests = self.requests(several, seeds)
        images, losses = self._draw_all(requests, num, self._sampling(sampling, guidance), ranked, progress)
        return (images[0], losses[0]) if isinstance(texts, str) else (images, losses)

    def _sampling(self, sampling: SamplingConfig | None, guidance: float | None) -> SamplingConfig:
        sampling = self.sampling if sampling is None else sampling
        if not isinstance(sampling, SamplingConfig):
            raise TypeError(f"sampling must be a SamplingConfig or None, got {sampling!r}")
        return sampling if guidance is None else dataclasses.replace(sampling, guidance=guidance)

    def _draw_all(
        self,
        requests: Sequence[tuple[str, Request]],
        num: int,
        sampling: SamplingConfig,
        ranked: bool,
        progress: bool,
    ) -> tuple[list[list[Image.Image]], list[list[float]]]:
        """The pictures of each request, and the CapLoss of each."""
        require_num(num)
        rows: list[list[Drawing]] = [[] for _ in requests]
        with Progress(len(requests) * num * self.num_codes, "draw", unit="code", enabled=progress) as bar:
            options = DrawOptions(sampling, max_batch=MAX_BATCH, on_step=bar.update)
            for batch in self.draw(requests, num, options):
                for place, drawing in batch:
                    rows[place].append(drawing)
        if ranked:
            rows = [sorted(row, key=lambda drawing: drawing.loss) for row in rows]
        images = [[drawing.image for drawing in row] for row in rows]
        return images, [[drawing.loss for drawing in row] for row in rows]

    def infill(
        self,
        text: str,
        image: Picture,
        mask: Picture | None = None,
        *,
        num: int = 16,
        seed: int = 0,
        keep_top: float | None = None,
        sampling: SamplingConfig | None = None,
        guidance: float | None = None,
        ranked: bool = True,
        progress: bool = False,
    ) -> tuple[list[Image.Image], list[float]]:
        """Draw a part of a picture anew, ``num`` times: ``(images, losses)``, best first.

        Args:
            text: what the whole picture shows.
            image: the picture whose other codes are kept.
            mask: white where the picture is drawn anew, black where its codes are kept; as large as
                ``image`` or of its proportions. A code with any white pixel is drawn anew.
            keep_top: instead of a mask, the share of the picture's height that is kept, from its top.
            num, seed, sampling, guidance, ranked, progress: as :meth:`generate` takes them.

        Kept codes pass through the image tokenizer, so even what is kept is not the same pixel by pixel.
        Codes are drawn in raster order: one sees the kept codes above and to its left, not those below.
        Raises what :meth:`generate` and :meth:`encode` raise, and ValueError for a mask of other proportions.
        """
        requests = self.requests([text], [seed], self.kept_codes(image, mask, keep_top))
        images, losses = self._draw_all(requests, num, self._sampling(sampling, guidance), ranked, progress)
        return images[0], losses[0]

    def kept_codes(self, image: Picture, mask: Picture | None, share: float | None = None) -> Tensor:
        """The codes of a picture ``[num_codes]``, -1 where they are drawn anew; see :meth:`infill`."""
        if (mask is None) == (share is None):
            raise ValueError("either mask or keep_top must be given, and not both")
        codes, config = self.encode(image), self.tokenizers.image.config
        if share is not None:
            return keep_top(codes, share, config.grid)
        assert mask is not None
        white = pixels_of(mask, config.image_size).mean(0)
        require_same_proportions(upright_size(image), upright_size(mask))
        return keep_outside(codes, white, config.grid)

    def requests(
        self, texts: Sequence[str], seeds: Sequence[int], given: Tensor | None = None
    ) -> list[tuple[str, Request]]:
        """Texts as :meth:`draw` takes them. Warns of parts that the text tokenizer does not know."""
        for seed in seeds:
            if not isinstance(seed, Integral):
                raise TypeError(f"seed must be an integer, or one for each text, got {seed!r}")
        if len(seeds) != len(texts):
            raise ValueError(f"seed must be one or as many as texts ({len(texts)}), got {len(seeds)}")
        pieces = self._known_pieces(texts)
        return [
            (text, Request(of_text, seed, given))
            for text, of_text, seed in zip(texts, pieces, seeds, strict=True)
        ]

    def draw(
        self,
        requests: Sequence[tuple[str, Request]],
        num: int,
        options: DrawOptions,
        on_partial: Callable[[list[tuple[int, Image.Image]]], object] | None = None,
        on_codes: Callable[[Candidates], object] | None = None,
    ) -> Iterator[list[tuple[int, Drawing]]]:
        """Pictures batch by batch, each as soon as it is drawn and ranked, with the place of its request.

        Args:
            requests: from :meth:`requests`.
            num: pictures of each.
            options: how tokens are drawn. Rows are at most ``options.max_batch``, fewer where their cache
                would not fit into memory.
            on_partial: called after each row of codes with the unfinished pictures of the batch and the
                places of their requests; what is not drawn yet is white.
            on_codes: called after every step with the codes of the batch so far. What it raises ends the
                drawing at once.
        """
        require_num(num)
        grid = self.tokenizers.image.config.grid
        # More guesses than a picture has codes would try nothing more.
        parallel = min(options.parallel, self.num_codes)
        options = dataclasses.replace(self._fitting(options), parallel=parallel)
        rows_told = 0

        def tell(batch: Candidates) -> None:
            nonlocal rows_told
            if on_codes is not None:
                on_codes(batch)
            if on_partial is None:
                return
            rows_drawn = int((batch.codes >= 0).sum(1).min()) // grid
            is_new, rows_told = rows_drawn not in (0, rows_told), rows_drawn
            if is_new:
                pixels = undrawn_is_white(self.pixels(batch.codes.clamp(min=0)), batch.codes, grid)
                on_partial(list(zip(batch.requests, _pictures(pixels), strict=True)))

        batches = draw_candidates(
            self.model,
            self.tokenizers.vocab,
            [request for _, request in requests],
            num_codes=self.num_codes,
            num_candidates=num,
            options=options,
            on_codes=None if on_partial is None and on_codes is None else tell,
        )
        for batch in batches:
            pieces = [requests[place][1].pieces for place in batch.requests]
            losses = self._losses(batch.codes, pieces)
            images, codes = self.decode(batch.codes), batch.codes.cpu()
            rows = zip(images, batch.requests, batch.numbers, losses, codes, strict=True)
            yield [
                (place, Drawing(image, requests[place][0], requests[place][1].seed, number, loss, own))
                for image, place, number, loss, own in rows
            ]

    def _fitting(self, options: DrawOptions) -> DrawOptions:
        """``options`` with no more rows in a batch than there is memory for."""
        weight = self.model.word_embeddings.weight
        fitting = rows_that_fit(self.model.config, weight.dtype, weight.device, options.max_batch)
        return dataclasses.replace(options, max_batch=fitting)

    @property
    def num_codes(self) -> int:
        """Codes of a picture."""
        return self.tokenizers.image.config.codes_per_image

    @overload
    def caption(self, images: Tensor, *, beams: int = ..., progress: bool = ...) -> Any: ...
    @overload
    def caption(self, images: Picture, *, beams: int = ..., progress: bool = ...) -> str: ...
    @overload
    def caption(
        self, images: list[Any] | tuple[Any, ...], *, beams: int = ..., progress: bool = ...
    ) -> list[str]: ...
    def caption(self, images, *, beams=1, progress=False):
        """The model's description of each image.

        ``beams`` 1 takes the likeliest token at every step; more look for the likeliest text as a whole
        by beam search. Raises what :meth:`encode` raises.
        """
        several = _listed_images(images)
        with Progress(len(several), "describe", unit="image", enabled=progress) as bar:
            texts = []
            for caption in self.describe(several, beams=beams):
                texts.append(caption.text)
                bar.update()
        return texts[0] if _is_one_image(images) else texts

    def describe(
        self, images: Sequence[Picture], *, beams: int = 1, on_step: Callable[[int], object] | None = None
    ) -> Iterator[Caption]:
        """What :meth:`caption` says of several images, and its CapLoss, a few images at a time.

        ``on_step`` is called after every step with the number of tokens just drawn.
        """
        vocab = self.tokenizers.vocab
        for start in range(0, len(images), READ_TOGETHER):
            codes = self.encode(list(images[start : start + READ_TOGETHER]))
            texts = generate_captions(
                self.model,
                vocab,
                codes,
                max_text_tokens=self.caption_tokens or self.max_text_tokens,
                beams=beams,
                options=self._fitting(DrawOptions(GREEDY, max_batch=MAX_BATCH, on_step=on_step)),
            )
            said = [index for index, text in enumerate(texts) if text]
            found = caption_loss(self.model, vocab, codes[said], [texts[index] for index in said])
            losses = dict(zip(said, found.tolist(), strict=True))
            for index, text in enumerate(texts):
                yield Caption(self.tokenizers.text.decode(text), losses.get(index, float("nan")))

    @overload
    def rerank(self, texts: str, images: Tensor | Sequence[Picture]) -> list[int]: ...
    @overload
    def rerank(
        self,
        texts: list[str] | tuple[str, ...],
        images: Tensor | Sequence[Picture] | Sequence[Sequence[Picture]],
    ) -> list[list[int]]: ...
    def rerank(self, texts, images):
        """The order of images by CapLoss: places in ``images``, the best one first.

        Several texts give several orders. Each text then orders its own images, if ``images`` is a list
        of as many lists (as :meth:`generate` returns it), else all of them. Raises what :meth:`cap_loss`
        raises.
        """
        if isinstance(texts, str):
            return _best_first(self.cap_loss(texts, _listed_images(images)))
        several = listed_texts(texts)
        if len(images) == len(several) and all(isinstance(own, (list, tuple)) for own in images):
            return [self.rerank(text, own) for text, own in zip(several, images, strict=True)]
        pieces, codes = self._known_pieces(several), self.encode(_listed_images(images))
        return [_best_first(self._losses(codes, [of_text] * len(codes))) for of_text in pieces]

    def _losses(self, codes: Tensor, pieces: Sequence[Sequence[int]]) -> list[float]:
        return caption_loss(self.model, self.tokenizers.vocab, codes, pieces).tolist()

    @overload
    def cap_loss(self, texts: str | Sequence[str], images: Tensor) -> Any: ...
    @overload
    def cap_loss(self, texts: str | Sequence[str], images: Picture) -> float: ...
    @overload
    def cap_loss(self, texts: str | Sequence[str], images: list[Any] | tuple[Any, ...]) -> list[float]: ...
    def cap_loss(self, texts, images):
        """CapLoss of each image: the mean negative log-likelihood of its text, in nats per token.

        Args:
            texts: one text for all images, or one for each.

        Raises:
            ValueError: an empty text, one that is too long, or not as many texts as images; and what
                :meth:`encode` raises.
        """
        pictures = _listed_images(images)
        several = [texts] * len(pictures) if isinstance(texts, str) else listed_texts(texts)
        if len(several) != len(pictures):
            raise ValueError(f"texts must be one or as many as images ({len(pictures)}), got {len(several)}")
        pieces = self._known_pieces(several)
        losses = self._losses(self.encode(pictures), pieces)
        return losses[0] if _is_one_image(images) else losses

    def encode(self, images: Picture | Sequence[Picture]) -> Tensor:
        """Codes of images, int64 ``[num_codes]`` for one and ``[N, num_codes]`` for several.

        An image of another size is scaled so that its shorter side fits, and cropped at the centre.

        Raises:
            FileNotFoundError: a path that leads nowhere.
            IsADirectoryError: one that leads to a folder.
            ValueError: a file that is no image, a picture of 0 pixels, a tensor that is not ``[3, H, W]`` or
                has no values.
            TypeError: an image that is neither a path nor a PIL picture nor a tensor.
        """
        codes = self._codes(_listed_images(images), self.tokenizers.image.config.image_size).flatten(1)
        return codes[0] if _is_one_image(images) else codes

    def _codes(self, pictures: Sequence[Picture], size: int) -> Tensor:
        """Codes ``[N, n, n]`` of pictures read at ``size`` pixels a side."""
        tokenizer = self.tokenizers.image
        side = size // 2**tokenizer.config.stages
        parts = [torch.empty(0, side, side, dtype=torch.int64, device="cpu")]
        for start in range(0, len(pictures), MAX_BATCH):
            chunk = pictures[start : start + MAX_BATCH]
            pixels = torch.stack([pixels_of(picture, size) for picture in chunk])
            parts.append(tokenizer.encode(pixels.to(tokenizer.mean)).cpu())
        return torch.cat(parts)

    @property
    def image_size(self) -> int:
        """Pixels of a side of the pictures that the run draws."""
        return self.tokenizers.image.config.image_size

    @overload
    def super_resolve(
        self,
        images: Tensor,
        texts: str | Sequence[str] | None = ...,
        *,
        from_half: bool = ...,
        seed: int = ...,
        sampling: SamplingConfig | None = ...,
        guidance: float | None = ...,
        progress: bool = ...,
    ) -> Any: ...
    @overload
    def super_resolve(
        self,
        images: Picture,
        texts: str | Sequence[str] | None = ...,
        *,
        from_half: bool = ...,
        seed: int = ...,
        sampling: SamplingConfig | None = ...,
        guidance: float | None = ...,
        progress: bool = ...,
    ) -> Image.Image: ...
    @overload
    def super_resolve(
        self,
        images: list[Any] | tuple[Any, ...],
        texts: str | Sequence[str] | None = ...,
        *,
        from_half: bool = ...,
        seed: int = ...,
        sampling: SamplingConfig | None = ...,
        guidance: float | None = ...,
        progress: bool = ...,
    ) -> list[Image.Image]: ...
    def super_resolve(
        self, images, texts=None, *, from_half=False, seed=0, sampling=None, guidance=None, progress=False
    ):
        """Pictures at twice the side; PIL, or a list.

        For a run of ``cogview finetune super-resolution`` or ``local-super-resolution``.

        Args:
            texts: what the pictures show, one text for all or one for each; None: nothing is said.
            from_half: read the pictures at half the run's size and give them at the run's, rather than read
                them at the run's size and give them at twice that.
            seed: another one draws other details.
            sampling, guidance, progress: as :meth:`generate` takes them.

        Only what the run's image tokenizer can tell of a picture is enlarged: best are pictures that a run
        with the same tokenizers drew. Another run gives a warning, as it never learned to enlarge.
        :meth:`enlarge` takes more options.

        Raises:
            ValueError: as many texts as images are needed; a text as :meth:`generate` refuses it; a grid of
                codes whose side 4 does not divide; ``from_half`` or guidance for a run of
                local-super-resolution; and what :meth:`encode` raises.
        """
        if guidance is not None and self.finetuned_for == "local-super-resolution":
            raise ValueError(
                f"guidance must be None for a run of local-super-resolution, which has none, got {guidance}"
            )
        pictures = _listed_images(images)
        total = len(pictures) * self.codes_to_enlarge(from_half)
        with Progress(total, "enlarge", unit="code", enabled=progress) as bar:
            options = DrawOptions(self._sampling(sampling, guidance), max_batch=MAX_BATCH, on_step=bar.update)
            enlarged = self.enlarge(pictures, texts, options, from_half=from_half, seed=seed)
        return enlarged[0] if _is_one_image(images) else enlarged

    def enlarge(
        self,
        images: Sequence[Picture],
        texts: str | Sequence[str] | None,
        options: DrawOptions,
        *,
        from_half: bool = False,
        seed: int = 0,
    ) -> list[Image.Image]:
        """What :meth:`super_resolve` makes of several images.

        ``options.on_step`` hears of :meth:`codes_to_enlarge` codes a picture.
        """
        is_local = self.finetuned_for == "local-super-resolution"
        if is_local and from_half:
            raise ValueError("from_half must be False for a run of local-super-resolution, got True")
        if not is_local and self.finetuned_for != "super-resolution":
            warnings.warn("the run was not finetuned for super-resolution", stacklevel=3)
        config = self.tokenizers.image.config
        low = self._codes(images, config.image_size // 2 if from_half else config.image_size)
        pieces: list[Sequence[int]] = [()] * len(images)
        if texts is not None:
            several = [texts] * len(images) if isinstance(texts, str) else listed_texts(texts)
            if len(several) != len(images):
                raise ValueError(
                    f"texts must be one or as many as images ({len(images)}), got {len(several)}"
                )
            pieces = list(self._known_pieces(several))
        small = [Small(text, codes, seed) for text, codes in zip(pieces, low, strict=True)]
        enlarged: list[Image.Image] = []
        options = self._fitting(options)
        for start in range(0, len(small), MAX_BATCH):
            part = small[start : start + MAX_BATCH]
            if is_local:
                codes = enlarge_locally(
                    self.model, self.tokenizers.vocab, part, self.max_text_tokens, options
                )
            else:
                codes = enlarge(self.model, self.tokenizers.vocab, part, config.grid, options)
            enlarged += _pictures(self.tokenizers.image.decode(codes))
        return enlarged

    def codes_to_enlarge(self, from_half: bool = False) -> int:
        """Codes that are drawn to enlarge a picture, for the display of progress."""
        side = self.tokenizers.image.config.grid
        if self.finetuned_for == "local-super-resolution":
            return 4 * side**2
        return codes_to_draw(side // 2 if from_half else side, side)

    def decode(self, codes: Tensor) -> Any:
        """Codes as PIL pictures: one for ``[num_codes]``, lists of lists for each dimension before it.

        Raises:
            ValueError: codes outside the codebook, or not ``num_codes`` in the last dimension.
            TypeError: codes that are no tensor of whole numbers.
        """
        return _pictures(self.pixels(codes))

    def pixels(self, codes: Tensor) -> Tensor:
        """Codes ``[..., num_codes]`` as pixels ``[..., 3, S, S]``, floats in [0, 1].

        Raises what :meth:`decode` raises.
        """
        tokenizer = self.tokenizers.image
        grid, num_codes = tokenizer.config.grid, tokenizer.config.num_codes
        if not isinstance(codes, Tensor) or codes.dtype not in _WHOLE_NUMBERS:
            kind = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
            raise TypeError(f"codes must be a tensor of whole numbers, got one of {kind}")
        require_values(codes, "codes")
        if codes.shape[-1:] != (grid * grid,):
            raise ValueError(f"codes must be [..., {grid * grid}], got {list(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < num_codes:
            span = f"{int(codes.min())}..{int(codes.max())}"
            raise ValueError(f"codes must be in [0, {num_codes}), got {span}")
        pixels = tokenizer.decode(codes.reshape(-1, grid, grid).to(tokenizer.mean.device).long())
        return pixels.view(*codes.shape[:-1], *pixels.shape[1:])

    def pieces(self, text: str) -> list[int]:
        """A text as piece ids; ValueError if it is empty, no valid Unicode, or too long for the model."""
        text = valid_text(text)
        pieces = self.tokenizers.text.encode(text)
        if not pieces:
            raise ValueError("the text is empty")
        return fit_text(pieces, self.max_text_tokens)

    def _known_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        pieces = [self.pieces(text) for text in texts]
        for text in dict.fromkeys(texts):
            unknown = self.tokenizers.text.unknown_pieces(text)
            if unknown:
                message = f'"{text}" has parts the model never learned: {" ".join(unknown)}'
                warnings.warn(message, stacklevel=4)
        return pieces


PRETRAINED = Path(__file__).with_name("pretrained")  # the run that ships; its README.md says what it is


def valid_text(text: str) -> str:
    """A text as it was typed. ValueError for what is no valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        try:  # bytes of UTF-8 that a terminal of ASCII handed over one by one
            text = os.fsencode(text).decode("utf-8")
        except UnicodeError:
            at = error.start + 1
            raise ValueError(
                f"the text {text!r} is not valid UTF-8: character {at} stands for no character"
            ) from None
    return text


def load_run(
    folder: StrPath | None = None,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
) -> Run:
    """The run of a folder that ``cogview train`` or ``cogview demo`` wrote, with its latest weights.

    Args:
        folder: None is the run that ships with the package: emoji of 32 px, asked for in English or Chinese.
        device: where it works, such as ``"cpu"``; by default an NVIDIA GPU where one answers.
        precision: of the transformer: ``"fp32"``, ``"bf16"``, ``"fp16"``; or ``"int8"``, bf16 with the
            weights of its linear layers in 8 bits, which needs the package torchao.

    FileNotFoundError or ValueError, each naming the file and the way out.
    """
    folder, device = PRETRAINED if folder is None else Path(folder), usable_device(device)
    tokenizers = load_tokenizers(folder, device)
    settings = load_model_settings(folder)
    checkpoint = require_checkpoint(folder / CHECKPOINTS, train_model_hint(folder))
    check_origin(checkpoint, {"tokenizers": tokenizers.fingerprint})
    with without_values():
        model = CogView(settings.model)
    load_model(checkpoint, model)
    model = in_precision(model.to(device).eval(), precision)
    return Run(
        model=model,
        tokenizers=tokenizers,
        sampling=settings.sampling,
        max_text_tokens=settings.max_text_tokens,
        caption_tokens=settings.caption_tokens,
        text_dropout=settings.train.text_dropout,
        finetuned_for=None if settings.finetuned is None else settings.finetuned.task,
    )


SAMPLES = 4  # pictures of each text on a sheet of samples


def sample_sheet(
    model: CogView, tokenizers: Tokenizers, settings: ModelSettings, texts: Sequence[str]
) -> Any:
    """A PIL picture with a row of drawings for each text, best first; the same noise every time."""
    run = Run(
        model=model,
        tokenizers=tokenizers,
        sampling=settings.sampling,
        max_text_tokens=settings.max_text_tokens,
    )
    images, _ = run.generate(list(texts), num=SAMPLES)
    return picture_grid(images)


def _pictures(pixels: Tensor) -> Any:
    return to_picture(pixels) if pixels.dim() == 3 else [_pictures(part) for part in pixels]


def require_num(num: int, name: str = "num") -> None:
    """ValueError for a number of pictures of one text that nobody can want, TypeError for what is none."""
    if not isinstance(num, Integral):
        raise TypeError(f"{name} must be a whole number, got {num!r}")
    if not 1 <= num <= MOST_PICTURES:
        raise ValueError(f"{name} must be at least 1 and at most {MOST_PICTURES:,}, got {num:,}")


def listed_texts(texts: str | Sequence[str]) -> list[str]:
    """One text or several, as a list. TypeError for anything else."""
    several = [texts] if isinstance(texts, str) else texts
    if not isinstance(several, Sequence) or not all(isinstance(text, str) for text in several):
        raise TypeError(f"texts must be a str or a list of str, got {texts!r}")
    return list(several)


def _best_first(losses: Sequence[float]) -> list[int]:
    return sorted(range(len(losses)), key=losses.__getitem__)


def _is_one_image(images: Picture | Sequence[Picture]) -> bool:
    if not isinstance(images, Tensor):
        return not isinstance(images, (list, tuple))
    require_values(images, "images")
    return images.dim() == 3


def _listed_images(images: Picture | Sequence[Picture]) -> list[Picture]:
    return [images] if _is_one_image(images) else list(images)  # type: ignore[arg-type, list-item]
