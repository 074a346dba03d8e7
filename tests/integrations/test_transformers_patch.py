# SPDX-License-Identifier: Apache-2.0
"""``patch``: each model that it knows computes the same with it and without; ``unpatch`` takes it back."""

from __future__ import annotations

import copy
import importlib
import inspect

import pytest
import torch
import transformers
from torch import nn

from cogview_kernels.integrations.transformers import patch, unpatch

V, T = 50, 11
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}


def gemma2():
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(head_dim=8, **SIZES))


def gemma3():
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(head_dim=8, final_logit_softcapping=5.0, **SIZES)
    )


def glm4():
    return transformers.Glm4ForCausalLM(transformers.Glm4Config(head_dim=8, **SIZES))


def glm_image():
    text = {"vision_vocab_size": V, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    config = transformers.GlmImageConfig(
        text_config={**SIZES, **text},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "patch_size": 2,
            "image_size": 8,
        },
        vq_config={"embed_dim": 8, "num_embeddings": 16, "latent_channels": 8},
        image_token_id=45,
        image_start_token_id=46,
        image_end_token_id=47,
    )
    return transformers.GlmImageForConditionalGeneration(config)


def olmo2():
    return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SIZES))


MODELS = pytest.mark.parametrize("make", [gemma2, gemma3, glm4, glm_image, olmo2])


def tiny(make):
    """In training mode, in float32, with norms that matter."""
    model = make().float().train()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture
def ids():
    return torch.randint(3, 44, (2, T))


def step(model, ids, **options):
    model.zero_grad()
    labels = ids.clone()
    labels[0, :4] = -100
    out = model(ids, labels=labels, output_hidden_states=True, **options)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out, gradients


@MODELS
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 7}], ids=["mean", "num_items_in_batch"])
def test_hidden_states_loss_and_gradients_are_the_same(make, options, ids):
    model = tiny(make)
    expected, expected_gradients = step(model, ids, **options)
    patch(model)
    got, gradients = step(model, ids, **options)
    assert got.logits is None and type(got) is type(expected)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert len(got.hidden_states) == 3
    for ours, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6, msg=name)


@MODELS
def test_in_bfloat16_the_branch_rounds_no_more_than_the_model_does(make, ids):
    model = tiny(make).eval()
    exact = copy.deepcopy(model)(ids).logits
    model.bfloat16()
    expected = (model(ids).logits - exact).norm()
    patch(model)
    assert (model(ids).logits - exact).norm() < 1.5 * expected


@pytest.mark.parametrize("make", [gemma2, gemma3, glm4, glm_image])
def test_under_autocast_the_mlp_reads_the_same_bits_in_16_bits(make, ids, monkeypatch):
    module = importlib.import_module("cogview_kernels.integrations.transformers.patch")
    fused, found = module.sandwich_rms_norm, []

    def with_casts(*rows, normed_dtype=None, **options):
        return fused(*rows, **options)

    model = tiny(make)
    patch(model)
    for name, mlp in model.named_modules():
        if name.endswith(".mlp") and "visual" not in name:
            mlp.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    for sandwich in (with_casts, fused):
        monkeypatch.setattr(module, "sandwich_rms_norm", sandwich)
        read = []
        with torch.autocast("cpu", torch.bfloat16):
            found.append((read, *step(model, ids)))
    (wide, expected, expected_gradients), (narrow, got, gradients) = found
    assert len(narrow) == 2 and {x.dtype for x in narrow} == {torch.bfloat16}
    assert all(map(torch.equal, narrow, (x.bfloat16() for x in wide)))
    assert got.loss == expected.loss
    # Where two products read it, their gradients are added in 16 bits, which rounds by 2^-9 at most, and what
    # comes of it goes through a few products in 16 bits.
    for name, gradient in gradients.items():
        expected = expected_gradients[name]
        assert (gradient - expected).norm() <= 8 * 2**-9 * expected.norm(), name


