# SPDX-License-Identifier: Apache-2.0
"""What each verb of the command ``cogview`` does: one Python function or method of a run, and what it prints.

Each verb imports what it needs itself: drawing needs no TensorBoard, training no matplotlib.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogview.config import STUDY_SEEDS
from cogview.device import usable_device
from cogview.files import require_folder
from cogview.terminal import in_one_line

if TYPE_CHECKING:
    from cogview import options
    from cogview.config import Preset


def train_tokenizer(given: options.TrainTokenizer) -> None:
    """``cogview train-tokenizer``."""
    from cogview.training.loop import late_mean
    from cogview.training.pipeline import TrainTokenizers, train_tokenizers

    preset = dataclasses.replace(
        given.start,
        image_tokenizer=given.image_tokenizer,
        image_tokenizer_train=given.image_tokenizer_train,
        text_pieces=given.text_pieces,
    )
    device = usable_device(given.device)
    history = train_tokenizers(
        TrainTokenizers(
            given.data,
            given.out,
            preset,
            device=device,
            workers=given.workers,
            skip_bad=given.skip_bad,
            images_only=given.images_only,
        )
    )
    error = late_mean(history["reconstruction"])
    print(f"tokenizers trained, mean squared pixel error {error:.5f}; in {given.out}")
    if given.images_only:
        _say_next("train-clip-gen", "--data", given.data, "--clip", "CLIP", "--out", given.out)
        return
    _say_next("train", "--data", given.data, "--out", given.out, *["--skip-bad"] * given.skip_bad)


def tokenize(given: options.Tokenize) -> None:
    """``cogview tokenize``."""
    from cogview.data.rows import SKIPPED
    from cogview.data.tokenize import Tokenize, tokenize

    rows = tokenize(
        Tokenize(
            given.data,
            given.out,
            given.run,
            max_text_tokens=given.max_text_tokens,
            workers=given.workers,
            device=usable_device(given.device),
        )
    )
    head = rows.head
    print(f"{head.rows} rows of {head.images} images, {head.format.width} tokens each, in {given.out}")
    cut = head.captions.longer_than(given.max_text_tokens)
    if cut:
        print(f"{cut} captions are longer than {given.max_text_tokens} tokens and lost their end")
    if head.skipped:
        print(f"{head.skipped} left out; {given.out / SKIPPED} says why")
    _say_next("train", "--data", given.out, "--out", given.run)


def train(given: options.Train) -> None:
    """``cogview train``."""
    from cogview.run import sample_sheet
    from cogview.training import distributed
    from cogview.training.loop import late_mean
    from cogview.training.pipeline import TrainModel, train_model

    preset = dataclasses.replace(
        given.start,
        model=given.model,
        train=given.train,
        sampling=given.sampling,
        min_text_tokens=given.min_text_tokens,
        max_text_tokens=given.max_text_tokens,
    )
    device = usable_device(given.device)
    wanted = TrainModel(
        given.data,
        given.out,
        preset,
        device=device,
        draw=sample_sheet,
        workers=given.workers,
        skip_bad=given.skip_bad,
    )
    with distributed.joined_ranks(device):
        history = train_model(wanted)
        if not distributed.is_first():
            return
    image, text = late_mean(history["image_loss"]), late_mean(history["text_loss"])
    print(f"model trained: image loss {image:.3f}, text loss {text:.3f} nats")
    _say_next("generate", "--run", given.out, "a text", "--out", "out.png")


def finetune(given: options.Finetune) -> None:
    """``cogview finetune``."""
    from cogview.run import sample_sheet
    from cogview.training import distributed
    from cogview.training.finetune import STYLE_CAPTION, TASKS, Finetune
    from cogview.training.loop import late_mean

    names = ("steps", "batch_size", "learning_rate", "seed", "precision", "accumulate", "validation")
    device = usable_device(given.device)
    wanted = Finetune(
        given.run,
        given.data,
        given.out,
        train={name: getattr(given, name) for name in names if getattr(given, name) is not None},
        attention=given.attention,
        caption=given.caption or STYLE_CAPTION,
        device=device,
        # A model that learns to enlarge draws no pictures of texts.
        draw=None if given.task.endswith("super-resolution") else sample_sheet,
        workers=given.workers,
        skip_bad=given.skip_bad,
    )
    with distributed.joined_ranks(device):
        history = TASKS[given.task](wanted)
        if not distributed.is_first():
            return
    image, text = late_mean(history["image_loss"]), late_mean(history["text_loss"])
    print(f"finetuned for {given.task}: image loss {image:.3f}, text loss {text:.3f} nats")
    if given.task == "captioning":
        _say_next("caption", "--run", given.out, "photo.png")
    elif given.task.endswith("super-resolution"):
        _say_next("super-resolve", "--run", given.out, "picture.png", "--out", "large.png")
    else:
        _say_next("generate", "--run", given.out, "a text", "--out", "out.png")


def train_clip(given: options.TrainClip) -> None:
    """``cogview train-clip``."""
    from cogview.evaluation.retrieval import held_out, in_words, measure_retrieval
    from cogview.perception.clip import load_clip
    from cogview.training.clip import TrainClip, train_clip
    from cogview.training.loop import late_mean

    device = usable_device(given.device)
    history = train_clip(TrainClip(given.data, given.out, given.train, device=device))
    print(f"CLIP trained, loss {late_mean(history['loss']):.3f}; in {given.out}")
    for name, pairs in held_out(given.data).items():
        found = measure_retrieval(load_clip(given.out, device), pairs, given.train.image_size, device)
        print(f"{name}: {in_words(found)}")


def train_clip_gen(given: options.TrainClipGen) -> None:
    """``cogview train-clip-gen``."""
    from cogview.training.clip_gen import TrainClipGen, train_clip_gen
    from cogview.training.loop import late_mean

    device = usable_device(given.device)
    history = train_clip_gen(
        TrainClipGen(
            given.data,
            given.out,
            given.clip,
            given.model,
            train=given.train,
            sampling=given.sampling,
            device=device,
        )
    )
    print(f"CLIP-GEN trained: code loss {late_mean(history['code_loss']):.3f} nats")
    _say_next("clip-generate", "--run", given.out, "a text", "--out", "out.png")


def clip_generate(given: options.ClipGenerate) -> None:
    """``cogview clip-generate``."""
    from cogview.commands.clip_generate import draw_by_clip

    draw_by_clip(given)


def plan(given: options.Plan) -> None:
    """``cogview plan``."""
    from cogview.training.forecast import H100_TFLOPS, Cluster, Forecast, in_words

    tflops = H100_TFLOPS[given.train.precision] if given.tflops is None else given.tflops
    cluster = Cluster(given.gpus, given.memory, tflops, given.utilization, given.headroom)
    print(in_words(Forecast(given.model, given.train, cluster)))


def generate(given: options.Generate) -> None:
    """``cogview generate``."""
    from cogview.commands.generate import draw_pictures

    draw_pictures(given, given.texts)


def infill(given: options.Infill) -> None:
    """``cogview infill``."""
    from cogview.commands.generate import draw_pictures

    draw_pictures(given, [given.text], lambda run: run.kept_codes(given.image, given.mask, given.keep_top))


def super_resolve(given: options.SuperResolve) -> None:
    """``cogview super-resolve``."""
    from cogview.commands.super_resolve import super_resolve

    super_resolve(dataclasses.replace(given, images=_pictures_of(given.images)))


def caption(given: options.Caption) -> None:
    """``cogview caption``: a line for each picture as soon as it is described."""
    from cogview.progress import Progress
    from cogview.run import load_run

    images = _pictures_of(given.images)
    run = load_run(given.run, given.device, given.precision)
    with Progress(len(images), "describe", unit="image") as bar:
        captions = run.describe(images, beams=given.beams)
        for path, found in zip(images, captions, strict=True):
            if given.json:
                line = _json_line(file=str(path), text=found.text, cap_loss=found.loss)
            else:
                line = f"{in_one_line(path)}\t{in_one_line(found.text)}\tCapLoss {found.loss:.3f}"
            print(line, flush=True)
            bar.update()


def rerank(given: options.Rerank) -> None:
    """``cogview rerank``."""
    from cogview.run import load_run

    images = _pictures_of(given.images)
    losses = load_run(given.run, given.device, given.precision).cap_loss(given.text, images)
    ranked = sorted(zip(losses, images, strict=True), key=lambda pair: pair[0])
    for place, (loss, path) in enumerate(ranked, start=1):
        if given.json:
            print(_json_line(place=place, file=str(path), cap_loss=loss))
        else:
            print(f"{place}\t{in_one_line(path)}\tCapLoss {loss:.3f}")


def _require_apart(out: Path, runs: Sequence[Path], why: str) -> None:
    """ValueError if ``out`` is one of ``runs``, which are read."""
    for run in runs:
        if out.resolve() == run.resolve():
            raise ValueError(f"--out {out} is the run {run}, and {why}; name another --out")


def _pictures_of(paths: Sequence[Path]) -> tuple[Path, ...]:
    """The files without the sheets that ``drawn/*.png`` brings along.

    A wrong name is told before a model is loaded and other pictures are read.
    """
    from cogview.data.image_files import require_image_file, without_overviews

    for path in paths:
        require_image_file(path)
    pictures, overviews = without_overviews(paths)
    for path in overviews:
        why = "a sheet or plot of cogview beside the pictures; name it alone to have it read"
        print(f"left out: {in_one_line(path)}, {why}", file=sys.stderr)
    return tuple(pictures)


def _json_line(**values: Any) -> str:
    """One JSON object; a number that JSON does not have, such as NaN, is null."""
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
    return json.dumps(plain, ensure_ascii=False)


def serve(given: options.Serve) -> None:
    """``cogview serve``."""
    if given.vote:
        require_folder(given.out)
    from cogview.serving.server import serve as serve_page

    serve_page(given)


def evaluate(given: options.Evaluate) -> None:
    """``cogview evaluate``."""
    require_folder(given.out)
    if given.vote:
        _take_votes(given)
        return
    from cogview.commands.evaluate import Evaluate, evaluate, evaluation_table

    first, second = given.sets
    wanted = Evaluate(
        first,
        second,
        given.out,
        inception=given.inception,
        radii=given.blur,
        side=given.size,
        scorer=given.run,
        candidates=given.num,
        captions=given.captions,
        rebuild=given.rebuild,
        seed=given.seed,
        splits=given.splits,
        batch_size=given.batch_size,
        skip_bad=given.skip_bad,
        device=usable_device(given.device),
    )
    print(evaluation_table(evaluate(wanted), wanted))
    print(f"written: {given.out}")


def _take_votes(given: options.Evaluate) -> None:
    """Until all questions have a vote, or Ctrl-C, which is no mistake here."""
    from tabulate import tabulate

    from cogview.evaluation.vote import VOTES, Ballot
    from cogview.evaluation.vote_server import VoteServer

    with Ballot(given.sets, given.out, seed=given.seed) as ballot, VoteServer(ballot, given.port) as server:
        print(
            f"{len(ballot.questions)} questions: open {server.url} (Ctrl-C ends)",
            flush=True,
        )
        with contextlib.suppress(KeyboardInterrupt):
            server.finished.wait()
    if not ballot.votes:
        print(f"no votes yet: 0 of {len(ballot.questions)} questions answered")
        return
    rows = [
        (share.folder, share.votes, f"{share.share:.1%}", f"{share.low:.1%} to {share.high:.1%}")
        for share in ballot.shares()
    ]
    print(tabulate(rows, ["folder", "votes", "share", "95 % interval"]))
    print(f"{len(ballot.votes)} of {len(ballot.questions)} questions answered; in {given.out / VOTES}")


def presets(given: options.Presets) -> None:
    """``cogview presets``."""
    from cogview.presets import ABOUT, PRESETS
    from cogview.training.memory import MicroBatch, count_parameters, step_memory

    columns = f"{'preset':9} {'parameters':>12} {'text + image':>20} {'batch':>6} {'GiB: 1 row, all':>17}"
    print(f"{columns}  for")
    for name, preset in PRESETS.items():
        model, train = preset.model, preset.train
        row = f"{preset.min_text_tokens} + {preset.image_tokenizer.codes_per_image} tokens"
        size = 4 if train.precision == "fp32" else 2
        held = [
            step_memory(model, MicroBatch(rows, model.max_positions - 1, size, accumulates)).total / 2**30
            for rows, accumulates in ((1, True), (train.batch_size, False))
        ]
        memory = f"{held[0]:.2f}, {held[1]:,.1f}"
        parameters = f"{count_parameters(model).total / 1e6:,.1f} M"
        print(f"{name:9} {parameters:>12} {row:>20} {train.batch_size:6,} {memory:>17}  {ABOUT[name]}")
    print("memory: of tensors on one GPU, with one row at a time (--accumulate) or the whole batch at once;")
    print("        cogview plan --preset NAME tells it by part and for several GPUs, with the time")


def pack(given: options.Pack) -> None:
    """``cogview pack``."""
    from cogview.commands.pack import pack_run

    size = pack_run(given.run, given.out)
    print(f"{given.out} holds the run in {size / 2**20:.1f} MiB")
    _say_next("generate", "--run", given.out, "a text", "--out", "out.png")


def convert(given: options.Convert) -> None:
    """``cogview convert``."""
    from cogview.commands.convert import Convert, left_behind
    from cogview.commands.convert import convert as convert_weights

    names = [field.name for field in dataclasses.fields(given)]
    weights = convert_weights(Convert(**{name: getattr(given, name) for name in names}))
    of_ranks = f", {weights.ranks} ranks merged" if weights.ranks > 1 else ""
    print(f"converted: {given.out}, {len(weights.tensors)} tensors of {_article(weights.kind)}{of_ranks}")
    for note in left_behind(given.source) if given.text_tokenizer is None else ():
        print(f"note: {note}", file=sys.stderr)
    if given.text_tokenizer is not None:
        _say_next("generate", "--run", given.out, "a text", "--out", "out.png")


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def data(given: options.WriteData) -> None:
    """``cogview data``."""
    from cogview.data.emoji import ATTRIBUTION, LICENCE, EmojiPairs, is_held_out, pictures
    from cogview.data.export import write_folder

    chosen = [
        picture
        for picture in pictures(flags=given.flags, couples=given.couples)
        if picture.style == given.style
        and (given.part == "all" or is_held_out(picture) == (given.part == "held-out"))
    ]
    write_folder(EmojiPairs(chosen), given.out, given.size, ATTRIBUTION)
    print(f"{len(chosen)} pictures of {given.size} px in {given.out}; {LICENCE}, see ATTRIBUTION.txt there")
    _say_next("train-tokenizer", "--data", given.out, "--out", "runs/emoji")


def demo(given: options.Demo) -> None:
    """``cogview demo``."""
    require_folder(given.folder)
    device = usable_device(given.device)
    preset = _demo_preset(given, device)
    if given.data == "emoji":
        from cogview.demo.emoji import EmojiDemo, run_emoji_demo
        from cogview.demo.emoji import summary as emoji_summary

        report = run_emoji_demo(EmojiDemo(given.folder, given.seed, preset, device=device))
        print(emoji_summary(report, given.folder))
        _say_next("generate", "--run", given.folder, "a tiger", "--out", "tiger.png")
        return
    from cogview.demo.digits import Demo, run_demo
    from cogview.demo.report import summary

    print(summary(run_demo(Demo(given.folder, given.seed, preset, device=device)), given.folder))
    _say_next("generate", "--run", given.folder, "a handwritten seven", "--out", "seven.png")


def _demo_preset(given: options.Demo, device: str) -> Preset:
    from cogview.config import ThreeRegionConfig
    from cogview.demo.run import begun_precision
    from cogview.presets import default_preset, get_preset
    from cogview.training.precision import fast_precision

    preset = get_preset(given.preset) if given.preset else default_preset(given.data)
    if given.attention == "dense":
        three_region = None
    elif given.attention == "three-region":
        three_region = preset.model.three_region or ThreeRegionConfig()
    else:
        three_region = preset.model.three_region
    precision = given.precision or begun_precision(given.folder)
    if precision is None:
        precision = fast_precision(device) if given.data == "emoji" else preset.train.precision
    return dataclasses.replace(
        preset,
        model=dataclasses.replace(preset.model, three_region=three_region),
        train=dataclasses.replace(preset.train, precision=precision),
        image_tokenizer_train=dataclasses.replace(preset.image_tokenizer_train, precision=precision),
    )


def rank_curve(given: options.RankCurve) -> None:
    """``cogview rank-curve``."""
    from cogview.demo.ranking import Ranking, ranking_table, study_ranking

    require_folder(given.out)
    _require_apart(given.out, [given.run], "it keeps its own drawings there")
    names = ("run", "out", "captioner", "candidates", "prompts", "seed")
    asked = {name: getattr(given, name) for name in names}
    print(ranking_table(study_ranking(Ranking(**asked, device=usable_device(given.device)))))
    print(f"written: {given.out}/rank_curve.png, .csv and .json")


def judge_clip_gen(given: options.JudgeClipGen) -> None:
    """``cogview judge-clip-gen``."""
    from cogview.demo.clip_gen import ClipGenJudging, clip_gen_table
    from cogview.demo.clip_gen import judge_clip_gen as judge

    require_folder(given.out)
    runs = [*given.runs, *([given.captioner] if given.captioner else [])]
    _require_apart(given.out, runs, "its own report would be replaced")
    wanted = ClipGenJudging(
        given.runs,
        given.out,
        captioner=given.captioner,
        clip=given.clip,
        candidates=given.candidates,
        prompts_of_a_group=given.prompts,
        seed=given.seed,
        device=usable_device(given.device),
    )
    print(clip_gen_table(judge(wanted)))
    print(f"written: {given.out}/report.json, picks.png and runs/*/contact_sheet.png")


