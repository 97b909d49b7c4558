"""A full disk, said the same way wherever it is met."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def full_disk_is_a_sentence(folder: Path) -> Iterator[None]:
    """SQLite's error becomes the OSError that `files.atomic_write` raises for files."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "full" not in str(error):
            raise
        what = f"the disk is full: the tables in {folder} could not grow; free space and run the same again"
        raise OSError(errno.ENOSPC, what) from error
