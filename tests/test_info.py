# SPDX-License-Identifier: Apache-2.0
"""``python -m cogview_kernels.info`` on machines that are not here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cogview_kernels import _backends, _device, _extension, info


@pytest.fixture
def gpu(monkeypatch):
    """``gpu(name, capability)``: pretends that there is one NVIDIA GPU, and no Triton interpreter."""

    def pretend(name, capability):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(_device, "properties", lambda device: _device.Properties(name, capability, 80))
        monkeypatch.setattr(_backends, "TRITON_INTERPRETED", False)
        native = SimpleNamespace(isa=lambda: "avx2", parallel_runtime=lambda: "openmp")
        monkeypatch.setattr(_extension, "native", native)

    return pretend


def lines_of(device):
    report = info.describe()
    return report[report.index(f"\n{device} (") :].splitlines()[1:]


def test_a_v100_is_told_what_to_install(gpu, monkeypatch):
    gpu("Tesla V100-SXM2-32GB", (7, 0))
    monkeypatch.setattr(_extension, "has_cuda", True)
    report = "\n".join(lines_of("cuda:0"))
    assert "Tesla V100-SXM2-32GB, compute capability 7.0" in report
    assert "triton     no: triton has no matrix units below compute capability 8.0" in report
    assert "cuda       yes" in report
    for needed in ("PyTorch 2.10 (CUDA 12.8)", "CUDA 12.6", "R570 to\n  R580", "COGVIEW_CUDA_ARCHS=70"):
        assert needed in report


@pytest.mark.parametrize(("name", "capability"), [("Tesla T4", (7, 5)), ("NVIDIA H200", (9, 0))])
def test_other_gpus_are_not_bothered_with_volta(name, capability, gpu, monkeypatch):
    gpu(name, capability)
    monkeypatch.setattr(_extension, "has_cuda", False)
    report = "\n".join(lines_of("cuda:0"))
    assert name in report and "Volta" not in report
    assert "cuda       no: the extension was built without its CUDA part" in report


def test_every_backend_is_listed_with_a_reason_or_yes():
    assert [line.split()[0] for line in lines_of("cpu")[1:]] == list(_backends.BACKENDS)
    assert all(line.split()[1] in ("yes", "no:") for line in lines_of("cpu")[1:])


@pytest.mark.parametrize(
    ("value", "on"),
    [("1", True), ("True", True), ("yes", True), ("0", False), ("false", False), ("", False)],
)
def test_switches_are_read_as_triton_reads_its_own(value, on, monkeypatch):
    monkeypatch.setenv("COGVIEW_KERNELS_TRACE", value)
    assert _backends.is_switched_on("COGVIEW_KERNELS_TRACE") == on
    monkeypatch.delenv("COGVIEW_KERNELS_TRACE")
    assert not _backends.is_switched_on("COGVIEW_KERNELS_TRACE")
