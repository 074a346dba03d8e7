# SPDX-License-Identifier: Apache-2.0
"""One flat id space for image codes, text pieces and command tokens, in the order of the released model.

================  =========================================  =======================
ids from          what                                       released model
================  =========================================  =======================
0                 image codes (index into the codebook)      0 .. 8191
num_image_codes   text pieces (SentencePiece id + offset)    8192 .. 58191
command_start     27 command tokens                          58192 .. 58218
size              unused rows up to a multiple of 128        58219 .. 58239
================  =========================================  =======================

Every offset follows from the two sizes, so released weights load and a small codebook wastes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

COMMANDS = (
    *("PAD", "BOI1", "BOI2", "BOI3", "EOI1", "EOI2", "EOI3", "ROI1", "ROI2", "ROI3"),
    *("SEP", "MASK", "CLS", "ENC", "TINY", "SMALL", "BASE", "BIG"),
    *(f"POS{i}" for i in range(9)),
)
GRID_SIDES = {"TINY": 8, "SMALL": 16, "BASE": 32, "BIG": 64}
PADDING_MULTIPLE = 128


@dataclass(frozen=True)
class Vocab:
    """Id ranges for a codebook of ``num_image_codes`` and a text tokenizer of ``num_text_pieces``.

    Both must be at least 1, else ValueError.
    """

    num_image_codes: int = 8192
    num_text_pieces: int = 50000

    def __post_init__(self) -> None:
        for name in ("num_image_codes", "num_text_pieces"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def text_start(self) -> int:
        """First text id."""
        return self.num_image_codes

    @property
    def command_start(self) -> int:
        """First command id, PAD."""
        return self.num_image_codes + self.num_text_pieces

    @property
    def size(self) -> int:
        """Number of ids in use."""
        return self.command_start + len(COMMANDS)

    @property
    def padded_size(self) -> int:
        """Rows of the embedding: ``size`` rounded up to a multiple of 128."""
        return -(-self.size // PADDING_MULTIPLE) * PADDING_MULTIPLE

    def command(self, name: str) -> int:
        """Id of a command token such as ``"ROI1"``; an unknown name is a ValueError."""
        try:
            return self.command_start + COMMANDS.index(name)
        except ValueError:
            raise ValueError(f"unknown command token {name!r}; known: {', '.join(COMMANDS)}") from None

    @property
    def pad(self) -> int:
        """Id of PAD, the one token that carries no loss."""
        return self.command_start

    def size_token(self, num_codes: int) -> int:
        """Id of the token announcing a square image of ``num_codes`` codes.

        TINY, SMALL, BASE and BIG stand for sides of 8, 16, 32 and 64. A side in between takes the
        smallest token that holds it. Not square, or a side above 64: ValueError.
        """
        side = round(num_codes**0.5)
        if num_codes < 1 or side * side != num_codes:
            raise ValueError(f"an image needs a square number of codes, got {num_codes}")
        for name, largest in GRID_SIDES.items():
            if side <= largest:
                return self.command(name)
        raise ValueError(f"images of at most 64 x 64 codes are supported, got {side} x {side}")