def study(given: options.Study) -> None:
    """``cogview study``."""
    require_folder(given.out)
    asked: dict[str, Any] = {
        "steps": given.steps,
        "learning_rate": given.learning_rate,
        "precision": given.precision,
    }
    changes = {name: value for name, value in asked.items() if value is not None}
    _STUDIES[given.name](given, changes)
    files = ".png, .csv and .json" if given.name in ("stability", "tokenizers") else ".png and .json"
    print(f"written: {given.out}/{given.name}{files}")


def _study_stability(given: options.Study, changes: dict[str, Any]) -> None:
    from cogview.evaluation.study import SIZES, StabilityStudy, finding, stability_table, study_stability

    size = dataclasses.replace(SIZES[given.size], **changes)
    seeds = given.seeds or STUDY_SEEDS
    records = study_stability(StabilityStudy(given.out, size, seeds, usable_device(given.device)))
    print(stability_table(records))
    print(finding(records))


def _study_tokenizers(given: options.Study, changes: dict[str, Any]) -> None:
    from cogview.evaluation import tokenizer_study as study

    size = study.SIZES[given.size]
    size = dataclasses.replace(size, train=dataclasses.replace(size.train, **changes))
    asked = study.TokenizerStudy(given.out, size, given.seeds or STUDY_SEEDS, usable_device(given.device))
    records = study.study_tokenizers(asked)
    print(study.tokenizer_table(records))
    print(study.tokenizer_finding(records))


