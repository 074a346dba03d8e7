# SPDX-License-Identifier: Apache-2.0
"""What the data mean for the sizes of a run: worked out, and put into words, before training starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from cogview.config import ImageTokenizerConfig, ModelConfig, Preset
from cogview.data.rows import CaptionLengths
from cogview.files import StrPath
from cogview.settings import TokenizerSettings, load_tokenizer_settings
from cogview.tokens.sequence import FRAME_TOKENS
from cogview.tokens.text_tokenizer import MANY_LINES, TextTokenizer, required_pieces
from cogview.tokens.vocab import Vocab


@dataclass(frozen=True)
class TextPlan:
    """A text tokenizer for captions, and what to tell about it."""

    tokenizer: TextTokenizer
    notes: tuple[str, ...]


def plan_text(captions: Sequence[str], text_pieces: int) -> TextPlan:
    """A text tokenizer of about ``text_pieces`` pieces.

    Fewer where the captions hold no more; more where every character would not have its own otherwise
    (up to 100,000 captions: of more than that the rarest characters are left out).
    """
    notes = []
    required = required_pieces(captions) if len(captions) <= MANY_LINES else 0
    if required > text_pieces:
        notes.append(
            f"text vocabulary: {required} pieces rather than {text_pieces}, as the captions have that many "
            "different characters"
        )
    tokenizer = TextTokenizer.train(captions, max(text_pieces, required))
    if len(tokenizer) < text_pieces:
        notes.append(
            f"text vocabulary: {len(tokenizer)} pieces rather than {text_pieces}, as the {len(captions)} "
            "captions support no more"
        )
    return TextPlan(tokenizer, tuple(notes))


@dataclass(frozen=True)
class ModelPlan:
    """Shape of a run's transformer, its room for text, and what to tell about them."""

    config: ModelConfig
    max_text_tokens: int
    notes: tuple[str, ...]


def plan_model(preset: Preset, vocab: Vocab, codes_per_image: int, captions: CaptionLengths) -> ModelPlan:
    """The preset's transformer over the vocabulary of a run's tokenizers, with room for its captions.

    The room for text is that of the longest caption, within ``min_text_tokens`` and ``max_text_tokens``.
    Three-region attention gets as many more pivots as the text outgrows ``min_text_tokens``, so that as
    many image codes remain among them.
    """
    notes = []
    room = min(max(captions.longest, preset.min_text_tokens), preset.max_text_tokens)
    too_long = captions.longer_than(room)
    if too_long:
        notes.append(
            f"{too_long} of {captions.count} captions are longer than {room} tokens and lose their end; "
            "a larger max_text_tokens keeps it"
        )
    unknown = captions.with_unknown
    if unknown:
        notes.append(
            f"{unknown} of {captions.count} captions have characters that the run's text tokenizer does not "
            "know; a tokenizer trained on these captions would"
        )
    length = FRAME_TOKENS + room + codes_per_image
    config = dataclasses.replace(preset.model, vocab_size=vocab.padded_size, max_positions=length)
    three_region = config.three_region
    if three_region is not None and room > preset.min_text_tokens:
        pivots = three_region.num_pivots + room - preset.min_text_tokens
        config = dataclasses.replace(
            config, three_region=dataclasses.replace(three_region, num_pivots=min(pivots, length - 1))
        )
    return ModelPlan(config, room, tuple(notes))


def _in_words(config: ImageTokenizerConfig) -> str:
    return f"{config.image_size} px as {config.grid} x {config.grid} codes of {config.num_codes}"


def require_fitting_preset(folder: StrPath, preset: Preset) -> TokenizerSettings:
    """The settings of a folder's tokenizers. ValueError if ``preset`` is made for other pictures."""
    settings = load_tokenizer_settings(folder)
    theirs, wanted = settings.image_tokenizer, preset.image_tokenizer
    shapes = [(config.image_size, config.grid, config.num_codes) for config in (theirs, wanted)]
    if shapes[0] != shapes[1]:
        name = f"preset {preset.name!r}" if preset.name else "the preset"
        raise ValueError(
            f"the tokenizers in {folder} take pictures of {_in_words(theirs)}, {name} is made for "
            f"{_in_words(wanted)}; leave --preset out to take what fits them, or train others in "
            f"another folder first: cogview train-tokenizer --preset {preset.name or 'NAME'}"
        )
    return settings
