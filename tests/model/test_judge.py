# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from cogview.data.digits import DigitPairs
from cogview.demo.judge import Judge


def test_the_judge_reads_real_scans_and_pictures_alike():
    judge, test = Judge(), DigitPairs("test")
    assert judge.test_accuracy > 0.98
    images = torch.stack([test.image(index, 16) for index in range(len(test))])
    assert (judge(images) == test.labels).double().mean().item() == pytest.approx(judge.test_accuracy)
