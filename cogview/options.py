# SPDX-License-Identifier: Apache-2.0
"""The options of each verb of the command ``cogview``: each is written once, and its help is read from here.

No PyTorch here, so that help and mistakes answer at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Fixed, FlagCreatePairsOff, Positional, Suppress, arg

from cogview.config import (
    MOST_PICTURES,
    MOST_PIXELS,
    STUDY_SEEDS,
    ClipGenTrainConfig,
    ClipTrainConfig,
    ImageTokenizerConfig,
    ImageTokenizerTrainConfig,
    ModelConfig,
    Preset,
    SamplingConfig,
    TrainConfig,
    TrainPrecision,
)


def _shown(metavar: str, default: str, about: str | None = None) -> Any:
    """How help shows an option whose default depends on something else; ``about`` it, if verbs share it."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {default})", help=about)


def _require_one(name: str, given: tuple) -> None:
    if not given:
        raise ValueError(f"at least one {name} is needed")


def _require_at_least(given: Any, **least: int) -> None:
    """ValueError for an option, by its name, that is given and below the least that it may be."""
    for name, smallest in least.items():
        value = getattr(given, name)
        if value is not None and not value >= smallest:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {smallest}, got {value}")


def _require_at_most(given: Any, **most: int) -> None:
    """ValueError for an option, by its name, that is given and above the most that it may be."""
    for name, largest in most.items():
        value = getattr(given, name)
        if value is not None and not value <= largest:
            raise ValueError(f"--{name.replace('_', '-')} must be at most {largest:,}, got {value:,}")


Data = Annotated[
    str,
    arg(
        metavar="DATA",
        help='a folder of images with captions.tsv (one "file<TAB>caption" per line) or captions.json '
        '({"file": "caption" or ["one", "two"]}); or the built-in "digits" or "emoji"',
    ),
]
PicturesOrRows = Annotated[
    str,
    arg(
        metavar="DATA",
        help="a folder of images with captions.tsv or captions.json; or the folder of rows that "
        '"cogview tokenize" wrote with the tokenizers of RUN; or "digits" or "emoji"',
    ),
]
PicturesOrShards = Annotated[
    str,
    arg(
        metavar="DATA",
        help="a folder of images with captions.tsv or captions.json; or WebDataset shards, such as "
        '"{00..49}.tar" or "pipe:zcat photos.tar.gz"; or "digits" or "emoji"',
    ),
]
Device = Annotated[str | None, _shown("DEVICE", "cuda where there is one", "cpu or cuda")]
PresetName = Annotated[str | None, _shown("NAME", "small; for built-in data, theirs")]
Start = Annotated[Preset, Fixed, Suppress]  # the preset that the other options began from
AttentionKind = Literal["dense", "three-region"]
Attention = Annotated[
    AttentionKind | None,
    _shown(
        "KIND",
        "the preset's",
        "dense or three-region; the sizes of the latter are --model.three-region...",
    ),
]
SettingsFile = Annotated[
    Path | None,
    _shown(
        "FILE",
        "none",
        "TOML file of any of these options, the nested ones in tables; the command line overrides it",
    ),
]
RunFolder = Annotated[Path, arg(metavar="RUN", help='run folder of "cogview train" or "cogview demo"')]
AnyRun = Annotated[
    Path | None,
    arg(
        metavar="RUN",
        help='run folder of "cogview train" or "cogview demo"',
        help_behavior_hint="(default: the one that ships, of emoji)",
    ),
]
Images = Positional[
    Annotated[
        tuple[Path, ...],
        arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="(required)", help="image files"),
    ]
]
Texts = Positional[
    Annotated[
        tuple[str, ...],
        arg(
            metavar="TEXT [TEXT ...]",
            help_behavior_hint="(required)",
            help="what to draw; several texts give several rows",
        ),
    ]
]


