# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import pytest

from cogview.weights import load_weights, without_values
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


def test_a_model_without_values_has_the_shapes_of_one_with_them():
    with without_values():
        empty = small_model()
    whole = small_model().state_dict()
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    load_weights(empty, whole, "file.x")
    assert all(tensor.equal(whole[name]) for name, tensor in empty.state_dict().items())


def test_a_run_is_loaded_without_pytorchs_compiler():
    """Its import takes a second."""
    program = "import sys, torch; known = set(sys.modules); import cogview; cogview.load_run(device='cpu'); "
    program += "print(*(set(sys.modules) - known))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "cogview.run" in done.stdout.split() and "torch._dynamo" not in done.stdout.split()
