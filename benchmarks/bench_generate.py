# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.bench_generate``: whole pictures drawn by the engine, and by two rivals, in turns.

Random weights. For each batch: milliseconds a step and seconds a picture, and the share of the floor that
memory sets: the weights and the valid part of the cache, read once a step, at the bandwidth of a large copy
(bytes read and written) that takes turns with the rest. Then how much longer the rivals take for the same
codes, the prompt's reading included, and the seconds for candidates of one prompt drawn and ranked by one
call. Results are a JSON file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, timing
from benchmarks.__main__ import APART, device_named
from benchmarks.rivals.generation import hugging_face, reprojection
from benchmarks.timing import Job, Limits
from cogview.config import MOST_PICTURES, ModelConfig
from cogview.evaluation.cap_loss import caption_loss
from cogview.generation.engine import DrawOptions, Task, decode, prefill
from cogview.generation.text_to_image import Request, draw_candidates
from cogview.model.transformer import CogView
from cogview.presets import PRESETS
from cogview.tokens.vocab import Vocab
from cogview_kernels.bench import DTYPES

STEPS = "steps alone"
MOST_ROWS = 1 << 16
COPIED = {"cpu": 64 << 20, "cuda": 512 << 20}  # floats of the copy that gives the bandwidth


@dataclass(frozen=True)
class Shape:
    """A model, and which part of a picture is timed: ``new`` tokens behind ``prompt`` that are read."""

    model: ModelConfig
    vocab: Vocab
    prompt: int
    new: int
    batches: tuple[int, ...]
    num_codes: int  # of a whole picture


def preset(name: str, vocab: Vocab, *, prompt: int, new: int, batches: tuple[int, ...]) -> Shape:
    chosen = PRESETS[name]
    return Shape(chosen.model, vocab, prompt, new, batches, num_codes=chosen.image_tokenizer.codes_per_image)


GPT2 = ModelConfig(num_layers=12, hidden_size=768, num_heads=12)
SHAPES = {
    # Whole pictures.
    "digits": preset("digits", Vocab(48, 130), prompt=8, new=16, batches=(1, 16, 60)),
    "small": preset("small", Vocab(512, 4000), prompt=15, new=64, batches=(1, 16)),
    # A stretch in the middle of a picture, where the cache is as long as on average.
    "gpt2": Shape(GPT2, Vocab(), 528, 32, (1,), num_codes=1024),
    "tutorial": preset("tutorial", Vocab(), prompt=528, new=32, batches=(1, 16)),
    "base": preset("base", Vocab(), prompt=480, new=128, batches=(1, 16, 60)),
    "tiny": Shape(ModelConfig(1, 64, 2, 128, 33), Vocab(16, 20), 4, 9, (2,), num_codes=9),
}


@dataclass(frozen=True)
class Options:
    rivals: bool
    parallel: int
    seconds: float
    ranked: int


def weight_bytes_read(shape: Shape, model: CogView) -> int:
    """What a step cannot avoid to read: the layers, and the rows of the head that image codes have."""
    layers = sum(p.numel() * p.element_size() for p in model.transformer.layers.parameters())
    head = model.word_embeddings.weight
    return layers + shape.vocab.num_image_codes * head.shape[1] * head.element_size()


def floor_bytes(shape: Shape, model: CogView, batch: int) -> int:
    """Bytes of weights and of the cache's valid part, on average over the steps."""
    config, size = shape.model, model.word_embeddings.weight.element_size()
    length = shape.prompt + shape.new / 2
    cache = 2 * config.num_layers * config.hidden_size * batch * length * size
    return int(weight_bytes_read(shape, model) + cache)


def jobs(shape: Shape, model: CogView, batch: int, options: Options, device: torch.device) -> dict[str, Job]:
    """Name -> one drawing of ``shape.new`` tokens in ``batch`` rows.

    ``STEPS`` is what the floor is compared with: it begins where the prompt has been read. All others read
    the prompt too, as the rivals do.
    """
    sampling = DrawOptions().sampling
    codes, seeds = shape.vocab.num_image_codes, list(range(batch))
    prompt = torch.randint(codes, (shape.prompt,), device=device)
    rows = [prompt.tolist()] * batch
    task = Task([range(codes)], shape.new, seeds)

    def ours(parallel: int) -> torch.Tensor:
        read = prefill(model, rows, shape.new, spare=parallel - 1)
        return decode(model, read, task, DrawOptions(sampling, parallel=parallel))

    read = prefill(model, rows, shape.new)

    def steps(_: torch.Tensor) -> torch.Tensor:
        return decode(model, read, task, DrawOptions(sampling))

    found = {STEPS: Job(steps, setup=lambda: read.cache.lengths.fill_(shape.prompt))}
    source = torch.ones(COPIED[device.type], device=device)
    target = torch.ones_like(source)
    found["copy"] = Job(lambda _: target.copy_(source))
    if not options.rivals:
        return found

    found["ours"] = Job(lambda _: ours(1))
    if options.parallel > 1:
        found[f"ours, {options.parallel} codes a step"] = Job(lambda _: ours(options.parallel))

    def original() -> torch.Tensor:
        return reprojection(model, prompt, shape.new, codes, sampling, seeds)

    same = (original() == ours(1)).float().mean().item()
    if same < 0.9:  # one other code, by a rounding, changes those behind it
        raise RuntimeError(f"the original's algorithm draws other codes: {same:.0%} are alike")
    found["re-projection"] = Job(lambda _: original())
    if importlib.util.find_spec("transformers") is None:
        print("Hugging Face's generate is left out: transformers is not installed", file=sys.stderr)
        return found
    dtype = model.word_embeddings.weight.dtype
    for name, cache in (("Hugging Face, static cache", "static"), ("Hugging Face, growing cache", None)):
        draw = hugging_face(shape.model, sampling, dtype, device, cache)
        found[name] = Job(lambda _, draw=draw: draw(prompt, shape.new, batch))
    return found


