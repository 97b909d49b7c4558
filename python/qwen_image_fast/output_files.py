"""Where pictures go: free names for them, which no other process can take. Imports neither torch nor PIL."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_image_fast.files import atomic_write, write_new
from qwen_image_fast.folders import nearest_file

if TYPE_CHECKING:
    from PIL import Image


class OutputFiles:
    """Where pictures go: the file asked for, or the next free number; all is checked before any work is done.

    Args:
        output: a .png file or a folder that exists. Without `overwrite` no existing file is replaced: `x.png` becomes
            `x-0001.png`. Several pictures are numbered in any case; in a folder they are `image-0001.png` and so on.
        count: how many pictures will be written.

    Raises:
        ValueError: the name is no PNG's, or its folder does not exist or is not writable.
    """

    def __init__(self, output: str | os.PathLike, overwrite: bool, count: int) -> None:
        output = Path(output)
        is_file = output.suffix.lower() == ".png" and not output.is_dir()
        self.single = output if is_file and count == 1 else None
        self.folder, self.stem = (output.parent, output.stem) if is_file else (output, "image")
        self.overwrite, self.count = overwrite, count
        self.number = 0
        if not self.folder.is_dir():
            raise ValueError(_wrong(output, self.folder))
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise ValueError(f"output {output}: the folder {self.folder} is not writable")

    def check_space(self, needed: int) -> None:
        """OSError where fewer than `needed` bytes are free: better now than after the pictures are computed."""
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            sizes = f"{free / 1e6:.1f} MB free, up to {needed / 1e6:.1f} MB needed"
            raise OSError(errno.ENOSPC, f"no disk space for the output in {self.folder}: {sizes}")

    def write(self, image: Image.Image, parameters: Mapping[str, Any]) -> Path:
        """Write one picture under the next name that is free when it is done, and return that."""
        from qwen_image_fast.png_metadata import png_writer

        writer = png_writer(image, parameters)
        if not self.overwrite:
            return write_new(self._names(), writer)
        path = next(self._names())
        atomic_write(path, writer)
        return path

    def _names(self) -> Iterator[Path]:
        if self.single is not None:
            yield self.single
        while True:
            self.number += 1
            yield self.folder / f"{self.stem}-{self.number:04d}.png"


def _wrong(output: Path, folder: Path) -> str:
    """Why there is no such place, and the nearest that could be meant."""
    if folder != output:
        return f"output {output}: there is no folder {folder}{nearest_file(folder)}"
    if output.suffix or output.exists():
        return f"output {output} must be a .png file or a folder"
    return f"output {output}: there is no folder {output}{nearest_file(output) or f'; {output}/ would be made'}"
