# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from cogview.generation.infill import keep_outside, keep_top

CODES = torch.arange(16)


def test_a_code_with_any_white_pixel_is_drawn_anew():
    mask = torch.zeros(16, 16)
    mask[4, 11] = 1.0  # a corner pixel of the second row's third code
    mask[12:, :4] = 0.49  # grey, still black
    kept = keep_outside(CODES, mask, 4)
    assert kept.tolist() == [code if code != 6 else -1 for code in range(16)]
    with pytest.raises(ValueError, match="mask must have a white part"):
        keep_outside(CODES, torch.zeros(16, 16), 4)


def test_the_top_is_kept_in_rows_of_codes():
    for share, rows in ((0.0, 0), (0.3, 1), (0.5, 2), (0.99, 3)):
        assert keep_top(CODES, share, 4).tolist() == [*range(rows * 4), *[-1] * (16 - rows * 4)]
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="keep_top must be at least 0 and below 1"):
            keep_top(CODES, share, 4)
