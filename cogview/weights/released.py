# SPDX-License-Identifier: Apache-2.0
"""The files of CogView's authors: where they lie, how their tensors are called, how ranks become one model.

::

    cogview-base/
      latest_checkpointed_iteration.txt         the name of a folder: an iteration, or "release"
      20000/mp_rank_00_model_states.pt          "module": the tensors; beside it the state of a training
      20000/mp_rank_01_model_states.pt          only where the model was trained over several ranks

The tracker file of SwissArmyTransformer, the authors' later library, is called ``latest``, and its word
embeddings ``transformer.word_embeddings``. The image tokenizer is one file of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from cogview.files import StrPath
from cogview.weights.lazy import LazyTensor
from cogview.weights.model_parallel import merge, split_of
from cogview.weights.pickles import read_pickle

TRACKERS = ("latest_checkpointed_iteration.txt", "latest")
WORD_EMBEDDINGS = "word_embeddings.weight"
CODEBOOK = "quantize_t.embed"
QUERY_KEY_VALUE = "transformer.layers.0.attention.query_key_value.weight"

_RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_TRANSFORMER_NAME = re.compile(
    r"word_embeddings\.weight|transformer\.position_embeddings\.weight|transformer\.final_layernorm\.(weight|bias)"
    r"|transformer\.layers\.\d+\.(\w+_layernorm|attention\.(query_key_value|dense)|mlp\.dense_\w+)\.(weight|bias)"
)
_IMAGE_TOKENIZER_NAME = re.compile(r"(enc_b|dec)\.blocks\.\d+\.(weight|bias)|quantize_t\.\w+")
_VQGAN_NAME = re.compile(
    r"(encoder|decoder)\.(conv_in|conv_out|norm_out|mid\.\w+\.\w+|(down|up)\.\d+\.(block|attn)\.\d+\.\w+"
    r"|down\.\d+\.downsample\.conv|up\.\d+\.upsample\.conv)\.(weight|bias)"
    r"|(post_)?quant_conv\.(weight|bias)|quantize\.(embedding\.weight|cluster_size|embed_avg)|loss\..+"
)
KNOWN = (
    f"CogView ({WORD_EMBEDDINGS}, transformer.layers.0...), its form in SwissArmyTransformer "
    f"(transformer.{WORD_EMBEDDINGS}...), CogView's VQ-VAE (enc_b, quantize_t, dec) and the VQGAN of "
    "taming-transformers (encoder, quant_conv, quantize, post_quant_conv, decoder)"
)

Kind = Literal["transformer", "image tokenizer"]


@dataclass(frozen=True)
class Weights:
    """The tensors of one model under the names that this package uses, which are those of the original."""

    source: Path
    kind: Kind
    tensors: dict[str, LazyTensor]
    iteration: int | None = None  # steps of training, where the file tells
    ranks: int = 1  # how many model-parallel ranks the files were of


def known_kind(tensors: Mapping[str, object], source: StrPath) -> Kind:
    """What the names are those of. ValueError that shows the first unexpected names, and what is known."""
    kind: Kind = "transformer" if WORD_EMBEDDINGS in tensors else "image tokenizer"
    pattern = _TRANSFORMER_NAME
    if kind == "image tokenizer":
        pattern = _VQGAN_NAME if is_vqgan(tensors) else _IMAGE_TOKENIZER_NAME
    unexpected = [name for name in tensors if not pattern.fullmatch(name)]
    if unexpected or not tensors:
        raise ValueError(
            f"{source} holds an unknown architecture; known are {KNOWN}; "
            f"the first unexpected names are {unexpected[:3]}"
        )
    return kind


def is_vqgan(tensors: Iterable[str]) -> bool:
    """Whether these are names of a VQGAN of taming-transformers, rather than of CogView's VQ-VAE."""
    return any(name.startswith(("encoder.", "decoder.")) for name in tensors)


