# SPDX-License-Identifier: Apache-2.0
import torch

from cogview.data.digits import TRAINING_PHRASINGS, DigitPairs


def test_digits_are_split_and_the_test_scans_are_no_training_scans():
    train, test = DigitPairs("train"), DigitPairs("test")
    assert (len(train), len(test)) == (1437, 360)
    seen = {tuple(train.image(index, 8)[0].flatten().tolist()) for index in range(len(train))}
    assert not any(tuple(test.image(index, 8)[0].flatten().tolist()) in seen for index in range(len(test)))
    assert len(train.captions(0)) == len(TRAINING_PHRASINGS)
    assert torch.equal(DigitPairs("test").labels, test.labels)


def test_copies_are_near_their_scan_and_keep_its_label():
    plain, copies = DigitPairs("train"), DigitPairs("train", copies=3)
    assert len(copies) == 3 * len(plain)
    for index in (0, 7, 500):
        assert torch.equal(copies.image(3 * index, 16), plain.image(index, 16))
        assert copies.labels[3 * index + 2] == plain.labels[index]
        change = (copies.image(3 * index + 1, 8) - plain.image(index, 8)).abs().mean()
        assert 0 < change < 0.25
