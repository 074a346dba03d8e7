# SPDX-License-Identifier: Apache-2.0
"""``save_pretrained`` and ``from_pretrained``: a model as a folder, or as a repository of the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from torch import nn

from cogview.config import ModelConfig
from cogview.files import load_tensors, save_tensors, write_text
from cogview.settings import build, plain
from cogview.weights import load_weights, without_values

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class HubModel(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="cogview",
    license="apache-2.0",
    paper_url="https://arxiv.org/abs/2105.13290",
    pipeline_tag="text-to-image",
):
    """A model with a ``config``, which it is made of.

    ``model.save_pretrained(folder)`` writes the weights in safetensors, the configuration as JSON and a model
    card. ``CogView.from_pretrained(folder)`` reads them, in evaluation mode and in float32, from a local
    folder or by the name of a repository. Nothing is unpickled, and a file with other tensors than the
    configuration's is a ValueError: nothing is left as it was initialised.
    """

    config: ModelConfig

    def _save_pretrained(self, save_directory: Path) -> None:
        save_tensors(save_directory / WEIGHTS, self.state_dict())
        write_text(save_directory / CONFIG, json.dumps(plain(self.config), indent=2))

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        config: dict[str, Any] | ModelConfig | None = None,
        map_location: str = "cpu",
        **where: Any,
    ) -> HubModel:
        if config is None:
            raise FileNotFoundError(f"{model_id} holds no {CONFIG}; save_pretrained writes one")
        folder = Path(model_id)
        path = folder / WEIGHTS if folder.is_dir() else Path(hf_hub_download(model_id, WEIGHTS, **where))
        tensors = load_tensors(path)
        with without_values():
            model = cls(config if isinstance(config, ModelConfig) else build(ModelConfig, config))
        load_weights(model, tensors, path)
        return model.to(map_location).eval()