@dataclass(frozen=True)
class TrainTokenizer:
    """Learn to turn pictures and captions into tokens (first step of training)."""

    data: Data
    out: Annotated[Path, arg(metavar="RUN")]
    """run folder to write; an interrupted run goes on where it stopped"""
    image_tokenizer: ImageTokenizerConfig
    image_tokenizer_train: ImageTokenizerTrainConfig
    text_pieces: int
    """pieces of the text tokenizer, at most; fewer if the captions hold no more"""
    start: Start
    preset: PresetName = None
    """sizes and schedule; every other option overrides it"""
    kind: Annotated[Literal["vqvae", "vqgan"] | None, _shown("KIND", "the preset's")] = None
    """vqvae, or vqgan: perceptual and adversarial losses, several times the cost; its sizes are
    --image-tokenizer.vqgan... and --image-tokenizer-train.vqgan..."""
    settings: SettingsFile = None
    skip_bad: bool = False
    """leave out images that are not there or cannot be read, and list them in the run folder"""
    images_only: bool = False
    """learn from pictures alone, for "cogview train-clip-gen": no caption is read, a folder needs none"""
    workers: int = 0
    """processes that read images ahead of the training, 0 = none"""
    device: Device = None

    def __post_init__(self) -> None:
        if self.kind == "vqvae" and self.image_tokenizer.vqgan is not None:
            raise ValueError(f"--kind must be vqgan for the preset {self.start.name}, got vqvae")


@dataclass(frozen=True)
class Tokenize:
    """Turn pictures and captions into rows of tokens on disk (for data of any size)."""

    data: PicturesOrShards
    out: Annotated[Path, arg(metavar="ROWS")]
    """folder of rows to write; interrupted work goes on where it stopped"""
    run: Annotated[Path, arg(metavar="RUN")]
    """run folder of "cogview train-tokenizer", whose tokenizers are used"""
    max_text_tokens: int = 64
    """room for a text in a row, in tokens; a longer caption loses its end"""
    workers: int = 4
    """threads that read images"""
    device: Device = None


@dataclass(frozen=True)
class Train:
    """Train the transformer (second step, in the folder of the first).

    On the 8 GPUs of a machine, with the same options:
    torchrun --standalone --nproc-per-node 8 -m cogview train ...
    They share each batch, and another number of them can go on with the run.
    """

    data: PicturesOrRows
    out: Annotated[Path, arg(metavar="RUN")]
    """run folder that holds the tokenizers; an interrupted run goes on where it stopped"""
    model: ModelConfig
    train: TrainConfig
    sampling: SamplingConfig
    min_text_tokens: int
    """room for a text, in tokens, however short the captions are"""
    max_text_tokens: int
    """room for a text, in tokens, however long the captions are; a longer one loses its end"""
    start: Start
    preset: Annotated[str | None, _shown("NAME", "the one of the tokenizers")] = None
    """sizes and schedule; every other option overrides it"""
    attention: Attention = None
    settings: SettingsFile = None
    skip_bad: bool = False
    """leave out images that are not there or cannot be read, and list them in RUN/rows"""
    workers: int = 0
    """processes that make batches ahead of the training, 0 = none"""
    device: Device = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_positions"):
            if getattr(self.model, name) != getattr(self.start.model, name):
                option = name.replace("_", "-")
                raise ValueError(f"--model.{option} follows from tokenizers and captions; leave it out")


@dataclass(frozen=True)
class Finetune:
    """Train a run further for one task, into a new run folder.

    captioning: to describe pictures, and so to rank them (rows in image-to-text order alone).
    style: to draw in the style of some pictures, which all get the same caption; afterwards, ask for
    "a tiger of line drawing style". The paper took 1,000 pictures of each style.
    super-resolution: to enlarge pictures to twice the side, with "cogview super-resolve".
    local-super-resolution: the same by CogView2's local attention, a whole picture in six rounds.
    """

    task: Positional[
        Annotated[
            Literal["captioning", "style", "super-resolution", "local-super-resolution"],
            arg(metavar="captioning|style|super-resolution|local-super-resolution"),
        ]
    ]
    """what for"""
    run: Annotated[Path, arg(metavar="RUN")]
    """run folder to begin with, which stays as it is; of released weights, what "cogview convert" wrote"""
    data: PicturesOrRows
    out: Annotated[Path, arg(metavar="RUN2")]
    """run folder to write; an interrupted finetuning goes on where it stopped"""
    caption: Annotated[str, _shown("TEXT", "a picture of line drawing style")] = ""
    """style: the caption of every picture; its last words name the style"""
    steps: Annotated[int | None, _shown("INT", "a tenth of the run's")] = None
    """of the finetuning"""
    batch_size: Annotated[int | None, _shown("INT", "the run's")] = None
    """rows of a step"""
    learning_rate: Annotated[float | None, _shown("FLOAT", "0.3 of the run's")] = None
    """the highest, after the warm-up"""
    seed: Annotated[int | None, _shown("INT", "the run's")] = None
    """of everything random"""
    attention: Annotated[AttentionKind | None, _shown("KIND", "the run's")] = None
    """dense or three-region, while training"""
    precision: Annotated[Literal["fp32", "bf16", "fp16"] | None, _shown("KIND", "the run's")] = None
    """fp32, bf16 or fp16, of activations"""
    accumulate: Annotated[int | None, _shown("INT", "the run's")] = None
    """parts of a batch, one after another: less memory"""
    validation: Annotated[float | None, _shown("SHARE", "the run's")] = None
    """share of the images that is not trained on; its loss is told at each checkpoint"""
    skip_bad: bool = False
    """leave out images that are not there or cannot be read, and list them in RUN2/rows"""
    workers: int = 0
    """processes that make batches ahead of the training, 0 = none"""
    device: Device = None

    def __post_init__(self) -> None:
        if self.caption and self.task != "style":
            raise ValueError(f"--caption belongs to the task style; {self.task} reads the captions of --data")


