# SPDX-License-Identifier: Apache-2.0
import pytest

from cogview.tokens.vocab import COMMANDS, Vocab


def test_ids_of_the_released_model():
    vocab = Vocab()
    assert (vocab.text_start, vocab.command_start, vocab.size, vocab.padded_size) == (
        8192,
        58192,
        58219,
        58240,
    )
    assert len(COMMANDS) == 27
    expected = {
        "PAD": 58192,
        "BOI1": 58193,
        "BOI2": 58194,
        "BOI3": 58195,
        "EOI1": 58196,
        "EOI2": 58197,
        "EOI3": 58198,
        "ROI1": 58199,
        "ROI2": 58200,
        "ROI3": 58201,
        "SEP": 58202,
        "MASK": 58203,
        "CLS": 58204,
        "ENC": 58205,
        "TINY": 58206,
        "SMALL": 58207,
        "BASE": 58208,
        "BIG": 58209,
        "POS0": 58210,
        "POS8": 58218,
    }
    assert {name: vocab.command(name) for name in expected} == expected
    assert vocab.pad == expected["PAD"]


def test_a_smaller_codebook_moves_all_that_follows():
    vocab = Vocab(num_image_codes=128, num_text_pieces=172)
    assert (vocab.text_start, vocab.command_start, vocab.size, vocab.padded_size) == (128, 300, 327, 384)


@pytest.mark.parametrize(
    ("side", "name"),
    [(4, "TINY"), (8, "TINY"), (9, "SMALL"), (16, "SMALL"), (32, "BASE"), (50, "BIG"), (64, "BIG")],
)
def test_size_tokens(side, name):
    assert Vocab().size_token(side * side) == Vocab().command(name)


@pytest.mark.parametrize("num_codes", [0, 10, 65 * 65])
def test_sizes_without_a_token_are_errors(num_codes):
    with pytest.raises(ValueError, match="codes"):
        Vocab().size_token(num_codes)


def test_bad_arguments_are_errors():
    with pytest.raises(ValueError, match="num_image_codes must be at least 1, got 0"):
        Vocab(num_image_codes=0)
    with pytest.raises(ValueError, match="unknown command token 'BOI4'"):
        Vocab().command("BOI4")
