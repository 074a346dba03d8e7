# SPDX-License-Identifier: Apache-2.0
"""An image tokenizer that a study trains once: a study that is interrupted goes on with those it has."""

from __future__ import annotations

from pathlib import Path

from cogview.config import ImageTokenizerTrainConfig
from cogview.data.pairs import Pairs
from cogview.files import exists, load_tensors, save_tensors, write_json
from cogview.tokens.tokenizers import IMAGE_TOKENIZER
from cogview.tokens.vqvae import ImageTokenizer
from cogview.training.image_tokenizer import read_history, train_image_tokenizer
from cogview.training.loop import History

HISTORY = "history.json"


def finish_tokenizer(
    tokenizer: ImageTokenizer,
    pairs: Pairs,
    config: ImageTokenizerTrainConfig,
    folder: Path,
    *,
    progress: bool = True,
) -> History:
    """Train ``tokenizer`` in place and keep it in ``folder``, or read it from there if it has been kept.

    Leaves it in eval mode. Returns the history of the training.
    """
    if not exists(folder / IMAGE_TOKENIZER):
        history = train_image_tokenizer(tokenizer, pairs, config, folder, progress=progress)
        # The weights last: they are what makes the tokenizer a finished one.
        write_json(folder / HISTORY, history)
        save_tensors(folder / IMAGE_TOKENIZER, tokenizer.state_dict())
    tokenizer.load_state_dict(load_tensors(folder / IMAGE_TOKENIZER))
    tokenizer.eval()
    return read_history(folder / HISTORY)