@dataclass(frozen=True)
class Plan:
    """Predict the memory and the time of a training, before a machine is rented for it."""

    model: ModelConfig
    train: TrainConfig
    start: Start
    gpus: int = 1
    """GPUs that share the model and the rows of a batch"""
    memory: float = 80.0
    """GiB of each GPU"""
    tflops: Annotated[
        float | None, _shown("FLOAT", "an H100's: 790 in 16 bits as measured, 67 in fp32 by its data sheet")
    ] = None
    """TFLOP/s of large matrix products on one GPU, in the precision of the training"""
    utilization: float = 0.45
    """share of --tflops that a step reaches in its products and all that lies between them; an assumption"""
    headroom: float = 0.1
    """share of the memory that is left to the CUDA context, libraries and the allocator's own waste"""
    preset: Annotated[str | None, _shown("NAME", "small")] = None
    """sizes and schedule; every other option overrides it"""
    attention: Attention = None
    settings: SettingsFile = None


Flag = Annotated[FlagCreatePairsOff[bool], arg(help_behavior_hint="")]
Force = Annotated[FlagCreatePairsOff[bool], arg(help_behavior_hint="", help="replace files that exist")]


@dataclass(frozen=True)
class TrainClip:
    """Teach a small CLIP which text belongs to which picture (two frozen networks with a head each)."""

    data: Data
    out: Annotated[Path, arg(metavar="CLIP")]
    """folder to write; an interrupted training goes on where it stopped"""
    train: ClipTrainConfig = field(default_factory=ClipTrainConfig)
    device: Device = None


@dataclass(frozen=True)
class TrainClipGen:
    """Learn to draw what texts say from pictures alone, by way of CLIP (CLIP-GEN).

    RUN holds the image tokenizer of "cogview train-tokenizer", which needs --images-only where there are no
    captions. Draw with "cogview clip-generate".
    """

    data: Annotated[str, arg(metavar="DATA", help='a folder of images; or the built-in "digits" or "emoji"')]
    out: Annotated[Path, arg(metavar="RUN")]
    """run folder that holds the image tokenizer; an interrupted training goes on where it stopped"""
    clip: Annotated[Path, arg(metavar="CLIP")]
    """folder of "cogview train-clip", or of any CLIP that transformers saved"""
    model: ModelConfig
    sampling: SamplingConfig
    start: Start
    train: ClipGenTrainConfig = field(default_factory=ClipGenTrainConfig)
    preset: Annotated[str | None, _shown("NAME", "the one of the tokenizer")] = None
    """shape of the transformer and its sampling; every other option overrides it"""
    attention: Attention = None
    device: Device = None


