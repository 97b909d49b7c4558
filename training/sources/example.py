"""What a catalogue of pictures gives: an entry with its picture, what it was made from, and a mask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qwen_image_fast.training.data.record import Record


@dataclass(frozen=True)
class Example:
    """target: a picture with its captions, or of an edit the result with its instruction as `captions`.

    references: of an edit, the pictures that it begins with. mask: white where the loss counts. missing: a file that it
    names and that is not there.
    """

    target: Record
    references: tuple[Record, ...] = ()
    mask: Record | None = None
    missing: Path | None = None


class Catalogue(Protocol):
    """Examples by their number; reading one costs memory and time, knowing their count does not.

    skipped: sentences about what was found and is not used. edits: whether its examples have references. folders: of
    each example, the path below the root that repeats are chosen by; empty where there are none.
    """

    skipped: list[str]
    edits: bool
    folders: list[str]

    def __len__(self) -> int: ...

    def read(self, place: int) -> Example:
        """Example `place`; what cannot be read becomes the fault of its record."""
