# SPDX-License-Identifier: Apache-2.0
"""The network of the FID, with weights by a formula, against what torch-fidelity's network gave with them."""

from __future__ import annotations

import pytest
import torch

from cogview.evaluation.inception import InceptionFeatures, resize_as_tensorflow
from tests.model.test_features import a_picture


def weights_by_formula(shapes):
    tensors = {}
    for place, (name, tensor) in enumerate(sorted(shapes.items())):
        wave = torch.cos(torch.arange(tensor.numel(), dtype=torch.float64) * (0.7 + 0.01 * place))
        wave = wave.view(tensor.shape)
        if name.endswith("num_batches_tracked"):
            wave = torch.zeros(())
        elif name.endswith("running_var"):
            wave = 1 + 0.5 * wave
        elif name.endswith("bn.weight"):
            wave = 1 + 0.2 * wave
        elif wave.dim() == 1:
            wave = 0.1 * wave
        else:
            wave = wave * (3 / tensor[0].numel()) ** 0.5
        tensors[name] = wave.to(tensor.dtype)
    return tensors


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> InceptionFeatures:
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("cogview.evaluation.inception.read_pickle", lambda path: {})
        patch.setattr("cogview.evaluation.inception.load_weights", lambda *_: None)
        shapes = InceptionFeatures(None).state_dict()
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights_by_formula(shapes), path)
    return InceptionFeatures(path)


def test_features_and_logits_are_those_of_torch_fidelity(network):
    picture = (a_picture(40) * 255).round().to(torch.uint8)
    features = network(picture)
    assert features.shape == (1, 2048)
    largest = features[0].topk(4)
    assert largest.indices.tolist() == [1555, 1567, 1562, 1560]
    torch.testing.assert_close(
        largest.values, torch.tensor([0.4764, 0.4706, 0.4624, 0.4268]), atol=2e-4, rtol=0
    )
    # The last block's pool, which takes the maximum.
    assert features[0, -192:].mean().item() == pytest.approx(0.1186748, rel=1e-4)
    assert features.mean().item() == pytest.approx(0.0569376, rel=1e-4)
    logits = network.class_logits(features)
    assert logits.argmax().item() == 66
    assert logits.max().item() == pytest.approx(0.269798, rel=1e-3)
    torch.testing.assert_close(network(picture.float() / 255), features)


def test_the_network_is_frozen(network):
    network.train()
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_resizing_reads_where_tensorflow_did():
    line = torch.tensor([0.0, 10.0, 20.0, 30.0]).expand(1, 1, 4, 4)
    wide = resize_as_tensorflow(line, 8)
    assert wide[0, 0, 0].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]
    assert resize_as_tensorflow(line.mT, 8)[0, 0, :, 0].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]
    assert resize_as_tensorflow(line, 2)[0, 0, 0].tolist() == [0, 20]
