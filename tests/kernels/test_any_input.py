# SPDX-License-Identifier: Apache-2.0
"""Random input, good and bad, for every public function: the right answer, or a documented error that names
the function and the argument; never a crash.

COGVIEW_ANY_INPUT=10000 throws so many at each function.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cogview_kernels
from cogview_kernels import ThreeRegionLayout
from tests.helpers.stack import random_stack

many = settings(
    max_examples=int(os.environ.get("COGVIEW_ANY_INPUT", "100")),
    deadline=None,
    derandomize="COGVIEW_ANY_INPUT" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
DOCUMENTED = (ValueError, TypeError, NotImplementedError)

# Mostly good, so that most calls come past the first check.
numbers = st.one_of(
    st.floats(1e-3, 4),
    st.sampled_from([0.0, -1.0, 1e-30, 1e30, float("inf"), float("nan"), None, "1", True, 2]),
)
sizes = st.sampled_from([1, 2, 3, 4, 5, 8, 16, 17, 33, 0])
dtypes = st.sampled_from(
    [torch.float32] * 6 + [torch.bfloat16] * 2 + [torch.float16, torch.float64, torch.int64]
)
values = st.sampled_from(["normal"] * 6 + ["huge", "zeros", "infinite", "NaN"])
devices = st.sampled_from(["cpu"] * 30 + ["meta"])


@st.composite
def tensors(draw, shape, dtype, value="normal"):
    """Of this shape and dtype, but for a rare mutation, with any strides."""
    shape = list(shape)
    if draw(st.integers(0, 30)) == 0 and shape:
        change = draw(st.sampled_from(["drop", "add", "grow"]))
        if change == "drop":
            shape.pop()
        elif change == "add":
            shape.insert(0, 2)
        else:
            shape[draw(st.integers(0, len(shape) - 1))] += 1
    if draw(st.integers(0, 30)) == 0:
        dtype = draw(dtypes)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    if value == "huge":
        x = x * 1e4
    elif value == "zeros":
        x = x * 0
    elif value in ("infinite", "NaN") and x.numel() > 0:
        x.view(-1)[0] = float("inf") if value == "infinite" else float("nan")
    x = x.to(dtype)
    how = draw(st.integers(0, 8))
    if how == 0 and x.dim() > 1:
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif how == 1 and x.dim() > 0:
        x = torch.stack([x, x], -1)[..., 0]
    elif how == 2 and x.dim() > 0:
        x = x[..., :1].expand(x.shape)
    x = x.to(draw(devices))
    return x.requires_grad_(x.is_floating_point() and draw(st.booleans()))


def compare(found, expected, inputs, numbers):
    """Within what a dtype can tell. Where something is not finite, or a number huge, shape and dtype
    alone."""
    floats = [x.detach() for x in inputs if x.is_floating_point() and x.numel() > 0]
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.is_meta or not all(bool(x.isfinite().all()) for x in floats):
            continue
        scale = max([1.0, *map(abs, numbers), *(float(x.abs().max()) for x in floats)])
        if scale > 1e3:
            continue
        fine = b.isfinite()
        dtypes = {x.dtype for x in (a, *inputs)}
        tolerance = 1e-1 if torch.bfloat16 in dtypes else 2e-2 if torch.float16 in dtypes else 1e-3
        torch.testing.assert_close(
            a.detach()[fine].double(), b.detach()[fine].double(), atol=tolerance * scale**2, rtol=tolerance
        )


def is_steep(rows):
    """Whether a row is 0 or almost constant: up to 1 / sqrt(eps) times its rounding comes out of a norm, and
    its gradients are off by about eps |x| / spread^2, which is 7e-5 in float32 for a spread of 0.03 around 1.
    The norms' own tests judge such rows."""
    if rows.numel() == 0 or rows.is_meta or rows.dim() == 0:
        return False
    rows = rows.detach().double()
    spread = (rows - rows.mean(-1, keepdim=True)).abs().amax(-1)
    largest = rows.abs().amax(-1)
    is_close = (spread <= 3e-2 * largest.clamp(min=1)) & (rows.shape[-1] > 1)
    return bool(((largest == 0) | is_close).any())


