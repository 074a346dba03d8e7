# SPDX-License-Identifier: Apache-2.0
"""Ops under ``torch.ops.cogview_kernels``: how one is registered, and how a call reaches its kernel.

There are three routes, and :class:`Op` alone chooses between them:

- compiling: the registered op, which ``torch.compile`` puts into its graph;
- differentiating, or inside a transform of ``torch.func``: an ``autograd.Function``;
- otherwise: the kernel itself, past the dispatcher where nobody watches.

Registration is by ``define`` + ``impl``, which has half the host time of ``torch.library.custom_op`` and
keeps the names stable for selective checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._C._functorch import peek_interpreter_stack as _transform
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from cogview_kernels import _backends, _flops
from cogview_kernels._checks import PLAIN

_library = torch.library.Library("cogview_kernels", "FRAGMENT")
# Kernels read strides themselves; without the tag, Inductor may hand them other strides than eager did.
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
# What the arguments of an op are, tensors apart: to ask for the type is faster than isinstance(x, Tensor).
_SCALARS = frozenset((int, float, bool, str, torch.dtype, type(None)))


def _has_memory(x: Tensor) -> bool:
    """Whether the memory of ``x`` holds its values; a kernel given another address would crash."""
    return type(x) in PLAIN and (x.is_cpu or x.is_cuda) and not (x.is_neg() or x._is_zerotensor())


def is_watched() -> bool:
    """Whether a mode, a transform, a tracer, the profiler or forward-mode AD must observe the call."""
    return (
        forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or _transform() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def values_are_readable(x: Tensor) -> bool:
    """Whether a check may look at the values of ``x``: on a GPU it would wait, in a tracer there are none."""
    if torch.compiler.is_compiling() or not (x.is_cpu and _has_memory(x)):
        return False
    return torch._C._len_torch_dispatch_stack() == 0 and _transform() is None


class Op:
    """An op of the library, called by its public function with the flat arguments of ``schema``.

    Args:
        schema: of ``torch.library``; begins with the op's name. Outputs that have no gradient come last.
        kernel: runs the op on tensors of the CPU or of a GPU, which it makes the current one.
        fake: gives empty tensors of the shapes, dtypes and strides that ``kernel`` gives.
        save: ``save(context, arguments, outputs)`` gives the tensors that ``backward`` needs, inputs and
            outputs alone, and sets what else it needs on ``context``.
        unsaved: as ``kernel``, on the CPU, but an output that only a backward pass reads is None.
        prepare: gives what :meth:`ready` is to give for calls like one with these arguments, those of
            :meth:`prepare`; None where it would not be so simple.
        backward: ``backward(context, saved, *doutputs)`` gives a gradient or None for each argument; a
            ``doutput`` that nobody brought is None. Without ``backward``, a derivative of the op is a
            NotImplementedError: so are second derivatives, since the ops that backward passes call have none.
        flops: what PyTorch's counter of FLOPs counts for a call; nothing without it, see ``_flops``.
    """

    def __init__(
        self,
        schema: str,
        kernel: Callable[..., Any],
        fake: Callable[..., Any],
        save: Callable[[Any, Sequence[Any], Any], Sequence[Tensor | None]] | None = None,
        backward: Callable[..., Sequence[Any]] | None = None,
        unsaved: Callable[..., Any] | None = None,
        flops: _flops.Formula | None = None,
        prepare: Callable[..., Callable[..., Any] | None] | None = None,
    ) -> None:
        self.name = schema[: schema.index("(")]
        self.kernel = kernel
        self._unsaved = unsaved or kernel
        self._prepare = prepare
        self._ready: dict[bytes | None, Callable[..., Any] | None] = {}
        _library.define(schema, tags=_TAGS)
        packet = getattr(torch.ops.cogview_kernels, self.name)
        self._overload = packet.default
        self._function = _make_function(self, save, backward)
        self._apply = super(torch.autograd.Function, self._function).apply  # type: ignore[misc]
        self._at_a_level = _of_one_level(self._function)
        _library.impl(self.name, self._on_its_device, "CompositeExplicitAutograd")
        _library.impl(self.name, self._at_the_autograd_key, "Autograd")
        torch.library.register_fake(f"cogview_kernels::{self.name}", fake)
        rule = _call_for_each(self.name, self._overload)
        torch.library.register_vmap(f"cogview_kernels::{self.name}", rule, lib=_library)
        if flops is not None:
            _flops.register(packet, flops)

    def __call__(self, *arguments: Any) -> Any:
        """By the shortest route that is differentiated, traced and transformed as the call needs."""
        return self._route(self.kernel, arguments)

    def ready(self, signature: bytes | None) -> Callable[..., Any] | None:
        """What gives the results of a call of this signature that was prepared: a function of its tensors, as
        the op's ``prepare`` says. None where there is none, or where the call is watched.

        A layer's weights have gone through the caches between two calls of an op: each function on the way
        from Python to the kernel costs microseconds then, and all of them more than a few rows do.
        """
        run = self._ready.get(signature)
        return None if run is None or is_watched() else run

    def prepare(self, signature: bytes | None, *arguments: Any) -> None:
        """Lets calls that look like this one, which the kernel of the CPU takes, be :meth:`ready`."""
        if _backends.is_direct(signature) and self._prepare is not None and signature not in self._ready:
            _backends.keep(self._ready, signature, self._prepare(*arguments))

    def for_signature(self, signature: bytes | None) -> Callable[..., Any]:
        """What to call with arguments of this signature: it leads to the kernel by the shortest way. It may
        give None for an output that only a backward pass reads."""
        # From memory that is no longer in the caches, every function on the way costs microseconds.
        if _backends.is_direct(signature) and not is_watched():
            return self._unsaved
        return self._differentiate if _backends.is_recorded(signature) else self._without_saved

    def _without_saved(self, *arguments: Any) -> Any:
        return self._route(self._unsaved, arguments)

    def _route(self, kernel: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if torch.compiler.is_compiling():
            return self._overload(*arguments)
        # One loop written out: host time is what this function is about.
        differentiable = torch.is_grad_enabled()
        has_memory = on_cpu = True
        for x in arguments:
            kind = type(x)
            if kind is not Tensor and kind is not Parameter:
                if kind in _SCALARS or kind is list:  # what a list holds has been checked by its op
                    continue
                has_memory = False  # of a subclass, or a symbolic number, which only a tracer has
                if not isinstance(x, Tensor):
                    continue
            if differentiable and x.requires_grad:
                return self._differentiate(*arguments)
            if not x.is_cpu:
                on_cpu = False
                has_memory = has_memory and x.is_cuda
            if x.is_neg() or x._is_zerotensor():
                has_memory = False
        if has_memory and not is_watched():
            if on_cpu:
                return kernel(*arguments)
            return self._on_its_device(*arguments)
        if forward_ad._current_level >= 0 or is_transformed():
            return self._differentiate(*arguments)
        return self._dispatch(*arguments)

    def below_autograd(self, *arguments: Any) -> Any:
        """Calls the kernel. The Autograd key would cost 10 us of host time; the dispatcher costs 4, which are
        saved where nobody watches. Not traceable: under ``torch.compile`` the op itself is called."""
        for x in arguments:
            if type(x) not in _SCALARS and not _has_memory(x):
                return self._dispatch(*arguments)
        return self._dispatch(*arguments) if is_watched() else self._on_its_device(*arguments)

    def _differentiate(self, *arguments: Any) -> Any:
        # Function.apply binds its arguments by inspect.signature, for 60 us; _apply is what it calls then.
        return (self._function.apply if is_transformed() else self._apply)(*arguments)

    def _at_the_autograd_key(self, *arguments: Any) -> Any:
        """Of the op called by its name, which torch.func has then given its level: not Function.apply."""
        if _transform() is None:
            return self._apply(*arguments)
        with enable_single_level_autograd_function():
            return self._at_a_level.apply(*arguments)  # type: ignore[attr-defined]

    def _dispatch(self, *arguments: Any) -> Any:
        if any(type(x).__name__ == "DTensor" for x in arguments):
            raise NotImplementedError(
                f"{self.name.removesuffix('_backward')}: a DTensor has no sharding strategy here; let each "
                "rank compute its part, sharded along the batch (attention: or the heads), inside "
                "torch.distributed.tensor.experimental.local_map"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return self._overload(*arguments)

    def _on_its_device(self, *arguments: Any) -> Any:
        """Kernels go to the current device and its stream, which tensors on another GPU are not on."""
        for x in arguments:
            if isinstance(x, Tensor):
                if x.is_cuda and x.get_device() != torch.cuda.current_device():
                    with torch.cuda.device(x.device):
                        return self.kernel(*arguments)
                break
        return self.kernel(*arguments)


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is active that differentiates or maps the ops in it."""
    transform = _transform()
    return transform is not None and transform.key() != TransformType.Functionalize


