# SPDX-License-Identifier: Apache-2.0
"""A decoder is the model: to the bit where one op takes all layers, and by the model itself elsewhere."""

import pytest
import torch
from torch import nn

from cogview.config import ModelConfig
from cogview.generation.engine import DrawOptions, Task, decode, prefill
from cogview.model.cache import KVCache
from cogview.model.decoder import Decoder, layer_stack
from cogview.model.transformer import CogView
from cogview_kernels import _extension
from cogview_kernels.decode_step import native
from tests.model.helpers import small_model

NEEDS_EXTENSION = pytest.mark.skipif(_extension.native is None, reason=_extension.missing_reason)


@pytest.fixture
def taken(monkeypatch):
    """One element for each call of the kernel."""
    calls, run = [], native.forward
    monkeypatch.setattr(native, "forward", lambda *a: calls.append(1) or run(*a))
    return calls


@NEEDS_EXTENSION
@pytest.mark.parametrize("restart", [None, torch.tensor([[2], [0], [4]])], ids=["", "restart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_step_is_that_of_the_model_to_the_bit(dtype, restart, taken):
    model = small_model(scale=5.0).to(dtype)
    tokens, lengths = torch.randint(0, 60, (3, 12)), torch.tensor([7, 3, 5])
    hidden, caches = [], [KVCache(2, 3, 2, 30, 32, dtype=dtype) for _ in range(2)]
    for cache, call in zip(caches, (Decoder(model), lambda t, cache: model(t, cache=cache)), strict=True):
        model(tokens[:, :7], cache=cache)
        cache.set_lengths(lengths)
        cache.restart = restart
        hidden.append([call(tokens[:, at : at + n], cache) for at, n in ((7, 1), (8, 1), (9, 3))])
    assert len(taken) == 3
    for ours, models in zip(*hidden, strict=True):
        assert torch.equal(ours, models)
    assert torch.equal(caches[0].buffer, caches[1].buffer)
    assert torch.equal(caches[0].lengths, caches[1].lengths)


@NEEDS_EXTENSION
def test_drawing_takes_the_kernel_for_prompt_and_steps(taken):
    model = small_model()
    rows = prefill(model, [[1, 2], [3, 4, 5]], 6)
    decode(model, rows, Task([range(16)], 6, [1, 2]), DrawOptions())
    assert len(taken) == 1 + 5
    many = prefill(model, [[n // 20, n % 20] for n in range(native.MOST_ROWS + 1)], 2)
    decode(model, many, Task([range(16)], 2, [0] * (native.MOST_ROWS + 1)), DrawOptions())
    assert len(taken) == 1 + 5


class OtherLinear(nn.Linear):
    """Might compute anything."""


def _train(model):
    model.train()


def _hook(model):
    model.transformer.layers[1].mlp.register_forward_hook(lambda *_: None)


def _replace(model):
    model.transformer.layers[1].attention.dense = OtherLinear(64, 64)


def _no_bias(model):
    model.transformer.layers[0].mlp.dense_h_to_4h = nn.Linear(64, 256, bias=False)


def _other_mlp(model):
    model.transformer.layers[0].mlp = nn.Identity()


@pytest.mark.parametrize("change", [_train, _hook, _replace, _no_bias, _other_mlp])
def test_what_is_not_the_models_own_goes_through_the_modules(change):
    model = small_model()
    assert layer_stack(model) is not None
    change(model)
    assert layer_stack(model) is None


@torch.no_grad()
def test_a_plain_model_and_autocast_take_the_modules(taken):
    config = ModelConfig(1, 64, 2, 40, 10, sandwich_norm=False)
    for model, autocast in ((CogView(config).eval(), False), (small_model(), True)):
        caches = [KVCache(model.config.num_layers, 1, 2, 9, 32) for _ in range(2)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = Decoder(model)(torch.tensor([[1, 2]]), caches[0])
            expected = model(torch.tensor([[1, 2]]), cache=caches[1])
        torch.testing.assert_close(hidden, expected, rtol=0, atol=0)
    assert not taken


@NEEDS_EXTENSION
@torch.no_grad()
def test_a_decoder_follows_autocast_from_call_to_call(taken):
    decoder, tokens = Decoder(small_model()), torch.tensor([[1, 2]])
    for calls, autocast in ((1, False), (1, True), (2, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            decoder(tokens, KVCache(2, 1, 2, 9, 32))
        assert len(taken) == calls
