# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path

import pytest

from cogview.data.digits import (
    CHINESE,
    ENGLISH,
    HELD_OUT_PHRASINGS,
    TRAINING_PHRASINGS,
    phrase,
)
from cogview.presets import PRESETS
from cogview.tokens.text_tokenizer import TextTokenizer, required_pieces

TEST_DATA = Path(os.environ.get("COGVIEW_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
RELEASED = TEST_DATA / "cog-pretrain.model"


@pytest.fixture(scope="module")
def digits_tokenizer():
    captions = [phrase(template, digit) for template in TRAINING_PHRASINGS for digit in range(10)]
    return TextTokenizer.train(captions * 20, PRESETS["digits"].text_pieces)


@pytest.mark.skipif(not RELEASED.exists(), reason=f"the released tokenizer is not at {RELEASED}")
def test_vectors_of_the_released_tokenizer():
    tokenizer = TextTokenizer.load(RELEASED)
    assert len(tokenizer) == 50000
    assert tokenizer.encode("一只老虎在踢足球") == [15955, 8120, 43373, 45714, 1703]
    english = [196, 134, 720, 41, 2476, 20944, 315, 605, 11832, 38588, 43369]
    assert tokenizer.encode("A tiger is playing football.") == english
    assert tokenizer.decode(english) == "A tiger is playing football."


@pytest.mark.parametrize("template", TRAINING_PHRASINGS + HELD_OUT_PHRASINGS)
def test_every_digit_is_a_piece_of_its_own(digits_tokenizer, template):
    for digit in range(10):
        pieces = [piece.lstrip("▁") for piece in digits_tokenizer.pieces(phrase(template, digit))]
        assert ENGLISH[digit] in pieces or CHINESE[digit] in pieces
        assert len(pieces) <= PRESETS["digits"].min_text_tokens


def test_held_out_phrasings_are_held_out():
    assert not set(HELD_OUT_PHRASINGS) & set(TRAINING_PHRASINGS)


def test_reserved_ids_and_round_trip(digits_tokenizer, tmp_path):
    digits_tokenizer.save(tmp_path / "text.model")
    loaded = TextTokenizer.load(tmp_path / "text.model")
    text = "手写数字七"
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.encode(text) == digits_tokenizer.encode(text)
    assert loaded.encode("<n>")[-1] == 3
    assert not list(tmp_path.glob("*.tmp"))


def test_unknown_characters_become_the_unknown_id_and_are_named(digits_tokenizer):
    assert 0 in digits_tokenizer.encode("a Ω")
    assert digits_tokenizer.unknown_pieces("a Ω") == ["Ω"]
    assert digits_tokenizer.unknown_pieces("a handwritten seven") == []


def test_a_few_captions_give_fewer_pieces_than_asked_for():
    tokenizer = TextTokenizer.train(["a cat", "a dog"], 1000)
    assert 4 < len(tokenizer) < 40
    assert tokenizer.unknown_pieces("a cat") == []


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="text tokenizer not found"):
        TextTokenizer.load(tmp_path / "absent.model")
    (tmp_path / "empty.model").touch()
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        TextTokenizer.load(tmp_path / "empty.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        TextTokenizer.load(tmp_path / "bad.model")
    with pytest.raises(ValueError, match="at least one non-empty text"):
        TextTokenizer.train(["  "], 100)
    with pytest.raises(ValueError, match=r"letters or signs that can be seen, got '\\u200b'"):
        TextTokenizer.train(["\u200b", "\u200b\u200b"], 100)
    with pytest.raises(ValueError, match=r"at least 17 for these captions, .* 13 different .* got 16"):
        TextTokenizer.train(["many different letters"], 16)


@pytest.mark.parametrize(
    "captions",
    [["many different letters"], ["a cat", "a dog"] * 70, ["红色的圆", "Ａ １ ㍿"], ["x"], ["😀 é"]],
)
def test_the_fewest_pieces_are_enough_and_one_less_is_not(captions):
    required = required_pieces(captions)
    tokenizer = TextTokenizer.train(captions, required)
    assert len(tokenizer) == required
    assert not any(tokenizer.unknown_pieces(caption) for caption in captions)
    with pytest.raises(ValueError, match=f"at least {required} "):
        TextTokenizer.train(captions, required - 1)


@pytest.mark.parametrize("text", ["z" * 5000, "字" * 70_000, "many words " * 10_000 + "end"])
def test_a_caption_of_any_length_is_learned(text):
    tokenizer = TextTokenizer.train(["short", text], 100)
    assert tokenizer.unknown_pieces(text) == []
