# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, told to compute as a GPU does and to prepare its language once a launch.

Each function works until the test ends. None changes which operations a kernel asks for.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest


def compute_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """``tl.fma`` rounds once, as on a GPU; the interpreter's own rounds the product, too.

    ``tl.dot`` sums in float64, then rounds to the dtype of its accumulator. On some processors OpenBLAS sums
    ``a @ b.T`` and ``b @ a.T`` in different orders. A GPU does not, and the backward of attention, which
    computes the forward's scores again, transposed, relies on it.

    A block that is made of a scalar has the scalar's dtype. In Triton 3.9 that of a comparison was the dtype
    of what it compared, so that a mask became integers, which no load takes.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def rounded_once(self, x, y, z):
        # Float64 holds the product of two float32 exactly.
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    def in_float64(self, a, b, d, *options):
        product = np.matmul(a.data, b.data, dtype=np.float64)
        return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    splat = InterpreterBuilder.create_splat

    def splat_as_typed(self, block_type, scalar):
        return splat(self, block_type, TensorHandle(scalar.data, block_type.scalar))

    monkeypatch.setattr(InterpreterBuilder, "create_splat", splat_as_typed)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", in_float64)
    monkeypatch.setattr(InterpreterBuilder, "create_fma", rounded_once)


def prepare_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the interpreter's time goes into work that it repeats at each call of a function in a kernel.

    The interpreter replaces the builtins of ``triton.language`` for a launch, and then searches both of its
    modules for builtins again whenever the kernel calls another function, although none are left to replace.
    It also builds the table of NumPy's dtypes at each use.
    """
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # in older releases nothing says when a launch ends
        return
    patch, launches = interpreter._patch_lang, []
    # A kernel may see one of the modules and the functions that it calls the other.
    sees_both = SimpleNamespace(__globals__={"tl": language, "core": language.core})

    def patch_for_a_launch(fn: Any) -> Any:
        if launches:
            return None
        scope = patch(sees_both)
        launches.append(scope)
        restore = scope.restore

        def end() -> None:
            launches.clear()
            restore()

        scope.restore = end
        return scope

    of_scalars = functools.cache(interpreter._get_np_dtype)
    pointer = np.dtype(np.uint64)
    monkeypatch.setattr(interpreter, "_patch_lang", patch_for_a_launch)
    monkeypatch.setattr(
        interpreter, "_get_np_dtype", lambda x: pointer if x.scalar.is_ptr() else of_scalars(x.scalar)
    )


def check_no_overflow_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter computes whether each sum and product of integers fits, and throws the answer away.

    Triton asserts it in kernels that are compiled with ``debug``, which the interpreter never sets.
    """
    from triton.runtime.interpreter import interpreter_builder

    options = interpreter_builder.options
    assert not options.debug
    monkeypatch.setattr(interpreter_builder, "options", dataclasses.replace(options, sanitize_overflow=False))


def make_shapes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A type of blocks and what a tensor says of its shape are made once for each shape, not at each use."""
    from triton.language import core

    make_type, types = core.block_type.__init__, {}

    def make_block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(shape.values if isinstance(shape, core.tuple) else shape)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = self.__dict__
        self.__dict__.update(types[key])

    @functools.cache
    def told_of(shape: tuple[int, ...]) -> dict[str, Any]:
        sizes = core.tuple([core.constexpr(size) for size in shape])
        return {"shape": sizes, "numel": core.constexpr(math.prod(shape))}

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.__dict__.update(told_of(tuple(type.shape.values) if type.is_block() else ()))

    monkeypatch.setattr(core.block_type, "__init__", make_block_type)
    monkeypatch.setattr(core.tensor, "__init__", make_tensor)