@dataclass(frozen=True)
class ClipGenerate:
    """Draw pictures for texts by a run of "cogview train-clip-gen", which has learned from pictures alone."""

    texts: Texts
    run: Annotated[Path, arg(metavar="RUN")]
    """run folder, as "cogview train-clip-gen" leaves it"""
    out: Annotated[str, arg(metavar="PATH")] = "out.png"
    """a .png file for one sheet; a folder (a name without an ending) for a PNG of each picture and the sheet;
    or - for standard output"""
    num: int = 16
    """pictures per text"""
    seed: int = 0
    """another seed, other pictures"""
    temperature: Annotated[float | None, _shown("FLOAT", "the run's")] = None
    """below 1 safer, above 1 wilder, 0 always the likeliest code"""
    top_k: Annotated[int | None, _shown("INT", "the run's")] = None
    """draw among the k likeliest codes, 0 = all"""
    rank: Literal["clip", "cap-loss", "both"] = "clip"
    """best first by CLIP's cosine, by the CapLoss of --captioner, or by the sum of both places"""
    captioner: Annotated[Path | None, _shown("RUN2", "none")] = None
    """run of "cogview train" that tells CapLoss"""
    clip: Annotated[Path | None, _shown("CLIP", "the one that the run was trained with")] = None
    """where that CLIP lies now"""
    force: Force = False
    device: Device = None

    def __post_init__(self) -> None:
        _require_one("TEXT", self.texts)
        _require_at_least(self, num=1)
        _require_at_most(self, num=MOST_PICTURES)
        if (self.rank == "clip") != (self.captioner is None):
            needs = "needs" if self.captioner is None else "has no use for"
            raise ValueError(f"--rank {self.rank} {needs} --captioner")