def race(shape: Shape, model: CogView, batch: int, options: Options, device: torch.device) -> dict[str, Any]:
    todo = jobs(shape, model, batch, options, device)
    limits = Limits(seconds=options.seconds, min_rounds=3, max_rounds=50)
    synchronized = {
        name: Job(lambda state, job=job: (job.run(state), timing.synchronize(device)), job.setup)
        for name, job in todo.items()
    }
    # A picture takes so long that the wall clock serves on a GPU as well.
    times = timing.interleave(synchronized, torch.device("cpu"), limits)
    spreads = {name: timing.spread(values) for name, values in times.items()}
    copy_gb_s = 2 * 4 * COPIED[device.type] / spreads.pop("copy").median / 1e6
    floor_ms = floor_bytes(shape, model, batch) / copy_gb_s / 1e6
    step_ms = spreads.pop(STEPS).median / (shape.new - 1)  # the first token needs none
    ours = spreads["ours"].median if "ours" in spreads else 1.0
    return {
        "batch": batch,
        "new": shape.new,
        "copy_gb_s": copy_gb_s,
        "floor_ms_a_step": floor_ms,
        "ms_a_step": step_ms,
        "seconds_a_picture": step_ms * shape.num_codes / batch / 1e3,
        "share_of_floor": floor_ms / step_ms,
        "drawings": {
            name: {**asdict(spread), "times_ours": spread.median / ours} for name, spread in spreads.items()
        },
    }


def ranked(shape: Shape, model: CogView, candidates: int, device: torch.device) -> float:
    """Seconds for candidates of one text drawn and ranked."""
    request = [Request([1, 2, 3], 0)]

    def draw(_: None) -> None:
        drawn = draw_candidates(model, shape.vocab, request, shape.num_codes, candidates, DrawOptions())
        for batch in drawn:
            caption_loss(model, shape.vocab, batch.codes, [[1, 2, 3]] * len(batch.codes))
        timing.synchronize(device)

    limits = Limits(seconds=0, min_rounds=1 if shape.num_codes > 64 else 3)
    times = timing.interleave({"ranked": Job(draw)}, torch.device("cpu"), limits)
    return timing.spread(times["ranked"]).median / 1e3


def told(result: dict[str, Any]) -> str:
    lines = [
        f"batch {result['batch']}: {result['ms_a_step']:.3f} ms a step, {result['seconds_a_picture']:.3f} s "
        f"a picture; floor {result['floor_ms_a_step']:.3f} ms a step at {result['copy_gb_s']:.1f} GB/s: "
        f"{result['share_of_floor']:.0%}"
    ]
    for name, of in result["drawings"].items():
        lines.append(
            f"  prompt and {result['new']} codes: {name:<30} {of['median']:10.2f} ms"
            f"   {of['times_ours']:6.2f}x our time"
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_generate", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--shape", choices=SHAPES, default="digits")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--batch", type=int, nargs="*", help="default: those of the shape")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--parallel", type=int, default=1, help="also with so many codes a step")
    parser.add_argument("--no-rivals", action="store_true")
    parser.add_argument("--ranked", type=int, default=60, help="candidates drawn and ranked; 0: none")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each batch")
    parser.add_argument("--save", type=Path, default=APART, metavar="FOLDER")
    chosen = parser.parse_args(arguments)
    new = SHAPES[chosen.shape].new
    if not 1 <= chosen.parallel <= new:
        parser.error(f"--parallel must be from 1 to the {new} codes that are drawn, got {chosen.parallel}")
    if not all(1 <= batch <= MOST_ROWS for batch in chosen.batch or ()):
        parser.error(f"--batch must be from 1 to {MOST_ROWS:,} each, got {chosen.batch}")
    if not 0 <= chosen.ranked <= MOST_PICTURES:
        parser.error(f"--ranked must be from 0 to {MOST_PICTURES:,}, got {chosen.ranked}")
    if not 0 <= chosen.seconds < math.inf:
        parser.error(f"--seconds must be finite, 0 or above, got {chosen.seconds:g}")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    device, shape = device_named(chosen.device), SHAPES[chosen.shape]
    torch.manual_seed(0)
    with device:
        model = CogView(shape.model).to(DTYPES[chosen.dtype]).eval()
    options = Options(not chosen.no_rivals, chosen.parallel, chosen.seconds, chosen.ranked)
    name = environment.device_name(device)
    print(f"{chosen.shape}, {chosen.dtype}, {model.num_parameters():,} parameters, {name}", flush=True)
    results = []
    for batch in chosen.batch or shape.batches:
        results.append(race(shape, model, batch, options, device))
        print(told(results[-1]), flush=True)
    document = {
        "shape": chosen.shape,
        "dtype": chosen.dtype,
        "threads": torch.get_num_threads(),
        "device": name,
        "results": results,
    }
    if options.ranked:
        document["ranked"] = {
            "candidates": options.ranked,
            "seconds": ranked(shape, model, options.ranked, device),
        }
        print(
            f"{options.ranked} candidates drawn and ranked: {document['ranked']['seconds']:.2f} s", flush=True
        )
    path = chosen.save / "generate" / f"{chosen.shape}-{chosen.dtype}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"saved: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
