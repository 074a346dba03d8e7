# SPDX-License-Identifier: Apache-2.0
"""``attn_implementation="three_region"``: what GPT-2 and Llama compute with it, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AttentionInterface,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from cogview_kernels import ThreeRegionLayout
from cogview_kernels.integrations.transformers import register
from cogview_kernels.integrations.transformers.attention import ThreeRegionImplementation

WIDE = "three_region_wide"  # whose window covers every sequence here
SINKS = "three_region_sinks"  # the first four tokens and a window of two blocks, nothing random
V, T = 50, 21


@pytest.fixture(scope="module", autouse=True)
def implementations():
    register(WIDE, block_size=4, window_blocks=100, num_pivots=6)
    register(SINKS, block_size=4, window_blocks=2, num_pivots=4, text_length=4)


def gpt2():
    config = GPT2Config(
        vocab_size=V,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, None, 0
    return GPT2LMHeadModel(config).float()


def llama(**options):
    """Four query heads on two key heads."""
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return LlamaForCausalLM(config).float()


MODELS = pytest.mark.parametrize("make", [gpt2, llama])


@pytest.fixture
def ids():
    return torch.randint(2, V, (3, T))


def padding(side):
    """Rows with five, two and no tokens of padding."""
    if side == "none":
        return None
    mask = torch.ones(3, T, dtype=torch.int64)
    mask[0, :5] = mask[1, :2] = 0
    return mask if side == "left" else mask.flip(1)


def trained(model, implementation, ids, mask):
    """Logits of what is no padding, loss, and gradients."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    labels = ids
    if mask is not None:
        # What precedes a row's first token is padding, and nothing sensible can be said of its logits.
        predicted = mask.bool() & torch.nn.functional.pad(mask[:, :-1], (1, 0)).bool()
        labels = ids.masked_fill(~predicted, -100)
    out = model(ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    logits = out.logits.detach() if mask is None else out.logits.detach()[mask.bool()]
    return [logits, out.loss.detach(), *(p.grad.clone() for p in model.parameters())]


@MODELS
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_a_window_over_everything_is_dense_attention(make, side, ids):
    model = make()
    mask = padding(side)
    dense, ours = (trained(model, name, ids, mask) for name in ("sdpa", WIDE))
    for expected, got in zip(dense, ours, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@MODELS
def test_sparse_logits_are_those_of_the_layout_as_a_dense_mask(make, ids):
    model = make().eval()
    layout = ThreeRegionLayout(torch.arange(4).expand(3, 4), block_size=4, window_blocks=2)
    model.set_attn_implementation(SINKS)
    sparse = model(ids).logits
    model.set_attn_implementation("sdpa")
    dense = model(ids, attention_mask=layout.dense_mask(T)[:, None]).logits
    assert not torch.allclose(sparse, model(ids).logits, atol=1e-3)
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-6)


@MODELS
@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}, {"use_cache": False}], ids=str
)
def test_generation_is_that_of_dense_attention(make, options, ids):
    model = make().eval()
    drawn = []
    for implementation in ("sdpa", WIDE):
        model.set_attn_implementation(implementation)
        options = {"attention_mask": padding("left"), "max_new_tokens": 6, "do_sample": False, **options}
        drawn.append(model.generate(ids, **options))
    assert drawn[0].shape == (3, T + 6)
    assert torch.equal(*drawn)


@MODELS
def test_sparse_generation_depends_neither_on_the_cache_nor_on_padding(make, ids):
    model = make().eval()
    model.set_attn_implementation(SINKS)
    options = {"max_new_tokens": 8, "do_sample": False}
    cached = model.generate(ids, attention_mask=padding("left"), **options)
    whole = model.generate(ids, attention_mask=padding("left"), use_cache=False, **options)
    alone = model.generate(ids[:1, 5:], **options)
    assert torch.equal(cached, whole)
    assert torch.equal(cached[0, 5:], alone[0])


@MODELS
def test_a_prompt_in_two_parts(make, ids):
    model = make().eval()
    model.set_attn_implementation(SINKS)
    cache = DynamicCache(config=model.config)
    model(ids[:, :9], past_key_values=cache)
    second = model(ids[:, 9:], past_key_values=cache).logits
    torch.testing.assert_close(second, model(ids).logits[:, 9:], rtol=1e-4, atol=1e-6)


def holes():
    """Rows with padding between tokens, with that and padding on the left, and with none."""
    mask = torch.ones(3, T, dtype=torch.int64)
    mask[0, 9:14] = mask[1, :3] = mask[1, 6] = mask[1, 8:10] = 0
    return mask


