# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from cogview.data.digits import HELD_OUT_PHRASINGS
from cogview.demo.report import Drawings, all_prompts, drawings_report, prompts_report


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
