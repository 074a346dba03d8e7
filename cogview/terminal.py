# SPDX-License-Identifier: Apache-2.0
"""What people's words and file names look like in a line of the command's output."""

from __future__ import annotations

import unicodedata

_ACTING = frozenset(("Cc", "Zl", "Zp"))  # control characters, and those that end a line


def in_one_line(words: object) -> str:
    """``str(words)`` with escapes for what would end the line, move the cursor or colour the terminal."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _ACTING
        else character
        for character in str(words)
    )
