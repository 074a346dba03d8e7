# SPDX-License-Identifier: Apache-2.0
"""``python -m cogview_kernels.bench``: an op at your own shape, against what you would run instead.

::

    python -m cogview_kernels.bench --shape 4,40,4224,64 --layout 128,6,768 --dtype bf16
    python -m cogview_kernels.bench --op sandwich_rms_norm --shape 4352,2560 --dtype bf16
    python -m cogview_kernels.bench --op linear_cross_entropy --shape 8704,2560,58240 --plot loss.png

All run in turns, in this process, on the same random tensors, so ratios hold on a machine that is shared.
Before it is timed, each is compared with ours; one that computes something else by mistake is left out.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cogview_kernels as ck
from cogview_kernels import _timing

OURS = "cogview_kernels"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Relative errors (of norms) that another order of summation explains, over long rows as well; gradients may
# have three times as much.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}

_PLOTS = (".png", ".pdf", ".svg")

Call = Callable[[], Any]


@dataclass
class Subject:
    """One op at one shape: its tensors and who computes it. ``differs``: who computes something else."""

    title: str
    inputs: list[Tensor]
    contenders: dict[str, Call]
    differs: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    contender: str
    ms: _timing.Spread
    memory: int | None
    error: float | None


# ---- the subjects


def _tensors(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    made = (torch.randn(*s, device=device, dtype=torch.float32, generator=generator) for s in shapes)
    return [x.to(dtype).requires_grad_() for x in made]


def attention(
    shape: Sequence[int], layout_sizes: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Subject:
    """B, H, T, D against dense SDPA and FlexAttention with the layout's mask."""
    B, _, T, _ = shape
    block_size, window_blocks, num_pivots = layout_sizes
    text = torch.zeros(B, T, dtype=torch.bool, device=device)
    layout = ck.ThreeRegionLayout.sample(
        text, num_pivots, block_size=block_size, window_blocks=window_blocks, density_correction=False
    )
    q, k, v = _tensors([shape] * 3, dtype, device)
    dense, flex = "SDPA, dense causal", "FlexAttention, our mask"
    return Subject(
        "three_region_attention",
        [q, k, v],
        {
            OURS: lambda: ck.three_region_attention(q, k, v, layout),
            dense: lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            flex: _flex(q, k, v, layout),
        },
        differs=(dense,),
        notes=[f"layout: {layout.plan(T)}", "the block mask of FlexAttention is made beforehand, not timed"],
    )


