"""Tar shards: those that `data filter` wrote, with their index, and WebDataset shards of others, without one."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen_image_fast.training.data.collect import CAPTION_SUFFIXES, IMAGE_SUFFIXES, LARGEST_FILE, record_of_parts
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.data.shard_index import ShardIndex
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.sources.example import Example


class Shards:
    """The records of shards that `data filter` wrote.

    Args:
        folder: has `index.parquet`.
        where: values that a column of the index or a field of its metadata may have, such as
            {category: [Nature, People], text_language: [Non-text]}.
        least, most: limits of numbers in the metadata, inclusive.
    """

    edits = False

    def __init__(
        self,
        folder: Path,
        where: Mapping[str, Sequence[str]] | None = None,
        least: Mapping[str, float] | None = None,
        most: Mapping[str, float] | None = None,
    ):
        self.index = ShardIndex(folder, where or {}, least or {}, most or {})
        self.skipped: list[str] = []
        self.folders: list[str] = []

    def __len__(self) -> int:
        return len(self.index)

    def read(self, place: int) -> Example:
        return Example(self.index.read(place))


class WebDataset:
    """The samples of tar files: neighbours of one name up to the first dot, with a picture, `.txt` or `.caption` and
    `.json`. The headers are read once when it is made; the pictures where they are needed.

    Raises:
        RecipeError: a file is compressed, damaged or empty.
    """

    edits = False

    def __init__(self, files: Sequence[Path]):
        self.files, self.skipped = list(files), []
        self.folders: list[str] = []
        self.members: list[tuple[int, str, list[tuple[str, int, int]]]] = []  # file, name, and its parts' place
        without = 0
        for number, file in enumerate(self.files):
            for key, parts in _samples(file):
                if any(suffix in IMAGE_SUFFIXES for suffix, _, _ in parts):
                    self.members.append((number, key, parts))
                else:
                    without += 1
        if without:
            self.skipped.append(f"{without} samples of {files[0].parent} have no picture")
        if not self.members:
            raise RecipeError(f"recipe: data.source must hold pictures, got {files[0]}, which has none")

    def __len__(self) -> int:
        return len(self.members)

    def read(self, place: int) -> Example:
        number, key, parts = self.members[place]
        file, found, fault = self.files[number], {}, ""
        try:
            with open(file, "rb") as tar:
                for suffix, offset, size in parts:
                    tar.seek(offset)
                    found[suffix] = tar.read(size)
                    if len(found[suffix]) != size:
                        fault = f"the shard {file.name} is cut off here"
        except OSError as error:
            fault = f"the shard {file.name} cannot be read: {error}"
        origin = f"{file.name}:{key}"
        return Example(Record(b"", origin=origin, fault=fault) if fault else record_of_parts(found, "", origin, {}))


def _samples(file: Path) -> list[tuple[str, list[tuple[str, int, int]]]]:
    used = (*IMAGE_SUFFIXES, *CAPTION_SUFFIXES, ".json")
    samples: list[tuple[str, list[tuple[str, int, int]]]] = []
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                tar.members = []  # it would keep every header
                if not member.isfile() or member.size > LARGEST_FILE:
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key, suffix = (f"{folder}/{stem}" if folder else stem), "." + extension.lower()
                if not samples or samples[-1][0] != key:
                    samples.append((key, []))
                if suffix in used:
                    samples[-1][1].append((suffix, member.offset_data, member.size))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise RecipeError(f"recipe: data.source {file} must be a whole, uncompressed tar file: {error}") from error
    return samples
