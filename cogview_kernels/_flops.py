# SPDX-License-Identifier: Apache-2.0
"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for an op: the matrix products that it does.

By PyTorch's own convention a norm or a softmax counts nothing, a sparse attention is counted by what
its kernels compute, and a backward pass of attention counts the scores that it makes anew.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from typing import Any

from torch import Tensor
from torch._subclasses import FakeTensor

_COUNTER = "torch.utils.flop_counter"

# ``formula(arguments by name, outputs)``
Formula = Callable[[dict[str, Any], Any], int]

_formulas: dict[Any, Formula] = {}


def register(packet: Any, formula: Formula) -> None:
    """``packet`` is ``torch.ops.cogview_kernels.<op>``."""
    _formulas[packet] = formula
    if _COUNTER in sys.modules:
        _tell_the_counter(packet, formula)


def values(x: Tensor) -> list[Any] | None:
    """Those of ``x``, for which a GPU is waited for; None where there are none."""
    return None if isinstance(x, FakeTensor) or x.is_meta else x.tolist()


def attention_backward(pairs: int, head_size: int, gradients: tuple[Tensor, Tensor, Tensor]) -> int:
    """For so many pairs of a query and a key, and the gradients of q, k and v, empty where none is made."""
    dq, dk, dv = (x.numel() > 0 for x in gradients)
    # Scores anew, then the gradient of the probabilities, if it is needed, and those of the inputs.
    return 2 * pairs * head_size * (1 + (dq or dk) + dq + dk + dv)


def _tell_the_counter(packet: Any, formula: Formula) -> None:
    from torch.utils.flop_counter import register_flop_formula

    names = [argument.name for argument in packet.default._schema.arguments]

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return formula({**dict(zip(names, args, strict=False)), **kwargs}, out_val)

    register_flop_formula(packet, get_raw=True)(count)


class _WhenImported(MetaPathFinder):
    """Tells the counter of all formulas once somebody imports it. To import it here would import Triton."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module: Any) -> None:
                execute(module)
                for packet, formula in _formulas.items():
                    _tell_the_counter(packet, formula)

            # This one import alone has this loader, and only what it does at its end is added.
            spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())