def check(name, arguments, options):
    """The function itself, forward and backward, against its reference."""
    function = getattr(cogview_kernels, name)
    inputs = [x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor)]
    outcomes = []
    for backend in (None, "reference"):
        try:
            out = function(*arguments, **options, backend=backend)
            # The second norm of sandwich_rms_norm may be left out.
            outcomes.append([x for x in (out if isinstance(out, tuple) else (out,)) if x is not None])
        except DOCUMENTED as error:
            message = str(error)
            assert message.startswith((name, "ThreeRegionLayout")) and len(message.splitlines()) == 1, message
            outcomes.append(type(error))
    found, expected = outcomes
    if isinstance(found, type) or isinstance(expected, type):
        assert found == expected, outcomes
        return
    numbers = [x for name, x in options.items() if isinstance(x, (int, float)) and name != "seed"]
    if name.endswith("_norm") and any(map(is_steep, arguments[: 1 + name.startswith("sandwich")])):
        numbers.append(1e30)
    compare(found, expected, inputs, numbers)
    leaves = [x for x in inputs if x.requires_grad]
    # An output that depends on nothing of these has no gradient in plain PyTorch, and zeros from a kernel.
    differentiable = [i for i, x in enumerate(expected) if x.requires_grad and not x.is_meta]
    if leaves and differentiable:
        gradients = [
            torch.autograd.grad(
                sum(out[i].float().sum() for i in differentiable),
                leaves,
                allow_unused=True,
                materialize_grads=True,
            )
            for out in outcomes
        ]
        compare(*gradients, inputs, numbers)


@many
@given(st.data())
def test_stable_softmax(data):
    draw, dtype = data.draw, data.draw(dtypes)
    shape = draw(st.lists(sizes, min_size=0, max_size=3))
    scores = draw(tensors(shape, dtype, draw(values)))
    options = {"causal": draw(st.booleans())}
    for name in ("alpha", "scale"):
        if draw(st.booleans()):
            options[name] = draw(numbers)
    if draw(st.booleans()):
        options["mask"] = draw(tensors(shape[draw(st.integers(0, 1)) :], torch.bool))
    check("stable_softmax", (scores,), options)


def norm_options(draw, names):
    drawn = {
        "eps": numbers,
        "pb_relax": st.sampled_from(["row", "tensor", None, "column"]),
        "dropout_p": numbers,
        "seed": st.sampled_from([3, 2**63, -1, 2**64, 1.5, None]),
        "normed_dtype": st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16, "float32"]),
    }
    options = {name: draw(drawn[name]) for name in names if draw(st.integers(0, 2)) == 0}
    if "dropout_p" in options:
        options.setdefault("seed", 3)
        options["seed"] = 3 if options["seed"] is None else options["seed"]
    return options


def norm_tensors(draw, rows, parameters):
    """What is normalised, ``rows`` of one shape, and the norms' parameters."""
    dtype, shape = draw(dtypes), draw(st.lists(sizes, min_size=0, max_size=3))

    def beside():
        return draw(st.sampled_from([dtype, torch.float32]))

    found = [draw(tensors(shape, dtype, draw(values)))]
    found += [draw(tensors(shape, beside())) for _ in range(rows - 1)]
    return *found, *(draw(st.none() | tensors(shape[-1:] or [1], beside())) for _ in range(parameters))


@many
@given(st.data())
def test_layer_norm(data):
    draw = data.draw
    check("layer_norm", norm_tensors(draw, 1, 2), norm_options(draw, ("eps", "pb_relax")))