PrecisionName = Annotated[
    Literal["fp32", "bf16", "fp16", "int8"],
    _shown(
        "fp32|bf16|fp16|int8",
        "fp32",
        "of the transformer; int8 stores the weights of its linear layers in 8 bits and needs torchao",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What every verb that draws pictures takes."""

    run: AnyRun = None
    out: Annotated[str, arg(metavar="PATH")] = "out.png"
    """a .png file for one sheet; a folder (a name without an ending) for a PNG of each picture, its text and
    seed within, and the sheet; or - for standard output"""
    num: int = 16
    """pictures per text"""
    seed: int = 0
    """another seed, other pictures; any whole number"""
    temperature: Annotated[float | None, _shown("FLOAT", "the run's")] = None
    """below 1 safer, above 1 wilder, 0 always the likeliest code"""
    top_k: Annotated[int | None, _shown("INT", "the run's")] = None
    """draw among the k likeliest codes, 0 = all"""
    top_p: Annotated[float | None, _shown("FLOAT", "the run's")] = None
    """draw among codes of total probability p, 0 = all"""
    guidance: Annotated[float | None, _shown("FLOAT", "the run's")] = None
    """above 1 the text counts for more, in twice the time; for a run trained with --train.text-dropout"""
    parallel: int = 1
    """codes that a step tries at once: the same pictures in fewer, larger steps"""
    max_batch: int = 256
    """pictures that are drawn together at most; fewer where memory is short"""
    no_rerank: Flag = False
    """keep the order of drawing instead of best first"""
    stream: Flag = False
    """write the sheet after each row of codes as well, to watch the pictures appear"""
    json: Flag = False
    """print one JSON document: each picture's text, seed, number and CapLoss, time and memory"""
    verbose: Flag = False
    """print the memory of weights and cache, on standard error"""
    force: Force = False
    precision: PrecisionName = "fp32"
    device: Device = None

    def __post_init__(self) -> None:
        _require_at_least(self, num=1, parallel=1, max_batch=1, guidance=0)
        _require_at_most(self, num=MOST_PICTURES)
        if not self.out:
            raise ValueError(
                "--out must be a .png file, a folder or - for standard output, got an empty name"
            )
        if self.json and self.out == "-":
            raise ValueError("--json and --out - both mean standard output; leave out one of them")
        if self.stream and self.out == "-":
            raise ValueError("--stream needs a file to write anew, got --out -")


@dataclass(frozen=True, kw_only=True)
class Generate(Drawing):
    """Draw pictures for texts."""

    texts: Texts

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_one("TEXT", self.texts)


@dataclass(frozen=True, kw_only=True)
class Infill(Drawing):
    """Draw a part of a picture anew."""

    text: Positional[Annotated[str, arg(metavar="TEXT")]]
    """what the whole picture shows"""
    image: Positional[Annotated[Path, arg(metavar="IMAGE")]]
    """the picture of which a part is kept"""
    mask: Annotated[Path | None, _shown("FILE", "none")] = None
    """a picture that is white where to draw anew and black where to keep"""
    keep_top: Annotated[float | None, _shown("SHARE", "none")] = None
    """instead of a mask: the share of the picture's height that is kept, from its top"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.mask is None) == (self.keep_top is None):
            raise ValueError("either --mask or --keep-top is needed, and not both")
        if self.keep_top is not None and not 0 <= self.keep_top < 1:
            raise ValueError(
                f"--keep-top must be at least 0 and below 1 (0.5 is the upper half), got {self.keep_top:g}"
            )


@dataclass(frozen=True)
class SuperResolve:
    """Draw pictures anew at twice the side.

    The run is one of "cogview finetune super-resolution", which enlarges by nine windows that overlap by
    half, or of "cogview finetune local-super-resolution". Best are pictures that the run drew with which it
    began.
    """

    images: Images
    run: RunFolder
    out: Annotated[str, arg(metavar="PATH")] = "large.png"
    """a .png file for one sheet; a folder (a name without an ending) for a PNG of each picture and the sheet;
    or - for standard output"""
    text: Annotated[str, _shown("TEXT", "none")] = ""
    """what the pictures show"""
    from_half: Flag = False
    """read the pictures at half the run's size, and draw them at the run's size, each as one window"""
    compare: Flag = False
    """take the pictures for the truth: shrink them first, and tell the PSNR beside that of bicubic scaling"""
    seed: int = 0
    """another seed, other details"""
    temperature: Annotated[float | None, _shown("FLOAT", "the run's")] = None
    """below 1 safer, 0 always the likeliest code"""
    parallel: int = 1
    """codes that a step tries at once: the same pictures in fewer, larger steps"""
    max_batch: int = 256
    """pictures that are drawn together at most; fewer where memory is short"""
    force: Force = False
    precision: PrecisionName = "fp32"
    device: Device = None

    def __post_init__(self) -> None:
        _require_one("IMAGE", self.images)
        _require_at_least(self, parallel=1, max_batch=1)
        if self.compare and self.out == "-":
            raise ValueError("--compare and --out - both mean standard output; leave out one of them")


@dataclass(frozen=True)
class Caption:
    """Describe pictures in words."""

    images: Images
    run: AnyRun = None
    beams: int = 1
    """texts that are followed at a time in search of the likeliest; 1 takes the likeliest token each time"""
    json: Flag = False
    """print a JSON object a picture"""
    precision: PrecisionName = "fp32"
    device: Device = None

    def __post_init__(self) -> None:
        _require_one("IMAGE", self.images)
        _require_at_least(self, beams=1)


@dataclass(frozen=True)
class Rerank:
    """Order pictures by how well a text describes them."""

    text: Positional[Annotated[str, arg(metavar="TEXT")]]
    """the text to compare with"""
    images: Images
    run: AnyRun = None
    json: Flag = False
    """print a JSON object a picture"""
    precision: PrecisionName = "fp32"
    device: Device = None

    def __post_init__(self) -> None:
        _require_one("IMAGE", self.images)


@dataclass(frozen=True)
class Serve:
    """Open a page in the browser: draw, describe, paint over.

    The page is for this machine alone, unless --host says otherwise: then the address that is printed holds
    a token, without which nobody gets in.
    """

    run: AnyRun = None
    enlarger: Annotated[Path | None, _shown("RUN2", "none")] = None
    """run of "cogview finetune super-resolution" or "local-super-resolution" that enlarges what is drawn"""
    vote: Annotated[tuple[Path, ...], _shown("A B [C ...]", "none")] = ()
    """folders of pictures to vote on in a tab of the page, as with cogview evaluate --vote"""
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("evaluation")
    """folder of the votes"""
    host: str = "127.0.0.1"
    """address to serve at; 0.0.0.0 is all of this machine's, for others too"""
    port: int = 8766
    """0 takes a free one"""
    open: Flag = False
    """open the page in a browser, where there is a screen"""
    precision: PrecisionName = "fp32"
    device: Device = None

    def __post_init__(self) -> None:
        if len(self.vote) == 1:
            raise ValueError("--vote compares two folders or more, got 1")
        _require_port(self.port)


def _require_port(port: int) -> None:
    if not 0 <= port < 1 << 16:
        raise ValueError(f"--port must be from 0 to 65535, got {port}")


@dataclass(frozen=True)
class Evaluate:
    """Compare two sets of pictures, or what a run draws with a set.

    A set is a folder of pictures, or the statistics of one that were saved before (reference.safetensors). A
    run draws a picture for each caption of the other folder, and describes its pictures.

    With --vote, people compare: a page on this machine shows what several folders have of one text, in random
    order, and keeps what is chosen by a click or by the number's key.
    """

    sets: Positional[Annotated[tuple[Path, ...], arg(metavar="A B [C ...]", help_behavior_hint="(required)")]]
    """A: a folder of pictures, their statistics, or a run; B: a folder of pictures, or their statistics"""
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("evaluation")
    """folder for the figures (CSV, JSON, plot), the statistics of B, what a run draws, and votes"""
    inception: Annotated[Path | None, _shown("FILE", "EfficientNet-Lite0, which gives no FID")] = None
    """weights of the network that defines the FID and the Inception Score, as pytorch-fid and torch-fidelity
    publish them"""
    blur: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0)
    """both sets are blurred by so many pixels; the paper's radii"""
    size: Annotated[int | None, _shown("INT", "that of the pictures, which must have one")] = None
    """side of the squares, in pixels, to which all pictures are scaled and cropped"""
    run: Annotated[Path | None, _shown("RUN", "A, if that is a run")] = None
    """run that tells CapLoss of sets with captions"""
    num: int = 1
    """pictures that the run A draws of each caption, of which the best by CapLoss is taken"""
    captions: Annotated[int | None, _shown("INT", "all")] = None
    """captions of B that the run A draws, and pictures that it describes, at most"""
    vote: Flag = False
    """serve a page that takes votes on the pictures of two or more folders"""
    port: int = 8765
    """of that page, on this machine alone; 0 takes a free one"""
    rebuild: Flag = False
    """the run A passes the pictures of B through its image tokenizer, which bounds what it can draw"""
    seed: int = 0
    """of what the run A draws, and of the order in which --vote shows pictures"""
    splits: int = 10
    """parts of the set over which the Inception Score is averaged"""
    batch_size: int = 32
    """pictures that the network sees together"""
    skip_bad: bool = False
    """leave out pictures that cannot be read, and list them"""
    device: Device = None

    def __post_init__(self) -> None:
        if self.vote and len(self.sets) < 2:
            raise ValueError(f"--vote compares two folders or more, got {len(self.sets)}")
        if not self.vote and len(self.sets) != 2:
            raise ValueError(f"two sets are compared, A and B, got {len(self.sets)}; --vote takes more")
        _require_port(self.port)
        _require_at_least(self, num=1, splits=1, batch_size=1, captions=1, size=1)
        _require_at_most(self, num=MOST_PICTURES, size=MOST_PIXELS)
        if not all(0 <= radius < 1000 for radius in self.blur):
            raise ValueError(f"--blur must be pixels from 0 to 1000, got {self.blur}")


@dataclass(frozen=True)
class Presets:
    """List the presets: parameters, tokens, memory, and what each is for."""


@dataclass(frozen=True)
class Pack:
    """Write a run without what only training needs, its weights in bfloat16, to hand on."""

    run: RunFolder
    out: Annotated[Path, arg(metavar="NEW")]
    """run folder to write, which must not exist yet"""


@dataclass(frozen=True)
class Convert:
    """Bring released weights into a run or a safetensors file, and back."""

    source: Positional[Annotated[Path, arg(metavar="SOURCE")]]
    """released .pt file, or its folder (all ranks become one model); or safetensors, or a run folder"""
    out: Annotated[Path, arg(metavar="TARGET")]
    """run folder to write, with both tokenizers; else a .safetensors file, or what --to says"""
    to: Literal["safetensors", "original"] = "safetensors"
    """original writes the released format, for the programs of CogView's authors"""
    text_tokenizer: Annotated[Path | None, _shown("FILE", "none")] = None
    """SentencePiece model that belongs to the transformer"""
    image_tokenizer: Annotated[Path | None, _shown("FILE", "none")] = None
    """VQ-VAE that belongs to the transformer, .pt or .safetensors"""
    num_heads: Annotated[int | None, _shown("INT", "heads of 64, as the released models have")] = None
    """attention heads, which the tensors do not tell"""
    image_size: int = 256
    """side of the pictures in pixels, which the tensors do not tell"""
    ranks: int = 1
    """model-parallel ranks to split the original's format into"""

    def __post_init__(self) -> None:
        _require_at_least(self, num_heads=1, image_size=1, ranks=1)


@dataclass(frozen=True)
class WriteData:
    """Write built-in pictures and their captions into a folder, to look at them or to train on a part."""

    name: Positional[Annotated[Literal["emoji"], arg(metavar="emoji")]]
    """emoji: OpenMoji's drawings, CC BY-SA 4.0"""
    out: Annotated[Path, arg(metavar="FOLDER")]
    """folder to write: PNG files, captions.tsv and ATTRIBUTION.txt; it must not exist"""
    size: int = 64
    """side of the pictures in pixels"""
    style: Literal["color", "line"] = "color"
    """color, or line for the outlines alone"""
    part: Literal["all", "training", "held-out"] = "all"
    """training leaves out, and held-out is, what --data emoji holds back: some skin tones of some drawings,
    some line drawings"""
    flags: Flag = False
    """the flags of regions as well, which --data emoji leaves out"""
    couples: Flag = False
    """pictures with a skin tone for each of two persons as well, which --data emoji leaves out"""

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 4096:
            raise ValueError(f"--size must be from 1 to 4096 pixels, got {self.size}")


@dataclass(frozen=True)
class Demo:
    """Learn to draw built-in pictures from scratch and show the result."""

    data: Literal["digits", "emoji"] = "digits"
    """digits: handwritten ones, a few minutes; emoji: OpenMoji's drawings, an hour or two"""
    out: Annotated[Path | None, _shown("RUN", "runs/demo; runs/pictures for emoji")] = None
    """folder to write; an interrupted demo goes on where it stopped"""
    preset: Annotated[Literal["digits", "emoji", "emoji-64"] | None, _shown("NAME", "that of the data")] = (
        None
    )
    """sizes and schedule: emoji-64 is for one GPU"""
    attention: Annotated[AttentionKind | None, _shown("KIND", "the preset's")] = None
    """dense or three-region"""
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        _shown("KIND", "for the emoji bf16 on a GPU or a CPU with matrix units, else fp32"),
    ] = None
    """of the activations while image tokenizer and transformer are trained"""
    seed: int = 0
    """of everything random"""
    device: Device = None

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset.partition("-")[0] != self.data:
            raise ValueError(f"--preset {self.preset} is not made for --data {self.data}")

    @property
    def folder(self) -> Path:
        """The folder to write."""
        return self.out or Path("runs/pictures" if self.data == "emoji" else "runs/demo")