def read_released(path: StrPath) -> Weights:
    """The weights of a released file or folder, transformer or image tokenizer, all its ranks as one.

    Args:
        path: the ``.pt`` file (of any rank), its folder, or the folder with the tracker file.

    The files are pickles, of which nothing is run (see :mod:`cogview.weights.pickles`). A ``module.`` prefix
    and the names of SwissArmyTransformer become the original's; optimizer and random states are left out.

    Raises:
        FileNotFoundError: no such file or folder, or a rank is missing.
        ValueError: a file that is damaged or holds code, ranks that do not belong together, or an
            unknown architecture.
    """
    files = rank_files(Path(path))
    contents = [read_pickle(file) for file in files]
    states = [_state(content, file) for content, file in zip(contents, files, strict=True)]
    iterations = [_iteration(content, file) for content, file in zip(contents, files, strict=True)]
    for file, iteration in zip(files, iterations, strict=True):
        if iteration != iterations[0]:
            raise ValueError(
                f"the ranks are of different iterations: {files[0]} has {iterations[0]}, "
                f"{file} has {iteration}"
            )
    _require_alike(states, files)
    kind = known_kind(states[0], files[0])
    if kind == "transformer":
        _require_all_ranks(states[0], files)
    tensors = {name: merge([state[name] for state in states], split_of(name)) for name in states[0]}
    return Weights(Path(path), kind, tensors, iterations[0], len(files))


def rank_files(path: Path) -> list[Path]:
    """The files of all model-parallel ranks, in order: one file, where it is not named as a rank's."""
    if path.is_dir():
        folder = _tracked_folder(path)
    elif not path.is_file():
        raise FileNotFoundError(f"weights not found: {path}")
    elif _RANK_FILE.fullmatch(path.name):
        folder = path.parent
    else:
        return [path]
    found = {int(match[1]): file for file in folder.iterdir() if (match := _RANK_FILE.fullmatch(file.name))}
    for rank in range(max(found, default=0) + 1):
        if rank not in found:
            raise FileNotFoundError(f"{folder} has no mp_rank_{rank:02d}_model_states.pt")
    return [found[rank] for rank in sorted(found)]


def _tracked_folder(path: Path) -> Path:
    for name in TRACKERS:
        if (path / name).is_file():
            iteration = (path / name).read_text(errors="replace").strip()
            folder = path / iteration
            if not iteration or Path(iteration).name != iteration or not folder.is_dir():
                raise FileNotFoundError(
                    f"{path / name} names the folder {iteration[:80]!r}, which is not there"
                )
            return folder
    if not any(_RANK_FILE.fullmatch(file.name) for file in path.iterdir()):
        raise FileNotFoundError(
            f"{path} has neither {TRACKERS[0]} nor mp_rank_00_model_states.pt; give the .pt file itself"
        )
    return path


def _state(content: Any, file: Path) -> dict[str, LazyTensor]:
    """The tensors of a file under the original's names."""
    state = content
    for key in ("module", "state_dict"):  # of CogView's authors, and of PyTorch Lightning
        state = state.get(key, state) if isinstance(state, dict) else state
    is_state = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not is_state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{file} does not hold a state dict: names and tensors, itself or under 'module' or 'state_dict'"
        )
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    theirs = f"transformer.{WORD_EMBEDDINGS}"
    return {
        WORD_EMBEDDINGS if name == theirs else name: LazyTensor.of(tensor) for name, tensor in state.items()
    }


def _iteration(content: Any, file: Path) -> int | None:
    """Steps of training, as the file or else the name of its folder tells."""
    iteration = content.get("iteration")
    if isinstance(iteration, int):
        return iteration
    is_rank = _RANK_FILE.fullmatch(file.name) is not None
    return int(file.parent.name) if is_rank and file.parent.name.isdecimal() else None


def _require_alike(states: Sequence[Mapping[str, LazyTensor]], files: Sequence[Path]) -> None:
    """ValueError unless all ranks have the same names, shapes and dtypes."""
    for state, file in zip(states, files, strict=True):
        for name in sorted(states[0].keys() | state.keys()):
            here, there = state.get(name), states[0].get(name)
            if here is None or there is None:
                raise ValueError(f"{file if here is None else files[0]} lacks {name}, which another rank has")
            if (here.shape, here.dtype) != (there.shape, there.dtype):
                raise ValueError(
                    f"the ranks do not belong together: {name} is {list(there.shape)} {there.dtype} in "
                    f"{files[0]}, {list(here.shape)} {here.dtype} in {file}"
                )


def _require_all_ranks(state: Mapping[str, LazyTensor], files: Sequence[Path]) -> None:
    """Each rank has one N-th of the rows of the projection, which tells N."""
    if QUERY_KEY_VALUE not in state or len(state[QUERY_KEY_VALUE].shape) != 2:
        return  # What is missing is told when the model is compared with the names it should have.
    rows, width = state[QUERY_KEY_VALUE].shape
    if rows * len(files) != 3 * width:
        raise FileNotFoundError(
            f"{files[0].parent} has {len(files)} of {3 * width // max(rows, 1)} model-parallel ranks: "
            f"{QUERY_KEY_VALUE} has {rows} rows of {3 * width}; fetch all mp_rank_*_model_states.pt"
        )
