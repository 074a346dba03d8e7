# SPDX-License-Identifier: Apache-2.0
"""The engine against plain passes over the whole row, and its samples against the exact distribution."""

import contextlib
import itertools
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

from cogview.config import SamplingConfig
from cogview.generation import graph
from cogview.generation.engine import DrawOptions, Task, decode, prefill, score
from cogview.generation.sampling import Noise, choose
from cogview.generation.text_to_image import Request, draw_candidates, generate_codes
from cogview.model.cache import KVCache
from cogview.model.decoder import Decoder
from cogview.seeding import derive_seed
from cogview.tokens.sequence import text_to_image_prompt
from cogview.tokens.vocab import Vocab
from tests.helpers.tolerance import assert_within_budget, judge
from tests.model.helpers import VOCAB, small_model

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
SAMPLING = SamplingConfig(temperature=1.0, top_k=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_steps_equal_one_full_pass_to_the_error_budget(dtype):
    model = small_model(scale=5.0).to(dtype)
    tokens = torch.randint(0, 60, (3, 25))

    @torch.no_grad()
    def cached(model, dtype):
        cache, step = (
            KVCache(num_layers=2, batch=3, num_heads=2, capacity=30, head_size=32, dtype=dtype),
            Decoder(model),
        )
        parts = [step(tokens[:, :7], cache)]
        parts += [step(tokens[:, at : at + 1], cache) for at in range(7, 20)]
        parts.append(step(tokens[:, 20:], cache))  # several new tokens at once
        assert cache.lengths.tolist() == [25, 25, 25]
        return model.logits(torch.cat(parts, dim=1))

    names, parameters = zip(*model.named_parameters(), strict=True)

    @torch.no_grad()
    def full(*given):
        weights = dict(zip(names, given, strict=True))
        logits = functional_call(model, weights, (tokens,)) @ weights["word_embeddings.weight"].t()
        return list(logits.unbind(1))

    truth, eager = judge(full, parameters)
    for at, actual in enumerate(cached(model, dtype).unbind(1)):
        assert_within_budget(actual, eager[at], truth[at], dtype=dtype)
    wide = cached(model.double(), torch.float64)
    torch.testing.assert_close(wide, torch.stack(truth, dim=1))


@pytest.mark.parametrize("prompts", [[[1, 2, 3], [4, 5, 6]], [[1, 2], [3]]])
def test_what_prompts_leave_is_kept_of_their_last_tokens_alone(prompts):
    _, hidden, _ = prefill(small_model(), prompts, 3)
    assert hidden.untyped_storage().nbytes() == hidden.nbytes


def test_prompts_of_different_lengths_share_a_batch_and_like_ones_are_read_once():
    model = small_model(scale=5.0)
    rows = [text_to_image_prompt(VOCAB, prompt, 16) for prompt in PROMPTS]
    rows.append(rows[0])
    seen = []
    handle = model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    cache, hidden, step = prefill(model, rows, 3)
    handle.remove()
    assert seen == [3]
    drawn = torch.tensor([[3], [4], [5], [6]])
    with torch.no_grad():
        second, third = (step(drawn, cache)[:, -1] for _ in range(2))
    for index, row in enumerate(rows):
        with torch.no_grad():
            alone = model(torch.tensor([[*row, *[int(drawn[index])] * 2]]))[0]
        n = len(row)
        for got, want in ((hidden, alone[n - 1]), (second, alone[n]), (third, alone[n + 1])):
            torch.testing.assert_close(got[index], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parallel", [1, 4])
def test_no_tensor_of_the_cache_is_replaced(parallel):
    model = small_model()
    rows = prefill(model, [[1, 2], [3, 4, 5]], 6, spare=parallel - 1)
    before = [tensor.data_ptr() for tensor in (rows.cache.buffer, rows.cache.lengths)]
    decode(model, rows, Task([range(16)], 6, [1, 2]), DrawOptions(SAMPLING, parallel=parallel))
    assert [tensor.data_ptr() for tensor in (rows.cache.buffer, rows.cache.lengths)] == before
    assert rows.cache.lengths.tolist() == [2 + 5, 3 + 5] or parallel > 1
    rows.cache.set_lengths(torch.tensor([4, 6]))
    rows.cache.buffer[:, :, 0] = 1
    rows.cache.reorder(torch.tensor([1, 0]), first=3)
    assert [tensor.data_ptr() for tensor in (rows.cache.buffer, rows.cache.lengths)] == before
    assert rows.cache.lengths.tolist() == [6, 4]
    assert rows.cache.buffer[:, :, 0, :, :3].eq(1).all() and rows.cache.buffer[:, :, 1, :, 3:].eq(1).all()


def test_a_full_cache_is_an_error():
    with pytest.raises(ValueError, match="holds 4 tokens"):
        small_model()(
            torch.zeros(1, 5, dtype=torch.int64),
            cache=KVCache(num_layers=2, batch=1, num_heads=2, capacity=4, head_size=32),
        )
    with pytest.raises(ValueError, match="capacity must be at least 4, got 3"):
        KVCache(num_layers=2, batch=1, num_heads=2, capacity=4, head_size=32).take([0], 3)


@pytest.mark.parametrize("parallel", [1, 3])
def test_samples_have_exactly_the_models_distribution(parallel):
    """All 81 pictures of 2 x 2 codes in a book of 3, enumerated, against 6,000 that were drawn."""
    vocab = Vocab(num_image_codes=3, num_text_pieces=20)
    model = small_model(scale=4.0)
    pictures = torch.tensor(list(itertools.product(range(3), repeat=4)))
    prompt = torch.tensor(text_to_image_prompt(vocab, [1, 2], 4)).expand(81, -1)
    with torch.no_grad():
        hidden = model(torch.cat([prompt, pictures[:, :-1]], dim=1))[:, -4:]
        steps = (model.logits(hidden, 0, 3) / 2.5).log_softmax(-1).gather(2, pictures[..., None])
    expected = 6000 * steps.sum((1, 2)).exp()
    sampling = SamplingConfig(temperature=2.5, top_k=0)  # so that no picture is too rare to be counted
    options = DrawOptions(sampling, seed=11, max_batch=6000, parallel=parallel)
    codes = generate_codes(model, vocab, [[1, 2]], 4, num_candidates=6000, options=options)[0]
    counts = (codes @ torch.tensor([27, 9, 3, 1])).bincount(minlength=81)
    assert expected.sum() == pytest.approx(6000, rel=1e-5) and expected.min() > 2
    assert expected.max() > 8 * expected.min()
    # Chi-square with 80 degrees of freedom: above 124.8 once in a thousand.
    assert ((counts - expected) ** 2 / expected).sum() < 124.8


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("parallel", [2, 5, 40])
def test_several_codes_a_step_give_the_same_pictures_in_fewer_steps(parallel, guidance):
    model = small_model(scale=4.0)
    given = torch.full((16,), -1)
    given[[0, 1, 7]] = torch.tensor([3, 2, 5])
    requests = [Request([1, 2, 3], 5), Request([4], 6, given), Request([5, 6, 7, 8, 9], 7)]
    steps = []
    model.register_forward_pre_hook(lambda *_: steps.append(1))

    def drawn(parallel):
        steps.clear()
        reported = []
        sampling = replace(SAMPLING, guidance=guidance)
        options = DrawOptions(sampling, max_batch=8, parallel=parallel, on_step=reported.append)
        batches = list(draw_candidates(model, VOCAB, requests, 16, 4, options))
        assert sum(reported) == 3 * 4 * 16
        return torch.cat([batch.codes for batch in batches]), len(steps)

    one_by_one, several = drawn(1), drawn(parallel)
    assert torch.equal(one_by_one[0], several[0])
    assert several[1] < one_by_one[1]


def test_guidance_weighs_the_logits_with_text_against_those_without():
    model = small_model(scale=5.0)
    options = DrawOptions(replace(SAMPLING, guidance=3.0))
    requests = [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    (batch,) = draw_candidates(model, VOCAB, requests, 9, 1, options)
    for seed, (pieces, drawn) in enumerate(zip(PROMPTS, batch.codes, strict=True)):
        codes: list[int] = []
        noise = Noise(torch.tensor([derive_seed(seed, 0)]), 9, 16)
        for at in range(9):
            with torch.no_grad():
                with_text, without = (
                    model.logits(model(torch.tensor([text_to_image_prompt(VOCAB, text, 9) + codes])), 0, 16)[
                        :, -1:
                    ]
                    for text in (pieces, [])
                )
            logits = without + 3.0 * (with_text - without)
            codes.append(choose(logits, SAMPLING, noise, torch.tensor([[at]])).item())
        assert drawn.tolist() == codes


def test_a_picture_does_not_depend_on_what_else_is_drawn():
    model = small_model(scale=5.0)

    def drawn(requests, num, max_batch, **options):
        batches = draw_candidates(
            model, VOCAB, requests, 16, num, DrawOptions(SAMPLING, max_batch=max_batch, **options)
        )
        return torch.cat([batch.codes for batch in batches])

    first, second = Request([1, 2, 3], 4), Request([4], -(2**80))
    both = drawn([first, second], 3, 256)
    assert torch.equal(drawn([second, first], 3, 4), torch.cat([both[3:], both[:3]]))
    assert torch.equal(drawn([second], 1, 1), both[3:4])
    assert not torch.equal(drawn([Request([4], 2**80)], 3, 8), both[3:])


def test_given_codes_stay_and_the_others_follow_them():
    model = small_model(scale=5.0)
    whole = generate_codes(model, VOCAB, [[1, 2]], 16, options=DrawOptions(SAMPLING, seed=3))[0, 0]
    given = whole.masked_fill(torch.arange(16) >= 9, -1)
    other = given.clone()
    other[5:9] = (other[5:9] + 3) % 16
    told = []
    requests = [Request([1, 2], 3, given), Request([1, 2], 3, other), Request([1, 2], 3)]
    (batch,) = draw_candidates(
        model, VOCAB, requests, 16, 1, DrawOptions(SAMPLING), lambda batch: told.append(batch.codes.clone())
    )
    # What is given as it would have been drawn changes nothing.
    assert torch.equal(batch.codes[0], whole) and torch.equal(batch.codes[2], whole)
    assert torch.equal(batch.codes[1][:9], other[:9])
    assert not torch.equal(batch.codes[1][9:], whole[9:])
    assert [int((codes[2] >= 0).sum()) for codes in told] == list(range(1, 17))
    assert torch.equal(told[0][0, :9], given[:9])
    (alone,) = draw_candidates(model, VOCAB, requests[:2], 16, 1, DrawOptions(SAMPLING))
    assert torch.equal(alone.codes, batch.codes[:2])  # the shared beginning went into the prompt


@pytest.mark.parametrize("parallel", [1, 3])
def test_weights_that_are_no_numbers_are_an_error(parallel):
    model = small_model()
    with torch.no_grad():
        model.word_embeddings.weight[5] = torch.nan  # one code, that may never be an input
    options = DrawOptions(SAMPLING, parallel=parallel)
    with pytest.raises(FloatingPointError, match="not finite"):
        generate_codes(model, VOCAB, PROMPTS, 16, options=options)
    with torch.no_grad():
        model.word_embeddings.weight[5] = 0
        model.word_embeddings.weight[VOCAB.text_start + 3] = torch.inf
    with pytest.raises(FloatingPointError, match="CapLoss is not finite"):
        score(model, [[1, 2]], [[VOCAB.text_start + 1]], range(VOCAB.text_start, VOCAB.size))


def test_a_captured_step_runs_as_often_as_it_is_called(monkeypatch):
    """CUDA's part played by doubles: a graph keeps what ran while it was captured, and replays it."""
    running = []

    class Graph:
        def replay(self):
            self.function()

    @contextlib.contextmanager
    def capture(graph):
        graph.function = running[-1]
        state[1] = False
        yield
        state[1] = True

    class Stream:
        def __init__(self, *_): ...
        def wait_stream(self, other): ...

    state = [0, True]

    def function():
        running.append(function)
        state[0] += state[1]  # capturing computes nothing

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    advance = graph.on_device(function, torch.device("cuda"))
    for calls in range(1, 7):
        advance()
        assert state[0] == calls
    assert len(running) == 7  # six calls and one capture
    assert graph.on_device(function, torch.device("cpu")) is function


def test_errors():
    for name in ("max_batch", "parallel"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            DrawOptions(**{name: 0})