@MODELS
def test_padding_between_tokens_is_not_seen(make, ids):
    model, mask = make().eval(), holes()
    logits = []
    for implementation in ("eager", WIDE):
        model.set_attn_implementation(implementation)
        logits.append(model(ids, attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-6)
    assert bool(logits[1].isfinite().all())


@pytest.mark.parametrize("pivot_bias", [0.0, 0.7])
def test_padding_between_tokens_under_a_sparse_layout(pivot_bias, ids):
    """The pivots are a row's first tokens that are no padding; the window counts padding as positions."""
    register("biased", block_size=4, window_blocks=2, num_pivots=4, text_length=4, pivot_bias=pivot_bias)
    model, mask = llama().eval(), holes()
    model.set_attn_implementation("biased")
    sparse = model(ids, attention_mask=mask).logits
    pivots = torch.tensor([[0, 1, 2, 3], [3, 4, 5, 7], [0, 1, 2, 3]])
    layout = ThreeRegionLayout(pivots, block_size=4, window_blocks=2)
    window, far = layout.regions(torch.arange(T), T, torch.tensor([0, 3, 0]))
    bias = torch.full((3, T, T), -1e9).masked_fill(window, 0.0).masked_fill(far, pivot_bias)
    bias = bias.masked_fill(~mask.bool()[:, None], -1e9)
    model.set_attn_implementation("eager")
    dense = model(ids, attention_mask=bias[:, None]).logits
    torch.testing.assert_close(sparse[mask.bool()], dense[mask.bool()], rtol=1e-4, atol=1e-6)
    half = model.bfloat16()
    half.set_attn_implementation("biased")
    assert bool(half(ids, attention_mask=mask).logits.isfinite().all())


@MODELS
@pytest.mark.parametrize("fixed", [False, True])
def test_a_prompt_that_was_padded_on_the_right_goes_on(make, fixed, ids):
    """What a query that is padding itself computes is nothing that anybody asks for."""
    model, prompt = make().eval(), padding("right")
    more, logits = torch.randint(2, V, (3, 4)), []
    for implementation in ("sdpa", WIDE):
        model.set_attn_implementation(implementation)
        cache = DynamicCache(config=model.config)
        if fixed:
            cache = StaticCache(config=model.config, max_cache_len=T + 8)
        model(ids, attention_mask=prompt, past_key_values=cache)
        for count in (1, 3):  # the tokens so far, one at first
            mask = torch.cat([prompt, torch.ones(3, 1 if count == 1 else 4, dtype=torch.int64)], 1)
            new = more[:, :1] if count == 1 else more[:, 1:]
            logits.append(model(new, attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(logits[2:], logits[:2], rtol=1e-4, atol=1e-6)


@MODELS
def test_trainer_fine_tunes(make, tmp_path):
    from transformers import Trainer, TrainingArguments

    losses = {}
    row = torch.arange(2, 2 + T)
    data = [{"input_ids": row, "labels": row}] * 8
    for implementation, options in (("sdpa", {}), (WIDE, {}), (SINKS, {"bf16": True})):
        torch.manual_seed(0)
        model = make()
        model.set_attn_implementation(implementation)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=8,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            gradient_checkpointing=implementation == WIDE,
            **options,
        )
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        losses[implementation] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[WIDE] == pytest.approx(losses["sdpa"], abs=2e-3)
    for of_one in losses.values():
        assert of_one[-1] < 0.8 * of_one[0]


def test_it_compiles_without_a_graph_break(ids):
    model = llama().eval()
    model.set_attn_implementation(SINKS)
    call = lambda ids, mask: model(ids, attention_mask=mask, use_cache=False).logits  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    mask = padding("left")
    torch.testing.assert_close(compiled(ids, mask), call(ids, mask), rtol=1e-4, atol=1e-6)


def test_dropout_is_drawn_anew_and_only_in_training(ids):
    model = llama(attention_dropout=0.5).train()
    model.set_attn_implementation(WIDE)
    first, second = model(ids).logits, model(ids).logits
    assert not torch.allclose(first, second)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_no_pivot_is_padding():
    implementation = ThreeRegionImplementation("name", 4, 2, 8, 3, 0.0)
    mask = padding("left").bool()
    made = implementation.mask(3, T, T, attention_mask=mask)
    assert made.shape == (3, 1, 1, 1 + 8 + 1)
    lengths, pivots, starts = made[:, 0, 0].split([1, 8, 1], 1)
    assert lengths.flatten().tolist() == [T] * 3 and starts.flatten().tolist() == [5, 2, 0]
    assert bool(mask.gather(1, pivots).all())
    for row, start in zip(pivots.tolist(), (5, 2, 0), strict=True):
        assert {start, start + 1, start + 2} <= set(row)


def test_what_it_cannot_do_is_an_error(ids):
    model = llama()
    model.set_attn_implementation(WIDE)
    packed = torch.cat([torch.arange(10), torch.arange(T - 10)]).expand(3, T)
    with pytest.raises(NotImplementedError, match="packed sequences"):
        model(ids, position_ids=packed, use_cache=False)
    with pytest.raises(NotImplementedError, match="attention has no softcap"):
        model(ids, softcap=30.0)
    with pytest.raises(TypeError, match=r"must be boolean or floating, got torch.int64 \(3, 1, 21, 21\)"):
        model(ids, attention_mask=torch.ones(3, 1, T, T, dtype=torch.int64))
    with pytest.raises(ValueError, match="text_length must be at most num_pivots, 6, got 7"):
        register("broken", num_pivots=6, text_length=7)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        register("broken", block_size=0)
    before = AttentionInterface()["sdpa"]
    with pytest.raises(ValueError, match="name 'sdpa' is taken in transformers; choose another"):
        register("sdpa")
    assert AttentionInterface()["sdpa"] is before
    with pytest.raises(ValueError, match="name must not be empty"):
        register("")
    with pytest.raises(TypeError, match="name must be a string, got int"):
        register(3)


def test_a_mask_of_the_user_and_sliding_windows_go_to_sdpa(ids):
    from transformers import MistralConfig, MistralForCausalLM

    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=V,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=3,
        )
    ).float()
    logits = []
    for implementation in ("sdpa", SINKS):
        model.set_attn_implementation(implementation)
        logits.append(model(ids, attention_mask=padding("right")).logits[padding("right").bool()])
    torch.testing.assert_close(*logits)
