# SPDX-License-Identifier: Apache-2.0
"""Text to piece ids and back: a SentencePiece BPE model, as the released system uses."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable

import sentencepiece

from cogview.files import StrPath, require_readable, write_bytes

UNKNOWN = 0
RESERVED = 4  # <unk>, <s>, </s>, <n>
NORMALIZATION = "nmt_nfkc"  # of the released tokenizer
MANY_LINES = 100_000
MAX_LINE_CHARACTERS = 1 << 12  # of at most four bytes each
MAX_LINE_BYTES = 4 * MAX_LINE_CHARACTERS  # SentencePiece leaves a longer line out without a word


def _lines(captions: Iterable[str]) -> list[str]:
    """The captions as lines of a length that the trainer takes, cut between words where there are any."""
    lines = []
    for caption in captions:
        line = " ".join(caption.split())
        if len(line) > MAX_LINE_CHARACTERS:
            lines += textwrap.wrap(line, MAX_LINE_CHARACTERS, break_on_hyphens=False)
        elif line:
            lines.append(line)
    return lines


def required_pieces(captions: Iterable[str]) -> int:
    """The fewest pieces that hold every character of the captions: one each, and the reserved ones."""
    normalize = sentencepiece.SentencePieceNormalizer(rule_name=NORMALIZATION).normalize
    characters = {character for line in set(_lines(captions)) for character in normalize(line)}
    return RESERVED + len(characters)


class TextTokenizer:
    """Wraps a serialized SentencePiece model; ids start at 0 (``Vocab.text_start`` is added elsewhere)."""

    def __init__(self, model: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.model = model

    @classmethod
    def load(cls, path: StrPath) -> TextTokenizer:
        """Read a ``.model`` file. FileNotFoundError if absent, ValueError if it is something else."""
        path = require_readable(path, "text tokenizer")
        content = path.read_bytes()
        try:
            if not content:  # which SentencePiece would take for no model yet
                raise RuntimeError
            return cls(content)
        except RuntimeError:
            raise ValueError(f"{path} is not a SentencePiece model (damaged or another format)") from None

    @classmethod
    def train(cls, captions: Iterable[str], num_pieces: int) -> TextTokenizer:
        """Learn at most ``num_pieces`` BPE pieces from captions; fewer if the captions hold no more.

        Same normalisation and reserved ids as the released tokenizer: NFKC, ``<unk>`` 0, ``<s>`` 1,
        ``</s>`` 2, ``<n>`` 3. ValueError for no captions or for fewer than :func:`required_pieces`.
        """
        lines = _lines(captions)
        if not lines:
            raise ValueError("captions must hold at least one non-empty text to train a tokenizer on")
        required = required_pieces(lines)
        if required == RESERVED:
            raise ValueError(f"captions must hold letters or signs that can be seen, got {lines[0]!r}")
        # Of many captions the rarest characters are left out, so fewer pieces can do.
        covers_all = len(lines) <= MANY_LINES
        if covers_all and num_pieces < required:
            raise ValueError(
                f"num_pieces must be at least {required} for these captions, which have "
                f"{required - RESERVED} different characters, got {num_pieces}"
            )
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type="bpe",
                vocab_size=num_pieces,
                hard_vocab_limit=False,
                character_coverage=1.0 if covers_all else 0.9995,
                max_sentence_length=MAX_LINE_BYTES,
                normalization_rule_name=NORMALIZATION,
                user_defined_symbols=["<n>"],
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(
                f"num_pieces={num_pieces} cannot be trained on these captions: {error}"
            ) from None
        return cls(model.getvalue())

    def save(self, path: StrPath) -> None:
        """Write the model file, aside first and then renamed."""
        write_bytes(path, self.model)

    def __len__(self) -> int:
        return self._processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """Piece ids; characters outside the vocabulary become ``UNKNOWN``."""
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of piece ids."""
        return self._processor.decode(ids)

    def pieces(self, text: str) -> list[str]:
        """The pieces that ``text`` is cut into."""
        return self._processor.encode(text, out_type=str)

    def unknown_pieces(self, text: str) -> list[str]:
        """Parts of ``text`` that no piece covers, so that a caller can warn about them."""
        return [piece for piece in self.pieces(text) if self._processor.piece_to_id(piece) == UNKNOWN]