@MODELS
def test_in_bfloat16_a_norm_rounds_where_the_model_does(make):
    """Where the weight is multiplied makes a difference to the last bit of a quarter of all elements."""
    model = tiny(make).bfloat16()
    norm = next(m for name, m in model.named_modules() if name.endswith("layers.1.post_attention_layernorm"))
    x = torch.randn(500, 32, dtype=torch.bfloat16)
    expected = norm(x)
    patch(model)
    assert (norm(x) == expected).float().mean() > 0.97


@MODELS
def test_unpatch_leaves_nothing_behind(make, ids):
    model = tiny(make)
    before, patched_modules = model.eval()(ids, labels=ids), 0
    patch(model)
    patched_modules = sum("forward" in vars(module) for module in model.modules())
    assert patched_modules > 2 * 3
    evaluated = model(ids, labels=ids)
    torch.testing.assert_close(evaluated.logits, before.logits, rtol=1e-4, atol=1e-5)
    unpatch(model)
    unpatch(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(ids, labels=ids).loss, before.loss)


def test_norms_alone_and_loss_alone(ids):
    model = tiny(olmo2)
    patch(model, linear_cross_entropy=False)
    assert model(ids, labels=ids).logits is not None
    unpatch(model)
    patch(model, sandwich_norm=False)
    assert model(ids, labels=ids).logits is None
    assert sum("forward" in vars(module) for module in model.modules()) == 1


def test_a_deep_copy_is_patched_and_its_own(ids):
    model = tiny(gemma2)
    patch(model)
    loss = model(ids, labels=ids).loss
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(other(ids, labels=ids).loss, loss)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, ids):
    model = tiny(gemma3)
    _, expected = step(model, ids)
    patch(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    _, gradients = step(model, ids, use_cache=False)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_generation_and_saving_go_on(ids, tmp_path):
    model = tiny(glm4).eval()
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, **options)
    patch(model)
    assert torch.equal(model.generate(ids, **options), expected)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(loaded.generate(ids, **options), expected)


class Adapter(nn.Module):
    """What adds to a layer and shows the layer's weights as its own, as LoRA does."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.tensor(1.5))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: getattr(self.base, "bias", None))

    def forward(self, x):
        return self.base(x) * self.scale


def _scaled(module, inputs, output):
    return output * 1.5


def change_head(model, how):
    if how == "adapter":
        model.lm_head = Adapter(model.lm_head)
    elif how == "several modules":
        model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())
    elif how == "hook":
        model.lm_head.register_forward_hook(_scaled)
    elif how == "forward":
        original = model.lm_head.forward
        model.lm_head.forward = lambda x: original(x) * 1.5
    else:
        model.loss_function = lambda logits, labels, vocab_size, **options: logits.square().mean()


HEADS = ("adapter", "several modules", "hook", "forward")


# A loss that it does not know before, patch refuses.
@pytest.mark.parametrize(
    ("how", "first"), [*((how, first) for how in HEADS for first in ("patch", "change")), ("loss", "patch")]
)
@pytest.mark.parametrize("make", [gemma2, glm4, olmo2])
def test_what_stands_at_the_head_is_called(make, how, first, ids):
    """Not its weight read: an adapter would get no gradient, and train another model than is evaluated."""
    model = tiny(make)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    other = copy.deepcopy(model)
    change_head(model, how)
    expected, expected_gradients = step(model, ids)
    if first == "patch":
        patch(other)
    change_head(other, how)
    if first == "change":
        patch(other)
    got, gradients = step(other, ids)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6, msg=name)


NORMS = [
    (gemma2, "post_attention_layernorm"),
    (gemma2, "pre_feedforward_layernorm"),
    (gemma3, "post_feedforward_layernorm"),
    (glm4, "post_self_attn_layernorm"),
    (olmo2, "post_attention_layernorm"),
]


@pytest.mark.parametrize("how", ["hook", "hook before", "hook of gradients", "adapter", "everywhere"])
@pytest.mark.parametrize(("make", "norm"), NORMS)
def test_norms_that_others_have_a_hold_of_are_called(make, norm, how, ids):
    model, heard = tiny(make), []
    other = copy.deepcopy(model)

    def change(model):
        layer = model.model.layers[0]
        module = getattr(layer, norm)
        if how == "hook":
            module.register_forward_hook(_scaled)
        elif how == "hook before":
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5 + 0.5,))
        elif how == "hook of gradients":
            module.register_full_backward_hook(lambda module, *gradients: heard.append(module))
        elif how == "adapter":
            setattr(layer, norm, Adapter(module))
        else:
            return nn.modules.module.register_module_forward_hook(
                lambda module, inputs, output: output * 1.5 if "Norm" in type(module).__name__ else None
            )
        return None

    def changed(model, make_first):
        if make_first:
            patch(model)
        handle = change(model)
        try:
            return step(model, ids)
        finally:
            if handle is not None:
                handle.remove()

    expected, expected_gradients = changed(model, make_first=False)
    got, gradients = changed(other, make_first=True)
    assert len(heard) == (2 if how == "hook of gradients" else 0)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_quantised_head_is_called(ids):
    """PyTorch's is called Linear as well, and its weight is a method."""

    class Linear(nn.Module):
        def __init__(self, of):
            super().__init__()
            self.of = of

        def weight(self):
            raise AssertionError

        def forward(self, x):
            return (self.of(x) * 8).round() / 8

    model = tiny(olmo2)
    model.lm_head = Linear(model.lm_head)
    expected = model(ids, labels=ids).loss
    patch(model)
    torch.testing.assert_close(model(ids, labels=ids).loss, expected, rtol=1e-5, atol=1e-6)


