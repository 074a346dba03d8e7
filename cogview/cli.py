# SPDX-License-Identifier: Apache-2.0
"""The command ``cogview``: its help, its verbs, and every error as one clear line.

PyTorch is imported only once the arguments are understood, so that help and mistakes answer at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import inspect
import io
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, TextIO, cast

import cogview
from cogview.launch import started_as_first, started_ranks

LONGEST_IMPORT = 30.0  # seconds for which a signal waits until libraries are loaded
EXIT_MISTAKE = 2
EXIT_SIGNAL = 128  # and the number of the signal
EXIT_BROKEN_PIPE = 128 + 13  # as of a program that SIGPIPE ends

EXAMPLES = {
    "train-tokenizer": "--data photos --out runs/photos",
    "tokenize": "--data photos --out rows/photos --run runs/photos",
    "train": "--data photos --out runs/photos",
    "finetune": "captioning --run runs/photos --data photos --out runs/captioner",
    "train-clip": "--data photos --out clips/photos",
    "train-clip-gen": "--data pictures --clip clips/photos --out runs/pictures",
    "plan": "--preset base --precision bf16 --gpus 8 --memory 80",
    "generate": '"an astronaut" --num 16 --out astronaut.png',
    "clip-generate": '--run runs/pictures "a tiger" --num 16 --out tiger.png',
    "infill": '--run runs/demo "a seven" photo.png --mask mask.png --out filled.png',
    "super-resolve": "--run runs/enlarger drawn/*.png --out large",
    "caption": "--run runs/photos photo.png",
    "rerank": '"a cat" *.png',
    "serve": "--open",
    "evaluate": "runs/photos photos-kept-back --num 16 --out evaluation",
    "presets": "",
    "convert": "cogview-base --out runs/base --text-tokenizer cog-pretrain.model --image-tokenizer vqvae.pt",
    "pack": "--run runs/photos --out photos-run",
    "data": "emoji --out emoji --size 64 --style color",
    "demo": "--out runs/demo",
    "rank-curve": "--run runs/demo --out runs/demo/ranking",
    "judge-clip-gen": "runs/pictures --captioner runs/emoji --out runs/pictures/judged",
    "study": "stability --out studies/stability",
}
RESUMABLE = (
    *("train-tokenizer", "tokenize", "train", "finetune", "train-clip", "train-clip-gen", "evaluate", "demo"),
    *("rank-curve", "judge-clip-gen", "study"),
)
WITH_RANKS = ("train", "finetune")  # what torchrun may start several of
HELP = """\
usage: cogview [-h] [--version] COMMAND ...

CogView: draw pictures from text, describe pictures in text, with one transformer.

commands:
{commands}
  cogview COMMAND --help explains each.