@many
@given(st.data())
def test_sandwich_layer_norm(data):
    draw = data.draw
    options = norm_options(draw, ("eps", "pb_relax", "dropout_p", "seed", "normed_dtype"))
    check("sandwich_layer_norm", norm_tensors(draw, 2, 4), options)


def rms_options(draw, names):
    options = norm_options(draw, names)
    if draw(st.integers(0, 2)) == 0:
        options["weight_offset"] = draw(numbers)
    if draw(st.integers(0, 2)) == 0:
        options["round_before_weight"] = draw(st.booleans())
    return options


@many
@given(st.data())
def test_rms_norm(data):
    draw = data.draw
    check("rms_norm", norm_tensors(draw, 1, 1), rms_options(draw, ("eps", "pb_relax")))


@many
@given(st.data())
def test_sandwich_rms_norm(data):
    draw = data.draw
    options = rms_options(draw, ("eps", "pb_relax", "dropout_p", "seed", "normed_dtype"))
    check("sandwich_rms_norm", norm_tensors(draw, 2, 2), options)


@many
@given(st.data())
def test_decode_linear(data):
    draw, dtype = data.draw, data.draw(dtypes)
    shape, O, K = draw(st.lists(sizes, min_size=0, max_size=2)), draw(sizes), draw(sizes)
    x, weight = draw(tensors([*shape, K], dtype, draw(values))), draw(tensors([O, K], dtype))
    bias = draw(st.none() | tensors([O], dtype))
    options = {"activation": draw(st.sampled_from([None, "gelu_tanh", "relu"]))}
    check("decode_linear", (x, weight, bias), options)


@many
@given(st.data())
def test_decode_step(data):
    draw, dtype = data.draw, data.draw(dtypes)
    B, T, S, L = draw(sizes), draw(st.integers(0, 3)), draw(sizes), draw(st.integers(0, 2))
    H, D, F = draw(st.integers(1, 3)), draw(sizes), draw(sizes)
    torch.manual_seed(draw(st.integers(0, 99)))
    stack = random_stack(L, H * D, F, dtype=dtype, pb_relax=draw(st.sampled_from(["row", "tensor", None, 1])))
    if draw(st.integers(0, 9)) == 0:
        stack = stack.map(lambda x: x.unsqueeze(0) if draw(st.integers(0, 30)) == 0 else x)
    x = draw(tensors([B, T, H * D], dtype, draw(values)))
    cache = draw(tensors([L, 2, B, H, S, D], dtype))
    lengths = torch.randint(-1 if draw(st.integers(0, 9)) == 0 else 0, max(1, S - T + 1), (B,))
    head = draw(st.none() | tensors([draw(sizes), H * D], dtype))
    check("decode_step", (x, stack, cache, lengths), {"head": head})


@many
@given(st.data())
def test_linear_cross_entropy(data):
    draw, dtype = data.draw, data.draw(dtypes)
    shape, C, V = draw(st.lists(sizes, min_size=0, max_size=2)), draw(sizes), draw(sizes)
    hidden, weight = draw(tensors([*shape, C], dtype, draw(values))), draw(tensors([V, C], dtype))
    torch.manual_seed(draw(st.integers(0, 99)))  # so that a failure can be replayed
    target = torch.randint(-1, V + draw(st.sampled_from([0] * 9 + [1])) or 1, shape)
    options = {"ignore_index": -1, "reduction": draw(st.sampled_from(["mean", "sum", "none", "max"]))}
    if draw(st.booleans()):
        options["token_weight"] = draw(tensors(shape, torch.float32)).detach().abs()
    if draw(st.integers(0, 3)) == 0:
        options["vocab_range"] = (draw(st.integers(-1, 3)), draw(st.integers(0, V + 1)))
    if draw(st.integers(0, 2)) == 0:
        options["bias"] = draw(tensors([V], dtype))
    for name in ("softcap", "z_loss", "label_smoothing", "extra_memory"):
        if draw(st.integers(0, 3)) == 0:
            options[name] = draw(numbers)
    check("linear_cross_entropy", (hidden, weight, target), options)


