# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from cogview.tokens.sequence import (
    drop_texts,
    fit_text,
    image_to_text_row,
    make_batch,
    text_to_image_prompt,
    text_to_image_row,
)
from cogview.tokens.vocab import Vocab

VOCAB = Vocab(num_image_codes=10, num_text_pieces=5)  # PAD 15, BOI1 16, EOI1 19, ROI1 22, SEP 25, TINY 29
PAD, BOI1, EOI1, ROI1, SEP, TINY = 15, 16, 19, 22, 25, 29


def test_both_orders():
    assert text_to_image_row(VOCAB, [3, 0], [7, 8, 9, 1]) == [ROI1, 13, 10, TINY, BOI1, 7, 8, 9, 1, EOI1]
    assert text_to_image_prompt(VOCAB, [3, 0], 4) == [ROI1, 13, 10, TINY, BOI1]
    assert image_to_text_row(VOCAB, [3, 0], [7, 8, 9, 1]) == [TINY, BOI1, 7, 8, 9, 1, EOI1, ROI1, 13, 10, SEP]


def test_a_row_of_the_released_model():
    row = text_to_image_row(Vocab(), [15955, 8120], [5] * 1024)
    assert row[:5] == [58199, 15955 + 8192, 8120 + 8192, 58208, 58193]
    assert row[-1] == 58196
    assert len(row) == 2 + 4 + 1024


def test_weights_go_by_the_input_token():
    rows = [text_to_image_row(VOCAB, [3], [7, 8, 9, 1]), image_to_text_row(VOCAB, [3, 0], [7, 8, 9, 1])]
    batch = make_batch(VOCAB, rows, length=12, text_weight=5.0)
    assert batch.tokens[0].tolist() == [ROI1, 13, TINY, BOI1, 7, 8, 9, 1, EOI1, PAD, PAD]
    assert batch.targets[0].tolist() == [13, TINY, BOI1, 7, 8, 9, 1, EOI1, PAD, PAD, PAD]
    # BOI1 -> first code counts as text, last code -> EOI1 as image, EOI1 -> PAD not at all.
    assert batch.weight[0].tolist() == [5, 5, 5, 5, 1, 1, 1, 1, 0, 0, 0]
    assert batch.weight[1].tolist() == [5, 5, 1, 1, 1, 1, 5, 5, 5, 5, 0]
    assert batch.text_mask[0].tolist() == [True] * 4 + [False] * 4 + [True] + [False] * 2
    assert batch.valid_mask[0].tolist() == [True] * 9 + [False] * 2
    assert batch.tokens.dtype == torch.int64


def test_too_long_is_an_error_or_costs_text_never_image():
    with pytest.raises(ValueError, match="the text has 3 tokens, at most 2 fit"):
        fit_text([1, 2, 3], 2)
    assert fit_text([1, 2, 3], 2, truncate=True) == [1, 2]
    with pytest.raises(ValueError, match="at most length=5 tokens"):
        make_batch(VOCAB, [text_to_image_row(VOCAB, [1], [1])], length=5)


def test_ids_out_of_range_are_errors():
    with pytest.raises(ValueError, match=r"pieces must be in \[0, 5\)"):
        text_to_image_row(VOCAB, [5], [1])
    with pytest.raises(ValueError, match=r"codes must be in \[0, 10\)"):
        image_to_text_row(VOCAB, [1], [10])


def test_a_share_of_the_rows_that_draw_loses_its_text():
    drawing, captioning = text_to_image_row(VOCAB, [3, 4], range(4)), image_to_text_row(VOCAB, [3], range(4))
    rows = drop_texts(VOCAB, [drawing, captioning] * 500, 0.25, seed=1)
    without = text_to_image_row(VOCAB, [], range(4))
    assert set(map(tuple, rows[::2])) == {tuple(drawing), tuple(without)}
    assert 90 < sum(row == without for row in rows) < 160
    assert rows[1::2] == [captioning] * 500
    assert drop_texts(VOCAB, [drawing] * 9, 0.0, seed=1) == [drawing] * 9
    assert drop_texts(VOCAB, [drawing] * 99, 0.5, seed=2) != drop_texts(VOCAB, [drawing] * 99, 0.5, seed=3)
