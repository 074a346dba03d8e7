# SPDX-License-Identifier: Apache-2.0
"""What the paper does with a pretrained model: finetuning to caption and rank, for a style, to enlarge.

Source: CogView, arXiv:2105.13290, section 3 and its appendix on finetuning. A task begins with the latest
weights of a run, which may be a converted one without an optimizer, and writes a new run of the same shape.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cogview.config import ModelConfig, Preset, ThreeRegionConfig
from cogview.data.row_kinds import ENLARGEMENTS, LOCAL_ENLARGEMENTS, PICTURES, RowKind
from cogview.device import default_device
from cogview.files import StrPath, exists
from cogview.presets import implied_preset
from cogview.settings import Finetuned, load_model_settings
from cogview.training.loop import History
from cogview.training.pipeline import Draw, TrainModel, train_model

STYLE_CAPTION = "a picture of line drawing style"
# Of the run's own training. Its weights are near a good place already, so that a short training at a lower
# rate suffices.
STEPS_SHARE, RATE_SHARE = 0.1, 0.3


@dataclass(frozen=True)
class Finetune:
    """Go on from the weights of ``run`` on ``data``, into the new run folder ``out``."""

    run: StrPath
    data: StrPath
    out: StrPath
    # Fields of TrainConfig that differ from those of the run, beyond a tenth of its steps at 0.3 of its rate.
    train: Mapping[str, Any] = field(default_factory=dict)
    attention: Literal["dense", "three-region"] | None = None  # while training; None: that of the run
    caption: str = STYLE_CAPTION  # of every picture, for the task style
    device: str = field(default_factory=default_device)
    progress: bool = True
    draw: Draw | None = None  # None: no sample pictures
    workers: int = 0  # processes that make batches ahead; 0 makes them between the steps
    skip_bad: bool = False  # leave out images that cannot be read, and list them in the run folder


def finetune_captioning(options: Finetune) -> History:
    """Rows in image-to-text order alone: the run describes pictures, and ranks them by CapLoss.

    Returns the history, as :func:`cogview.training.pipeline.train_model` does, and raises what that raises;
    and ValueError if ``out`` is the folder of another run.
    """
    return _finetune("captioning", options, caption_fraction=1.0)


def finetune_style(options: Finetune) -> History:
    """Pictures of one style, all with the same generic caption, in text-to-image order alone.

    ``data`` is a folder of pictures, of whose captions nothing is read. Returns and raises what
    :func:`finetune_captioning` does.
    """
    return _finetune("style", options, options.caption, caption_fraction=0.0)


def finetune_super_resolution(options: Finetune) -> History:
    """Rows of one picture on two grids, the high codes after the low ones: the run enlarges pictures.

    ``data`` are pictures, best of twice the size that the run's tokenizer takes; see
    :mod:`cogview.data.enlargements`. A tenth of the rows loses its text, so that pictures without one can be
    enlarged. Returns and raises what :func:`finetune_captioning` does, and ValueError for rows of tokens in
    place of pictures, or for a grid of codes whose side 4 does not divide.
    """
    return _finetune("super-resolution", options, kind=ENLARGEMENTS, caption_fraction=0.0, text_dropout=0.1)


def finetune_local_super_resolution(options: Finetune) -> History:
    """Pictures at the run's size and at twice that, under CogView2's local attention: the run fills in codes.

    See :class:`cogview.model.local_grid.LocalGrid`. ``data`` are pictures, best of twice the size that the
    run's tokenizer takes. Of the losses only that of image codes means anything. Returns and raises what
    :func:`finetune_super_resolution` does, but for any grid.
    """
    return _finetune(
        "local-super-resolution", options, kind=LOCAL_ENLARGEMENTS, caption_fraction=0.0, text_dropout=0.1
    )


TASKS: dict[str, Callable[[Finetune], History]] = {
    "captioning": finetune_captioning,
    "style": finetune_style,
    "super-resolution": finetune_super_resolution,
    "local-super-resolution": finetune_local_super_resolution,
}


def _finetune(
    task: str, options: Finetune, caption: str | None = None, kind: RowKind = PICTURES, **train: Any
) -> History:
    if exists(options.out) and exists(options.run) and os.path.samefile(options.out, options.run):
        raise ValueError(f"out must be another folder than run, got {options.out} for both")
    return train_model(
        TrainModel(
            options.data,
            options.out,
            preset_of(task, options, **train),
            options.device,
            options.progress,
            draw=options.draw,
            workers=options.workers,
            skip_bad=options.skip_bad,
            finetuned=Finetuned(task, os.fspath(options.run), caption),
            kind=kind,
        )
    )


def preset_of(task: str, options: Finetune, **train: Any) -> Preset:
    """Model, training and drawing of the run that is begun with, changed as the task and the options say.

    FileNotFoundError if there is no such run, ValueError for an option out of range.
    """
    run = load_model_settings(options.run)
    # Guidance weighs the text, and an enlarger draws what it sees.
    guidance = 1.0 if task.endswith("super-resolution") else run.sampling.guidance
    steps = max(1, round(STEPS_SHARE * run.train.steps))
    shorter = {"steps": steps, "learning_rate": RATE_SHARE * run.train.learning_rate, "code_dropout": 0.0}
    return dataclasses.replace(
        implied_preset(options.run),
        model=_with_attention(run.model, options.attention),
        train=dataclasses.replace(run.train, **{**shorter, **train, **options.train}),
        sampling=dataclasses.replace(run.sampling, guidance=guidance),
        min_text_tokens=run.max_text_tokens,
        max_text_tokens=run.max_text_tokens,
    )


def _with_attention(model: ModelConfig, attention: str | None) -> ModelConfig:
    if attention is None:
        return model
    three_region = model.three_region or ThreeRegionConfig()
    return dataclasses.replace(model, three_region=three_region if attention == "three-region" else None)
