# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent: everything is written aside, flushed to the disk, and then renamed.

A kill or a loss of power at any moment therefore leaves the previous file, never half of the next one.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import pwd
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:  # The settings of a run are read before PyTorch is loaded.
    from torch import Tensor

StrPath = str | os.PathLike[str]

# Of all our JSON files. It is raised when an earlier version of the package would misread a later one's.
FORMAT_VERSION = 1
_VERSION_KEY = "format_version"  # absent in the files of before there were versions
_CHUNK_BYTES = 1 << 24
ASIDE = ".cogview.tmp"  # what the name of a file ends with while it is written
_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


@contextmanager
def written_aside(path: StrPath) -> Iterator[Path]:
    """A path to write to, which becomes ``path`` when the block ends without an error.

    Missing folders are made. The file gets the rights that the umask (or the folder's access list) gives.
    After an error ``path`` is as it was and nothing else is left behind.

    Raises:
        BlockingIOError: another process is writing ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ASIDE)
    try:
        with _held(path, aside, make=_make_file, remove=Path.unlink) as held:
            mode = stat.S_IMODE(os.fstat(held).st_mode)
            with _removed_on_error(aside, Path.unlink):
                yield aside
                os.chmod(aside, mode)  # safetensors makes a file of its own, which nobody else may read
                flush(aside)
                os.replace(aside, path)
            flush(path.parent)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        # What writing to an open file raises, such as for a full disk, does not say which.
        raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from None


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def folder_written_aside(path: StrPath) -> Iterator[Path]:
    """An empty folder to fill, which becomes ``path`` when the block ends without an error.

    Missing folders above it are made. After an error nothing is left behind.

    Raises:
        FileExistsError: there is something at ``path``, be it a link that leads nowhere.
        BlockingIOError: another process is writing ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ASIDE)
    with _held(path, aside, make=Path.mkdir, remove=shutil.rmtree):
        with _removed_on_error(aside, shutil.rmtree):
            if os.path.lexists(path):
                raise FileExistsError(f"{path} exists; choose another folder, or remove it")
            yield aside
            for folder, _, names in os.walk(aside):
                for name in names:
                    flush(Path(folder, name))
                flush(Path(folder))
            os.rename(aside, path)
        flush(path.parent)


@contextmanager
def _removed_on_error(aside: Path, remove: Callable[[Path], object]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            remove(aside)
        raise


def _make_file(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))


@contextmanager
def _held(
    path: Path, aside: Path, *, make: Callable[[Path], object], remove: Callable[[Path], object]
) -> Iterator[int]:
    """A new file or folder ``aside``, as an open descriptor, that no other process removes within the block.

    What nobody holds is what a killed process has left, and is removed.
    """
    while True:
        is_new = True
        try:
            make(aside)
        except FileExistsError:
            is_new = False
        try:
            descriptor = _open(aside)
        except FileNotFoundError:  # another process has finished with it, or has taken it for a dead one's
            continue
        try:
            if _lock(descriptor) is False:
                raise BlockingIOError(
                    f"another process is writing {path}; wait until it ends, or choose another name"
                )
            if not _is_at(descriptor, aside):
                continue
            if not is_new:
                remove(aside)
                continue
            yield descriptor
            return
        finally:
            os.close(descriptor)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW)  # NFS locks no file that is open to read alone
    except (IsADirectoryError, PermissionError):
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether what is open still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _lock(file: IO[Any] | int) -> bool | None:
    """Whether an open file is held now: False if another process holds it, None where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def lock(file: IO[Any], folder: StrPath) -> None:
    """Hold an open file, which stands for ``folder``, until it is closed or the process ends in any way.

    A file system without locks gives a warning.

    Raises:
        BlockingIOError: another process holds it.
    """
    found = _lock(file)
    if found is False:
        raise BlockingIOError(f"another process holds {folder}")
    if found is None:
        warnings.warn(
            f"the file system of {folder} has no locks: see to it yourself that no second process writes "
            "there",
            stacklevel=3,
        )


def write_bytes(path: StrPath, content: bytes) -> None:
    """Write bytes aside and rename."""
    with written_aside(path) as aside:
        aside.write_bytes(content)


def write_text(path: StrPath, content: str) -> None:
    """Write text as UTF-8 aside and rename. A name that is no UTF-8 is spelled as in JSON."""
    write_bytes(path, content.encode(errors="backslashreplace"))


def write_json(path: StrPath, content: Mapping[str, Any]) -> None:
    """Write a JSON object, with the version of our files, aside and rename."""
    versioned = {_VERSION_KEY: FORMAT_VERSION, **content}
    write_text(path, json.dumps(versioned, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: StrPath, heads: Iterable[object], rows: Iterable[Iterable[object]]) -> None:
    """Write a table as CSV aside and rename."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(heads)
    table.writerows(rows)
    write_text(path, text.getvalue())