def heads(draw, lengths, dtype):
    """q, k and v of attention."""
    B, Hkv, G, D = draw(sizes), draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(sizes)
    value = draw(values)
    return [
        draw(tensors((B, H, T, D), dtype, value)) for H, T in zip((Hkv * G, Hkv, Hkv), lengths, strict=True)
    ]


def layouts(draw, B, T):
    """Good ones, but for a rare pivot out of range."""
    P = draw(st.integers(0, T))
    torch.manual_seed(draw(st.integers(0, 99)))  # so that a failure can be replayed
    pivots = torch.stack([torch.randperm(max(T, 1))[:P] for _ in range(B)]) if B else torch.empty(0, P).long()
    if draw(st.integers(0, 20)) == 0 and pivots.numel() > 0:
        pivots[0, 0] = draw(st.sampled_from([-1, -2, T, 2**40]))
    bias = draw(st.sampled_from([0.0, 0.7, -3.0]))
    dtype = draw(st.sampled_from([torch.int64] * 4 + [torch.int32, torch.int16]))
    w, W = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    causal = draw(st.sampled_from([True, True, False]))
    return ThreeRegionLayout(pivots.to(dtype), w, W, bias, draw(st.integers(1, 3)), causal=causal)


def starts(draw, B, T):
    """First positions of samples, none most often; now and then of another dtype or one sample too many."""
    if draw(st.integers(0, 2)):
        return {}
    dtype = draw(st.sampled_from([torch.int64] * 5 + [torch.int32] * 5 + [torch.float32]))
    rows = B + (draw(st.integers(0, 20)) == 0)
    return {"starts": torch.randint(0, T + 1, (rows,)).to(dtype)}


def attention_options(draw):
    options = {"scale": draw(numbers)} if draw(st.booleans()) else {}
    if draw(st.booleans()):
        options |= {"dropout_p": draw(numbers), "seed": draw(st.sampled_from([3, -1, 2**64, "3"]))}
    if draw(st.booleans()):
        options["return_lse"] = True
    return options


@many
@given(st.data())
def test_three_region_attention(data):
    draw = data.draw
    T = draw(sizes)
    q, k, v = heads(draw, (T, T, T), draw(dtypes))
    B = q.shape[0] if q.dim() else 1
    layout = layouts(draw, B, T)
    check("three_region_attention", (q, k, v, layout), attention_options(draw) | starts(draw, B, T))


@many
@given(st.data())
def test_decode_attention(data):
    draw = data.draw
    S = draw(sizes)
    q, k, v = heads(draw, (draw(st.integers(0, 3)), S, S), draw(dtypes))
    B = q.shape[0] if q.dim() else 1
    torch.manual_seed(draw(st.integers(0, 99)))
    lengths = torch.randint(0, S + draw(st.sampled_from([1] * 9 + [3])), (B,))
    options = {"scale": draw(numbers)} if draw(st.booleans()) else {}
    if draw(st.booleans()):
        options["layout"] = layouts(draw, B, S)
    options |= starts(draw, B, S)
    check("decode_attention", (q, k, v, lengths), options)


@many
@given(st.data())
def test_local_attention_2d(data):
    draw = data.draw
    grid, s = (draw(st.integers(0, 4)), draw(st.integers(1, 4))), draw(st.integers(1, 2))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (5, 3), (9, 1), (2, 3), (3,), 3]))
    cells, dtype = grid[0] * grid[1], draw(dtypes)
    q, k, v = heads(draw, (cells * s * s, cells, cells), dtype)
    options = attention_options(draw) | {"query_scale": s, "causal": draw(st.booleans())}
    if draw(st.booleans()) and k.dim() == 4:
        shape = (*k.shape[:2], draw(st.integers(0, 3)), k.shape[3])
        options |= {"extra_k": draw(tensors(shape, dtype)), "extra_v": draw(tensors(shape, dtype))}
        if draw(st.booleans()):
            options["extra_mask"] = draw(tensors((shape[0], shape[2]), torch.bool))
    check("local_attention_2d", (q, k, v, grid, kernel), options)