examples:
  cogview generate "an astronaut" --out drawn.png  draw with the run that ships, of emoji
  cogview caption photo.png                        describe a picture with it
  cogview serve --open                             do both in the browser
  cogview demo                                     learn to draw digits and show it, a few minutes
  cogview demo --data emoji                        learn to draw emoji and show it, an hour or two

  your own pictures, in photos/ with photos/captions.tsv:
  cogview train-tokenizer --data photos --out runs/photos
  cogview train           --data photos --out runs/photos
  cogview generate --run runs/photos "a tiger playing football" --out tiger.png
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code.

    0, 2 for a mistake, 128 and a signal's number after it; 141 where the reader of the output has gone.
    """
    # PyTorch's CPU threads spin at every barrier by default, which makes a run ten times slower as soon as
    # another program wants a core. Read when PyTorch is loaded; a value set by the user stands.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _open_closed_streams()
    # A terminal that lacks a character shows its number: a finished run must not fail at the last line.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    output = sys.stdout
    sys.stdout = cast("TextIO", _Output(output))
    try:
        with _ended_by_signals() as received:
            return _main(argv, received)
    finally:
        sys.stdout = output


def _main(argv: Sequence[str] | None, received: list[int]) -> int:
    """The exit code; ``received`` has the signals that have ended the command so far."""
    words = list(sys.argv[1:] if argv is None else argv)
    verb = words[0] if words and words[0] in EXAMPLES else ""
    given: Any = None
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                given = _parse(verb, words)
                if given is not None:
                    _run(verb, given)
            except SystemExit:  # Help was asked for.
                sys.stdout.flush()
                raise
            sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        if not started_as_first():
            pass  # The first rank tells it for all.
        elif verb in RESUMABLE and given is not None:
            folder = given.folder if verb == "demo" else given.out
            if os.path.isdir(folder) and os.listdir(folder):
                saved = (
                    f"what is finished is saved in {folder}. Run the same command again to go on from there."
                )
            else:
                saved = f"nothing was finished yet, and nothing is in {folder}"
            _tell(f"\ninterrupted; {saved}")
        else:
            _tell(f"\ninterrupted; {str(interrupt) or 'nothing was written'}")
        return EXIT_SIGNAL + getattr(interrupt, "signum", received[-1] if received else signal.SIGINT)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "cogview":
            raise
        print(f"cogview: {cogview.missing_extra(error)}", file=sys.stderr)
        return EXIT_MISTAKE
    except BrokenPipeError:
        # Whoever reads the output has enough.
        _drop_output()
        return EXIT_BROKEN_PIPE
    except (ValueError, OSError, FloatingPointError, Warning) as error:  # a warning under ``-W error``
        # A mistake in the options is that of all ranks; a full disk or a bad device may be that of one.
        if given is not None or started_as_first():
            where = "" if started_as_first() else f" (rank {os.environ['RANK']})"
            command = f"cogview {verb}".strip()
            _tell(f"{command}{where}: {' '.join(_in_words(error, given).split())}")
        return EXIT_MISTAKE
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        reason = f"not enough memory: {str(error).splitlines()[0] if str(error) else 'none is left'}"
        print(f"cogview {verb}: {reason}; take a smaller batch or a smaller model", file=sys.stderr)
        return EXIT_MISTAKE
    return 0


def _open_closed_streams() -> None:
    """What was closed for the command, as by ``2>&-``, takes what is written to it and drops it."""
    # The next file to be opened would get the number of a closed one, and libraries in C would write into it.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))


class _Output:
    """Standard output that remembers whether it has refused what was written to it.

    Where Python holds back nothing, as under ``PYTHONUNBUFFERED=1``, no later flush tells of it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.is_lost = stream, False

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self.is_lost = True
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[list[int]]:
    """Within the block SIGTERM and SIGHUP end the command as Ctrl-C does: what is half done is removed.

    Yields the list of those that have come. One that is ignored, as SIGHUP under ``nohup``, stays ignored.
    While a library is loaded they wait: in the midst of NumPy or PyTorch the interrupt gets lost, and what is
    half loaded fails with errors of its own.
    """
    received: list[int] = []
    waiting: list[tuple[int, float]] = []  # those that have come while a library was loaded, and when

    def handle(signum: int, frame: FrameType | None) -> None:
        if signum != signal.SIGALRM:
            waiting.append((signum, time.monotonic()))
        if not waiting:
            return
        can_wait = signal.SIGALRM in taken and _is_importing(frame)
        if can_wait and time.monotonic() - waiting[0][1] < LONGEST_IMPORT:
            # No thread looks again: the handler may have come while a lock was held that a new thread takes.
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            return
        received.append(waiting[0][0])
        waiting.clear()
        raise KeyboardInterrupt

    usual: dict[int, Any] = dict.fromkeys((signal.SIGTERM, signal.SIGHUP, signal.SIGALRM), signal.SIG_DFL)
    usual[signal.SIGINT] = signal.default_int_handler
    is_main = threading.current_thread() is threading.main_thread()
    taken = [signum for signum in usual if is_main and signal.getsignal(signum) is usual[signum]]
    for signum in taken:
        signal.signal(signum, handle)
    try:
        yield received
    finally:
        if signal.SIGALRM in taken:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for signum in taken:
            signal.signal(signum, usual[signum])


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _in_words(error: Exception, given: Any) -> str:
    """An error with its option as it is typed, or with its place, which the system tells of no open file."""
    if not isinstance(error, OSError) or error.errno is None:
        return _with_option(str(error), given)
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if error.filename is not None and not is_full:
        ends = (end for end in (error.filename, error.filename2) if end is not None)
        return f"{error.strerror}: " + " to ".join(repr(str(end)) for end in ends)
    # What copies or renames a file tells first what it reads, then what it writes.
    name = error.filename if error.filename2 is None else error.filename2
    out = getattr(given, "folder", None) or getattr(given, "out", None)
    if name is None and _is_output_lost():
        name = "standard output"
    elif name is None and out is not None:
        name = f"--out {out}"
    place = "" if name is None else f"{name} cannot be written: "
    way_out = "; make room there and repeat the command, or write to another place" if is_full else ""
    return f"{place}{error.strerror}{way_out}"


