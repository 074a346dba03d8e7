# SPDX-License-Identifier: Apache-2.0
"""The emulation of CUDA finds what it says it finds (its results are judged by every op's own tests)."""

from __future__ import annotations

import pytest
import torch

from tests import emulation
from tests.emulation import probe


@pytest.fixture(autouse=True)
def _defaults():
    yield
    emulation.configure()


def test_rewrites_launches_and_dynamic_shared_memory():
    assert emulation.rewrite("f<T, 4>\n    <<<grid, n, 0, s>>>(a);") == (
        '::emulation::Launch("f<T, 4>", f<T, 4>, grid, n, 0, s)(a);'
    )
    assert emulation.rewrite("extern __shared__ __align__(128) char raw[];") == (
        "char* raw = reinterpret_cast<char*>(::emulation::state.shared);"
    )


@pytest.mark.parametrize("layout", [0, 1, 2])
@pytest.mark.parametrize("order", [0, 5])
def test_product_of_matrices(layout, order):
    emulation.configure(order=order, fragment_layout=layout)
    a, b = torch.randn(16, 16).half(), torch.randn(16, 16).half()
    torch.testing.assert_close(probe.product(a, b), a.float() @ b.float(), atol=1e-3, rtol=1e-3)


def test_fragment_layouts_differ_and_cover_the_matrix():
    places = []
    for layout in (0, 1, 2):
        emulation.configure(fragment_layout=layout)
        places.append(probe.places())
        assert sorted(places[-1].tolist()) == list(range(256))
    assert not torch.equal(places[0], places[1]) and not torch.equal(places[1], places[2])


def test_faults_are_named():
    x = emulation.guarded(torch.zeros(100))
    probe.write(x, 99)
    assert float(x[99]) == 1
    for index in (100, 1100):
        with pytest.raises(RuntimeError, match=r"probe_write: access out of bounds .*block 0,0,0 thread 0"):
            probe.write(x, index)
    with pytest.raises(RuntimeError, match="deadlock"):
        probe.miss_a_barrier()
    with pytest.raises(RuntimeError, match="part of the lanes"):
        probe.shuffle_half_a_warp()
    with pytest.raises(RuntimeError, match="not aligned to 256 bits"):
        probe.misaligned()


def test_shared_memory_ends_where_it_should_and_begins_as_nan():
    assert torch.isnan(probe.fresh_shared(64)).all()
    with pytest.raises(RuntimeError, match="out of bounds"):
        probe.shared_past_the_end()


def test_a_race_shows_in_another_order():
    emulation.configure()
    first = probe.race()
    emulation.configure(order=3)
    assert not torch.equal(first, probe.race())