@dataclass(frozen=True)
class RankCurve:
    """Show how much ranking by CapLoss gains with the number of candidates (the paper's figure 9).

    Prompts in phrasings that training never saw are drawn many times. Then the best of 1, 2, 4 ... is picked
    by CapLoss, by chance, and by the judge itself. For each, the share that is right and the Frechet distance
    from real pictures are told.
    """

    run: Annotated[Path, arg(metavar="RUN")]
    """run on the built-in digits or emoji, which a judge can read"""
    out: Annotated[Path, arg(metavar="FOLDER")]
    """folder to write; what is drawn is kept, so that the same command goes on"""
    captioner: Annotated[Path | None, _shown("RUN2", "none")] = None
    """run of "cogview finetune captioning" that ranks the same candidates as well"""
    candidates: int = 60
    """pictures of each prompt"""
    prompts: int = 120
    """texts that are drawn, at most"""
    seed: int = 0
    """of everything random"""
    device: Device = None

    def __post_init__(self) -> None:
        _require_at_least(self, candidates=1, prompts=2)
        _require_at_most(self, candidates=MOST_PICTURES)


@dataclass(frozen=True)
class JudgeClipGen:
    """Let a judge read what runs of CLIP-GEN draw for words, beside a CogView that was taught with captions.

    Held-out combinations of a drawing and a skin tone are asked for, and drawings that training saw. Of the
    candidates, one is picked by CLIP's cosine, by the CapLoss of --captioner, by both, and at random. The
    share that is right is told for each, and how far texts lie from pictures in the space of CLIP.
    """

    runs: Positional[
        Annotated[tuple[Path, ...], arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)")]
    ]
    """runs of "cogview train-clip-gen" on the emoji, such as one with and one without --embedding-loss"""
    out: Annotated[Path, arg(metavar="FOLDER")]
    """folder to write; what is drawn is kept, so that the same command goes on, with more runs too"""
    captioner: Annotated[Path | None, _shown("RUN2", "none")] = None
    """run of "cogview train" on the emoji, which ranks by CapLoss, and draws the same prompts"""
    clip: Annotated[Path | None, _shown("CLIP", "the one that each run was trained with")] = None
    """where that CLIP lies now"""
    candidates: int = 16
    """pictures of each prompt"""
    prompts: Annotated[int | None, _shown("INT", "all")] = None
    """texts of each of the two groups, at most"""
    seed: int = 0
    """of everything random"""
    device: Device = None

    def __post_init__(self) -> None:
        _require_one("RUN", self.runs)
        _require_at_least(self, candidates=1, prompts=2)
        _require_at_most(self, candidates=MOST_PICTURES)


