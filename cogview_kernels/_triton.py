# SPDX-License-Identifier: Apache-2.0
"""What Triton kernels of several ops share. Imported only once a Triton kernel is to run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from cogview_kernels import _backends
from cogview_kernels._dropout import Dropout

# The interpreter's bfloat16 arithmetic is silently wrong, so there every operand is widened right after
# its load; on a GPU the matrix units take 16-bit operands as they are.
INTERPRETED = _backends.TRITON_INTERPRETED
_WIDEN = tl.constexpr(INTERPRETED)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def offset(index, stride):
    """``index * stride`` in 64 bits; every offset that can pass 2^31 goes through here.

    ``index`` has 32 bits, and is negative under a mask alone: unsigned, it costs half the instructions."""
    return tl.cast(tl.cast(index, tl.uint32), tl.int64) * stride


@triton.jit
def load_rows(base_ptr, rows, stride, seen, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """``[rows, BLOCK_D]`` from rows of D contiguous elements; 0 where not ``seen`` and past D.

    16-bit operands of a matrix product stay as they are, but for the interpreter, which gets float32."""
    d = tl.arange(0, BLOCK_D)
    pointers = base_ptr + offset(rows, stride)[:, None] + d[None, :]
    if D == BLOCK_D:
        x = tl.load(pointers, mask=seen[:, None], other=0.0)
    else:
        x = tl.load(pointers, mask=seen[:, None] & (d < D)[None, :], other=0.0)
    if _WIDEN:
        x = x.to(tl.float32)
    return x


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """Float32 rounded to the nearest value of ``dtype``, as float32 still.

    The interpreter's own conversion would truncate to bf16."""
    if dtype == tl.bfloat16 and _WIDEN:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        bits = tl.where(value == value, rounded, bits | 0x400000)
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype).to(tl.float32)


@triton.jit
def store_rounded(pointer, value, mask, dtype: tl.constexpr):
    """Store float32 as ``dtype``, to nearest even."""
    tl.store(pointer, round_to(value, dtype).to(dtype), mask=mask)


@triton.jit
def dropout_rows(seed, c0, c1, c2):
    """The two words of a row for :func:`dropout_keeps`: Philox4x32-10 of (c0, c1, c2, 0), see ``_dropout``,
    each already xored with itself shifted, as :func:`dropout_keeps` would for every element.

    ``seed`` is an integer or a pointer to one; ``c0`` an int32 tensor, the others int32 scalars."""
    if seed.dtype.is_ptr():
        seed = tl.load(seed)
    r0, r1, _, _ = tl.philox(seed, c0, c1, c2, tl.zeros_like(c2))
    return r0 ^ (r0 >> 16), r1 ^ (r1 >> 15)


@triton.jit
def dropout_keeps(r0, r1, columns, keep_threshold):
    """True where an element survives; words of rows (uint32) and columns broadcast against each other."""
    c = columns.to(tl.uint32)
    # A shift of (c ^ r0) is that of c and that of r0: two steps an element fewer, the same bits.
    x = (c ^ (c >> 16) ^ r0) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ r1) * 0x846CA68B
    keep_threshold = keep_threshold.to(tl.uint32)
    # As (x ^ (x >> 16)) >= keep_threshold: the upper halves decide, or they are equal, and then x >> 16 is
    # keep_threshold >> 16.
    return (x ^ (keep_threshold >> 16)) >= keep_threshold


def dropout_arguments(dropout: Dropout | None) -> tuple[Any, int, float]:
    """Seed (a number, or a tensor where it lies on a GPU), keep_threshold and keep_scale."""
    if dropout is None:
        return 0, 0, 1.0
    seed = dropout.seed if dropout.seed.is_cuda else int(dropout.seed)
    return seed, dropout.keep_threshold, dropout.keep_scale


def precision(x: Tensor) -> str:
    """PRECISION of a kernel's products: PyTorch's own switch decides whether those of float32 use tf32."""
    may = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if may else "ieee"


# ---- launching

Plan = TypeVar("Plan")


class Plans(Generic[Plan]):
    """What was worked out for a call, kept for the next one of the same shapes, strides, dtypes and options.

    ``make(*arguments)`` gives a plan, most often :class:`Launch` objects. The key must hold all that ``make``
    looks at but the memory of tensors. The interpreter gets a new plan each time: tests patch what makes it.
    """

    MOST = 1024

    def __init__(self, make: Callable[..., Plan]) -> None:
        self.make = make
        self.kept: dict[Hashable, Plan] = {}

    def get(self, key: Hashable, *arguments: Any) -> Plan:
        plan = self.kept.get(key)
        if plan is None:
            plan = self.make(*arguments)
            if not INTERPRETED:
                if len(self.kept) >= self.MOST:
                    self.kept.clear()
                self.kept[key] = plan
        return plan


class Launch:
    """A kernel with its grid and all arguments but tensors and the seed, compiled once and then run directly.

    Triton binds and classifies every argument anew at each call, for about 0.4 us each; the compiled kernel
    alone takes a microsecond. The parameters of ``kernel`` come in the order tensors (or None), the seed
    where it has one, ``numbers``, and the compile-time ``constants``. A tensor that does not start at a
    multiple of 16 bytes sends the call Triton's own way, since the kernel is compiled differently for it.
    What changes how Triton compiles (its environment variables) is read at the first call alone.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], numbers: Sequence[Any] = (), **constants: Any
    ) -> None:
        self.kernel, self.grid = kernel, grid
        self.numbers, self.constants = tuple(numbers), constants
        self.rest = (*self.numbers, *(constants[name] for name in kernel.arg_names if name in constants))
        self.blocks = (*grid, 1, 1)[:3]
        # By GPU, on which a kernel is loaded for itself, dtypes and the kind of the seed.
        self.compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __call__(self, *tensors: Tensor | None, seed: Tensor | int | None = None) -> None:
        # Every kernel here takes a tensor first, never None.
        device = tensors[0].get_device()  # type: ignore[union-attr]
        addresses: list[Any] = []
        kinds: list[Any] = [device]
        misaligned = 0
        for x in tensors:
            if x is None:
                addresses.append(None)
                kinds.append(None)
            else:
                address = x.data_ptr()
                misaligned |= address
                addresses.append(address)
                kinds.append(x.dtype)
        if seed is not None:
            kinds.append(_kind(seed))
            addresses.append(seed.data_ptr() if isinstance(seed, Tensor) else seed)
        kind = tuple(kinds)
        compiled = self.compiled.get(kind)
        if compiled is None or misaligned % 16 or _is_watched():
            seeds = () if seed is None else (seed,)
            kernel = self.kernel[self.grid](*tensors, *seeds, *self.numbers, **self.constants)
            if not INTERPRETED and not misaligned % 16:
                stream_of = driver.active.get_current_stream
                self.compiled[kind] = (kernel.run, kernel.function, kernel.packed_metadata, stream_of)
            return
        run, function, metadata, stream_of = compiled
        run(*self.blocks, stream_of(device), function, metadata, None, None, None, *addresses, *self.rest)


def _kind(seed: Tensor | int) -> str:
    """A kernel takes a seed as a pointer, or as an integer of the width that Triton gives it."""
    if isinstance(seed, Tensor):
        return "pointer"
    return "32 bits" if -(2**31) <= seed < 2**31 else "64 bits"


def _is_watched() -> bool:
    """Whether a profiler of Triton's wants to see each launch."""
    hook = knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))
