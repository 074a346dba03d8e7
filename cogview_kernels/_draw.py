# SPDX-License-Identifier: Apache-2.0
"""Tokens drawn on the CPU, for the model package alone: from logits by one call, and whole steps by one.

PyTorch takes a dozen calls to draw a token, and a dozen for what else surrounds the layers of a step: as long
as the layers of a small model take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cogview_kernels import _extension
from cogview_kernels._attention import with_rows
from cogview_kernels._checks import PLAIN
from cogview_kernels._norms import rows as shared
from cogview_kernels._norms.rows import NormOptions
from cogview_kernels._torch_ops import is_watched
from cogview_kernels.decode_step.stack import LayerStack

_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))


class Drawing(NamedTuple):
    """How tokens of B rows are drawn from logits: as ``choose`` in ``cogview/generation/sampling.py`` does
    without top-p."""

    seeds: Tensor  # int64 [B], contiguous
    first: int  # is added to the positions
    temperature: float  # at least 0, which takes the likeliest
    top_k: int  # 0 keeps all
    total: Tensor | None = None  # float32 []: the sum of the logits is added to it


def can_draw(logits: Tensor) -> bool:
    """Whether :func:`draw_tokens` takes these; it has no derivative."""
    if _extension.native is None or not logits.is_cpu or logits.numel() == 0 or is_watched():
        return False
    is_plain = type(logits) in PLAIN and logits.dtype in _DTYPES and logits.is_contiguous()
    return is_plain and not logits.requires_grad


def draw_tokens(logits: Tensor, positions: Tensor, drawing: Drawing) -> Tensor:
    """One token for each row of ``[B, T, V]`` at positions ``[B, T]``, int64 ``[B, T]``.

    As PyTorch draws it but where two tokens arrive at the same time up to a rounding.
    """
    drawn = torch.empty_like(positions, memory_format=torch.contiguous_format)
    _extension.call("draw_tokens", "cpu", logits, positions.contiguous(), drawn, drawing)
    return drawn


class Rows(NamedTuple):
    """B rows of which each has a token that is drawn and not read yet. All change in place."""

    last: Tensor  # int64 [B, 1]: these tokens; replaced by the next ones
    tokens: Tensor  # int64 [B, W]: where the next ones are put
    done: Tensor  # int64 [B, 1]: at which place, and the position of their noise; one more afterwards


class Embedding(NamedTuple):
    """A token's embedding is the sum of a row of ``words`` and a row of ``positions``."""

    words: Tensor  # [.., C]
    positions: Tensor  # [.., C]
    restart: Tensor | None  # int64 [B, 1]: from which place on the positions of a row begin at 0 again


def whole_step(
    rows: Rows,
    embedding: Embedding,
    stack: LayerStack,
    head: Tensor,
    cache: Tensor,
    lengths: Tensor,
    drawing: Drawing,
) -> Callable[[], None] | None:
    """What does a step when called: each row's last token goes through the layers, and the next is drawn.

    None where these tensors are not what the kernel takes. The dtype of ``embedding``, ``head`` and ``cache``
    is that of ``stack``, which takes B rows.

    Args:
        head, cache, lengths: as of :func:`cogview_kernels.decode_step`; lengths are int64, and one more
            afterwards.
    """
    given = (*rows, *embedding, cache, lengths)
    if not all(x is None or (type(x) in PLAIN and x.is_cpu and x.is_contiguous()) for x in given):
        return None
    if with_rows(head) is not head or type(head) not in PLAIN or is_watched():
        return None
    options = shared.options(NormOptions(stack.eps, stack.pb_relax))
    run, threads = _extension.native.draw_step_cpu, torch.get_num_threads
    arguments = (rows, embedding, head, stack.handle, cache, lengths, options, drawing)
    return lambda: run(*arguments, threads())
