# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch

from cogview.data.digits import HELD_OUT_PHRASINGS
from cogview.demo.plots import _running_mean
from cogview.demo.report import Drawings, all_prompts, drawings_report, prompts_report
from cogview.training.loop import late_mean


def test_the_best_candidate_is_the_one_of_least_loss_and_the_judge_says_whether_it_is_right():
    prompts = all_prompts(1)
    asked = torch.tensor([prompt.digit for prompt in prompts])
    seen = torch.stack([asked, (asked + 1) % 10, asked], dim=1)
    losses = torch.tensor([3.0, 1.0, 2.0]).repeat(len(prompts), 1)
    losses[:15] = torch.tensor([3.0, 2.0, 1.0])  # The right one is best for these 15 alone.
    drawings = Drawings(prompts, torch.zeros(len(prompts), 3, 3, 16, 16), losses, seen)
    assert drawings.order[0].tolist() == [2, 1, 0] and drawings.order[15].tolist() == [1, 2, 0]
    report = drawings_report(drawings)
    assert report["results"] == {"prompts": 60, "best_of_all": 0.25, "single_draw": pytest.approx(2 / 3)}
    shares = [report["by_phrasing"][template]["best_of_all"] for template in HELD_OUT_PHRASINGS]
    assert shares == [1.0, 0.5, 0.0, 0.0, 0.0, 0.0]
    first, last = prompts_report(drawings)[0], prompts_report(drawings)[-1]
    assert (first["best_shows"], first["best_cap_loss"], first["right_candidates"]) == (0, 1.0, 2)
    assert (last["digit"], last["best_shows"]) == (9, 0)


def test_a_skipped_step_leaves_no_gap_in_the_curve_behind_it():
    values = [1.0, math.nan, 3.0, math.inf, math.nan, math.nan, 5.0]
    means = _running_mean(values, 3)
    np.testing.assert_array_equal(means, [1, 1, 2, 3, 3, math.nan, 5])
    np.testing.assert_allclose(_running_mean([1.0, 2.0, 6.0, 4.0], 2), [1, 1.5, 4, 5])


def test_the_last_losses_are_those_of_steps_that_were_not_skipped():
    assert late_mean([9.0] * 10 + [2.0, math.nan] * 25) == 2.0
    with pytest.raises(FloatingPointError, match="none of the last steps had a finite loss"):
        late_mean([1.0] + [math.nan] * 50)