def _flex(q: Tensor, k: Tensor, v: Tensor, layout: ck.ThreeRegionLayout) -> Call:
    """Made at the first call, so that a machine without a compiler tells so in its row."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    B, _, T, _ = q.shape
    prepared: list[Call] = []

    def prepare() -> Call:
        visible = layout.dense_mask(T)
        mask = create_block_mask(lambda b, h, i, j: visible[b, i, j], B, None, T, T, device=str(q.device))
        compiled = torch.compile(flex_attention, dynamic=False)
        if (
            q.device.type == "cpu"
        ):  # where it refuses tensors that require gradients, whether asked for or not
            return lambda: compiled(q.detach(), k.detach(), v.detach(), block_mask=mask)
        return lambda: compiled(q, k, v, block_mask=mask)

    def call() -> Any:
        if q.device.type == "cpu" and torch.is_grad_enabled():
            raise NotImplementedError("FlexAttention has no backward pass on a CPU")
        if not prepared:
            prepared.append(prepare())
        return prepared[0]()

    return call


def _with_compile(eager: Call) -> dict[str, Call]:
    return {"eager PyTorch": eager, "torch.compile": torch.compile(eager, dynamic=False)}


def layer_norm(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Subject:
    C = shape[-1]
    x, weight, bias = _tensors([shape, [C], [C]], dtype, device)
    eager = partial(F.layer_norm, x, (C,), weight, bias)
    ours = partial(ck.layer_norm, x, weight, bias, pb_relax=None)
    return Subject("layer_norm", [x, weight, bias], {OURS: ours, **_with_compile(eager)})


def rms_norm(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Subject:
    C = shape[-1]
    x, weight = _tensors([shape, [C]], dtype, device)
    eager = partial(F.rms_norm, x, (C,), weight, 1e-6)
    return Subject("rms_norm", [x, weight], {OURS: partial(ck.rms_norm, x, weight), **_with_compile(eager)})


def sandwich_layer_norm(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Subject:
    C = shape[-1]
    inputs = _tensors([shape, shape, [C], [C], [C], [C]], dtype, device)
    branch, residual, post_weight, post_bias, pre_weight, pre_bias = inputs

    def eager() -> tuple[Tensor, Tensor]:
        out = residual + F.layer_norm(branch, (C,), post_weight, post_bias)
        return out, F.layer_norm(out, (C,), pre_weight, pre_bias)

    ours = partial(ck.sandwich_layer_norm, *inputs, pb_relax=None)
    return Subject("sandwich_layer_norm", inputs, {OURS: ours, **_with_compile(eager)})


def sandwich_rms_norm(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Subject:
    C = shape[-1]
    inputs = _tensors([shape, shape, [C], [C]], dtype, device)
    branch, residual, post_weight, pre_weight = inputs

    def eager() -> tuple[Tensor, Tensor]:
        out = residual + F.rms_norm(branch, (C,), post_weight, 1e-6)
        return out, F.rms_norm(out, (C,), pre_weight, 1e-6)

    ours = partial(ck.sandwich_rms_norm, *inputs)
    return Subject("sandwich_rms_norm", inputs, {OURS: ours, **_with_compile(eager)})


def linear_cross_entropy(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Subject:
    N, C, V = shape
    hidden, weight = _tensors([[N, C], [V, C]], dtype, device)
    weight = (weight.detach() * C**-0.5).requires_grad_()
    target = torch.randint(V, (N,), device=device, generator=torch.Generator(device).manual_seed(0))

    def eager() -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), target)

    ours = partial(ck.linear_cross_entropy, hidden, weight, target)
    return Subject("linear_cross_entropy", [hidden, weight], {OURS: ours, **_with_compile(eager)})


# What ``--shape`` means to an op, its default, and who makes its tensors.
OPS: dict[str, tuple[str, str, Callable[..., Subject]]] = {
    "three_region_attention": ("B,H,T,D", "1,8,1088,64", attention),
    "layer_norm": ("N,C", "4352,2560", layer_norm),
    "rms_norm": ("N,C", "4352,2560", rms_norm),
    "sandwich_layer_norm": ("N,C", "4352,2560", sandwich_layer_norm),
    "sandwich_rms_norm": ("N,C", "4352,2560", sandwich_rms_norm),
    "linear_cross_entropy": ("N,C,V", "1088,640,8192", linear_cross_entropy),
}


# ---- the race


def _outputs(made: Any) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


def _forward(call: Call, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return _outputs(call())


def _both(call: Call, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    made = _outputs(call())
    return torch.autograd.grad(made, inputs, [torch.ones_like(out) for out in made])


DIRECTIONS = {"forward": _forward, "forward and backward": _both}


def race(subject: Subject, direction: str, seconds: float) -> tuple[list[Row], dict[str, str]]:
    """The rows, ours first, and for each contender that has none the reason."""
    run = DIRECTIONS[direction]
    device = subject.inputs[0].device
    jobs: dict[str, _timing.Job] = {}
    skipped: dict[str, str] = {}
    errors: dict[str, float | None] = {}
    expected: tuple[Tensor, ...] = ()
    for name, call in subject.contenders.items():
        try:
            made = run(call, subject.inputs)
        except Exception as error:  # whatever a rival cannot do; the table tells why it has no row
            if name == OURS:
                raise
            skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        if name == OURS:
            expected = made
        errors[name] = None if name == OURS or name in subject.differs else relative_error(made, expected)
        tolerance = TOLERANCE[subject.inputs[0].dtype] * (3 if run is _both else 1)
        if not (errors[name] or 0.0) <= tolerance:
            skipped[name] = f"it differs from ours by {errors[name]:.1e}, more than rounding explains"
            continue
        jobs[name] = _job(run, call, subject.inputs)
    times = _timing.interleave(jobs, device, _timing.Limits(seconds=seconds * len(jobs)))
    rows = [
        Row(name, _timing.spread(times[name]), _timing.peak_bytes(job, device), errors[name])
        for name, job in jobs.items()
    ]
    return rows, skipped


def _job(run: Callable[..., Any], call: Call, inputs: list[Tensor]) -> _timing.Job:
    return _timing.Job(lambda _: run(call, inputs))


def relative_error(actual: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest over the results of ``|actual - truth| / |truth|``; NaN counts as infinite."""
    assert len(actual) == len(truth), f"{len(actual)} results, the reference has {len(truth)}"
    worst = 0.0
    for a, t in zip(actual, truth, strict=True):
        assert a.shape == t.shape, f"shape {tuple(a.shape)}, the reference has {tuple(t.shape)}"
        a, t = a.detach().double(), t.detach().double()
        error = float((a - t).norm() / t.norm().clamp_min(1e-300))
        worst = max(worst, error if error == error else float("inf"))
    return worst


# ---- what is printed and drawn