STUDIES_OF_RUNS = ("super-resolution", "style")  # they train nothing


@dataclass(frozen=True)
class Study:
    """Repeat an experiment of the paper and show what came out."""

    name: Positional[
        Annotated[
            Literal["stability", "tokenizers", "vqgan", "super-resolution", "style"],
            arg(metavar="stability|tokenizers|vqgan|super-resolution|style"),
        ]
    ]
    """stability: what keeps a deep training in float16 from overflowing; tokenizers: whether four ways to
    train an image tokenizer come to the same, even one with a fixed codebook; vqgan: a VQGAN beside a VQ-VAE
    of as many codes, one training each (small: digits, paper: emoji); super-resolution: what --runs make of
    held-out pictures (small: digits, paper: emoji), with nothing trained; style: whether --runs draw emoji as
    lines that training saw in colour alone, with nothing trained"""
    out: Annotated[Path, arg(metavar="FOLDER")]
    """folder to write; an interrupted study goes on after the last finished training"""
    size: Literal["small", "paper"] = "small"
    """small: minutes on two CPU cores; paper: for a GPU (stability: 64 layers x 1,024)"""
    seeds: Annotated[int | None, _shown("INT", f"{STUDY_SEEDS}; vqgan: 1, and no other")] = None
    """trainings of each variant"""
    steps: Annotated[int | None, _shown("INT", "the size's")] = None
    """of each training, unless it overflows before"""
    learning_rate: Annotated[float | None, _shown("FLOAT", "the size's")] = None
    """from the first step to the last"""
    precision: Annotated[TrainPrecision | None, _shown("{fp32,bf16,fp16}", "fp32")] = None
    """tokenizers, vqgan: of activations; weights are always fp32"""
    runs: Annotated[tuple[Path, ...], _shown("RUN [RUN ...]", "none")] = ()
    """super-resolution: what "cogview finetune super-resolution" and "local-super-resolution" wrote; style:
    a run on the emoji, and what "cogview finetune style" made of it"""
    device: Device = None

    def __post_init__(self) -> None:
        if bool(self.runs) != (self.name in STUDIES_OF_RUNS):
            raise ValueError(f"--runs must be given for {' and '.join(STUDIES_OF_RUNS)}, and for them alone")
        numbers = ("seeds", "steps", "learning_rate")
        for option in (*numbers, "precision"):
            value = getattr(self, option)
            if value is not None and self.name in STUDIES_OF_RUNS:
                raise ValueError(f"--{option.replace('_', '-')} belongs to a study that trains; leave it out")
            if value is not None and option in numbers and not 0 < value < math.inf:
                option = option.replace("_", "-")
                raise ValueError(f"--{option} must be above 0 and finite, got {value}")
        if self.name == "stability" and self.precision is not None:
            raise ValueError("--precision does not belong to stability, which is about float16; leave it out")
        if self.name == "vqgan" and self.seeds not in (None, 1):
            raise ValueError(
                f"--seeds must be 1 for vqgan, which trains each once, got {self.seeds}; leave it out"
            )
