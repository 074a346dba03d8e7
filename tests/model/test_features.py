# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0: the published network, frozen, for pictures of any size."""

from __future__ import annotations

import pytest
import torch

from cogview.perception.efficientnet import EfficientNetLite0Features


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0Features:
    return EfficientNetLite0Features()


def a_picture(side: int = 224) -> torch.Tensor:
    """Slanted waves of three colours."""
    position = torch.arange(side, dtype=torch.float32) * (224 / side)
    waves = [torch.sin(position[:, None] / a + position[None] / b) for a, b in ((9, 17), (23, 5), (41, 31))]
    return (torch.stack(waves)[None] + 1) / 2


def test_the_features_are_those_of_the_published_network(network):
    # From the package efficientnet-lite-pytorch 0.1.0 with the same weights and ((255 * x) - 127) / 128.
    features = network(a_picture())
    assert features.shape == (1, network.width)
    largest = features[0].topk(4)
    assert largest.indices.tolist() == [897, 600, 949, 661]
    torch.testing.assert_close(
        largest.values, torch.tensor([5.8355, 5.4616, 4.8515, 4.5117]), atol=2e-3, rtol=0
    )
    assert features.mean().item() == pytest.approx(0.170908, abs=1e-4)
    assert network.class_logits(features).argmax().item() == 906


def test_eight_bits_and_floats_are_the_same_picture(network):
    bits = (a_picture(40) * 255).round().to(torch.uint8)
    torch.testing.assert_close(network(bits), network(bits.float() / 255))


def test_the_network_is_frozen_and_stays_in_eval_mode(network):
    network.train()
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 3, 0, 8)])
def test_what_is_no_batch_of_pictures_is_refused(network, shape):
    with pytest.raises(ValueError, match=r"images must be \[N, 3, H, W\]"):
        network(torch.zeros(shape))


def test_a_file_of_another_network_is_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"other.pth does not hold this model"):
        EfficientNetLite0Features(path)
