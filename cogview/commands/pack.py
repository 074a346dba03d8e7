# SPDX-License-Identifier: Apache-2.0
"""A run without what only training needs: small enough to hand on.

The run that ships with the package was written so.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from cogview.files import StrPath, folder_written_aside, require_new, save_tensors, write_json
from cogview.settings import (
    MODEL_SETTINGS,
    TOKENIZER_SETTINGS,
    ModelSettings,
    TokenizerSettings,
    load_model_settings,
    load_tokenizer_settings,
    plain,
    train_model_hint,
)
from cogview.tokens.tokenizers import IMAGE_TOKENIZER, TEXT_TOKENIZER
from cogview.training.checkpoint import (
    CHECKPOINTS,
    MODEL,
    CheckpointState,
    complete_checkpoint,
    read_state,
    require_checkpoint,
    verified_tensors,
)

Settings = TypeVar("Settings", TokenizerSettings, ModelSettings)


def pack_run(run: StrPath, out: StrPath) -> int:
    """Write a run's tokenizers and its latest weights, in bfloat16, as a run folder; returns its bytes.

    Draws, describes and ranks like the run (its weights rounded to bfloat16), can be finetuned, and cannot go
    on with its training. ValueError or OSError naming the file and the way out; an ``out`` that exists is
    refused.
    """
    run, out = Path(run), Path(out)
    require_new(out)
    tokenizers, model = load_tokenizer_settings(run), load_model_settings(run)
    checkpoint = require_checkpoint(run / CHECKPOINTS, train_model_hint(run))
    state = read_state(checkpoint)
    weights = verified_tensors(checkpoint, MODEL, state)
    with folder_written_aside(out) as aside:
        packed = aside / CHECKPOINTS / checkpoint.name
        packed.mkdir(parents=True)
        for name in (TEXT_TOKENIZER, IMAGE_TOKENIZER):
            shutil.copyfile(run / name, aside / name)
        # Where the data lay is of no meaning elsewhere, but for the built-in ones, which are names.
        write_json(aside / TOKENIZER_SETTINGS, plain(_placeless(tokenizers)))
        write_json(aside / MODEL_SETTINGS, plain(_placeless(model)))
        save_tensors(packed / MODEL, _narrow(weights))
        origin = {"tokenizers": state.origin["tokenizers"]} if "tokenizers" in state.origin else {}
        complete_checkpoint(packed, CheckpointState(state.step, {}, origin=origin))
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def _placeless(settings: Settings) -> Settings:
    return dataclasses.replace(settings, data=Path(settings.data).name)


def _narrow(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in bfloat16; what is no floating-point number stays."""
    return {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }
