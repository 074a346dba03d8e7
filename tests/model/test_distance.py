# SPDX-License-Identifier: Apache-2.0
"""Perceptual distances: LPIPS by its formula, EfficientNet-Lite0 where its weights are absent."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cogview.perception.distance import LPIPS, EfficientNetDistance, perceptual_distance

CONVOLUTIONS = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
WIDTHS = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
LOOKED_AT = {2: 0, 7: 1, 14: 2, 21: 3, 28: 4}


def save_weights(folder):
    state, inner = {"classifier.0.weight": torch.zeros(2, 2)}, 3
    for number, outer in zip(CONVOLUTIONS, WIDTHS, strict=True):
        state[f"features.{number}.weight"] = torch.randn(outer, inner, 3, 3) * (2 / (9 * inner)) ** 0.5
        state[f"features.{number}.bias"] = torch.randn(outer) * 0.1
        inner = outer
    linear = {
        f"lin{place}.model.1.weight": torch.rand(1, width, 1, 1)
        for place, width in enumerate((64, 128, 256, 512, 512))
    }
    torch.save(state, folder / "vgg16-397923af.pth")
    torch.save(linear, folder / "vgg.pth")
    return state, linear


def lpips_by_hand(state, linear, first, second):
    """As the paper has it, layer after layer, cell by cell; pictures in [-1, 1], shifted and scaled."""
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    pair, total = [(2 * image - 1 - shift) / scale for image in (first, second)], 0.0
    for number in CONVOLUTIONS:
        if number in (5, 10, 17, 24):
            pair = [F.max_pool2d(x, 2, 2) for x in pair]
        weight, bias = state[f"features.{number}.weight"], state[f"features.{number}.bias"]
        pair = [F.conv2d(x, weight, bias, padding=1).relu() for x in pair]
        if number in LOOKED_AT:
            one, other = (x / (x.norm(dim=1, keepdim=True) + 1e-10) for x in pair)
            weighted = F.conv2d((one - other) ** 2, linear[f"lin{LOOKED_AT[number]}.model.1.weight"])
            total = total + weighted.mean((1, 2, 3))
    return total


def test_lpips_by_its_formula(tmp_path):
    state, linear = save_weights(tmp_path)
    distance = perceptual_distance(str(tmp_path), 256)
    assert isinstance(distance, LPIPS)
    first, second = torch.rand(2, 2, 3, 32, 32)
    torch.testing.assert_close(
        distance(first, second), lpips_by_hand(state, linear, first, second), rtol=1e-3, atol=1e-4
    )
    assert distance(first, first).abs().max() == 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_missing_and_foreign_files_are_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vgg16-397923af\.pth"):
        LPIPS(tmp_path)
    for name in ("vgg16-397923af.pth", "vgg.pth"):
        torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(ValueError, match="does not hold this model"):
        LPIPS(tmp_path)


def test_features_tell_a_blurred_picture_from_itself():
    distance = perceptual_distance("", 32)
    assert isinstance(distance, EfficientNetDistance)
    sharp = torch.rand(1, 3, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3).requires_grad_()
    slightly, strongly = (
        F.avg_pool2d(sharp.detach(), size, 1, size // 2, count_include_pad=False) for size in (3, 9)
    )
    near, far = distance(sharp, slightly), distance(sharp, strongly)
    assert 0 < near.item() < far.item() <= 2
    near.sum().backward()
    assert sharp.grad.isfinite().all() and sharp.grad.abs().sum() > 0
    assert distance(slightly, slightly).item() == 0
