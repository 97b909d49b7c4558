"""Where a single file is: on this disk, or on the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from qwen_image_fast.folders import nearest_file, resolve_folder

# "owner/name/path/file.gguf", and what a browser shows of such a file.
HUB_FILE = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)/(?P<file>.+\.(safetensors|gguf))")
HUB_URL = re.compile(
    r"https?://[\w.-]+/(?P<repo>[^/]+/[^/]+)/(blob|resolve)/(?P<revision>[^/]+)/(?P<file>[^?]+)(\?.*)?"
)


class HubFile(NamedTuple):
    repository: str
    file: str
    revision: str | None


def find_file(path_or_name: str | os.PathLike) -> Path | HubFile:
    """A weight file of this disk, or of the hub, which is not asked: a path, "owner/name/file.gguf" or a file's URL.

    Raises:
        FileNotFoundError, IsADirectoryError: it is neither, in one sentence.
    """
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".gguf"))
        which = f"its file {files[0]}" if len(files) == 1 else "one of its files, or use it as the model"
        raise IsADirectoryError(f"{path} is a folder; name {which}")
    name = os.fspath(path_or_name)
    match = HUB_URL.fullmatch(name) or HUB_FILE.fullmatch(name)
    if match is None or name.startswith((".", "~")):
        raise FileNotFoundError(f"there is no file {name}{nearest_file(name)}")
    found = match.groupdict()
    return HubFile(found["repo"], found["file"], found.get("revision"))


def single_file(path_or_name: str | os.PathLike, *, revision: str | None = None, **hub) -> Path:
    """The local path of a weight file, which is downloaded where it is the hub's.

    Args:
        hub: cache_dir, token, local_files_only.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError, ConnectionError: it is not there, in one sentence.
    """
    place = find_file(path_or_name)
    if isinstance(place, Path):
        return place
    revision = revision or place.revision
    folder = resolve_folder(place.repository, allow_patterns=[place.file], revision=revision, **hub)
    if not (folder / place.file).is_file():
        raise FileNotFoundError(f"{place.repository} has no file {place.file}")
    return folder / place.file
