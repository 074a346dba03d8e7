# SPDX-License-Identifier: Apache-2.0
"""Tensors into a model, and between the formats of files: safetensors, and the pickles that were released."""

from cogview.weights.loading import load_weights, without_values

__all__ = ["load_weights", "without_values"]
