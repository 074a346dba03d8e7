# SPDX-License-Identifier: Apache-2.0
"""What a file of ``torch.save`` holds, read without running anything that the file names.

A pickle is a program: it may call any function that it names. PyTorch's restricted unpickler
(``weights_only=True``) knows tensors and plain containers, and refuses every other name. The files of a
training, however, carry its optimizer and random states too, with classes of DeepSpeed, apex or NumPy.
Here each name that the restricted unpickler does not know is given to it as :class:`Skipped`, which keeps
nothing and does nothing. So no foreign function is called, nor is its module imported.
"""

from __future__ import annotations

import pickle
import re
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from cogview.files import require_readable

_ZIP = b"PK\x03\x04"  # How a file of torch.save begins since PyTorch 1.6.
# Modules of the standard library with data types that a training's state may hold. Any other name of the
# standard library is a function that such a file has no honest use for.
_DATA_MODULES = {
    *("_codecs", "argparse", "collections", "copyreg", "copy_reg", "datetime", "decimal", "enum"),
    *("fractions", "functools", "pathlib", "random", "types", "uuid"),
}
_DATA_TYPES = {
    "bytearray",
    "complex",
    "dict",
    "frozenset",
    "list",
    "object",
    "range",
    "set",
    "slice",
    "tuple",
}


class Skipped:
    """Stands for an object of a pickle whose class is not known here; takes any state and keeps none."""

    def __new__(cls, *args: object, **kwargs: object) -> Skipped:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _is_code(name: str) -> bool:
    """Whether a name in a pickle can only be meant to be run."""
    module, _, attribute = name.rpartition(".")
    root = module.partition(".")[0]
    if root in ("builtins", "__builtin__"):
        return attribute not in _DATA_TYPES
    return (root in sys.stdlib_module_names or root == "nt") and root not in _DATA_MODULES


def read_pickle(path: Path) -> Any:
    """The content of a file of ``torch.save``, its tensors on the CPU and mapped from the file.

    A mapped tensor takes memory only where it is read. (Files of PyTorch 1.5 and older cannot be mapped.)

    Raises:
        FileNotFoundError, PermissionError: no such file, or one that may not be read.
        ValueError: the file is truncated, is something else, or holds code; nothing of it was run.
    """
    with require_readable(path, "weights").open("rb") as file:
        is_zip = file.read(len(_ZIP)) == _ZIP
    if is_zip and not zipfile.is_zipfile(path):  # A zip file ends with its table of contents.
        raise ValueError(f"{path} is truncated: its end is missing; fetch it again")
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        if not any(map(_is_code, unknown)):
            with warnings.catch_warnings(), torch.serialization.safe_globals([(Skipped, n) for n in unknown]):
                warnings.simplefilter("ignore")  # An unusual protocol fails below, with the reason.
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # the unpickler raises many kinds, all meaning the same to the caller
        raise ValueError(f"{path} cannot be read safely as weights: {_reason(error)}") from None
    code = min(filter(_is_code, unknown))
    raise ValueError(f"{path} cannot be read safely as weights: it holds code, {code}; nothing of it was run")


def _reason(error: Exception) -> str:
    """What an error of the unpickler means, without PyTorch's advice to switch its safety off."""
    text = str(error).strip()
    if isinstance(error, EOFError) or "EOF" in text:
        return "it is truncated, or no file of torch.save; fetch it again"
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"GLOBAL (\S+)", text)
        named = f" {found[1]}" if found else ""
        return f"it is no file of torch.save, or holds code{named}; nothing of it was run"
    if isinstance(error, (KeyError, IndexError, UnicodeDecodeError)):  # of bytes that are no pickle
        return "it is no file of torch.save"
    return text.splitlines()[0] if text else type(error).__name__
