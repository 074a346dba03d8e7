# SPDX-License-Identifier: Apache-2.0
"""Products that Triton's interpreter rounds once with the sum that they enter, as a GPU's compiler may.

A compiler for GPUs is free to turn ``a * b + c`` into one fused multiply-add. A value that two expressions
share is then not the same number in both: where a maximum of rounded products is subtracted from the
products, up to half an ulp of it is left instead of 0. The interpreter rounds each operation by itself, so it
never shows this. ``fuse_products`` makes it fuse wherever it can, through selections as well.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest


def fma32(a: Any, b: Any, c: Any) -> np.ndarray:
    """``a * b + c`` of float32 numbers, rounded once."""
    a, b, c = (np.asarray(x, np.float32).astype(np.float64) for x in (a, b, c))
    with np.errstate(all="ignore"):
        product = a * b  # exact: 48 bits
        total = product + c
        # What the sum in float64 rounded away, exactly. If there is any, the last bit of the sum is made odd,
        # so that rounding to float32 sees on which side of a tie the sum lies.
        back = total - product
        lost = (product - (total - back)) + (c - back)
        even = (total.view(np.int64) & 1) == 0
        nudged = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
        total = np.where(np.isfinite(total) & (lost != 0) & even, nudged, total)
        return total.astype(np.float32)


class _Product(NamedTuple):
    """A value is ``a * b`` rounded, where ``here``."""

    a: np.ndarray
    b: np.ndarray
    here: np.ndarray


def fuse_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, every float32 product that is added or subtracted is fused with that sum."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    original = {
        name: getattr(Builder, f"create_{name}")
        for name in ("fmul", "fadd", "fsub", "select", "expand_dims", "broadcast")
    }

    def product_of(handle: Any) -> _Product | None:
        return handle.attr.get("product")

    def multiply(self, left, right):
        result = original["fmul"](self, left, right)
        if result.data.dtype == np.float32:
            a, b = np.broadcast_arrays(left.data, right.data)
            result.attr["product"] = _Product(a, b, np.ones(a.shape, bool))
        return result

    def add(self, left, right, name="fadd", sign=1):
        result = original[name](self, left, right)
        if result.data.dtype != np.float32:
            return result
        if p := product_of(left):
            result.data = np.where(p.here, fma32(p.a, p.b, sign * right.data), result.data)
        elif p := product_of(right):
            result.data = np.where(p.here, fma32(sign * p.a, p.b, left.data), result.data)
        return result

    def subtract(self, left, right):
        return add(self, left, right, "fsub", -1)

    def select(self, condition, left, right):
        result = original["select"](self, condition, left, right)
        chosen = np.broadcast_to(condition.data, result.data.shape)
        for side, p in ((chosen, product_of(left)), (~chosen, product_of(right))):
            if p is not None:
                result.attr["product"] = _Product(p.a, p.b, p.here & side)
                break
        return result

    def reshape(name, function):
        def reshaped(self, handle, how):
            result = original[name](self, handle, how)
            if p := product_of(handle):
                result.attr["product"] = _Product(*(function(x, how) for x in p))
            return result

        return reshaped

    for name, function in (
        ("fmul", multiply),
        ("fadd", add),
        ("fsub", subtract),
        ("select", select),
        ("expand_dims", reshape("expand_dims", np.expand_dims)),
        ("broadcast", reshape("broadcast", np.broadcast_to)),
    ):
        monkeypatch.setattr(Builder, f"create_{name}", function)