def _is_batched(x: Tensor) -> bool:
    """Whether ``torch.autograd.grad(is_grads_batched=True)`` maps ``x``; that is not torch.func's vmap."""
    return torch._C._dispatch_keys(x).has(torch._C.DispatchKey.AutogradOther)


class _ToTheDispatcher(TorchDispatchMode):
    """Inside, every op goes through the dispatcher, which calls it for each element of a batched gradient."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def _no_derivative(name: str, kind: str) -> NotImplementedError:
    op = name.removesuffix("_backward")
    kind = "second derivatives" if op != name else kind
    return NotImplementedError(
        f"{op}: its kernels have no {kind}; use backend='reference', which is plain PyTorch"
    )


def _call_for_each(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A rule for ``torch.func.vmap``: one call for each element of the mapped dimension."""

    def element(x: Any, dim: Any, i: int) -> Any:
        if isinstance(dim, (list, tuple)):  # of a list of tensors
            return [element(one, of_one, i) for one, of_one in zip(x, dim, strict=True)]
        return x if dim is None else x.select(dim, i)

    def rule(info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
        if info.batch_size == 0:
            raise NotImplementedError(f"{name}: vmap must map 1 element or more, got 0; skip an empty batch")
        calls = [function(*map(element, arguments, in_dims, repeat(i))) for i in range(info.batch_size)]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(calls[0])

    return rule


def _make_function(
    op: Op,
    save: Callable[[Any, Sequence[Any], Any], Sequence[Tensor | None]] | None,
    backward: Callable[..., Sequence[Any]] | None,
) -> type[torch.autograd.Function]:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            return op.below_autograd(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
            ctx.set_materialize_grads(False)
            if save is not None:
                ctx.save_for_backward(*save(ctx, inputs, output))

        @staticmethod
        def backward(ctx: Any, *doutputs: Tensor | None) -> Any:
            if all(d is None for d in doutputs):
                return (None,) * len(ctx.needs_input_grad)
            if backward is None:
                raise _no_derivative(op.name, "gradient")
            # What a transform of torch.func saved may still be wrapped by it when it has ended.
            saved = unwrap_dead_wrappers(ctx.saved_tensors)
            if any(d is not None and _is_batched(d) for d in doutputs):
                with _ToTheDispatcher():
                    return backward(ctx, saved, *doutputs)
            return backward(ctx, saved, *doutputs)

        @staticmethod
        def jvp(ctx: Any, *_: Any) -> Any:
            raise _no_derivative(op.name, "forward-mode derivative")

        vmap = staticmethod(_call_for_each(op.name, op))

    Function.__name__ = Function.__qualname__ = "".join(word.title() for word in op.name.split("_"))
    return Function


def _of_one_level(function: type[torch.autograd.Function]) -> type[_SingleLevelFunction]:
    """The function for calls at the level of a transform of torch.func, which a Function would enter again.

    PyTorch's stubs do not know its ``apply``.
    """
    parts = {name: vars(function)[name] for name in ("forward", "setup_context", "backward", "jvp")}
    return type(function.__name__, (_SingleLevelFunction,), parts)
