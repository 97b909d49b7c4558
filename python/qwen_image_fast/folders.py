"""Where models and their files are: local folders, the model of the package, hub repositories. Imports no torch."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PathLike = str | os.PathLike
# The trained models that come with the package, in the layout of `QwenImageEditPlusPipeline`, by name.
PACKAGED = {name: Path(__file__).parent / "checkpoints" / name for name in ("tiny", "tiny-vision")}
SHIPPED = PACKAGED["tiny"]
DOWNLOAD_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def local_folder(name_or_path: PathLike) -> Path | None:
    """The folder of a model's name without asking the hub; None: it is the name of a hub repository.

    The one place that knows what a model may be called, for the pipelines, the command line and training: a folder,
    `~` for the home folder, "tiny" and "tiny-vision" for the models of the package (where no folder is called so),
    owner/model.

    Raises:
        FileNotFoundError, NotADirectoryError: it is none of these; the sentence names the nearest that is.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{path} is a file; name the folder that holds it")
    if name in PACKAGED:
        return PACKAGED[name]
    if HUB_NAME.fullmatch(name):
        return None
    near = ("" if "/" in name else nearest(name, PACKAGED)) or nearest_file(path)
    raise FileNotFoundError(f"there is no folder {name}, and it is not a hub name like owner/model{near}")


def resolve_folder(
    name_or_path: PathLike,
    *,
    revision: str | None = None,
    cache_dir: PathLike | None = None,
    token: str | None = None,
    local_files_only: bool | None = None,
    allow_patterns: Iterable[str] | None = None,
) -> Path:
    """The local folder of a model: `local_folder` where it is one, else a download of that hub repository.

    `allow_patterns` (default: safetensors, json, txt, sentencepiece and jinja files) limits what is downloaded.
    `local_files_only` uses the cache alone, as does huggingface_hub's own offline switch. Raises FileNotFoundError,
    NotADirectoryError, or ConnectionError where the hub could not be reached.
    """
    path = local_folder(name_or_path)
    if path is not None:
        return path
    import huggingface_hub
    from huggingface_hub import errors

    name = os.fspath(name_or_path)
    near = nearest_file(name)
    not_here = f"is neither a local folder nor cached, and the hub was not reached; download it or name a folder{near}"
    failures: dict[type[Exception], tuple[type[OSError], str]] = {  # a class before its base
        errors.GatedRepoError: (PermissionError, "asks to accept its terms on the hub: do so, then pass a token"),
        errors.RepositoryNotFoundError: (
            FileNotFoundError,
            f"is neither a local folder nor a readable hub repository{near}",
        ),
        errors.RevisionNotFoundError: (FileNotFoundError, f"has no revision {revision} on the hub"),
        errors.LocalEntryNotFoundError: (FileNotFoundError, not_here),
        errors.HFValidationError: (FileNotFoundError, f"is neither a local folder nor a valid hub name{near}"),
        errors.HfHubHTTPError: (ConnectionError, "could not be downloaded from the hub"),
    }
    hub: dict[str, Any] = {
        "revision": revision,
        "cache_dir": cache_dir,
        "token": token,
        "local_files_only": bool(local_files_only),
    }
    patterns = list(allow_patterns or DOWNLOAD_PATTERNS)
    try:
        return Path(str(huggingface_hub.snapshot_download(name, allow_patterns=patterns, **hub)))
    except tuple(failures) as error:
        kind, what = next(value for cls, value in failures.items() if isinstance(error, cls))
        raise kind(f"{name} {what}") from error


def nearest(name: str, candidates: Iterable[str]) -> str:
    """The end of a sentence that offers what `name` may have been meant to be; empty where nothing is near."""
    near = difflib.get_close_matches(name, [other for other in candidates if other != name], n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def nearest_file(path: PathLike) -> str:
    """As `nearest`, of what lies beside a file that is not there, or is of another kind; written as `path` is."""
    path = Path(path).expanduser()
    try:
        there = [name for name in sorted(os.listdir(path.parent)) if name[0] != "." and name != path.name]
        beside = {name: str(path.parent / name) for name in there}
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.7)
    return f"; did you mean {beside[near[0]]}?" if near else ""


def newest_lora(path: PathLike) -> str:
    """Of a training run that a path is of, or in, the newest LoRA; of any other path nothing."""
    path = Path(path).expanduser()
    found = [file for run in (path, path.parent) for file in sorted(run.glob("loras/step-*.safetensors"))[-1:]]
    return f"; the newest of that run is {found[0]}" if found else ""


def read_text(path: PathLike) -> str:
    """A text file in UTF-8, with a byte order mark or without; ValueError where it is in another encoding."""
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is not text in UTF-8, as line {line} shows; save it as UTF-8 (of GBK, for example: "
            f"iconv -f GBK -t UTF-8)"
        ) from error


def read_json(path: PathLike) -> dict[str, Any]:
    """The object in a json file; ValueError where the file is not valid json or not an object."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid json ({error}); download or write it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a json object, got {type(value).__name__}")
    return value