def _study_vqgan(given: options.Study, changes: dict[str, Any]) -> None:
    from cogview.evaluation import vqgan_study as study

    preset = study.SIZES[given.size]
    training = dataclasses.replace(preset.image_tokenizer_train, **changes)
    preset = dataclasses.replace(preset, image_tokenizer_train=training)
    device = usable_device(given.device)
    print(study.vqgan_table(study.study_vqgan(study.VQGANStudy(given.out, preset, device))))


def _study_super_resolution(given: options.Study, _: dict[str, Any]) -> None:
    from cogview.commands import study_super_resolution as study

    asked = study.SuperResolutionStudy(given.runs, given.out, given.size, device=usable_device(given.device))
    print(study.super_resolution_table(study.study_super_resolution(asked)))


def _study_style(given: options.Study, _: dict[str, Any]) -> None:
    from cogview.demo import style

    asked = style.StyleStudy(given.runs, given.out, device=usable_device(given.device))
    print(style.style_table(style.study_style(asked)))


_STUDIES = {
    "stability": _study_stability,
    "tokenizers": _study_tokenizers,
    "vqgan": _study_vqgan,
    "super-resolution": _study_super_resolution,
    "style": _study_style,
}


def _say_next(*words: object) -> None:
    """The command to go on with, to be pasted as it is."""
    print("next: " + shlex.join([*_program(), *map(str, words)]))


def _program() -> list[str]:
    """How the shell finds this command: a virtual environment that is not activated is not on its path."""
    if shutil.which("cogview"):
        return ["cogview"]
    return [sys.argv[0]] if Path(sys.argv[0]).name == "cogview" else [sys.executable, "-m", "cogview"]
