# SPDX-License-Identifier: Apache-2.0
"""Which pictures people prefer: the questions, the votes, and the shares that follow from them.

Source: the human evaluation of CogView (arXiv:2105.13290): people see the pictures that several models drew
of one text, side by side and in random order, and choose the best one.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from PIL import Image

from cogview.data.caption_files import read_captions
from cogview.data.image_files import picture_files
from cogview.files import StrPath, exists, read_json, require_folder, write_json
from cogview.folder_lock import FolderLock
from cogview.seeding import derive_seed
from cogview.settings import build

VOTES = "votes.json"
NORMAL_95 = 1.959964  # of a standard normal variable lies within it with probability 0.95


@dataclass(frozen=True)
class Question:
    """One text and a picture of it from each folder, in the order in which they are shown."""

    prompt: str
    pictures: tuple[Path, ...]
    folders: tuple[str, ...]  # of each picture


@dataclass(frozen=True)
class Vote:
    """A choice that somebody made."""

    question: int
    prompt: str
    chosen: str  # folder
    among: list[str]  # folders, in the order shown
    time: str  # ISO 8601, UTC


@dataclass(frozen=True)
class VoteFile:
    """``votes.json``."""

    folders: list[str]
    seed: int
    votes: list[dict[str, Any]]  # each a Vote


class Share(NamedTuple):
    """How often a folder was chosen, and the 95 % interval of that share."""

    folder: str
    votes: int
    share: float
    low: float
    high: float


class VoteLock(FolderLock):
    """The lock of a ballot on the folder of its votes."""

    name, busy = "votes.lock", "is used for a vote"
    elsewhere = "name a folder of your own with --out"


class Ballot:
    """All questions on some folders, in an order and with an order of candidates that ``seed`` shuffles.

    A context manager: until it is closed, no other ballot can keep votes in the same folder.

    A picture's text is what the folder's list of captions says, else what ``cogview generate`` has written
    into the file, else the file's name. Where a text has several pictures in every folder, it gives several
    questions.

    Args:
        out: folder of ``votes.json``, where each vote is kept at once, and from which a ballot goes on.

    Raises:
        FileNotFoundError, ValueError: no such folder, or no picture in it; fewer than two folders; no text
            that all of them have; votes on other folders in ``out``.
        BlockingIOError: another ballot keeps votes in ``out``.
        OSError: ``out`` cannot be written to.
    """

    def __init__(self, folders: Sequence[StrPath], out: StrPath, *, seed: int = 0) -> None:
        self.folders = [str(folder) for folder in folders]
        if len(self.folders) < 2 or len({Path(folder).resolve() for folder in folders}) < len(self.folders):
            raise ValueError(f"folders must be two or more, each named once, got {', '.join(self.folders)}")
        self.seed, self.path = seed, Path(out) / VOTES
        require_folder(Path(out), str(out))
        self.questions = self._questions()
        self._lock = VoteLock(out)
        self._lock.take()
        try:
            self.votes = self._saved_votes()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another ballot take the folder."""
        self._lock.release()

    def __enter__(self) -> Ballot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _questions(self) -> list[Question]:
        by_folder = [_by_prompt(Path(folder)) for folder in self.folders]
        common = [prompt for prompt in by_folder[0] if all(prompt in other for other in by_folder)]
        if not common:
            raise ValueError(
                f"{' and '.join(self.folders)} have no picture of the same text; texts are taken from a "
                "list of captions, from what cogview generate writes into its files, or from the files' names"
            )
        questions = []
        for prompt in common:
            pictures = [other[prompt] for other in by_folder]
            for number, candidates in enumerate(zip(*pictures, strict=False)):
                shown = list(zip(candidates, self.folders, strict=True))
                random.Random(derive_seed(self.seed, "shown", prompt, number)).shuffle(shown)
                questions.append(Question(prompt, *zip(*shown, strict=True)))
        random.Random(derive_seed(self.seed, "questions")).shuffle(questions)
        return questions

    def _saved_votes(self) -> list[Vote]:
        if not exists(self.path):
            return []
        try:
            saved = build(VoteFile, read_json(self.path))
            votes = [build(Vote, vote) for vote in saved.votes]
        except TypeError as error:
            raise ValueError(f"{self.path} is damaged, or of another version: {error}") from None
        fits = all(
            vote.question < len(self.questions) and self.questions[vote.question].prompt == vote.prompt
            for vote in votes
        )
        if (saved.folders, saved.seed) != (self.folders, self.seed) or not fits:
            raise ValueError(f"{self.path} has votes on other pictures; choose another --out")
        return votes

    @property
    def next_question(self) -> int | None:
        """The number of the first question without a vote; None where all have one."""
        answered = {vote.question for vote in self.votes}
        return next((number for number in range(len(self.questions)) if number not in answered), None)

    def vote(self, question: int, place: int) -> None:
        """Keep the choice of the picture at ``place``. A question that has a vote already keeps that one.

        ValueError for a question or a place that there is not, OSError where the vote cannot be kept.
        """
        asked = self._asked(question, place)
        if any(vote.question == question for vote in self.votes):
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        vote = Vote(question, asked.prompt, asked.folders[place], list(asked.folders), now)
        votes = [asdict(each) for each in (*self.votes, vote)]
        try:
            write_json(self.path, asdict(VoteFile(self.folders, self.seed, votes)))
        except OSError as error:
            raise OSError(f"{self.path} cannot be written: {error.strerror or error}") from None
        self.votes.append(vote)

    def picture(self, question: int, place: int) -> Path:
        """The file shown at ``place``. ValueError for a question or a place that there is not."""
        return self._asked(question, place).pictures[place]

    def _asked(self, question: int, place: int) -> Question:
        if not 0 <= question < len(self.questions):
            raise ValueError(f"question must be from 0 to {len(self.questions) - 1}, got {question}")
        asked = self.questions[question]
        if not 0 <= place < len(asked.folders):
            raise ValueError(f"place must be from 0 to {len(asked.folders) - 1}, got {place}")
        return asked

    def shares(self) -> list[Share]:
        """Of the votes so far, the most chosen folder first."""
        counts = Counter(vote.chosen for vote in self.votes)
        total = len(self.votes)
        found = [
            Share(folder, counts[folder], *wilson_interval(counts[folder], total)) for folder in self.folders
        ]
        return sorted(found, key=lambda share: -share.votes)


def wilson_interval(count: int, total: int) -> tuple[float, float, float]:
    """The share ``count / total`` and its 95 % interval by Wilson (1927); NaN, 0, 1 without votes."""
    if not total:
        return math.nan, 0.0, 1.0
    share, z = count / total, NORMAL_95
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return share, max(0.0, middle - half), min(1.0, middle + half)


def _by_prompt(folder: Path) -> dict[str, list[Path]]:
    """The pictures of each text."""
    paths = picture_files(folder)
    has_list = any((folder / name).is_file() for name in ("captions.tsv", "captions.json"))
    captions = read_captions(folder) if has_list else {}
    found: dict[str, list[Path]] = {}
    for path in paths:
        own = captions.get(path.relative_to(folder).as_posix())
        found.setdefault(own[0] if own else _prompt_within(path), []).append(path)
    return found


def _prompt_within(path: Path) -> str:
    """The text in a PNG file of ``cogview generate``, else the file's name. ValueError for a damaged file."""
    try:
        with Image.open(path) as picture:
            return str(picture.info.get("prompt", path.stem))
    except Exception as error:  # Pillow raises many kinds for a damaged file.
        raise ValueError(f"{path} cannot be read as an image: {error}") from None
