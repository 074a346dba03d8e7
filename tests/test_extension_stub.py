# SPDX-License-Identifier: Apache-2.0
"""``cogview_kernels/_C.pyi`` says of every compiled function what the module itself says."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable
from pathlib import Path

import pytest

import cogview_kernels
from cogview_kernels import _extension
from tests.conftest import HAS_GPU
from tests.emulation import emulated_cuda

STUB = Path(cogview_kernels.__file__).with_name("_C.pyi")


def _plain(node: ast.expr, aliases: dict[str, ast.expr]):
    """A type as "int", "float", "bool", "str" or "None", or a tuple; ``(x, ...)`` has any length."""
    text = ast.unparse(node)
    if text in aliases:
        return _plain(aliases[text], aliases)
    if isinstance(node, ast.Attribute) and "_C" in text.split("."):  # a class of the module's own
        return node.attr
    if isinstance(node, ast.BinOp):  # pybind11: SupportsInt | SupportsIndex
        if text == "Tensor | None":
            return text
        return "float" if "SupportsFloat" in text else "int"
    if isinstance(node, ast.Subscript):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if text.startswith("typing.Annotated"):  # pybind11: Annotated[Sequence[x], "FixedSize(n)"]
            sequence, size = inner
            element = _plain(sequence.slice, aliases)
            return (element,) * int(size.value.removeprefix("FixedSize(").removesuffix(")"))
        if ast.unparse(inner[-1]) == "...":
            return (_plain(inner[0], aliases), ...)
        return tuple(_plain(x, aliases) for x in inner)
    return text


def _agree(stub, module) -> bool:
    if isinstance(stub, tuple) and isinstance(module, tuple):
        if stub[-1] is ...:
            stub = (stub[0],) * len(module)
        return len(stub) == len(module) and all(map(_agree, stub, module))
    return stub == module


def _signature(function: ast.FunctionDef, aliases: dict[str, ast.expr]) -> dict:
    types = {a.arg: _plain(a.annotation, aliases) for a in function.args.args if a.arg != "self"}
    return {**types, "return": _plain(function.returns, aliases)}


def _with_constructors(names: Iterable[tuple[str, object]], is_class, constructor) -> dict[str, object]:
    """Functions by name, and of each class its constructor under the name of the class."""
    return {name: constructor(x) if is_class(x) else x for name, x in names}


def _of_stub() -> dict[str, dict]:
    body = ast.parse(STUB.read_text()).body
    aliases = {n.target.id: n.value for n in body if isinstance(n, ast.AnnAssign) and n.value is not None}
    named = [(n.name, n) for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    functions = _with_constructors(named, lambda n: isinstance(n, ast.ClassDef), lambda n: n.body[-1])
    return {name: _signature(f, aliases) for name, f in functions.items()}


def _of_module(module) -> dict[str, dict]:
    named = [(name, f) for name, f in vars(module).items() if callable(f)]
    functions = _with_constructors(named, inspect.isclass, lambda c: c.__init__)
    docs = {name: f.__doc__.strip().splitlines()[0] for name, f in functions.items()}
    parsed = {name: ast.parse(f"def {doc}: ...").body[0] for name, doc in docs.items()}
    return {name: _signature(f, {}) for name, f in parsed.items()}


def _check(module) -> set[str]:
    stub, real = _of_stub(), _of_module(module)
    for name, signature in real.items():
        assert name in stub, f"_C.pyi lacks {name}"
        assert list(signature) == list(stub[name]), name
        for argument, kind in signature.items():
            assert _agree(stub[name][argument], kind), f"{name}: {argument} is {kind}"
    return set(stub) - set(real)


def test_stub_and_module_agree():
    if _extension.native is None:
        pytest.skip(_extension.missing_reason)
    missing = _check(_extension.native)
    # Those of Hopper are missing, too, where nvcc compiled for other chips.
    assert not _extension.has_cuda or all(name.endswith("_sm90") for name in missing), missing
    assert all(name.endswith(("_cuda", "_sm90")) for name in missing), missing


@pytest.mark.skipif(HAS_GPU, reason="the extension itself has the CUDA functions")
def test_stub_and_cuda_functions_agree():
    assert not {name for name in _check(emulated_cuda()) if name.endswith(("_cuda", "_sm90"))}