def table(rows: list[Row]) -> str:
    """Milliseconds, and how many times as fast ours is, with a bar for each."""
    ours = rows[0].ms.median
    slowest = max(row.ms.median for row in rows)
    width = max(len(row.contender) for row in rows)
    lines = [
        f"  {'':<{width}}  {'ms':>10}  {'quartiles':>19}  {'ours is':>8}  {'memory':>10}  {'differs':>8}"
    ]
    for row in rows:
        quartiles = f"{row.ms.low:.3f} to {row.ms.high:.3f}"
        memory = "unknown" if row.memory is None else f"{row.memory / 2**20:,.1f} MiB"
        error = "" if row.error is None else f"{row.error:.0e}"
        bar = "#" * max(1, round(24 * row.ms.median / slowest))
        lines.append(
            f"  {row.contender:<{width}}  {row.ms.median:>10.3f}  {quartiles:>19}  "
            f"{row.ms.median / ours:>7.2f}x  {memory:>10}  {error:>8}  {bar}"
        )
    return "\n".join(lines)


def draw(title: str, results: dict[str, list[Row]], path: str) -> None:
    """One panel a direction, a bar for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(results), 1, figsize=(8, 2.2 * len(results)), squeeze=False)
    for axis, (direction, rows) in zip(axes[:, 0], results.items(), strict=True):
        colours = ["#c2410c" if row.contender == OURS else "#94a3b8" for row in rows]
        axis.barh([row.contender for row in rows], [row.ms.median for row in rows], color=colours)
        axis.invert_yaxis()
        axis.set_title(direction, loc="left", fontsize=10)
        axis.set_xlabel("milliseconds")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---- the command


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"must be positive whole numbers with commas between, got {text!r}")
    return numbers


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    shapes = ", ".join(f"{letters} for {op}" for op, (letters, _, _) in OPS.items())
    parser = argparse.ArgumentParser(
        prog="python -m cogview_kernels.bench", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--op", choices=OPS, default="three_region_attention")
    parser.add_argument("--shape", type=_numbers, help=shapes)
    parser.add_argument(
        "--layout",
        type=_numbers,
        default=None,
        help="attention's block_size,window_blocks,num_pivots; default 64,4,256",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender and direction")
    parser.add_argument("--plot", metavar="FILE", help="also draw the bars; needs matplotlib")
    given = parser.parse_args(argv)
    letters, default, _ = OPS[given.op]
    given.shape = given.shape or _numbers(default)
    if len(given.shape) != len(letters.split(",")):
        parser.error(f"argument --shape: {given.op} takes {letters}, got {len(given.shape)} numbers")
    if given.layout is not None and given.op != "three_region_attention":
        parser.error(f"argument --layout: only three_region_attention has a layout, not {given.op}")
    given.layout = given.layout or [64, 4, 256]
    if len(given.layout) != 3:
        parser.error("argument --layout: must be block_size,window_blocks,num_pivots, three numbers")
    if not (math.isfinite(given.seconds) and given.seconds > 0):
        parser.error(f"argument --seconds: must be positive, got {given.seconds}")
    try:
        given.device = torch.device(given.device)
        torch.empty(0, device=given.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"argument --device: {str(error).splitlines()[0]}")
    if given.device.type not in ("cpu", "cuda"):
        parser.error(f"argument --device: must be cpu or cuda, got {given.device}")
    # Drawn last, when all else is done.
    if given.plot and not (Path(given.plot).parent.is_dir() and Path(given.plot).suffix in _PLOTS):
        endings = ", ".join(_PLOTS)
        parser.error(f"argument --plot: must be a file in a folder that exists, ending in {endings}")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    given = _arguments(argv)
    try:
        return _race_and_tell(given)
    except (MemoryError, RuntimeError) as error:
        # PyTorch has an exception of its own for it on GPUs, and on a CPU only this message.
        lacks = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
        if not (lacks or isinstance(error, MemoryError)):
            raise
        print(f"--shape {given.shape} needs more memory than there is; take a smaller one", file=sys.stderr)
        return 1


def _race_and_tell(given: argparse.Namespace) -> int:
    make = OPS[given.op][2]
    sizes = [given.shape] + ([given.layout] if make is attention else [])
    subject = make(*sizes, DTYPES[given.dtype], given.device)
    name = torch.cuda.get_device_name(given.device) if given.device.type == "cuda" else "CPU"
    threads = "" if given.device.type == "cuda" else f", {torch.get_num_threads()} threads"
    title = (
        f"{subject.title} {tuple(given.shape)}, {given.dtype}, {name}{threads}, PyTorch {torch.__version__}"
    )
    print(title)
    for note in subject.notes:
        print(f"  {note}")
    results = {}
    for direction in DIRECTIONS:
        rows, skipped = race(subject, direction, given.seconds)
        results[direction] = rows
        print(f"\n{direction}\n{table(rows)}")
        for contender, reason in skipped.items():
            print(f"  {contender}: left out: {reason}")
    if given.plot:
        try:
            draw(title, results, given.plot)
        except ModuleNotFoundError as error:
            print(f"--plot needs {error.name}: pip install {error.name}", file=sys.stderr)
            return 1
        print(f"\ndrawn in {given.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
