# SPDX-License-Identifier: Apache-2.0
"""Named tensors into a model that expects exactly them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cogview.files import StrPath

_DRAWS = frozenset(("normal_", "uniform_", "kaiming_uniform_"))


class _NothingDrawn(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(function, "__name__", "") in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@contextmanager
def without_values() -> Iterator[None]:
    """Models that are made in the block are on the device ``meta``: they have shapes and no values.

    Initial values are not drawn there: on that device PyTorch imports its compiler to draw nothing, which
    takes a second.
    """
    with torch.device("meta"), _NothingDrawn():
        yield


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: StrPath) -> None:
    """Copy tensors into ``model``, whatever their dtype; a wrong name or shape is one ValueError.

    A model on the device ``meta`` takes the tensors themselves, so that no size is given memory unchecked.
    """
    require_tensors_of(model, tensors, source)
    expected = model.state_dict()
    if any(tensor.is_meta for tensor in expected.values()):
        taken = {name: tensors[name].to(tensor.dtype) for name, tensor in expected.items()}
        model.load_state_dict(taken, assign=True)
    else:
        model.load_state_dict(dict(tensors))


def require_tensors_of(model: nn.Module, tensors: Mapping[str, Any], source: StrPath) -> None:
    """ValueError naming ``source`` unless ``tensors`` has the names and the shapes of ``model``.

    Only ``shape`` of each tensor is looked at, and ``model`` may be on the meta device.
    """
    expected = model.state_dict()
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"{source} does not hold this model: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}"
        )
    for name, tensor in expected.items():
        if tuple(tensor.shape) != tuple(tensors[name].shape):
            raise ValueError(
                f"{source}: {name} must be {list(tensor.shape)}, got {list(tensors[name].shape)}; "
                "the configuration differs from that of the file"
            )
