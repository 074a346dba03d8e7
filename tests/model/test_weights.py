# SPDX-License-Identifier: Apache-2.0
import pytest

from cogview.weights import load_weights
from tests.model.helpers import small_model


def test_weights_of_another_model_are_one_clear_error():
    model = small_model()
    weights = small_model(num_layers=3).state_dict()
    with pytest.raises(
        ValueError, match=r"file\.x does not hold this model: 0 tensors missing .* 16 unknown"
    ):
        load_weights(model, weights, "file.x")
    weights = small_model(max_positions=30).state_dict()
    with pytest.raises(ValueError, match=r"position_embeddings.weight must be \[40, 64\], got \[30, 64\]"):
        load_weights(model, weights, "file.x")