@MODELS
def test_the_signature_is_the_models(make):
    """Trainer drops what no argument is named for, and generate asks for logits of the last token alone."""
    model = tiny(make)
    expected = inspect.signature(model.forward)
    patch(model)
    assert inspect.signature(model.forward) == expected


def test_trainer_and_generation_ask_the_signature(ids, tmp_path):
    model = tiny(gemma2)
    patch(model)
    data = [{"input_ids": row, "labels": row} for row in ids]
    options = {"max_steps": 1, "use_cpu": True, "report_to": [], "save_strategy": "no"}
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), **options)
    assert transformers.Trainer(model, arguments, train_dataset=data).train().training_loss > 0
    shapes = []
    model.eval().lm_head.register_forward_hook(lambda module, inputs, out: shapes.append(tuple(out.shape)))
    model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert shapes == [(2, 1, V)] * 2


def test_parts_that_are_sharded_by_themselves(ids):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        losses = []
        for patched in (False, True):
            torch.manual_seed(0)
            model = tiny(gemma2)
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
            if patched:
                patch(model)
            for part in (model.lm_head, model.model.layers[0].post_attention_layernorm, model):
                fully_shard(part)
            loss = model(ids, labels=ids).loss
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


def test_what_it_does_not_know_is_an_error_and_changes_nothing(monkeypatch):
    config = transformers.LlamaConfig(**SIZES)
    with pytest.raises(NotImplementedError, match=r"LlamaForCausalLM is not one of .* Gemma2, Gemma3, Glm4"):
        patch(transformers.LlamaForCausalLM(config))
    model = tiny(gemma2)
    with pytest.raises(NotImplementedError, match="needs a Gemma2ForCausalLM, got Gemma2Model"):
        patch(model.model)
    patch(model)
    with pytest.raises(ValueError, match="replaced by patch; call unpatch first"):
        patch(model)
    unpatch(model)
    model.loss_function = lambda *arguments, **options: None
    with pytest.raises(NotImplementedError, match="this model's loss is"):
        patch(model)
    del model._loss_function

    def other(self, x):
        return x * self.weight

    monkeypatch.setattr(type(model.model.norm), "forward", other)
    with pytest.raises(NotImplementedError, match=r"Gemma2RMSNorm of transformers .* is not written as in"):
        patch(model)
    assert not any("forward" in vars(module) for module in model.modules())
