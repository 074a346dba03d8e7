# SPDX-License-Identifier: Apache-2.0
"""Training in 16 bits: what is rounded, how float16 keeps its range, and where a bad step went wrong.

Weights, their gradients and the optimizer's state are float32 in every precision. Under PyTorch's autocast
the matrix products, attention and what they give to the backward pass are in 16 bits. The trunk that the
branches are added to, the LayerNorms, softmax and the losses stay float32, as they do in any PyTorch model
under autocast. bfloat16 has the range of float32. float16 does not, so its losses are multiplied by the
scale of a ``torch.amp.GradScaler``: half as large after each step that overflowed, twice as large after
2,000 that did not. :mod:`cogview.training.resblock` is another way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from cogview.config import TrainPrecision
from cogview.launch import started_as_first
from cogview_kernels import _device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def _why_not(dtype: torch.dtype, device: torch.device) -> str:
    """Why ``device`` cannot train in ``dtype``; empty if it can."""
    if dtype == torch.float32:
        return ""
    if not torch.amp.is_autocast_available(device.type):
        return f"PyTorch has no autocast for {device.type}"
    if device.type == "cuda" and dtype == torch.bfloat16:
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "" if native else f"{torch.cuda.get_device_name(device)} has no bfloat16; fp16 is what it has"
    with warnings.catch_warnings():
        # PyTorch only warns about a dtype that it does not have there, and computes in float32.
        warnings.simplefilter("ignore")
        with torch.autocast(device.type, dtype):
            enabled = torch.is_autocast_enabled(device.type)
            has_it = enabled and torch.get_autocast_dtype(device.type) == dtype
    return "" if has_it else f"this PyTorch ({torch.__version__}) has no such autocast for {device.type}"


def fast_precision(device: torch.device | str) -> TrainPrecision:
    """``"bf16"`` where ``device`` has matrix units for bfloat16, else ``"fp32"``.

    CPUs with AMX have them, and GPUs from sm_80 on. Other CPUs emulate bfloat16, or multiply vectors of it at
    no more than twice the rate of float32.
    """
    device = torch.device(device)
    # The oldest PyTorch that is taken cannot tell.
    capabilities: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    if device.type == "cpu" and not capabilities().get("amx_bf16", False):
        return "fp32"
    return "fp32" if _why_not(torch.bfloat16, device) else "bf16"


class Precision:
    """The autocast and, for float16, the loss scale of one training.

    Args:
        loss_scaling: False leaves the losses as they are in float16 too, for another way to scale.

    Raises:
        ValueError: no such precision, or the device cannot compute in it.
    """

    def __init__(self, name: str, device: torch.device | str, *, loss_scaling: bool = True) -> None:
        if name not in DTYPES:
            raise ValueError(f"precision must be one of {', '.join(DTYPES)}, got {name!r}")
        self.dtype = DTYPES[name]
        self.device = torch.device(device)
        reason = _why_not(self.dtype, self.device)
        if reason:
            raise ValueError(f"precision {name} cannot be used on {self.device}: {reason}")
        if self.device.type == "cpu" and _device.emulates(self.dtype) and started_as_first():
            # Told from this line wherever it is called from: Python tells a line's warning once.
            warnings.warn(
                f"this processor has no matrix products in {name}, and emulated they take several times as "
                "long; --precision fp32 is faster",
                stacklevel=1,
            )
        self.scaler = torch.amp.GradScaler(self.device.type) if name == "fp16" and loss_scaling else None

    def autocast(self) -> torch.autocast:
        """The forward pass belongs inside, the backward pass outside."""
        enabled = self.dtype != torch.float32
        # A cache would hold the 16-bit copies of all weights until the forward pass ends. Each is used once.
        return torch.autocast(
            self.device.type, self.dtype if enabled else None, enabled=enabled, cache_enabled=False
        )

    def loss_scale(self) -> Tensor | None:
        """The scale of the next step, which stays on its device; None where losses are not scaled."""
        one = torch.ones((), device=self.device)
        return None if self.scaler is None else self.scaler.scale(one)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to scale as this one would, for JSON."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state(self, state: Mapping[str, Any], source: object) -> None:
        """Go on from :meth:`state`. A ValueError that names ``source`` if it is not of this precision."""
        if self.scaler is None:
            return
        has_numbers = all(isinstance(value, (int, float)) for value in state.values())
        if not has_numbers or state.keys() != self.scaler.state_dict().keys():
            raise ValueError(
                f"{source} holds no loss scale of this PyTorch, so it cannot go on in {_NAMES[self.dtype]}; "
                "choose another folder"
            )
        self.scaler.load_state_dict(dict(state))


class NonFiniteWatch:
    """Within the block, finds the first value of a pass through ``model`` that is not finite.

    Looks at the inputs and outputs of every module in the order in which they are computed, at what
    :meth:`look` is given, then at the gradients of all of these and of the parameters. Each look waits for
    the device, so this is for a step that is run once more because it failed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.where = ""  # empty as long as everything is finite
        self._model = model
        self._handles: list[Any] = []

    def look(self, what: str, *values: object) -> None:
        """Remember ``what`` if it is the first whose ``values`` are not all finite."""
        for value in values:
            if self.where or not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            if not value.detach().isfinite().all():
                self.where = what

    def _watch(self, module: nn.Module, name: str) -> None:
        def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.look(f"the input of {name}", *inputs)

        def after(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            self.look(f"the output of {name}", *outputs)
            for value in outputs:
                if isinstance(value, Tensor) and value.requires_grad:
                    self._watch_gradient(value, f"the output of {name}")

        self._handles += [
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after),
        ]

    def _watch_gradient(self, value: Tensor, name: str) -> None:
        self._handles.append(value.register_hook(lambda grad: self.look(f"the gradient of {name}", grad)))

    def __enter__(self) -> NonFiniteWatch:
        for name, module in self._model.named_modules():
            self._watch(module, name or "the model")
        for name, parameter in self._model.named_parameters():
            self._watch_gradient(parameter, name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
