# SPDX-License-Identifier: Apache-2.0
"""The command ``cogview``.

PyTorch is imported only once the arguments are understood, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cogview.config import Preset, SamplingConfig
from cogview.presets import PRESETS, get_preset

if TYPE_CHECKING:
    from cogview.commands import Generated

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130

_DATA_HELP = (
    'a folder of images with captions.tsv (one "file<TAB>caption" per line) or captions.json '
    '({"file": "caption" or ["one", "two"]}); or "digits", the built-in handwritten digits'
)
_EXAMPLES = """\
examples:
  cogview demo                                     learn to draw digits and show it, a few minutes
  cogview generate --run runs/demo "a handwritten seven" --num 8 --out seven.png
  cogview caption --run runs/demo photo.png

  your own pictures, in photos/ with photos/captions.tsv:
  cogview train-tokenizer --data photos --preset tutorial --out runs/photos
  cogview train           --data photos --preset tutorial --out runs/photos
  cogview generate --run runs/photos "a tiger playing football" --out tiger.png
"""


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_positive.__name__ = "whole number of at least 1"  # argparse prints this in its message


class _Version(argparse.Action):
    """Looks the version up only when asked for: that imports PyTorch."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import cogview_kernels

        print(f"cogview {cogview_kernels.__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cogview",
        description="CogView: draw pictures from text, describe pictures in text, with one transformer.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example:\n  cogview {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def add_device(command: argparse.ArgumentParser) -> None:
        command.add_argument("--device", help='"cpu" or "cuda" (default: cuda where there is one)')

    def add_training(command: argparse.ArgumentParser, out: str) -> None:
        command.add_argument("--data", required=True, help=_DATA_HELP)
        command.add_argument("--out", required=True, type=Path, metavar="RUN", help=out)
        command.add_argument(
            "--preset", default="digits", metavar="NAME", help=f"sizes and schedule: {', '.join(PRESETS)}"
        )
        command.add_argument("--steps", type=_positive, help="training steps (default: the preset's)")
        command.add_argument(
            "--batch-size", type=_positive, help="images or rows per step (default: the preset's)"
        )
        command.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
        add_device(command)

    command = add(
        "train-tokenizer",
        "learn to turn pictures and captions into tokens (first step of training)",
        "--data photos --preset tutorial --out runs/photos",
    )
    add_training(command, "run folder to write; interrupted runs go on where they stopped")

    command = add(
        "train",
        "train the transformer (second step, in the folder of the first)",
        "--data photos --preset tutorial --out runs/photos",
    )
    add_training(command, "run folder that holds the tokenizers; an interrupted run goes on where it stopped")

    run_help = 'run folder of "cogview train" or "cogview demo"'

    command = add(
        "generate", "draw pictures for texts", '--run runs/demo "a handwritten seven" --num 16 --out out.png'
    )
    command.add_argument(
        "texts", nargs="+", metavar="TEXT", help="what to draw; several texts give several rows"
    )
    command.add_argument("--run", required=True, type=Path, help=run_help)
    command.add_argument("--out", type=Path, default=Path("out.png"), help="PNG to write (default: out.png)")
    command.add_argument("--num", type=_positive, default=16, help="pictures per text (default: 16)")
    command.add_argument("--seed", type=int, default=0, help="another seed, other pictures (default: 0)")
    command.add_argument(
        "--temperature", type=float, help="below 1 safer, above 1 wilder (default: the run's)"
    )
    command.add_argument(
        "--top-k", type=int, help="draw among the k likeliest codes, 0 = all (default: the run's)"
    )
    command.add_argument(
        "--top-p", type=float, help="draw among codes of total probability p, 0 = all (default: the run's)"
    )
    command.add_argument(
        "--no-rerank", action="store_true", help="keep the order of drawing instead of best first"
    )
    add_device(command)

    command = add("caption", "describe pictures in words", "--run runs/demo photo.png")
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    command.add_argument("--run", required=True, type=Path, help=run_help)
    add_device(command)

    command = add(
        "rerank", "order pictures by how well a text describes them", '--run runs/demo "a seven" *.png'
    )
    command.add_argument("text", metavar="TEXT", help="the text to compare with")
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    command.add_argument("--run", required=True, type=Path, help=run_help)
    add_device(command)

    command = add(
        "demo", "learn to draw handwritten digits from scratch and show the result", "--out runs/demo"
    )
    command.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder to write (default: runs/demo)"
    )
    command.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    add_device(command)
    return parser


def _preset(arguments: argparse.Namespace, part: str) -> Preset:
    """The named preset with the command's steps, batch size and seed in its training ``part``."""
    preset = get_preset(arguments.preset)
    given = {"steps": arguments.steps, "batch_size": arguments.batch_size, "seed": arguments.seed}
    changes = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(preset, **{part: dataclasses.replace(getattr(preset, part), **changes)})