def read_json(path: StrPath) -> Any:
    """What :func:`write_json` was given.

    Raises:
        FileNotFoundError: no such file.
        PermissionError: a file that may not be read.
        ValueError: a damaged file, or one of a newer version of the package.
    """
    path = require_readable(path, "file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
        raise ValueError(f"{path} is damaged: {error}") from None
    version = content.pop(_VERSION_KEY, 0) if isinstance(content, dict) else 0
    if type(version) is not int or version < 0:
        raise ValueError(f"{path} is damaged: {_VERSION_KEY} must be a whole number, got {version!r}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} was written by a newer version of cogview: its format is {version}, this version reads "
            f"up to {FORMAT_VERSION}; update with: pip install --upgrade cogview-kernels"
        )
    return content


def exists(path: StrPath) -> bool:
    """Whether there is such a file or folder. PermissionError, not False, where that may not be known."""
    return _mode(path) is not None


def is_file(path: StrPath) -> bool:
    """Whether there is such a file, and no folder or the like; as :func:`exists`."""
    return stat.S_ISREG(_mode(path) or 0)


def _mode(path: StrPath) -> int | None:
    """None for what nothing can be: a name with a zero byte or of too many, a link to itself."""
    try:
        return os.stat(path).st_mode
    except PermissionError:
        raise _not_permitted(Path(path)) from None
    except ValueError:
        return None
    except OSError as error:
        if error.errno not in _NOWHERE:
            raise
        return None


def require_folder(path: StrPath, out: StrPath | None = None) -> None:
    """OSError or ValueError unless files can be written to the folder ``path``, which may have to be made.

    Makes nothing: to be called before any work whose outcome is to be written there. ``out`` is what to call
    it, by default ``path``.
    """
    place, out = Path(path), path if out is None else out
    while not os.path.exists(place):
        _require_short_name(place, out)
        if os.path.islink(place):
            raise FileNotFoundError(
                f"--out {out} cannot be written: {place} is a link that leads nowhere; remove it, or name "
                "another --out"
            )
        place = place.parent
    if not os.path.isdir(place):
        raise NotADirectoryError(f"--out {out} cannot be written: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {out} cannot be written: no permission to write in {place}")
    try:  # there are folders that take no file whatever their permissions say
        with tempfile.TemporaryFile(dir=place, buffering=0) as file:
            file.write(bytes(1024))  # a full disk may still take a name
    except OSError as error:
        reason = f"no file can be made in {place} ({error.strerror})"
        raise OSError(f"--out {out} cannot be written: {reason}; name another --out") from None


def require_place(path: StrPath, out: StrPath | None = None) -> None:
    """As :func:`require_folder`, for what is written aside first: a file, or a folder that is made whole."""
    _require_short_name(Path(path), path if out is None else out)
    require_folder(Path(path).parent, path if out is None else out)


def require_new(path: StrPath) -> None:
    """As :func:`require_place`. FileExistsError if there is anything, be it a link that leads nowhere."""
    if os.path.lexists(path):
        raise FileExistsError(f"--out {path} exists; name another, or remove it")
    require_place(path)


def _require_short_name(path: Path, out: StrPath) -> None:
    longest = os.pathconf("/", "PC_NAME_MAX") - len(ASIDE)
    if len(os.fsencode(path.name)) > longest:
        raise ValueError(f"--out has a name of more than {longest} bytes, got {out}; choose a shorter one")


def require_readable(path: StrPath, what: str) -> Path:
    """``path``. FileNotFoundError if there is no such file, PermissionError if it may not be read."""
    path = Path(path)
    if not is_file(path):  # To open a pipe that nobody writes to would wait for ever.
        raise FileNotFoundError(f"{what} not found: {path}")
    try:
        with open(path, "rb"):
            return path
    except PermissionError:
        raise _not_permitted(path) from None


def _not_permitted(path: Path) -> PermissionError:
    """Names who can mend it: the owner of the file, or of the innermost folder that may be seen."""
    for part in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            number = part.stat().st_uid
            try:
                owner = pwd.getpwuid(number).pw_name
            except KeyError:  # A container may not know the users of a shared disk.
                owner = f"user {number}"
            return PermissionError(
                f"{path} cannot be read: permission denied; ask {owner}, its owner, for it"
            )
    return PermissionError(f"{path} cannot be read: permission denied")


def save_tensors(path: StrPath, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as safetensors, aside and then renamed. OSError if that fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written_aside(path) as aside:
        try:
            save_file(content, aside)
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(f"{path} cannot be written: {error}") from None


def load_tensors(path: StrPath) -> dict[str, Tensor]:
    """Read a safetensors file.

    FileNotFoundError if absent, PermissionError if it may not be read, ValueError if damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = require_readable(path, "weights")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}") from None


def digest(path: StrPath) -> str:
    """Hexadecimal fingerprint of a file's content: BLAKE2b over its size and the BLAKE2b of its chunks.

    The chunks are hashed by several threads, since a checkpoint can have a hundred gigabytes.
    """
    size = os.path.getsize(path)
    whole = hashlib.blake2b(str(size).encode(), digest_size=20)
    with open(path, "rb") as file, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:

        def of_chunk(start: int) -> bytes:
            return hashlib.blake2b(os.pread(file.fileno(), _CHUNK_BYTES, start)).digest()

        for part in threads.map(of_chunk, range(0, size, _CHUNK_BYTES)):
            whole.update(part)
    return whole.hexdigest()
