# SPDX-License-Identifier: Apache-2.0
"""Released weights into safetensors or a whole run folder, and weights of ours into the original's format."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cogview.config import (
    ImageTokenizerConfig,
    ImageTokenizerTrainConfig,
    ModelConfig,
    SamplingConfig,
    TrainConfig,
    VQGANTrainConfig,
)
from cogview.files import StrPath, folder_written_aside, require_new
from cogview.model.transformer import CogView
from cogview.presets import PRESETS
from cogview.progress import Progress
from cogview.settings import (
    MODEL_SETTINGS,
    TOKENIZER_SETTINGS,
    ModelSettings,
    TokenizerSettings,
    load_model_settings,
    load_tokenizer_settings,
    train_model_hint,
    write_settings,
)
from cogview.tokens.sequence import FRAME_TOKENS
from cogview.tokens.text_tokenizer import TextTokenizer
from cogview.tokens.tokenizers import IMAGE_TOKENIZER, TEXT_TOKENIZER, fingerprint_tokenizers
from cogview.tokens.vocab import PADDING_MULTIPLE, Vocab
from cogview.tokens.vqgan import make_image_tokenizer, tensors_of_vqgan, vqgan_config
from cogview.tokens.vqvae import ImageTokenizer
from cogview.training.checkpoint import (
    CHECKPOINTS,
    MODEL,
    CheckpointState,
    complete_checkpoint,
    read_state,
    require_checkpoint,
)
from cogview.weights.lazy import LazyTensor, open_safetensors, write_safetensors
from cogview.weights.loading import require_tensors_of, without_values
from cogview.weights.original import write_original
from cogview.weights.released import (
    CODEBOOK,
    KNOWN,
    WORD_EMBEDDINGS,
    Weights,
    is_vqgan,
    known_kind,
    read_released,
)

HEAD_SIZE = 64  # of every released transformer
CAPTION_TOKENS = 20  # The original draws this many: its models have learned no end of a caption.
POSITIONS = "transformer.position_embeddings.weight"
DATA = "released weights"  # what the settings of a converted run name as its data


@dataclass(frozen=True)
class Convert:
    """What to convert, and into what."""

    source: StrPath  # released file or folder, safetensors file or run folder
    out: StrPath
    to: Literal["safetensors", "original"] = "safetensors"
    text_tokenizer: StrPath | None = None  # with both tokenizers, ``out`` becomes a run folder
    image_tokenizer: StrPath | None = None
    num_heads: int | None = None  # None: heads of 64, as every released model has
    image_size: int = 256
    ranks: int = 1  # model-parallel ranks to split into, for the original's format
    progress: bool = True


def convert(options: Convert) -> Weights:
    """Convert weights as ``options`` say; returns what was read. Tensors keep their dtype.

    The source is read as it is needed and written tensor by tensor, so the memory taken is that of a few
    tensors (for the original's format: of one rank), beside the pages of the files.

    Raises:
        FileExistsError: ``out`` exists.
        FileNotFoundError: a file that is not there, or a missing rank.
        ValueError: a file that is damaged, holds code or holds an unknown architecture; ranks or tokenizers
            that do not belong together; options that do not fit the weights.
    """
    out = Path(options.out)
    _check(options, out)
    weights = open_weights(options.source)
    if weights.kind == "image tokenizer":
        _check_image_tokenizer(options, weights)
    else:
        config = _model_config(weights, options)
        weights = _with_rows_in_use(weights, Vocab())
    if options.to == "original":
        write_original(out, weights, options.ranks, progress=options.progress)
    elif options.text_tokenizer is not None:
        _write_run(out, weights, config, options)
    else:
        _write_tensors(out, weights, options.progress)
    return weights


def open_weights(source: StrPath) -> Weights:
    """The weights of a released file or folder, of a safetensors file, or of a run's latest checkpoint."""
    source = Path(source)
    iteration = None
    file = source
    if (source / MODEL_SETTINGS).is_file():
        checkpoint = require_checkpoint(source / CHECKPOINTS, train_model_hint(source))
        file, iteration = checkpoint / MODEL, read_state(checkpoint).step
    if file.suffix != ".safetensors":
        return _without_losses(read_released(source))
    tensors = open_safetensors(file)
    return _without_losses(Weights(source, known_kind(tensors, file), tensors, iteration))


def _without_losses(weights: Weights) -> Weights:
    """A VQGAN without the networks that only its training needs; other weights as they are."""
    if not is_vqgan(weights.tensors):
        return weights
    return replace(weights, tensors=tensors_of_vqgan(weights.tensors))


def left_behind(source: StrPath) -> tuple[str, ...]:
    """What a run has beside its transformer's tensors, which a file of weights alone does not tell."""
    folder = Path(source)
    if not (folder / MODEL_SETTINGS).is_file():
        return ()
    model = load_model_settings(folder).model
    image_size = load_tokenizer_settings(folder).image_tokenizer.image_size
    told = [
        f"the tokenizers are not in it: {folder / TEXT_TOKENIZER} is a SentencePiece model as it is, and "
        f"cogview convert takes {folder / IMAGE_TOKENIZER} by itself"
    ]
    if image_size != Convert.image_size:
        told.append(f"to convert it back, give --image-size {image_size}")
    if model.num_heads != model.hidden_size // HEAD_SIZE:
        told.append(
            f"it does not tell its attention heads: to convert it back, give --num-heads {model.num_heads}"
        )
    if model.three_region is not None:
        told.append("the run has learned three-region attention; converted back, it computes dense attention")
    if model.pb_relax != "tensor":
        told.append(
            f"the run has pb_relax = {model.pb_relax}; the original, and what is converted back, has tensor"
        )
    return tuple(told)


def _check(options: Convert, out: Path) -> None:
    """Mistakes that can be found before anything is read."""
    require_new(out)
    has_tokenizers = options.text_tokenizer is not None
    if has_tokenizers != (options.image_tokenizer is not None):
        raise ValueError("a run folder needs both --text-tokenizer and --image-tokenizer")
    if has_tokenizers and options.to == "original":
        raise ValueError("--to original converts weights alone: leave the tokenizers out")
    if options.to == "original" and out.suffix == ".safetensors":
        raise ValueError(
            f"--to original writes no safetensors, got --out {out}; name another, or leave --to out"
        )
    if options.to == "safetensors" and options.ranks != 1:
        raise ValueError("--ranks belongs to --to original; safetensors are always whole")
    if options.to == "safetensors" and not has_tokenizers and out.suffix != ".safetensors":
        raise ValueError(
            f"--out must end with .safetensors, got {out}; for a run folder give --text-tokenizer and "
            "--image-tokenizer too"
        )


def _check_image_tokenizer(options: Convert, weights: Weights) -> None:
    if options.text_tokenizer is not None:
        raise ValueError(f"{options.source} is an image tokenizer; a run folder begins with the transformer")
    if options.ranks != 1:
        raise ValueError(f"{options.source} is an image tokenizer, which is not split into ranks")
    _image_config(weights, options.image_size)


def _model_config(weights: Weights, options: Convert) -> ModelConfig:
    """The shape of a transformer from its tensors; ValueError unless they are exactly those of that shape."""
    tensors = weights.tensors
    layers = {int(match[1]) for name in tensors if (match := re.match(r"transformer\.layers\.(\d+)\.", name))}
    shapes = [tensors[name].shape for name in (WORD_EMBEDDINGS, POSITIONS) if name in tensors]
    if not layers or [len(shape) for shape in shapes] != [2, 2]:
        raise ValueError(f"{options.source} is no whole transformer; known are {KNOWN}")
    (vocab_size, width), (max_positions, _) = shapes
    settings = Path(options.source) / MODEL_SETTINGS
    default = (
        load_model_settings(options.source).model.num_heads if settings.is_file() else width // HEAD_SIZE
    )
    num_heads = options.num_heads or default
    if num_heads < 1 or width % num_heads or num_heads % options.ranks:
        raise ValueError(
            f"the width {width} must be a multiple of --num-heads {num_heads}, and that of --ranks "
            f"{options.ranks}; the released models have heads of {HEAD_SIZE}"
        )
    config = ModelConfig(len(layers), width, num_heads, vocab_size, max_positions, pb_relax="tensor")
    with without_values():
        require_tensors_of(CogView(config), tensors, options.source)
    return config


def _image_config(weights: Weights, image_size: int) -> ImageTokenizerConfig:
    """The shape of an image tokenizer from its tensors; ValueError unless they are exactly those."""
    tensors = weights.tensors
    if is_vqgan(tensors):
        shape = vqgan_config(tensors, image_size, weights.source)
        with without_values():
            require_tensors_of(make_image_tokenizer(shape), tensors, weights.source)
        return shape
    first = tensors.get("enc_b.blocks.0.weight")
    convolutions = [name for name in tensors if re.fullmatch(r"enc_b\.blocks\.\d+\.weight", name)]
    if first is None or CODEBOOK not in tensors or len(convolutions) < 2:
        raise ValueError(f"{weights.source} is no whole image tokenizer; known are {KNOWN}")
    code_dim, num_codes = tensors[CODEBOOK].shape
    stages = len(convolutions) - 1
    config = ImageTokenizerConfig(
        num_codes=num_codes,
        code_dim=code_dim,
        channels=first.shape[0],
        stages=stages,
        image_size=image_size,
    )
    with without_values():
        require_tensors_of(ImageTokenizer(config), tensors, weights.source)
    return config


def _padded(size: int, ranks: int) -> int:
    """Rows of the word embeddings: a multiple of 128 on each rank."""
    return -(-size // (PADDING_MULTIPLE * ranks)) * PADDING_MULTIPLE * ranks


def _with_rows_in_use(weights: Weights, vocab: Vocab) -> Weights:
    """Without the unused rows that several ranks add behind ``vocab``; other sizes stay as they are."""
    whole = weights.tensors[WORD_EMBEDDINGS]
    rows = vocab.padded_size
    if whole.shape[0] == rows or whole.shape[0] not in {_padded(vocab.size, ranks) for ranks in range(1, 65)}:
        return weights
    cut = LazyTensor((rows, whole.shape[1]), whole.dtype, lambda: whole.read()[:rows])
    return replace(weights, tensors={**weights.tensors, WORD_EMBEDDINGS: cut})


def _write_tensors(path: Path, weights: Weights, progress: bool) -> None:
    with Progress(len(weights.tensors), "convert", unit="tensor", enabled=progress) as bar:
        write_safetensors(path, weights.tensors, bar.update)


def _write_run(out: Path, weights: Weights, config: ModelConfig, options: Convert) -> None:
    """A run folder as training writes it, but without the state of an optimizer."""
    assert options.text_tokenizer is not None and options.image_tokenizer is not None
    text = TextTokenizer.load(options.text_tokenizer)
    image = open_weights(options.image_tokenizer)
    if image.kind != "image tokenizer":
        raise ValueError(f"--image-tokenizer {options.image_tokenizer} is a {image.kind}")
    image_config = _image_config(image, options.image_size)
    weights = _with_rows_in_use(weights, Vocab(image_config.num_codes, len(text)))
    settings = _run_settings(weights, config, image_config, len(text))
    step = weights.iteration or 0
    with folder_written_aside(out) as folder:
        text.save(folder / TEXT_TOKENIZER)
        write_safetensors(folder / IMAGE_TOKENIZER, image.tensors)
        for name, content in settings.items():
            write_settings(folder / name, content)
        checkpoint = folder / CHECKPOINTS / f"step-{step:08d}"
        _write_tensors(checkpoint / MODEL, weights, options.progress)
        origin = {"tokenizers": fingerprint_tokenizers(folder)}
        complete_checkpoint(checkpoint, CheckpointState(step, {}, origin=origin))


def _run_settings(
    weights: Weights, config: ModelConfig, image: ImageTokenizerConfig, text_pieces: int
) -> dict[str, TokenizerSettings | ModelSettings]:
    """The settings of a run by their file; ValueError unless transformer and tokenizers belong together."""
    rows = weights.tensors[WORD_EMBEDDINGS].shape[0]
    vocab = Vocab(image.num_codes, text_pieces)
    if rows != vocab.padded_size:
        raise ValueError(
            f"{weights.source} has {rows} vocabulary rows, {image.num_codes} codes and {text_pieces} "
            f"text pieces make {vocab.padded_size}; give the tokenizers that belong to it"
        )
    room = config.max_positions - image.codes_per_image - FRAME_TOKENS
    if room < 1:
        raise ValueError(
            f"{weights.source} has {config.max_positions} positions, too few for a text and the "
            f"{image.codes_per_image} codes of {image.image_size} px; give a smaller --image-size"
        )
    caption_tokens = min(CAPTION_TOKENS, room)
    preset = PRESETS["base"].name if image == PRESETS["base"].image_tokenizer else ""
    model = replace(config, vocab_size=rows)
    training = ImageTokenizerTrainConfig(vqgan=None if image.vqgan is None else VQGANTrainConfig())
    return {
        TOKENIZER_SETTINGS: TokenizerSettings(DATA, text_pieces, image, training, preset),
        MODEL_SETTINGS: ModelSettings(DATA, model, SamplingConfig(), room, TrainConfig(), caption_tokens),
    }
