# SPDX-License-Identifier: Apache-2.0
"""From pictures with captions to a trained run: first both tokenizers, then the transformer.

All that can go wrong with the data or the sizes is found first; only then are settings written. They bind
the folder once a first checkpoint is there: a call that failed before it can be repeated with others.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from cogview.config import ModelConfig, Preset, require_workers
from cogview.data.fingerprint import fingerprint
from cogview.data.pairs import Pairs, open_pairs, open_pictures
from cogview.data.row_kinds import PICTURES, RowKind
from cogview.data.row_writer import has_rows, row_format, write_rows
from cogview.data.rows import SKIPPED, Rows, is_rows, open_rows, skipped_lines, split_rows
from cogview.data.tokens import caption_lengths
from cogview.device import default_device
from cogview.files import StrPath, exists, save_tensors, write_bytes, write_json
from cogview.model.transformer import CogView
from cogview.presets import default_preset, implied_preset
from cogview.seeding import derive_seed
from cogview.settings import (
    MODEL_OPTIONS,
    MODEL_SETTINGS,
    TOKENIZER_OPTIONS,
    TOKENIZER_SETTINGS,
    Finetuned,
    ModelSettings,
    TokenizerSettings,
    check_settings,
    load_model_settings,
    model_options,
    tokenizer_options,
    write_options,
    write_settings,
)
from cogview.tokens.text_tokenizer import TextTokenizer
from cogview.tokens.tokenizers import IMAGE_TOKENIZER, TEXT_TOKENIZER, Tokenizers, load_tokenizers
from cogview.training import distributed
from cogview.training.checkpoint import CHECKPOINTS, check_resumable, latest_checkpoint
from cogview.training.code_embeddings import begin_like_codebook
from cogview.training.compilation import require_compiler
from cogview.training.image_tokenizer import new_image_tokenizer, read_history, train_image_tokenizer
from cogview.training.lock import RunLock
from cogview.training.loop import History
from cogview.training.plan import ModelPlan, plan_model, plan_text, require_fitting_preset
from cogview.training.precision import Precision
from cogview.training.start import Start
from cogview.training.transformer import TrainingData, train
from cogview.training.vqvae import ImageTokenizerTrainer

TOKENIZER_HISTORY = "image_tokenizer_history.json"
TRAINING_ROWS = "rows"  # of pictures that are trained on, in the run folder

# A picture of texts by a model that is being trained, at which TensorBoard shows how far it is. It is handed
# in from above, as training does not know how pictures are drawn.
Draw = Callable[[CogView, Tokenizers, ModelSettings, Sequence[str]], Any]


def _tell(notes: Sequence[str], progress: bool) -> None:
    for note in notes if progress else ():
        print(note, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class TrainTokenizers:
    """Train both tokenizers on ``data`` (a folder, or built-in data) into the run folder ``out``."""

    data: StrPath
    out: StrPath
    preset: Preset | None = None  # None: that of built-in data, small for a folder
    device: str = field(default_factory=default_device)
    progress: bool = True
    workers: int = 0  # processes that read images ahead; 0 reads them between the steps
    skip_bad: bool = False  # leave out images that cannot be read, and list them in the run folder
    images_only: bool = False  # no text tokenizer: captions are not read, and a folder needs none

    def __post_init__(self) -> None:
        require_workers(0, self.workers)


def train_tokenizers(options: TrainTokenizers) -> History:
    """Train text and image tokenizer, or finish what an interrupted call began.

    Returns the image tokenizer's history (``reconstruction`` and ``codes_used`` per step). A finished
    tokenizer is not trained again.

    Raises:
        ValueError: the folder was started with other settings or other data; captions without text; images
            that cannot be read, all of them listed.
        BlockingIOError: another training is at work in the folder.
        FileNotFoundError: no such data, or listed files that are not there.
    """
    with RunLock(options.out) as lock:
        return _train_tokenizers(options, lock)


def _train_tokenizers(options: TrainTokenizers, lock: RunLock) -> History:
    out = Path(options.out)
    preset = options.preset or default_preset(options.data)
    settings = TokenizerSettings(
        os.fspath(options.data),
        preset.text_pieces,
        preset.image_tokenizer,
        preset.image_tokenizer_train,
        preset.name,
    )
    is_finished = _is_finished(out, preset.image_tokenizer_train.steps)
    saved = latest_checkpoint(out / ImageTokenizerTrainer.checkpoints)
    is_started = is_finished or saved is not None
    if is_started:
        check_settings(out / TOKENIZER_SETTINGS, settings)
    if is_rows(options.data):
        raise ValueError(f"{options.data} holds rows of tokens; a tokenizer is trained on pictures")
    if options.images_only:
        pairs = open_pictures(options.data)
    else:
        pairs = open_pairs(options.data, skip_bad=options.skip_bad)
    origin = {"data": fingerprint(pairs)}
    if saved is not None:
        check_resumable(saved, origin)
    if not is_finished:
        size = preset.image_tokenizer.image_size
        left_out = pairs.check(size, skip_bad=options.skip_bad, progress=options.progress)
        if left_out:
            write_bytes(out / SKIPPED, skipped_lines((reason,) for reason in left_out))
        _tell_left_out(len(left_out), out, options)
    text = None if is_started or options.images_only else _plan_text(pairs, preset, options)
    lock.take()
    write_settings(out / TOKENIZER_SETTINGS, settings)
    write_options(out / TOKENIZER_OPTIONS, tokenizer_options(settings))
    if text is not None:
        text.save(out / TEXT_TOKENIZER)
    if not is_finished:
        _train_image_tokenizer(pairs, preset, options, origin)
    return read_history(out / TOKENIZER_HISTORY)


def _is_finished(out: Path, steps: int) -> bool:
    """Whether the image tokenizer in ``out`` has that many steps. ValueError if it cannot get them."""
    if not exists(out / IMAGE_TOKENIZER):
        return False
    done = len(read_history(out / TOKENIZER_HISTORY)["reconstruction"])
    if done > steps:
        raise ValueError(
            f"the image tokenizer in {out} has {done} steps; ask for at least as many, not {steps}"
        )
    if done < steps and latest_checkpoint(out / CHECKPOINTS) is not None:
        raise ValueError(
            f"the transformer in {out} has learned the codes of its image tokenizer as that is after {done} "
            f"steps; to train the tokenizer for {steps}, choose another folder"
        )
    return done == steps


def _plan_text(pairs: Pairs, preset: Preset, options: TrainTokenizers) -> TextTokenizer:
    captions = [caption for index in range(len(pairs)) for caption in pairs.captions(index)]
    plan = plan_text(captions, preset.text_pieces)
    _tell(plan.notes, options.progress)
    return plan.tokenizer


def _train_image_tokenizer(
    pairs: Pairs, preset: Preset, options: TrainTokenizers, origin: Mapping[str, str]
) -> None:
    out = Path(options.out)
    torch.manual_seed(derive_seed(preset.image_tokenizer_train.seed, "init image tokenizer"))
    tokenizer = new_image_tokenizer(preset.image_tokenizer, preset.image_tokenizer_train)
    tokenizer = tokenizer.to(options.device)
    history = train_image_tokenizer(
        tokenizer,
        pairs,
        preset.image_tokenizer_train,
        out,
        origin=origin,
        progress=options.progress,
        workers=options.workers,
    )
    # The weights last: they are what makes the tokenizer a finished one.
    write_json(out / TOKENIZER_HISTORY, history)
    save_tensors(out / IMAGE_TOKENIZER, tokenizer.state_dict())


@dataclass(frozen=True)
class TrainModel:
    """Train the transformer on ``data`` into the run folder ``out``, which holds its tokenizers.

    ``data`` are a folder of pictures with captions, ``"digits"`` or ``"emoji"``, or the folder of rows that
    ``cogview tokenize`` wrote with the same tokenizers. The rows of pictures are written once, into the run
    folder.
    """

    data: StrPath
    out: StrPath
    preset: Preset | None = None  # None: the one that fits the tokenizers of the folder
    device: str = field(default_factory=default_device)
    progress: bool = True
    draw: Draw | None = None  # None: no sample pictures
    workers: int = 0  # processes that make batches ahead; 0 makes them between the steps
    skip_bad: bool = False  # leave out images that cannot be read, and list them in the run folder
    finetuned: Finetuned | None = None  # the run whose weights and tokenizers are begun with
    kind: RowKind = PICTURES  # what the rows hold of each picture

    def __post_init__(self) -> None:
        require_workers(0, self.workers)


def train_model(options: TrainModel) -> History:
    """Train the transformer, or go on from its latest checkpoint; under ``torchrun``, all ranks together.

    Vocabulary, number of positions and room for text follow from the tokenizers and the captions (see
    :func:`cogview.training.plan.plan_model`). Returns the history: image loss, text loss and learning rate
    per step.

    Raises:
        ValueError: the preset is made for other pictures than the folder's tokenizers; the device cannot
            compute in the preset's precision; layers are to be compiled and there is no compiler; the folder
            was started with other settings, data or tokenizers; images that cannot be read, all of them
            listed.
        BlockingIOError: another training is at work in the folder.
        FileNotFoundError: no tokenizers in the folder, no such data, or listed files that are not there.
    """
    with distributed.joined_ranks(options.device):
        options = dataclasses.replace(options, progress=options.progress and distributed.is_first())
        with distributed.only_first(lambda: RunLock(options.out)) as lock:
            return _train_model(options, lock)


def _train_model(options: TrainModel, lock: RunLock) -> History:
    out = Path(options.out)
    source = out if options.finetuned is None else Path(options.finetuned.run)
    preset = options.preset or implied_preset(source)
    require_fitting_preset(source, preset)
    # Found out before the images are encoded.
    Precision(preset.train.precision, options.device)
    if preset.train.compile_layers:
        require_compiler(options.device)
    tokenizers = load_tokenizers(source, options.device)
    options.kind.num_codes(tokenizers.image.config)  # refuses a grid that has no such rows
    data = _open_data(options, tokenizers)
    lengths = data.head.captions if isinstance(data, Rows) else caption_lengths(data, tokenizers.text)
    plan = plan_model(preset, tokenizers.vocab, tokenizers.image.config.codes_per_image, lengths)
    settings = ModelSettings(
        data=os.fspath(options.data),
        model=plan.config,
        sampling=preset.sampling,
        max_text_tokens=plan.max_text_tokens,
        train=preset.train,
        finetuned=options.finetuned,
    )
    origin = {"tokenizers": tokenizers.fingerprint, "data": fingerprint(data)}
    start = None if options.finetuned is None else Start(source, tokenizers.fingerprint)
    if start is not None:
        settings = start.settings(settings)
        origin["start"] = start.fingerprint
    saved = latest_checkpoint(out / CHECKPOINTS)
    if saved is not None:
        check_settings(out / MODEL_SETTINGS, settings)
        check_resumable(saved, origin)
        _tell(_notes_on_going_on(out, preset), options.progress)
    draw = _sample_drawer(options, settings, tokenizers, data)
    _tell([*plan.notes, _shape_in_words(settings, options.kind, tokenizers)], options.progress)
    lock.take()
    if start is not None and distributed.is_first():
        start.copy_tokenizers(out)
    rows = data if isinstance(data, Rows) else _rows_of(data, options, tokenizers, plan.max_text_tokens)
    dataset = _dataset(rows, options, preset, tokenizers, plan)
    model = _model(plan.config, preset, options.device)
    if start is not None and saved is None:
        start.load_weights(model)
    elif preset.train.codebook_embeddings and saved is None:
        begin_like_codebook(model.word_embeddings, tokenizers.image.quantizer.embed.t())
    if distributed.is_first():
        write_settings(out / MODEL_SETTINGS, settings)
        if start is None:
            write_options(out / MODEL_OPTIONS, model_options(os.fspath(options.data), preset))
    return train(
        model,
        dataset,
        preset.train,
        out,
        origin=origin,
        draw=None if draw is None else partial(draw, model),
        progress=options.progress,
    )


def _model(config: ModelConfig, preset: Preset, device: str) -> CogView:
    torch.manual_seed(derive_seed(preset.train.seed, "init model"))
    return CogView(config).to(device)


def _dataset(
    rows: Rows, options: TrainModel, preset: Preset, tokenizers: Tokenizers, plan: ModelPlan
) -> TrainingData:
    training, validation = split_rows(rows, preset.train.validation)
    length = options.kind.row_length(tokenizers.image.config, plan.max_text_tokens)
    dataset = options.kind.dataset
    return TrainingData(
        dataset(tokenizers.vocab, training, length),
        dataset(tokenizers.vocab, validation, length) if validation is not None else None,
        options.workers,
    )


def _shape_in_words(settings: ModelSettings, kind: RowKind, tokenizers: Tokenizers) -> str:
    model, room, pictures = settings.model, settings.max_text_tokens, tokenizers.image.config
    length, codes = kind.row_length(pictures, room), kind.num_codes(pictures)
    return (
        f"model: {model.num_layers} layers of width {model.hidden_size} over rows of {length} tokens, "
        f"{room} for text and {codes} for the picture"
    )


def _notes_on_going_on(out: Path, preset: Preset) -> list[str]:
    before = load_model_settings(out).train.steps
    if before == preset.train.steps:
        return []
    return [
        f"the learning rate follows the schedule of {preset.train.steps} steps from here on, not {before}"
    ]


def _open_data(options: TrainModel, tokenizers: Tokenizers) -> Pairs | Rows:
    if options.finetuned is not None and options.finetuned.caption is not None:
        from cogview.data.folder import pictures_with

        return pictures_with(options.finetuned.caption, options.data)
    if not is_rows(options.data):
        return open_pairs(options.data, skip_bad=options.skip_bad)
    if options.kind is not PICTURES:
        raise ValueError(f"{options.data} holds rows of tokens; this training needs the pictures themselves")
    rows = open_rows(options.data)
    if rows.head.format.tokenizers != tokenizers.fingerprint:
        raise ValueError(
            f"the rows in {options.data} were written with other tokenizers than those of {options.out}: "
            f"write them anew with cogview tokenize --run {options.out}"
        )
    return rows


def _rows_of(pairs: Pairs, options: TrainModel, tokenizers: Tokenizers, text_width: int) -> Rows:
    """The rows of pictures, which are encoded once: a run that goes on finds them in its folder."""
    kind = options.kind
    folder, samples = Path(options.out) / TRAINING_ROWS, kind.samples(pairs)
    wanted = row_format(samples, tokenizers, text_width, kind.num_codes(tokenizers.image.config))
    if not distributed.is_first():
        while not has_rows(folder, wanted):
            time.sleep(1)  # That takes longer than ranks wait for one another.
        return open_rows(folder)
    if not options.skip_bad and not has_rows(folder, wanted):
        pairs.check(tokenizers.image.config.image_size, progress=options.progress)
    rows = write_rows(
        samples,
        tokenizers,
        folder,
        wanted,
        encode=kind.encode,
        replace=True,
        progress=options.progress,
    )
    _tell_left_out(rows.head.skipped, folder, options)
    return rows


def _tell_left_out(count: int, folder: Path, options: TrainTokenizers | TrainModel) -> None:
    if count:
        _tell([f"{count} images left out; {folder / SKIPPED} says why"], options.progress)


def _sample_drawer(
    options: TrainModel, settings: ModelSettings, tokenizers: Tokenizers, data: Pairs | Rows
) -> Callable[[CogView], Any] | None:
    """What draws the sample pictures, given the model. ValueError for a text that is too long for it."""
    draw, room = options.draw, settings.max_text_tokens
    if draw is None or not settings.train.samples_every:
        return None
    texts = settings.train.sample_texts
    for text in texts:
        if not 1 <= len(tokenizers.text.encode(text)) <= room:
            raise ValueError(f"sample_texts must have 1 to {room} tokens each, got {text!r}")
    if not texts:
        firsts = (_first_caption(data, index, tokenizers) for index in range(len(data)))
        fitting = (text for text in firsts if len(tokenizers.text.encode(text)) <= room)
        texts = tuple(islice(dict.fromkeys(islice(fitting, 100)), 4))
    return lambda model: draw(model, tokenizers, settings, texts)


def _first_caption(data: Pairs | Rows, index: int, tokenizers: Tokenizers) -> str:
    if isinstance(data, Rows):
        return tokenizers.text.decode(data.read(index)[0])
    return data.captions(index)[0]