def _with_option(said: str, given: Any) -> str:
    """An error of Python's own names, such as ``learning_rate must``, with the option in their place."""
    name = said.partition(" must ")[0]
    for field in dataclasses.fields(given) if given is not None else ():
        if field.name == name and not str(field.type).startswith(("Positional", "Images")):
            return f"--{name.replace('_', '-')}{said.removeprefix(name)}"
    return said


def _is_output_lost() -> bool:
    """Whether standard output takes no more; what Python holds back of it is then dropped."""
    is_lost = bool(getattr(sys.stdout, "is_lost", False))
    try:
        sys.stdout.flush()
    except OSError:
        is_lost = True
    if is_lost:
        _drop_output()
    return is_lost


def _drop_output() -> None:
    """What Python still holds back must not be written at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell(line: str) -> None:
    with contextlib.suppress(OSError):  # A full disk under a log must not hide the exit code.
        print(line, file=sys.stderr, flush=True)


def _is_lack_of_memory(error: Exception) -> bool:
    """PyTorch has an exception of its own for it on GPUs, and on a CPU only this message."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _parse(verb: str, words: list[str]) -> Any:
    """The options of the verb; None if help or the version was asked for and printed."""
    from cogview.parsing import SHORT, VERBS, parse
    from cogview.presets import ABOUT

    if words[:1] == ["--version"]:
        import cogview_kernels

        print(f"cogview {cogview_kernels.__version__}")
        return None
    if not words or words[0] in ("-h", "--help"):
        summaries = [f"  {name:<17}{_summary(kind)}" for name, kind in VERBS.items()]
        print(HELP.format(commands="\n".join(summaries)), file=sys.stdout if words else sys.stderr, end="")
        if not words:
            raise ValueError("which command? one of " + ", ".join(VERBS))
        return None
    if words[0] not in VERBS:
        near = difflib.get_close_matches(words[0], VERBS, n=1)
        guess = f"; did you mean {near[0]!r}" if near else ""
        raise ValueError(f"unknown command {words[0]!r}{guess}; the commands are {', '.join(VERBS)}")
    if started_ranks() > 1 and verb not in WITH_RANKS:
        raise ValueError(
            f"{verb} is one process; start it without torchrun, which is for cogview "
            + " and ".join(WITH_RANKS)
        )
    example = f"cogview {verb} {EXAMPLES[verb]}".rstrip()
    parts = [inspect.cleandoc(_about(VERBS[verb])), f"example:\n  {example}"]
    if VERBS[verb] in SHORT:
        short = SHORT[VERBS[verb]]
        width = max(map(len, short))
        lines = (f"  --{name:<{width}}  --{short[name]}" for name in short)
        parts.append("\n".join(["short forms:", *lines]))
        parts.append("presets:\n" + "\n".join(f"  {name:<9} {about}" for name, about in ABOUT.items()))
    return parse(verb, words[1:], "\n\n".join(parts))


def _summary(kind: type) -> str:
    return _about(kind).partition("\n")[0].rstrip(".")


def _about(kind: type) -> str:
    """The docstring; none under ``python -OO``, where a dataclass gets its signature instead."""
    about = kind.__doc__ or ""
    return "" if about.startswith(f"{kind.__name__}(") else about


def _run(verb: str, given: Any) -> None:
    try:
        os.getcwd()  # PyTorch's libraries would end the process with a line about one of them.
    except FileNotFoundError:
        raise FileNotFoundError("the folder in which this began has been removed; cd to another") from None
    from cogview.commands import verbs

    getattr(verbs, verb.replace("-", "_"))(given)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    if started_as_first():
        print(f"warning: {message}", file=sys.stderr)
