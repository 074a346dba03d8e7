# SPDX-License-Identifier: Apache-2.0
"""A step of drawing by one call of a kernel is the step by many, to the bit."""

from __future__ import annotations

import pytest
import torch

from cogview.config import SamplingConfig
from cogview.generation.engine import DrawOptions, Task, _OneByOne, decode, prefill
from cogview.model.decoder import Decoder
from cogview_kernels import _draw, _extension
from tests.model.helpers import small_model

pytestmark = pytest.mark.skipif(_extension.native is None, reason=_extension.missing_reason)

PROMPTS = [[1, 2], [3, 4, 5, 6, 7], [8, 9, 10]]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOP_5 = SamplingConfig(top_k=5)


def begun(prompts=PROMPTS, new=6, dtype=torch.float32, sampling=TOP_5, restart=None, **task):
    """What draws ``new`` tokens, after the first."""
    model = small_model(scale=5.0).to(dtype)
    rows = prefill(model, prompts, new, restart=restart)
    loop = _OneByOne(model, rows, Task([range(16)], new, range(len(prompts)), **task), DrawOptions(sampling))
    with torch.no_grad():
        loop.start()
    return loop


def state(loop):
    return loop.last, loop.tokens, loop.done, loop.total, loop.cache.lengths, loop.cache.buffer


def check(**options):
    by_one, by_many = begun(**options), begun(**options)
    step = by_one.next_step()
    assert step != by_one.advance
    for _ in range(by_one.task.num_tokens - 1):
        step()
        with torch.no_grad():
            by_many.advance()
        for found, expected in zip(state(by_one), state(by_many), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_step_by_many_calls_to_the_bit(dtype, temperature):
    check(dtype=dtype, sampling=SamplingConfig(temperature=temperature, top_k=5))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512bf16", "amx"])
def test_every_instruction_set(isa, instruction_set):
    instruction_set(isa)
    check(first=3)
    check(prompts=[[n, n + 1] for n in range(20)], dtype=torch.bfloat16)


def test_positions_begin_again_at_the_restart():
    check(prompts=[[1, 2, 3], [2, 3, 4, 5], [3, 1]], restart=3)


def test_many_rows_on_several_threads():
    check(prompts=[[n % 40, n // 40] for n in range(70)])


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("last", 128, r"a token must lie in \[0, 128\), got 128"),
        ("last", -1, r"a token must lie in \[0, 128\), got -1"),
        ("done", 6, r"the place of a token must lie in \[0, 6\), got 6"),
        ("lengths", 40, r"a position must lie in \[0, 40\), got 40"),
    ],
)
def test_what_is_not_there_is_an_error_and_nothing_is_written(what, value, message):
    loop = begun()
    step = loop.next_step()
    {"last": loop.last, "done": loop.done, "lengths": loop.cache.lengths}[what].view(-1)[2] = value
    before = [x.clone() for x in state(loop)]
    with pytest.raises(IndexError, match=message):
        step()
    assert all(map(torch.equal, state(loop), before))


def test_a_full_cache_is_an_error_and_nothing_is_written():
    loop = begun()
    step = loop.next_step()
    loop.cache.lengths[0] = 11
    before = [x.clone() for x in state(loop)]
    with pytest.raises(ValueError, match=r"lengths must lie in \[0, 10\]"):
        step()
    assert all(map(torch.equal, state(loop), before))


def test_which_draws_take_it(monkeypatch):
    assert begun().next_step() != begun().advance
    kept = torch.full((3, 6), -1)
    for options in ({"sampling": SamplingConfig(top_p=0.9)}, {"given": kept}, {"dtype": torch.float64}):
        loop = begun(**options)
        assert loop.next_step() == loop.advance
    with torch.profiler.profile():  # which is to see the ops
        loop = begun()
        assert loop.next_step() == loop.advance
    asked = []
    monkeypatch.setattr(Decoder, "whole_step", lambda *_: asked.append(1))
    model, prompts = small_model(), [[1, 2], [3]]
    for options, task in (
        (DrawOptions(parallel=3), Task([range(16)], 5, [1, 2])),
        (DrawOptions(SamplingConfig(guidance=2.0)), Task([range(16)], 5, [1])),
        (DrawOptions(), Task([range(16), range(20, 24)], 5, [1, 2])),
    ):
        decode(model, prefill(model, prompts, 5, spare=options.parallel - 1), task, options)
    assert not asked
    decode(model, prefill(model, prompts, 5), Task([range(16)], 5, [1, 2]), DrawOptions())
    assert asked


def test_a_model_of_which_a_layer_is_not_its_own_takes_its_modules():
    model = small_model()
    model.transformer.layers[0].register_forward_hook(lambda *_: None)
    loop = _OneByOne(model, prefill(model, [[1]], 3), Task([range(16)], 3, [1]), DrawOptions())
    with torch.no_grad():
        loop.start()
    assert loop.next_step() == loop.advance


def test_tensors_that_are_not_contiguous_are_not_taken():
    loop = begun()
    drawing = _draw.Drawing(torch.arange(3), 0, 1.0, 5)
    for change in ("last", "tokens", "done"):
        rows = {"last": loop.last, "tokens": loop.tokens, "done": loop.done}
        rows[change] = rows[change].repeat(1, 2)[:, ::2]
        assert loop.step.whole_step(tuple(rows.values()), loop.cache, loop.heads[0], drawing) is None
