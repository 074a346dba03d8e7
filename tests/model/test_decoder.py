# SPDX-License-Identifier: Apache-2.0
"""A decoder is the model: to the bit where one op takes all layers, and by the model itself elsewhere."""

import copy
import gc
import weakref

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
    """One element for each call of a kernel that takes all layers."""
    calls = []
    for name in ("decode_step_cpu", "draw_step_cpu") if _extension.native else ():
        run = getattr(_extension.native, name)
        monkeypatch.setattr(_extension.native, name, lambda *a, run=run: calls.append(1) or run(*a))
    return calls


@NEEDS_EXTENSION
@pytest.mark.parametrize("restart", [None, torch.tensor([[2], [0], [4]])], ids=["", "restart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_step_is_that_of_the_model_to_the_bit(dtype, restart, taken):
    model = small_model(scale=5.0).to(dtype)
    tokens, lengths = torch.randint(0, 60, (3, 12)), torch.tensor([7, 3, 5])
    hidden, caches = (
        [],
        [
            KVCache(num_layers=2, batch=3, num_heads=2, capacity=30, head_size=32, dtype=dtype)
            for _ in range(2)
        ],
    )
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


def _hook_of_gradients(model):
    model.transformer.layers[1].mlp.dense_4h_to_h.register_full_backward_hook(lambda *_: None)


def _hook_before_gradients(model):
    model.transformer.layers[0].attention.dense.register_full_backward_pre_hook(lambda *_: None)


def _replace(model):
    model.transformer.layers[1].attention.dense = OtherLinear(64, 64)


def _no_bias(model):
    model.transformer.layers[0].mlp.dense_h_to_4h = nn.Linear(64, 256, bias=False)


def _other_mlp(model):
    model.transformer.layers[0].mlp = nn.Identity()


def _own_forward(model):
    layer = model.transformer.layers[1].mlp.dense_4h_to_h
    layer.forward = lambda x, usual=layer.forward: 2 * usual(x)


def _narrower(model):
    mlp = model.transformer.layers[1].mlp
    mlp.dense_h_to_4h, mlp.dense_4h_to_h = nn.Linear(64, 32), nn.Linear(32, 64)


def _fewer(model):
    del model.transformer.layers[1]


def _one_other_eps(model):
    model.transformer.layers[1].third_layernorm.eps = 0.1


CHANGES = [
    *(_train, _hook, _hook_of_gradients, _hook_before_gradients, _replace, _no_bias, _other_mlp),
    *(_own_forward, _narrower, _fewer, _one_other_eps),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_the_models_own_goes_through_the_modules(change):
    model = small_model()
    assert layer_stack(model) is not None
    change(model)
    assert layer_stack(model) is None


@NEEDS_EXTENSION
@pytest.mark.parametrize("change", CHANGES)
def test_a_look_at_a_model_serves_until_it_is_another(change):
    model = small_model()
    first, second = Decoder(model)._plan, Decoder(model)._plan
    assert first is second and first.stack is not None
    change(model)
    assert Decoder(model)._plan.stack is None


def _other_data(model):
    weight = model.transformer.layers[1].mlp.dense_4h_to_h.weight
    weight.data = torch.randn_like(weight)


def _other_parameter(model):
    model.transformer.layers[0].attention.dense.bias = nn.Parameter(torch.randn(64))


def _other_dtype(model):
    model.to(torch.bfloat16)


def _other_module(model):
    model.transformer.layers[1].input_layernorm = nn.LayerNorm(64, eps=0.1)


def _other_eps(model):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.1


def _transposed(model):
    weight = model.transformer.layers[1].attention.dense.weight
    weight.data = weight.data.t()


def _loaded(model):
    model.load_state_dict(small_model(seed=1, scale=5.0).state_dict())


@NEEDS_EXTENSION
@pytest.mark.parametrize(
    "change",
    [_other_data, _other_parameter, _other_dtype, _other_module, _other_eps, _transposed, _loaded],
)
@torch.no_grad()
def test_a_new_decoder_has_the_models_weights_of_today(change, taken):
    model, tokens = small_model(scale=5.0), torch.tensor([[1, 2, 3]])
    Decoder(model)(tokens, KVCache(num_layers=2, batch=1, num_heads=2, capacity=9, head_size=32))
    change(model)
    dtype = model.word_embeddings.weight.dtype
    caches = [
        KVCache(num_layers=2, batch=1, num_heads=2, capacity=9, head_size=32, dtype=dtype) for _ in range(2)
    ]
    found, expected = Decoder(model)(tokens, caches[0]), Decoder(copy.deepcopy(model))(tokens, caches[1])
    assert torch.equal(found, expected)


def test_a_hook_on_every_module_is_called():
    model, heard = small_model(), []
    Decoder(model)
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(type(module)))
    try:
        assert Decoder(model)._plan.stack is None
        rows = prefill(model, [[1, 2]], 4)
        decode(model, rows, Task([range(16)], 4, [1]), DrawOptions())
        assert heard.count(nn.Linear) == 4 * 2 * 4  # of each layer, for the prompt and three steps
    finally:
        hook.remove()


class _Adapted(nn.Linear):
    """As LoRA has it: another result than that of its weight."""

    def forward(self, x):
        return super().forward(x) + x[..., : self.out_features]


@torch.no_grad()
def test_a_step_calls_modules_that_are_not_plain():
    model = small_model(scale=5.0)
    old = model.transformer.layers[1].mlp.dense_4h_to_h
    new = _Adapted(256, 64)
    new.load_state_dict(old.state_dict())
    model.transformer.layers[1].mlp.dense_4h_to_h = new
    tokens = torch.tensor([[1, 2, 3, 4]])
    cache = KVCache(num_layers=2, batch=1, num_heads=2, capacity=9, head_size=32)
    step = Decoder(model)
    step(tokens[:, :2], cache)
    found = torch.cat([step(tokens[:, at : at + 1], cache) for at in (2, 3)], dim=1)
    torch.testing.assert_close(found, model(tokens)[:, 2:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_drawing_under_autocast():
    model = small_model()
    with torch.autocast("cpu", torch.bfloat16):
        rows = prefill(model, [[1, 2], [3]], 4)
        drawn = decode(model, rows, Task([range(16)], 4, [1, 2]), DrawOptions())
    assert drawn.shape == (2, 4)


def test_a_look_does_not_keep_the_model():
    model = small_model()
    Decoder(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_a_plain_model_and_autocast_take_the_modules(taken):
    config = ModelConfig(1, 64, 2, 40, 10, sandwich_norm=False)
    for model, autocast in ((CogView(config).eval(), False), (small_model(), True)):
        caches = [
            KVCache(num_layers=model.config.num_layers, batch=1, num_heads=2, capacity=9, head_size=32)
            for _ in range(2)
        ]
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
            decoder(tokens, KVCache(num_layers=2, batch=1, num_heads=2, capacity=9, head_size=32))
        assert len(taken) == calls