def _device(arguments: argparse.Namespace) -> str:
    import torch

    from cogview.device import default_device

    if arguments.device is None:
        return default_device()
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {arguments.device} cannot be used here: {reason}") from None
    return arguments.device


def _train_tokenizer(arguments: argparse.Namespace) -> None:
    preset = _preset(arguments, "image_tokenizer_train")
    from cogview.training.pipeline import TrainTokenizers, train_tokenizers

    options = TrainTokenizers(arguments.data, arguments.out, preset, _device(arguments))
    history = train_tokenizers(options)
    last = history["reconstruction"][-50:]
    print(f"tokenizers trained, mean squared pixel error {sum(last) / len(last):.5f}; in {arguments.out}")
    print(f"next: cogview train --data {arguments.data} --preset {arguments.preset} --out {arguments.out}")


def _train(arguments: argparse.Namespace) -> None:
    preset = _preset(arguments, "train")
    from cogview.training.pipeline import TrainModel, train_model

    history = train_model(TrainModel(arguments.data, arguments.out, preset, _device(arguments)))
    image, text = (history[name][-50:] for name in ("image_loss", "text_loss"))
    print(
        f"model trained: image loss {sum(image) / len(image):.3f}, text loss {sum(text) / len(text):.3f} nats"
    )
    print(f'next: cogview generate --run {arguments.out} "a text" --out out.png')


def _generate(arguments: argparse.Namespace) -> None:
    from cogview.commands import Generate, generate, run_sampling
    from cogview.images import image_grid, save_png

    given = {"temperature": arguments.temperature, "top_k": arguments.top_k, "top_p": arguments.top_p}
    changes = {name: value for name, value in given.items() if value is not None}
    sampling: SamplingConfig | None = None
    if changes:
        sampling = dataclasses.replace(run_sampling(arguments.run), **changes)
    result: Generated = generate(
        Generate(
            run=arguments.run,
            texts=arguments.texts,
            num=arguments.num,
            seed=arguments.seed,
            sampling=sampling,
            is_ranked=not arguments.no_rerank,
            device=_device(arguments),
        )
    )
    for text, unknown in zip(arguments.texts, result.unknown, strict=True):
        if unknown:
            print(
                f'warning: "{text}" has parts the model never learned: {" ".join(unknown)}', file=sys.stderr
            )
    save_png(arguments.out, image_grid(result.images.flatten(0, 1), columns=arguments.num))
    order = "in the order drawn" if arguments.no_rerank else "best first"
    for text, losses in zip(arguments.texts, result.losses.tolist(), strict=True):
        print(f'"{text}": {len(losses)} pictures, {order}, CapLoss {min(losses):.3f} to {max(losses):.3f}')
    print(f"written: {arguments.out}")


def _caption(arguments: argparse.Namespace) -> None:
    from cogview.commands import Caption, caption

    described = caption(Caption(arguments.run, arguments.images, _device(arguments)))
    for path, (text, loss) in zip(arguments.images, described, strict=True):
        print(f"{path}\t{text}\tCapLoss {loss:.3f}")


def _rerank(arguments: argparse.Namespace) -> None:
    from cogview.commands import Rerank, rerank_files

    ranked = rerank_files(Rerank(arguments.run, arguments.text, arguments.images, _device(arguments)))
    for place, (path, loss) in enumerate(ranked, start=1):
        print(f"{place}\t{path}\tCapLoss {loss:.3f}")


def _demo(arguments: argparse.Namespace) -> None:
    from cogview.demo.run import Demo, run_demo, summary

    options = Demo(out=arguments.out, seed=arguments.seed, device=_device(arguments))
    print(summary(run_demo(options), arguments.out))


_COMMANDS = {
    "train-tokenizer": _train_tokenizer,
    "train": _train,
    "generate": _generate,
    "caption": _caption,
    "rerank": _rerank,
    "demo": _demo,
}
_RESUMABLE = ("train-tokenizer", "train", "demo")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, 2 for a mistake, 130 after Ctrl-C."""
    # PyTorch's CPU threads spin at every barrier by default, which makes a run ten times slower as soon as
    # another program wants a core. Read when PyTorch is loaded; a value set by the user stands.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = _parser().parse_args(argv)
    try:
        _COMMANDS[arguments.command](arguments)
    except KeyboardInterrupt:
        if arguments.command in _RESUMABLE:
            print(
                f"\ninterrupted; what is finished is saved in {arguments.out}. "
                "Run the same command again to go on from there.",
                file=sys.stderr,
            )
        else:
            print("\ninterrupted; nothing was written", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError) as error:
        print(f"cogview {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_MISTAKE
    return 0
