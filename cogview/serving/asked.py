# SPDX-License-Identifier: Apache-2.0
"""What a visitor has typed, checked. Everything typed comes through here before anything else sees it."""

from __future__ import annotations

import math
import random
import unicodedata
from dataclasses import dataclass, replace

from cogview.config import SamplingConfig

LONGEST_TEXT = 1000  # characters, long before the tokenizer counts its tokens
MOST_PICTURES = 64  # of one request
LARGEST_SEED = 2**53 - 1  # up to which a browser's numbers are exact
LARGEST_GUIDANCE = 20
HOTTEST = 10

Number = float | int | None  # what a field of numbers holds; None where it is empty


@dataclass(frozen=True)
class Fields:
    """The settings as a visitor typed them; None, an empty field, takes what the run does by itself."""

    num: Number = None
    seed: Number = None
    temperature: Number = None
    top_k: Number = None
    guidance: Number = None


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn, whatever they show."""

    num: int
    seed: int
    sampling: SamplingConfig


def read_settings(fields: Fields, sampling: SamplingConfig) -> Settings:
    """The settings of a request; an empty seed is a random one.

    ValueError, one line that names the field, for what is out of its range.
    """
    seed = _whole("seed", fields.seed, 0, LARGEST_SEED)
    temperature = _within("temperature", fields.temperature, 0, HOTTEST)
    top_k = _whole("top-k", fields.top_k, 0, 2**31)
    guidance = _within("guidance", fields.guidance, 0, LARGEST_GUIDANCE)
    num = _whole("pictures", fields.num, 1, MOST_PICTURES)
    sampling = replace(
        sampling,
        temperature=sampling.temperature if temperature is None else temperature,
        top_k=sampling.top_k if top_k is None else top_k,
        guidance=sampling.guidance if guidance is None else guidance,
    )
    return Settings(
        num=8 if num is None else num,
        # Small enough to be read out and typed again.
        seed=random.SystemRandom().randrange(10**6) if seed is None else seed,
        sampling=sampling,
    )


def read_text(typed: str) -> str:
    """A text of one line, without characters that would steer a terminal or stand for nothing.

    ValueError if nothing is left or it is too long.
    """
    if not isinstance(typed, str):
        raise ValueError("the text must be words")
    if len(typed) > LONGEST_TEXT:
        raise ValueError(
            f"the text has {len(typed):,} characters, and at most {LONGEST_TEXT:,} are read; shorten it"
        )
    shown = "".join(" " if unicodedata.category(each) in ("Cc", "Cs") else each for each in typed)
    text = " ".join(shown.split())
    if not text:
        raise ValueError("the text is empty; type what the picture shows")
    return text


def _within(name: str, value: Number, low: int, high: int) -> float | None:
    if value is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} must be from {low:,} to {high:,}, got {value!r:.40}")
    return float(value)


def _whole(name: str, value: Number, low: int, high: int) -> int | None:
    if _within(name, value, low, high) is None:
        return None
    assert value is not None
    if value != int(value):
        raise ValueError(f"{name} must be a whole number, got {value}")
    return int(value)
