# SPDX-License-Identifier: Apache-2.0
"""The public function: meaning, validation, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels import _backends, _checks
from cogview_kernels._attention import check_layout, check_lengths, check_pivots_of_cache
from cogview_kernels.decode_step.op import backend_module, decode_step_op
from cogview_kernels.decode_step.reference import decode_step_reference
from cogview_kernels.decode_step.stack import LayerStack, LayerWeights, WeightAndBias
from cogview_kernels.layout import ThreeRegionLayout

_OP = "decode_step"
_BACKENDS = ("cpu", "reference")
_PB_RELAX = (None, "row", "tensor")


def _limit(backend: str, x: Tensor, stack: LayerStack, cache: Tensor) -> str:
    if backend == "reference":
        return ""
    return backend_module(backend).limit(backend, x.shape[0] * x.shape[1], cache.shape[5], stack.tensors)


def decode_step(
    x: Tensor,
    stack: LayerStack,
    cache: Tensor,
    lengths: Tensor,
    *,
    layout: ThreeRegionLayout | None = None,
    head: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """All layers of a decoding step: new tokens through a transformer with Sandwich-LN and a cache.

    Per layer, with ``LN`` short for ``F.layer_norm`` with the weights of :class:`LayerWeights`::

        q, k, v = linear(LN_attention_pre(x), qkv)
        keys[b, :, lengths[b] : lengths[b] + T] = k[b]        # values likewise
        x = x + LN_attention_post(linear(decode_attention(q, keys, values, lengths + T), attention_out))
        x = x + LN_mlp_post(linear(gelu_tanh(linear(LN_mlp_pre(x), mlp_up)), mlp_down))

    and ``LN_final(x)`` is returned, or ``linear(LN_final(x), head)``. The kernel calls those of
    :func:`cogview_kernels.decode_linear`, :func:`cogview_kernels.decode_attention` and
    :func:`cogview_kernels.sandwich_layer_norm` one after the other, with the rounding that they have, so the
    result is that of calling them. What it saves is the host's time between them, which is most of a step of
    a small model.

    Args:
        x: ``[B, T, C]``, the embeddings of T new tokens of each row; float32, float16, bfloat16 or float64.
        stack: at least one layer; dtype and device of ``x`` throughout, also under autocast.
        cache: ``[L, 2, B, H, S, D]``, contiguous, keys and values of each layer, C = H D. Written in place.
        lengths: int32 or int64 ``[B]``: tokens cached so far, in ``[0, S - T]``. It is not changed: add T.
        layout: a causal :class:`ThreeRegionLayout`: only the keys that it allows are seen, in every layer.
        head: ``[V, C]``, dtype and device of ``x``: what gives the logits that are wanted.
        backend: "cpu" or "reference"; None takes the best for device and arguments.

    Returns:
        ``[B, T, C]``, or ``[B, T, V]`` with a head; the dtype of ``x``.

    Raises:
        TypeError: a dtype above is not met.
        ValueError: a shape above is not met, devices differ, or on the CPU lengths or pivots are out of
            range.
        NotImplementedError: a derivative is needed: the op has none. A limit of the backend asked for ("cpu":
            no float64, 256 rows, or 64 of bfloat16 on a processor with AMX, D up to 256).
        RuntimeError: the named backend cannot run here; the message says why.

    Source: CogView, arXiv:2105.13290, sections 2.4 and 4.1, with keys and values cached.
    """
    if not isinstance(stack, LayerStack):
        raise TypeError(f"{_OP}: stack must be a LayerStack, got {type(stack).__name__}")
    if not isinstance(cache, Tensor):
        raise TypeError(f"{_OP}: cache must be a tensor, got {type(cache).__name__}")
    if torch.is_grad_enabled():
        _refuse_derivatives(x, stack, cache, head)
    pivots, is_causal = getattr(layout, "pivots", layout), getattr(layout, "causal", True)
    regions = pivots, is_causal, type(layout) is ThreeRegionLayout
    options = stack.eps, stack.pb_relax
    inputs = x, head, cache, lengths
    # Of a stack the number is enough: it does not change, and to look at its tensors takes longer than the
    # rest of the host's work.
    signature = _backends.signature(_OP, stack.serial, *inputs, *regions, backend)
    run = decode_step_op.ready(signature)
    if run is not None:
        return run(x, stack, head, cache, lengths, layout)
    chosen = _backends.passed(signature)
    if chosen is None:
        _check(x, stack, cache, lengths, layout)
        _check_head(head, x)
        chosen = _backends.choose(_OP, _BACKENDS, backend, x.device, _limit, x, stack, cache)
        _backends.remember(signature, chosen)
    if chosen == "reference" or x.numel() == 0:  # else the kernel looks at them by itself
        check_pivots_of_cache(_OP, layout, cache.shape[4])
        most = cache.shape[4] - x.shape[1]
        check_lengths(_OP, lengths, most, "the cache's size less the new tokens")
    if chosen == "reference":
        with _checks.no_autocast(x.device):
            return decode_step_reference(x, stack.tensors, head, cache, lengths, layout, *options)
    if chosen == "cpu" and x.numel() > 0:
        decode_step_op.prepare(signature, x, stack, head, cache, lengths, layout)
    call = decode_step_op.for_signature(signature)
    if layout is None:
        return call(x, stack.tensors, head, cache, lengths, None, 1, 1, 0.0, 1, *options, chosen)
    return call(
        x,
        stack.tensors,
        head,
        cache,
        lengths,
        layout.pivots,
        layout.block_size,
        layout.window_blocks,
        float(layout.pivot_bias),
        layout.density,
        *options,
        chosen,
    )


def _refuse_derivatives(*inputs: Tensor | LayerStack | None) -> None:
    if any(getattr(given, "requires_grad", False) for given in inputs):
        raise NotImplementedError(f"{_OP}: there is no derivative; call it inside torch.no_grad()")


def _check(
    x: Tensor, stack: LayerStack, cache: Tensor, lengths: Tensor, layout: ThreeRegionLayout | None
) -> None:
    if not stack.layers:
        raise ValueError(f"{_OP}: stack must have at least one layer, got none")
    _checks.check_float(_OP, "x", x)
    if x.dim() != 3 or x.shape[2] == 0:
        raise ValueError(f"{_OP}: x must have shape [B, T, C] with C of at least 1, got {tuple(x.shape)}")
    B, _, C = x.shape
    _check_beside("cache", cache, x)
    if (
        cache.dim() != 6
        or cache.shape[:3] != (len(stack.layers), 2, B)
        or cache.shape[3] * cache.shape[5] != C
        or cache.shape[4] == 0
    ):
        raise ValueError(
            f"{_OP}: cache must have shape [{len(stack.layers)}, 2, {B}, H, S, D] with H D = {C} to go with "
            f"x and stack, S at least 1, got {tuple(cache.shape)}"
        )
    if not cache.is_contiguous():
        raise ValueError(f"{_OP}: cache must be contiguous, since it is written in place")
    _checks.check_positions(_OP, "lengths", lengths, "x", x)
    _check_stack(stack, x)
    check_layout(_OP, layout, "x", x, causal=True)


def _check_beside(name: str, tensor: Tensor, x: Tensor) -> None:
    _checks.check_float(_OP, name, tensor)
    if tensor.dtype != x.dtype:
        raise TypeError(f"{_OP}: {name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
    _checks.check_same_device(_OP, name, tensor, "x", x)


def _check_head(head: Tensor | None, x: Tensor) -> None:
    if head is None:
        return
    _check_beside("head", head, x)
    if head.dim() != 2 or head.shape[1] != x.shape[2]:
        raise ValueError(
            f"{_OP}: head must have shape [V, {x.shape[2]}] to go with x, got {tuple(head.shape)}"
        )


def _check_stack(stack: LayerStack, x: Tensor) -> None:
    _checks.check_finite_number(_OP, "stack.eps", stack.eps, positive=True)
    _checks.check_choice(_OP, "stack.pb_relax", stack.pb_relax, _PB_RELAX)
    bias = stack.layers[0].mlp_up[1]
    _check_beside("stack.layers[0].mlp_up's bias", bias, x)
    C, F = x.shape[2], bias.numel()
    linear = {"qkv": (3 * C, C), "attention_out": (C, C), "mlp_up": (F, C), "mlp_down": (C, F)}
    parts: dict[str, tuple[WeightAndBias, tuple[int, ...]]] = {"final_norm": (stack.final_norm, (C,))}
    for index, layer in enumerate(stack.layers):
        for name in LayerWeights._fields:
            parts[f"layers[{index}].{name}"] = getattr(layer, name), linear.get(name, (C,))
    for name, ((weight, bias), shape) in parts.items():
        for kind, tensor, expected in (("weight", weight, shape), ("bias", bias, shape[:1])):
            called = f"stack.{name}'s {kind}"
            _check_beside(called, tensor, x)
            if tensor.shape != expected:
                raise ValueError(f"{_OP}: {called} must have shape {expected}, got {tuple(tensor.shape)}")
