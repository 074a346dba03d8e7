# SPDX-License-Identifier: Apache-2.0
"""The ops as modules are those of PyTorch: same parameters, same results, same gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from cogview_kernels import ThreeRegionLayout, layer_norm, rms_norm
from cogview_kernels.modules import (
    LinearCrossEntropy,
    SandwichLayerNorm,
    SandwichRMSNorm,
    ThreeRegionAttention,
)


def of(module, *inputs, outputs):
    """What a module gives, then the gradients of its inputs and parameters by name."""
    made = outputs(module(*inputs))
    weights = [torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out) for out in made]
    loss = sum((out * weight).sum() for out, weight in zip(made, weights, strict=True))
    named = dict(sorted(module.named_parameters()))
    gradients = torch.autograd.grad(loss, [*inputs, *named.values()])
    return [*made, *gradients]


def assert_alike(ours, theirs):
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_attention_is_multihead_attention_under_the_layout(bias):
    B, T, C, H = 2, 19, 32, 4
    x = torch.randn(B, T, C, requires_grad=True)
    layout = ThreeRegionLayout(torch.tensor([[0, 3, 9], [1, 2, -1]]), block_size=4, window_blocks=2)
    theirs = nn.MultiheadAttention(C, H, bias=bias, batch_first=True)
    ours = ThreeRegionAttention(C, H, bias=bias)
    assert {name: p.shape for name, p in ours.named_parameters()} == {
        name: p.shape for name, p in theirs.named_parameters()
    }
    ours.load_state_dict(theirs.state_dict())
    hidden = ~layout.dense_mask(T).repeat_interleave(H, 0)
    dense = lambda made: [made[0]]  # noqa: E731
    theirs_call = Calls(theirs, lambda m, x: m(x, x, x, attn_mask=hidden, need_weights=False))
    ours_call = Calls(ours, lambda m, x: m(x, layout))
    assert_alike(of(ours_call, x, outputs=lambda made: [made]), of(theirs_call, x, outputs=dense))


def test_attention_takes_starts():
    """A sample behind padding gives what it gives alone, and a position of padding the bias alone."""
    x, start = torch.randn(2, 11, 16), 3
    layout = ThreeRegionLayout(torch.tensor([[0, 5], [4, 7]]), block_size=2, window_blocks=2)
    alone = ThreeRegionLayout(torch.tensor([[1, 4]]), block_size=2, window_blocks=2)
    attention = ThreeRegionAttention(16, 2).eval()
    nn.init.normal_(attention.out_proj.bias)
    y = attention(x, layout, torch.tensor([0, start]))
    torch.testing.assert_close(y[1:, start:], attention(x[1:, start:], alone))
    torch.testing.assert_close(y[1, :start], attention.out_proj.bias.expand(start, 16))
    torch.testing.assert_close(y[:1], attention(x[:1], ThreeRegionLayout(layout.pivots[:1], 2, 2)))
    with pytest.raises(ValueError, match=r"starts must have shape \[2\], got \(1,\)"):
        attention(x, layout, torch.tensor([3]))


class Calls(nn.Module):
    def __init__(self, module, call):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, *inputs):
        return self.call(self.module, *inputs)


def test_attention_drops_in_training_alone():
    x = torch.randn(1, 8, 16)
    layout = ThreeRegionLayout(torch.zeros(1, 0, dtype=torch.int64), block_size=4, window_blocks=2)
    attention = ThreeRegionAttention(16, 2, dropout=0.5)
    assert not torch.equal(attention(x, layout), attention(x, layout))
    attention.eval()
    assert torch.equal(attention(x, layout), attention(x, layout))


class Apart(nn.Module):
    """The two norms, called one after the other."""

    def __init__(self, post, pre):
        super().__init__()
        self.post, self.pre = post, pre

    def forward(self, branch, residual):
        residual = residual + self.post(branch)
        return residual, self.pre(residual)


@pytest.mark.parametrize(
    ("ours", "norm"),
    [
        (lambda C: SandwichLayerNorm(C, pb_relax=None), nn.LayerNorm),
        (lambda C: SandwichRMSNorm(C), lambda C: nn.RMSNorm(C, 1e-6)),
    ],
    ids=["layer_norm", "rms_norm"],
)
def test_sandwich_norms_are_two_norms_and_a_sum(ours, norm):
    C = 24
    inputs = [torch.randn(3, 5, C, requires_grad=True) for _ in range(2)]
    apart, module = Apart(norm(C), norm(C)), ours(C)
    for parameter in apart.parameters():
        nn.init.normal_(parameter)
    module.load_state_dict(apart.state_dict())
    assert_alike(of(module, *inputs, outputs=list), of(apart, *inputs, outputs=list))


@pytest.mark.parametrize("module", [SandwichLayerNorm(8), SandwichRMSNorm(8)], ids=["layer_norm", "rms_norm"])
def test_sandwich_norms_give_a_narrow_normed(module):
    branch, residual = torch.randn(2, 4, 8).bfloat16(), torch.randn(2, 4, 8)
    (residual_out, normed), expected = module(branch, residual, torch.bfloat16), module(branch, residual)
    assert normed.dtype == torch.bfloat16 and torch.equal(residual_out, expected[0])
    assert torch.equal(normed, expected[1].bfloat16())


@pytest.mark.parametrize("pb_relax", [None, "row", "tensor"])
@pytest.mark.parametrize("make", [SandwichLayerNorm, SandwichRMSNorm], ids=["layer_norm", "rms_norm"])
def test_sandwich_norms_take_pb_relax(make, pb_relax):
    branch, residual = 1e-3 * torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    module = make(8, eps=0.1, pb_relax=pb_relax)
    assert f"pb_relax={pb_relax!r}, dropout=0.0" in repr(module)
    post = {name: parameter for name, parameter in module.post.named_parameters()}
    norm = layer_norm if make is SandwichLayerNorm else rms_norm
    expected = residual + norm(branch, **post, eps=0.1, pb_relax=pb_relax)
    torch.testing.assert_close(module(branch, residual)[0], expected)


def test_a_weight_with_an_offset_begins_as_one():
    branch, residual = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    plain, gemma = SandwichRMSNorm(8), SandwichRMSNorm(8, weight_offset=1.0)
    assert bool((gemma.post.weight == 0).all())
    for got, expected in zip(gemma(branch, residual), plain(branch, residual), strict=True):
        torch.testing.assert_close(got, expected)


SANDWICHES = {
    "layer_norm": lambda: SandwichLayerNorm(8, eps=0.1),
    "rms_norm": lambda: SandwichRMSNorm(8, 0.1, weight_offset=1.0, pb_relax="row"),
}


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("which", ["post", "pre"])
@pytest.mark.parametrize("make", SANDWICHES.values(), ids=SANDWICHES)
def test_a_norm_with_a_hook_is_called_and_gives_the_same(make, which, dtypes):
    branch, residual = (torch.randn(2, 4, 8, dtype=dtype) for dtype in dtypes)
    module, seen = make().to(dtypes[0]), []
    expected = module(branch, residual, dtypes[0])
    getattr(module, which).register_forward_hook(lambda *_: seen.append(which))
    found = module(branch, residual, dtypes[0])
    assert seen == [which] and [x.dtype for x in found] == [*dtypes[::-1]]
    rounding = 2e-2 if dtypes[0] == torch.bfloat16 else 1e-5  # of the first norm, before it is added
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


def test_a_norm_that_is_called_by_itself_has_all_options():
    x = torch.randn(64, 8, dtype=torch.bfloat16)
    options = {"weight_offset": 1.0, "round_before_weight": True, "pb_relax": "row"}
    post = SandwichRMSNorm(8, 0.1, **options, dtype=torch.bfloat16).post
    nn.init.normal_(post.weight)
    assert torch.equal(post(x), rms_norm(x, post.weight, eps=0.1, **options))
    assert not torch.equal(post(x), rms_norm(x, post.weight, eps=0.1, weight_offset=1.0))


@pytest.mark.parametrize("make", SANDWICHES.values(), ids=SANDWICHES)
def test_weights_that_hooks_make_are_made_at_each_call(make):
    branch, residual = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    module = make()
    prune.random_unstructured(module.post, "weight", 0.5)
    module(branch, residual)
    with torch.no_grad():
        module.post.weight_orig.fill_(3)
    module(branch, residual)
    assert torch.equal(module.post.weight, 3 * module.post.weight_mask)


@pytest.mark.parametrize("make", SANDWICHES.values(), ids=SANDWICHES)
def test_a_norm_that_was_replaced_is_called(make):
    branch, residual = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    module = make()
    module.post = nn.Sequential(module.post, nn.Tanh())
    residual_out, normed = module(branch, residual)
    torch.testing.assert_close(residual_out, residual + module.post[0](branch).tanh())
    torch.testing.assert_close(normed, module.pre(residual_out))


@pytest.mark.parametrize("make", SANDWICHES.values(), ids=SANDWICHES)
@pytest.mark.parametrize("hooked", [False, True])
def test_sandwich_norms_compile_without_graph_break(make, hooked):
    branch, residual = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    module = make()
    if hooked:
        module.pre.register_forward_hook(lambda *_: None)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(branch, residual), module(branch, residual))


@pytest.mark.parametrize(
    ("module", "first"),
    [(SandwichRMSNorm(4), 1), (SandwichRMSNorm(4, weight_offset=1.0), 0), (SandwichLayerNorm(4), 1)],
    ids=["rms_norm", "rms_norm, offset", "layer_norm"],
)
def test_weights_begin_anew_in_any_order(module, first):
    """Of parents before their parts, as some initialisations after ``to_empty`` walk, and after them."""
    for order in (list(module.modules()), list(module.modules())[::-1]):
        for parameter in module.parameters():
            nn.init.constant_(parameter, 7.0)
        for part in order:
            part.reset_parameters()
        for name, parameter in module.named_parameters():
            assert bool((parameter == (first if name.endswith("weight") else 0)).all())
    for parameter in module.parameters():
        nn.init.constant_(parameter, 7.0)
    module.reset_parameters()
    assert all(bool((parameter != 7).all()) for parameter in module.parameters())


@pytest.mark.parametrize("bias", [False, True])
def test_loss_is_that_of_a_linear_head(bias):
    hidden = torch.randn(2, 7, 12, requires_grad=True)
    target = torch.randint(0, 31, (2, 7))
    target[0, 0] = -100
    head = nn.Linear(12, 31, bias=bias)
    ours = LinearCrossEntropy(12, 31, bias=bias, label_smoothing=0.1)
    ours.load_state_dict(head.state_dict())
    loss = lambda m, x: F.cross_entropy(m(x).flatten(0, -2), target.flatten(), label_smoothing=0.1)  # noqa: E731
    theirs = Calls(head, loss)
    single = lambda made: [made]  # noqa: E731
    assert_alike(
        of(Calls(ours, lambda m, x: m(x, target)), hidden, outputs=single), of(theirs, hidden, outputs=single)
    )


DROPPING = (lambda p: SandwichLayerNorm(4, dropout=p), lambda p: SandwichRMSNorm(4, dropout=p))


def test_sizes_that_cannot_be_are_errors():
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads, 3, got 16"):
        ThreeRegionAttention(16, 3)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        LinearCrossEntropy(8, 0)
    for make in (lambda p: ThreeRegionAttention(16, 2, dropout=p), *DROPPING):
        for p in (1.0, 7.0, -0.5):
            with pytest.raises(ValueError, match=rf"dropout must be in \[0, 1\), got {p}"):
                make(p)
    for norm in (SandwichLayerNorm, SandwichRMSNorm):
        with pytest.raises(ValueError, match="pb_relax must be one of None, 'row', 'tensor', got 'rows'"):
            norm(4, pb_relax="rows")
        with pytest.raises(ValueError, match="eps must be a positive finite number, got 0"):
            norm(4, eps=0.0)
    with pytest.raises(ValueError, match="reduction must be one of 'none', 'sum', 'mean', got 'foo'"):
        LinearCrossEntropy(8, 5, reduction="foo")
    with pytest.raises(TypeError, match=r"options must be among token_weight, reduction, .*, got reduktion"):
        LinearCrossEntropy(8, 5, reduktion="sum")


def test_what_is_no_batch_of_sequences_is_an_error():
    layout = ThreeRegionLayout(torch.zeros(1, 0, dtype=torch.int64))
    for shape in ((8, 32), (1, 8, 31)):
        with pytest.raises(ValueError, match=r"ThreeRegionAttention: x must be \[B, T, 32\], got"):
            ThreeRegionAttention(32, 4)(torch.randn(shape), layout)
