# SPDX-License-Identifier: Apache-2.0
"""The options of each verb of the command ``cogview``: each is written once, and its help is read from here.

No PyTorch here, so that help and mistakes answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Fixed, FlagCreatePairsOff, Positional, Suppress, arg

from cogview.config import (
    ImageTokenizerConfig,
    ImageTokenizerTrainConfig,
    ModelConfig,
    Preset,
    SamplingConfig,
    TrainConfig,
)


def _shown(metavar: str, default: str) -> Any:
    """How the help shows an option whose default depends on something else."""
    return arg(metavar=metavar, help_behavior_hint=default and f"(default: {default})")


def _require_one(name: str, given: tuple) -> None:
    if not given:
        raise ValueError(f"at least one {name} is needed")


Data = Annotated[
    str,
    arg(
        metavar="DATA",
        help='a folder of images with captions.tsv (one "file<TAB>caption" per line) or captions.json '
        '({"file": "caption" or ["one", "two"]}); or "digits", the built-in handwritten digits',
    ),
]
PicturesOrRows = Annotated[
    str,
    arg(
        metavar="DATA",
        help="a folder of images with captions.tsv or captions.json; or the folder of rows that "
        '"cogview tokenize" wrote with the tokenizers of RUN; or "digits"',
    ),
]
PicturesOrShards = Annotated[
    str,
    arg(
        metavar="DATA",
        help="a folder of images with captions.tsv or captions.json; or WebDataset shards, such as "
        '"photos-{000..499}.tar" or "pipe:zcat photos.tar.gz"; or "digits"',
    ),
]
Device = Annotated[str | None, _shown("DEVICE", "cuda where there is one")]
PresetName = Annotated[str | None, _shown("NAME", 'small; for the data "digits", digits')]
Start = Annotated[Preset, Fixed, Suppress]  # the preset that the other options began from
Attention = Annotated[Literal["dense", "three-region"] | None, _shown("KIND", "the preset's")]
SettingsFile = Annotated[Path | None, _shown("FILE", "none")]
RunFolder = Annotated[Path, arg(metavar="RUN", help='run folder of "cogview train" or "cogview demo"')]
Images = Positional[
    Annotated[tuple[Path, ...], arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="(required)")]
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
    settings: SettingsFile = None
    """TOML file of any of these options, the nested ones in tables; the command line overrides it"""
    skip_bad: bool = False
    """leave out images that are not there or cannot be read, and list them in the run folder"""
    workers: int = 0
    """processes that read images ahead of the training, 0 = none"""
    device: Device = None
    """cpu or cuda"""


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
    """cpu or cuda"""


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
    """dense or three-region; the sizes of the latter are --model.three-region..."""
    settings: SettingsFile = None
    """TOML file of any of these options, the nested ones in tables; the command line overrides it"""
    skip_bad: bool = False
    """leave out images that are not there or cannot be read, and list them in RUN/rows"""
    workers: int = 0
    """processes that make batches ahead of the training, 0 = none"""
    device: Device = None
    """cpu or cuda"""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_positions"):
            if getattr(self.model, name) != getattr(self.start.model, name):
                option = name.replace("_", "-")
                raise ValueError(f"--model.{option} follows from tokenizers and captions; leave it out")


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
    """dense or three-region; the sizes of the latter are --model.three-region..."""
    settings: SettingsFile = None
    """TOML file of any of these options, the nested ones in tables; the command line overrides it"""


@dataclass(frozen=True)
class Generate:
    """Draw pictures for texts."""

    texts: Positional[
        Annotated[tuple[str, ...], arg(metavar="TEXT [TEXT ...]", help_behavior_hint="(required)")]
    ]
    """what to draw; several texts give several rows"""
    run: RunFolder
    out: Annotated[Path, arg(metavar="FILE")] = Path("out.png")
    """PNG to write"""
    num: int = 16
    """pictures per text"""
    seed: int = 0
    """another seed, other pictures"""
    temperature: Annotated[float | None, _shown("FLOAT", "the run's")] = None
    """below 1 safer, above 1 wilder"""
    top_k: Annotated[int | None, _shown("INT", "the run's")] = None
    """draw among the k likeliest codes, 0 = all"""
    top_p: Annotated[float | None, _shown("FLOAT", "the run's")] = None
    """draw among codes of total probability p, 0 = all"""
    no_rerank: Annotated[FlagCreatePairsOff[bool], arg(help_behavior_hint="")] = False
    """keep the order of drawing instead of best first"""
    device: Device = None
    """cpu or cuda"""

    def __post_init__(self) -> None:
        _require_one("TEXT", self.texts)
        if self.num < 1:
            raise ValueError(f"--num must be at least 1, got {self.num}")


@dataclass(frozen=True)
class Caption:
    """Describe pictures in words."""

    images: Images
    """image files"""
    run: RunFolder
    device: Device = None
    """cpu or cuda"""

    def __post_init__(self) -> None:
        _require_one("IMAGE", self.images)


@dataclass(frozen=True)
class Rerank:
    """Order pictures by how well a text describes them."""

    text: Positional[Annotated[str, arg(metavar="TEXT")]]
    """the text to compare with"""
    images: Images
    """image files"""
    run: RunFolder
    device: Device = None
    """cpu or cuda"""

    def __post_init__(self) -> None:
        _require_one("IMAGE", self.images)


@dataclass(frozen=True)
class Presets:
    """List the presets: parameters, tokens, memory, and what each is for."""


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
        for name in ("num_heads", "image_size", "ranks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


@dataclass(frozen=True)
class Demo:
    """Learn to draw handwritten digits from scratch and show the result."""

    out: Annotated[Path, arg(metavar="RUN")] = Path("runs/demo")
    """folder to write; an interrupted demo goes on where it stopped"""
    seed: int = 0
    """of everything random"""
    device: Device = None
    """cpu or cuda"""


@dataclass(frozen=True)
class Study:
    """Repeat an experiment of the paper and show what came out."""

    name: Positional[Annotated[Literal["stability"], arg(metavar="stability")]]
    """stability: what keeps a deep training in float16 from overflowing"""
    out: Annotated[Path, arg(metavar="FOLDER")]
    """folder to write; an interrupted study goes on after the last finished training"""
    size: Literal["small", "paper"] = "small"
    """small: 24 layers x 64, minutes on two CPU cores; paper: 64 layers x 1,024, for a GPU"""
    seeds: int = 3
    """trainings of each variant"""
    steps: Annotated[int | None, _shown("INT", "the size's")] = None
    """of each training, unless it overflows before"""
    learning_rate: Annotated[float | None, _shown("FLOAT", "the size's")] = None
    """from the first step to the last"""
    device: Device = None
    """cpu or cuda"""

    def __post_init__(self) -> None:
        for option in ("seeds", "steps", "learning_rate"):
            value = getattr(self, option)
            if value is not None and value <= 0:
                raise ValueError(f"--{option.replace('_', '-')} must be above 0, got {value}")
