# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from cogview.model.transformer import CogView
from cogview.presets import PRESETS
from cogview_kernels import ThreeRegionLayout
from tests.model.helpers import SMALL, small_model


@pytest.mark.parametrize(("name", "parameters"), [("base", 3_928_849_920), ("tutorial", 211_958_784)])
def test_parameter_count(name, parameters):
    with torch.device("meta"):
        model = CogView(PRESETS[name].model)
    assert model.num_parameters() == parameters


def test_the_fashion_preset_has_three_billion_parameters():
    with torch.device("meta"):
        model = CogView(PRESETS["fashion"].model)
    assert 2.9e9 < model.num_parameters() < 3.1e9


def test_names_and_shapes_of_the_released_checkpoint():
    with torch.device("meta"):
        model = CogView(PRESETS["base"].model)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    expected = {
        "word_embeddings.weight": [58240, 2560],
        "transformer.position_embeddings.weight": [1089, 2560],
        "transformer.final_layernorm.weight": [2560],
        "transformer.final_layernorm.bias": [2560],
    }
    norms = ("input_layernorm", "post_attention_layernorm", "third_layernorm", "fourth_layernorm")
    linears = {
        "attention.query_key_value": [7680, 2560],
        "attention.dense": [2560, 2560],
        "mlp.dense_h_to_4h": [10240, 2560],
        "mlp.dense_4h_to_h": [2560, 10240],
    }
    for layer in range(48):
        prefix = f"transformer.layers.{layer}"
        for norm in norms:
            expected |= {f"{prefix}.{norm}.weight": [2560], f"{prefix}.{norm}.bias": [2560]}
        for linear, shape in linears.items():
            expected |= {f"{prefix}.{linear}.weight": shape, f"{prefix}.{linear}.bias": shape[:1]}
    assert len(expected) == 772
    assert shapes == expected