@many
@given(st.data())
def test_merge_attention(data):
    draw, dtype = data.draw, data.draw(dtypes)
    shape = [draw(sizes) for _ in range(4)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    n = draw(st.integers(0, 6))
    outputs = [draw(tensors(shape, dtype)) for _ in range(n)]
    lses = [draw(tensors(shape[:3], wide)) for _ in range(n)]
    check("merge_attention", (outputs, lses), {"return_lse": draw(st.booleans())})


@many
@given(st.data())
def test_layout(data):
    """A layout that can be made, or drawn, gives masks and a plan."""
    draw = data.draw
    T, B = draw(sizes), draw(sizes)
    text = draw(tensors((B, T), draw(st.sampled_from([torch.bool] * 9 + [torch.float32])))).detach()
    counts = st.sampled_from([1, 2, 3, 7, 50, 0, -1, 2.0, None])
    try:
        layout = ThreeRegionLayout.sample(
            text, draw(counts), block_size=draw(counts), window_blocks=draw(counts),
            density_correction=draw(st.booleans()), valid_mask=draw(st.none() | tensors((B, T), torch.bool)),
        )  # fmt: skip
        if layout.pivots.is_meta:
            return
        B, T = text.shape  # which may have been changed
        mask = layout.dense_mask(T)
        assert mask.shape == (B, T, T) and bool(mask.diagonal(dim1=1, dim2=2).all())
        if T > 0:
            assert layout.plan(T).keys_per_query * B * T == pytest.approx(int(mask.sum()))
    except DOCUMENTED as error:
        assert str(error).startswith("ThreeRegionLayout"), error


STRANGE = {
    "sparse": lambda: torch.ones(4, 8).to_sparse(),
    "sparse_csr": lambda: torch.ones(4, 8).to_sparse_csr(),
    "mkldnn": lambda: torch.ones(4, 8).to_mkldnn(),
    "nested": lambda: torch.nested.as_nested_tensor([torch.ones(1, 8), torch.ones(3, 8)]),
    "jagged": lambda: torch.nested.as_nested_tensor(
        [torch.ones(1, 8), torch.ones(3, 8)], layout=torch.jagged
    ),
}
DENSE, WEIGHT = torch.ones(4, 8), torch.ones(6, 8)
TAKES_ROWS = {
    "stable_softmax": [lambda f, x: f(x)],
    "layer_norm": [lambda f, x: f(x), lambda f, x: f(DENSE, x)],
    "rms_norm": [lambda f, x: f(x), lambda f, x: f(DENSE, x)],
    "sandwich_layer_norm": [lambda f, x: f(x, x, *[None] * 4), lambda f, x: f(DENSE, x, *[None] * 4)],
    "sandwich_rms_norm": [lambda f, x: f(x, x, None), lambda f, x: f(DENSE, DENSE, None, x)],
    "decode_linear": [lambda f, x: f(x, WEIGHT), lambda f, x: f(DENSE, x)],
    "linear_cross_entropy": [
        lambda f, x: f(x, WEIGHT, torch.zeros(4, dtype=torch.int64)),
        lambda f, x: f(DENSE, x, torch.zeros(4, dtype=torch.int64)),
    ],
}


@pytest.mark.filterwarnings("ignore:.*(prototype|beta)")
@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("name", TAKES_ROWS)
def test_a_tensor_without_strides_is_refused(name, kind):
    for call in TAKES_ROWS[name]:
        with pytest.raises(TypeError, match=rf"^{name}: \w+ must be dense, got .*; (try|pad it)"):
            call(getattr(cogview_kernels, name), STRANGE[kind]())
