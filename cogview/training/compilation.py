# SPDX-License-Identifier: Apache-2.0
"""Compilation of a model's layers by ``torch.compile``, each by itself.

All layers have one code, so one compilation serves them all. That of the whole model would take as many times
longer as there are layers.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from cogview.model.transformer import CogView


def require_compiler(device: torch.device | str) -> None:
    """ValueError unless there is the compiler that ``torch.compile`` calls to make code for ``device``."""
    # Inductor writes C++ for the CPU. For a GPU, Triton has its launchers compiled.
    on_cpu = torch.device(device).type == "cpu"
    variable, standard = ("CXX", ("g++",)) if on_cpu else ("CC", ("gcc", "clang"))
    named = os.environ.get(variable)
    wanted = (named,) if named else standard
    if not any(map(shutil.which, wanted)):
        raise ValueError(
            f"--compile-layers needs a compiler, and {' or '.join(wanted)} was not found; install one, name "
            f"it in the environment variable {variable}, or leave the option out"
        )


@contextmanager
def compiled_layers(model: CogView) -> Iterator[None]:
    """Within the block, each layer of ``model`` is compiled when it is first called.

    Hooks on a layer are called as ever, and so is nothing inside it: :func:`uncompiled` is for hooks there.
    Dropout draws other masks than it does otherwise.

    Raises:
        ValueError: there is no compiler here.
    """
    require_compiler(model.word_embeddings.weight.device)
    layers = list(model.transformer.layers)
    for layer in layers:
        layer.forward = torch.compile(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def uncompiled() -> AbstractContextManager[object]:
    """Within the block, what is compiled runs as it is written."""
    return torch.compiler.set_stance("force_eager")