def plain_forward(model, tokens, mask=None):
    """The equations written out from the published description, with none of the package's ops."""
    config, weights = model.config, model.state_dict()
    C, H = config.hidden_size, config.num_heads

    def norm(x, name):
        if config.pb_relax is None:
            largest = 8
        else:
            largest = x.abs().amax(-1, keepdim=True) if config.pb_relax == "row" else x.abs().max()
        return F.layer_norm(x / (largest / 8), (C,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    B, T = tokens.shape
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool).tril()
    x = weights["word_embeddings.weight"][tokens] + weights["transformer.position_embeddings.weight"][:T]
    for layer in range(config.num_layers):
        p = f"transformer.layers.{layer}"
        qkv = linear(norm(x, f"{p}.input_layernorm"), f"{p}.attention.query_key_value")
        q, k, v = (part.view(B, T, H, C // H).transpose(1, 2) for part in qkv.split(C, dim=-1))
        scores = (q @ k.transpose(2, 3)) / (C // H) ** 0.5
        out = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        out = linear(out.transpose(1, 2).reshape(B, T, C), f"{p}.attention.dense")
        x = x + (norm(out, f"{p}.third_layernorm") if config.sandwich_norm else out)
        m = linear(norm(x, f"{p}.post_attention_layernorm"), f"{p}.mlp.dense_h_to_4h")
        m = 0.5 * m * (1 + torch.tanh(0.7978845608 * (m + 0.044715 * m**3)))
        m = linear(m, f"{p}.mlp.dense_4h_to_h")
        x = x + (norm(m, f"{p}.fourth_layernorm") if config.sandwich_norm else m)
    return norm(x, "transformer.final_layernorm")


@pytest.mark.parametrize(
    ("pb_relax", "sandwich_norm"),
    [("row", True), ("tensor", True), (None, True), ("row", False), (None, False)],
)
def test_forward_is_the_published_equations(pb_relax, sandwich_norm):
    model = small_model(scale=5.0, pb_relax=pb_relax, sandwich_norm=sandwich_norm)
    tokens = torch.randint(0, 60, (3, 21))
    expected = plain_forward(model, tokens)
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-4)
    logits = model.logits(model(tokens))
    torch.testing.assert_close(logits, expected @ model.word_embeddings.weight.T, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.logits(model(tokens), 3, 9), logits[..., 3:9])


def test_one_layout_for_all_layers_is_the_same_layout_for_each():
    model = small_model(scale=5.0)
    tokens = torch.randint(0, 60, (2, 30))
    text = torch.arange(30) < 6
    layout = ThreeRegionLayout.sample(
        text.expand(2, 30), 8, block_size=4, window_blocks=2, density_correction=False
    )
    expected = plain_forward(model, tokens, layout.dense_mask(30)[:, None])
    torch.testing.assert_close(model(tokens, layout=layout), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(tokens, layout=layout), model(tokens, layout=[layout] * 2))
    assert not torch.allclose(model(tokens, layout=layout), model(tokens), atol=1e-2)
    with pytest.raises(ValueError, match="one per layer"):
        model(tokens, layout=[layout])


def test_positions():
    model = small_model(scale=5.0)
    tokens = torch.randint(0, 60, (2, 10))
    assert torch.equal(model(tokens), model(tokens, positions=torch.arange(10)))
    assert not torch.allclose(model(tokens), model(tokens, positions=torch.arange(10) + 1), atol=1e-2)
    with pytest.raises(ValueError, match="at most 40 columns, got 41"):
        model(torch.zeros(1, 41, dtype=torch.int64))


def test_nothing_looks_ahead():
    model = small_model(scale=5.0)
    tokens = torch.randint(0, 60, (1, 20))
    changed = tokens.clone()
    changed[0, 12] = 61
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:], atol=1e-2)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["dense", "three-region"])
def test_activation_checkpointing_changes_no_bit(attention, dtype):
    tokens = torch.randint(0, 60, (2, 20))
    is_text = torch.arange(20).expand(2, 20) < 4
    layouts = None
    if attention == "three-region":
        layouts = [ThreeRegionLayout.sample(is_text, 8, block_size=4, window_blocks=2) for _ in range(3)]
    runs = []
    for activation_checkpointing in (False, True):
        model = small_model(
            dropout=0.1, num_layers=3, activation_checkpointing=activation_checkpointing
        ).train()
        calls = []
        for layer in model.transformer.layers:
            layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            hidden = model(tokens, layout=layouts)
        after = torch.rand(())  # Recomputation must not move the generator that comes next.
        hidden.square().sum().backward()
        assert len(calls) == (6 if activation_checkpointing else 3)
        runs.append([hidden, after, torch.rand(()), *(parameter.grad for parameter in model.parameters())])
    for plain, checkpointed in zip(*runs, strict=True):
        assert torch.equal(plain, checkpointed)


def test_a_hook_of_gradients_hears_every_linear_layer():
    """A model with a cache has no gradient, but a branch alone, called as for a step of decoding, has."""
    model, heard = small_model(), []
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.register_full_backward_hook(lambda *_: heard.append(1))
    model.train()(torch.randint(0, 60, (1, 6))).square().sum().backward()
    assert len(heard) == 2 * 4
    x = torch.randn(1, 2, 64)
    model.transformer.layers[0].mlp(x, decoding=True).sum().backward()
    assert len(heard) == 2 * 4 + 2


def test_initial_weights():
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, num_layers=8, hidden_size=128, init_std=0.02)
    weights = CogView(config).state_dict()
    for name, tensor in weights.items():
        if "layernorm" in name:
            assert torch.all(tensor == (1 if name.endswith("weight") else 0)), name
        elif name.endswith("bias"):
            assert torch.all(tensor == 0), name
        else:
            ends_branch = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
            assert tensor.std().item() == pytest.approx(0.02 / 4 if ends_branch else 0.02, rel=0.05), name


def test_dropout_only_in_training():
    model = small_model(scale=5.0, dropout=0.5)
    tokens = torch.randint(0, 60, (1, 10))
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.allclose(model(tokens), model(tokens), atol=1e-2)
