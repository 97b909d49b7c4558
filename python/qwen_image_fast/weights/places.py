"""Where a single file is: on this disk, or on the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from qwen_image_fast.folders import nearest_file, resolve_folder

# "owner/name/path/file.gguf", and what a browser shows of such a file.
HUB_FILE = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)/(?P<file>.+\.(safetensors|gguf))")
HUB_URL = re.compile(
    r"https?://[\w.-]+/(?P<repo>[^/]+/[^/]+)/(blob|resolve)/(?P<revision>[^/]+)/(?P<file>[^?]+)(\?.*)?"
)


def single_file(path_or_name: str | os.PathLike, *, revision: str | None = None, **hub) -> Path:
    """The local path of a weight file, which is downloaded where it is the hub's.

    Args:
        path_or_name: a path, "owner/name/file.safetensors" or "owner/name/file.gguf" of the hub, or such a file's URL.
        hub: cache_dir, token, local_files_only.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError, ConnectionError: it is not there, in one sentence.
    """
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise IsADirectoryError(f"from_single_file: {path} is a folder; name one of its files, or use from_pretrained")
    name = os.fspath(path_or_name)
    match = HUB_URL.fullmatch(name) or HUB_FILE.fullmatch(name)
    if match is None or name.startswith((".", "~")):
        raise FileNotFoundError(f"from_single_file: there is no file {name}{nearest_file(name)}")
    found = match.groupdict()
    folder = resolve_folder(
        found["repo"], allow_patterns=[found["file"]], revision=revision or found.get("revision"), **hub
    )
    if not (folder / found["file"]).is_file():
        raise FileNotFoundError(f"from_single_file: {found['repo']} has no file {found['file']}")
    return folder / found["file"]
