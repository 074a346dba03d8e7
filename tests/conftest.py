# SPDX-License-Identifier: Apache-2.0
"""Seeds, devices, backends, and fresh memory filled with NaN.

Without an NVIDIA GPU the Triton kernels run in Triton's interpreter, which must be chosen before Triton is
imported, and the CUDA kernels in an emulation on the host (tests/emulation). With one (``make gpu-check``)
the same tests run on it: the ``device`` fixture is "cuda".
"""

from __future__ import annotations

import gc
import importlib.util
import os
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Workers of pytest-xdist share the cores; libraries read this when they are loaded.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

# Below, because they read TRITON_INTERPRET when they are imported.
import cogview_kernels  # noqa: E402
from cogview_kernels import _backends, _extension  # noqa: E402
from tests import emulation as cuda_emulation  # noqa: E402
from tests.helpers import interpreter, tolerance  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]

# `make sanitize`: were the package of the checkout imported, nothing would be watched, and nobody would know.
if "asan" in os.environ.get("LD_PRELOAD", ""):
    assert "sanitize" in Path(cogview_kernels.__file__).parts and not _extension.missing_reason


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seeds", type=int, default=1, help="run every test with so many seeds; report the smallest margins"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if (seeds := metafunc.config.getoption("seeds")) > 1:
        metafunc.parametrize("_seed", range(seeds), indirect=True, ids="seed{}".format)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.getoption("seeds") == 1:
        return
    tests = (r for key in ("passed", "failed") for r in terminalreporter.stats.get(key, ()))
    closest = sorted((dict(r.user_properties).get("share of the error budget", 0), r.nodeid) for r in tests)
    terminalreporter.section("largest shares of the error budget")
    for share, name in closest[:-21:-1]:
        terminalreporter.write_line(f"{share:.2f} {name}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_collection_finish() -> None:
    """Modules and tests live to the end, so no search for garbage goes through them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(getattr(request, "param", 0))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    tolerance.shares.clear()
    try:
        return (yield)
    finally:
        item.user_properties.append(("share of the error budget", max(tolerance.shares, default=0)))


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(request: pytest.FixtureRequest):
    """Kernel tests: ``torch.empty`` gives NaN, so an element that no one writes is seen."""
    if "kernels" not in request.path.parts:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> torch.device:
    """Where kernels are tested: the GPU if there is one."""
    return torch.device("cuda" if HAS_GPU else "cpu")


def _interpreter_is_broken() -> str:
    """Triton 3.6 and older turn one-element arrays into loop bounds in a way that NumPy 2.4 forbids."""
    if HAS_GPU or importlib.util.find_spec("triton") is None:
        return ""
    release = {name: tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy")}
    if release["triton"] >= (3, 7) or release["numpy"] < (2, 4):
        return ""
    return f"the interpreter of Triton {version('triton')} needs numpy<2.4, here is {version('numpy')}"


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if HAS_GPU or importlib.util.find_spec("triton") is None:
        return
    interpreter.compute_as_a_gpu(monkeypatch)
    interpreter.prepare_once_a_launch(monkeypatch)
    interpreter.check_no_overflow_in_vain(monkeypatch)
    interpreter.make_shapes_once(monkeypatch)


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch):
    """Until the test ends ``backend="cuda"`` serves CPU tensors, by emulation; gives tests.emulation."""
    monkeypatch.setattr(_extension, "native", cuda_emulation.emulated_cuda())
    monkeypatch.setattr(_extension, "has_cuda", True)
    why_not = _backends.why_not
    monkeypatch.setattr(_backends, "why_not", lambda b, d: "" if b == "cuda" else why_not(b, d))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0))
    cuda_emulation.configure()
    return cuda_emulation


@pytest.fixture
def backend_device(request: pytest.FixtureRequest):
    """``backend_device(name)``: the device on which that backend runs here; skips with the reason if none."""

    def find(backend: str) -> torch.device:
        if backend == "cuda" and not HAS_GPU:
            request.getfixturevalue("emulation")
            return torch.device("cpu")
        reasons = []
        if backend == "triton" and (broken := _interpreter_is_broken()):
            pytest.skip(broken)
        for name in ("cuda", "cpu") if HAS_GPU else ("cpu",):
            if not (reason := _backends.why_not(backend, torch.device(name))):
                return torch.device(name)
            reasons.append(reason)
        pytest.skip(f"{backend}: {'; '.join(reasons)}")

    return find


@pytest.fixture
def instruction_set():
    """``instruction_set(name)`` switches to it, or skips where the processor lacks it."""
    if _extension.native is None:
        pytest.skip(_extension.missing_reason)
    best = _extension.native.isa()

    def switch(name):
        try:
            _extension.native.set_isa(name)
        except ValueError as error:
            pytest.skip(str(error))
        assert _extension.native.isa() == name

    yield switch
    _extension.native.set_isa(best)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Files too large or not ours to commit; a test that needs one skips where it is absent."""
    return Path(os.environ.get("COGVIEW_TEST_DATA", ROOT.parent / "shared" / "data"))
