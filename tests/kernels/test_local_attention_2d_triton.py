# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of local_attention_2d compile to."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.triton_compile import Call, assert_clean, compile_calls, meta


def call(arch, D, dtype, **options):
    q, k, v = (meta(2, 4, 1024, D, dtype=dtype, grad=True) for _ in range(3))
    text = {f"extra_{name}": meta(2, 4, 64, D, dtype=dtype, grad=True) for name in "kv"}
    return Call("local_attention_2d", (q, k, v, (32, 32), (9, 9)), {**text, **options}, arch)


MASKED = {"causal": True, "extra_mask": torch.empty(2, 64, dtype=torch.bool, device="meta")}
DROPOUT = {"dropout_p": 0.1, "seed": 3, **MASKED}


def test_the_largest_head():
    """In 16 bits; float32 takes the compiler a minute."""
    assert_clean(compile_calls([call(90, 256, torch.bfloat16, **MASKED)]))


@pytest.mark.parametrize(
    ("arch", "dtype", "options"), [(80, torch.float16, DROPOUT), (90, torch.bfloat16, {})]
)
def test_compiles_for_sm80_and_sm90(arch, dtype, options):
    """No spills, shared memory within the chip, products that overlap, the matrix unit of the chip in use."""
    reports = compile_calls([call(arch, 64, dtype, **options)])
    assert_clean(reports)
    assert {r.name for r in reports} == {"fwd_kernel", "dq_kernel", "dkv_kernel", "dkv_extra_kernel"}
    for report in reports:
        assert report.matrix_instructions == (["wgmma"] if arch == 90 else ["mma"]), report
