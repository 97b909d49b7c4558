"""Writing so that nothing is half there and nobody else's file is replaced. Imports no torch."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from qwen_image_fast.folders import PathLike

Writer = Callable[[BinaryIO], Any]
# What file systems without hard links answer to link.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def atomic_write(path: PathLike, writer: Writer) -> None:
    """Write a file so that readers see the old one or the whole new one: `writer(file)` fills a temporary neighbour."""
    atomic_write_all({Path(path): writer})


def atomic_write_all(writers: Mapping[Path, Writer]) -> None:
    """`atomic_write` of several files: all are complete on the disk before the first is put in place, in order.

    Whatever stops it, an interrupt included, the temporary files are removed; before the first replacement, the
    previous files are untouched. OSError where the disk is full.
    """
    with _staged(writers) as staged:
        for temporary, path in staged:
            os.replace(temporary, path)


def write_new(names: Iterable[PathLike], writer: Writer) -> Path:
    """`atomic_write` under the first of `names` that is free, which is returned.

    The name is taken by the file system in one step: of processes that want the same one, one gets it and the others
    the next; nothing is ever replaced.
    """
    candidates = map(Path, names)
    first = next(candidates)
    with _staged({first: writer}) as [(temporary, _)]:
        path = first
        while path.exists() or not _take(temporary, path):
            path = next(candidates)
    return path


def not_text(text: str) -> bool:
    """Whether it holds bytes that were no text in the encoding of the file system or the command line."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def numbered(path: PathLike) -> Iterator[Path]:
    """`x.png`, then `x-0001.png`, `x-0002.png` and so on."""
    path = Path(path)
    yield path
    for number in itertools.count(1):
        yield path.with_name(f"{path.stem}-{number:04d}{path.suffix}")


def _take(temporary: Path, path: Path) -> bool:
    """Whether `path` was free; then the file is there."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        os.replace(temporary, path)  # the empty file is ours
    return True


@contextmanager
def _staged(writers: Mapping[Path, Writer]) -> Iterator[list[tuple[Path, Path]]]:
    """Written temporary neighbours of the files, which are removed at the end where they were not moved."""
    staged: list[tuple[Path, Path]] = []
    try:
        for path, writer in writers.items():
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
            staged.append((temporary, path))
            with open(temporary, "xb") as file:
                writer(file)
                file.flush()
                os.fsync(file.fileno())
        yield staged
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        what = f"the disk is full: {path} could not be written and is unchanged; free space and save again"
        raise OSError(error.errno, what) from error
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


@contextmanager
def claimed(folder: PathLike, result: str | None = None) -> Iterator[Path]:
    """The folder of a result for this process alone, made where it is missing, until the block or the process ends.

    Args:
        result: the file that a finished result has; a folder with one is somebody's and refused.

    Raises:
        FileExistsError: another process is writing there, a result is there, or it is a file.
    """
    folder = Path(folder)
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; choose a folder")
    was_there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the folder itself: leaves no file, ends with us
        except BlockingIOError as error:
            text = f"another process is writing to {folder}; wait for it or choose another folder"
            raise FileExistsError(text) from error
        except OSError as error:  # a file system without such locks, as networks' may be: the result is all we see
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
                raise
        if result is not None and (folder / result).exists():
            raise FileExistsError(f"{folder} already has a finished {result}; choose another folder or remove this one")
        yield folder
    finally:
        os.close(descriptor)
        if not was_there:
            with suppress(OSError):  # it holds something, as it should
                folder.rmdir()
