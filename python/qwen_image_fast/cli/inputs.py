"""What goes into a picture: prompts, pictures, LoRAs and folders, found and checked before anything is loaded."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from qwen_image_fast.cli.errors import BAD_INPUT, FAILED, CommandError, failing
from qwen_image_fast.cli.options import flag
from qwen_image_fast.folders import (
    HUB_NAME,
    PACKAGED,
    local_folder,
    nearest_file,
    newest_lora,
    read_text,
    resolve_folder,
)
from qwen_image_fast.model_defaults import GENERATION_FILE
from qwen_image_fast.pictures import decode, to_mask
from qwen_image_fast.request import Request
from qwen_image_fast.request_fields import InputPicture, Lora, has_pictures
from qwen_image_fast.weights.places import find_file

# Pickles are refused by name later.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}


def prompts_of(path: Path) -> list[str]:
    """The prompts of a file, one per line."""
    try:
        text = read_text(path.expanduser())
    except FileNotFoundError as error:
        raise CommandError(f"there is no file {path}{nearest_file(path)}") from error
    except IsADirectoryError as error:
        raise CommandError(f"{path} is a folder, not a file of prompts") from error
    except PermissionError as error:
        raise CommandError(f"{path} may not be read") from error
    except ValueError as error:
        raise CommandError(str(error)) from error
    if "\0" in text:
        raise CommandError(f"{path} is not a file of text: it holds a character NUL")
    prompts = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise CommandError(f"{path} holds no prompt")
    return prompts


def model_folder(name: str) -> Path:
    """The folder of a pipeline, with only its index and its defaults for certain."""
    with failing(FAILED, ConnectionError, PermissionError), failing(BAD_INPUT, FileNotFoundError, NotADirectoryError):
        return resolve_folder(name, allow_patterns=["model_index.json", GENERATION_FILE])


def settled(
    request: Request, from_image: Path | None, note: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a request that name files, with names that hold from any folder, and its pictures, opened.

    `from_image`: the picture that is repeated, beside which its inputs may lie. A file that has changed since is noted.
    """
    found: dict[str, Any] = {}
    opened: dict[str, Any] = {}
    for name, field in type(request).model_fields.items():
        value = getattr(request, name)
        if value is None or not has_pictures(field.annotation):
            continue
        each = [_found(one, name, from_image, note) for one in (value if isinstance(value, list) else [value])]
        inputs, pictures = [one for one, _ in each], [picture for _, picture in each]
        found[name], opened[name] = (inputs, pictures) if isinstance(value, list) else (inputs[0], pictures[0])
    for name in ("model", "net"):
        if hasattr(request, name):
            found[name] = _absolute(getattr(request, name))
    for name in ("transformer", "vae"):
        if (file := getattr(request, name)) is not None:
            found[name] = weight_file(file)
    if request.text_encoder is not None:
        found["text_encoder"] = [weight_file(file) for file in request.text_encoder]
    found["lora"] = [_found_lora(lora, from_image, note) for lora in request.lora]
    _say_loras(found["lora"], note)
    _check_mask(opened, note)
    return found, opened


def _absolute(name: str) -> str:
    with failing(BAD_INPUT, FileNotFoundError, NotADirectoryError):
        folder = local_folder(name)
    return name if folder is None or (name in PACKAGED and not Path(name).is_dir()) else str(folder.resolve())


def weight_file(name: str) -> str:
    """A file's path from anywhere, or its name on the hub."""
    with failing(BAD_INPUT, FileNotFoundError, IsADirectoryError):
        place = find_file(name)
    if isinstance(place, Path) and place.suffix.lower() == ".json":
        raise CommandError(f"{name} holds no weights: name a .safetensors or .gguf file")
    return str(place.resolve()) if isinstance(place, Path) else name


def lora_file(name: str) -> str:
    """A file or folder from anywhere, or the name on the hub: owner/name, or owner/name/file.safetensors."""
    path = Path(name).expanduser()
    if path.is_dir() and not any(file.suffix in _WEIGHTS for file in path.iterdir()):
        raise CommandError(f"{name} holds no LoRA: it has no safetensors file{newest_lora(path)}")
    if path.exists():
        return str(path.resolve())
    file, equals, weight = name.rpartition("=")
    if equals and Path(file).expanduser().exists():
        raise CommandError(f"the weight of the LoRA {file} must be a number, got {weight or 'nothing'}")
    owner, _, rest = name.partition("/")
    parts = rest.split("/")
    on_hub = HUB_NAME.fullmatch(f"{owner}/{parts[0]}") and (len(parts) == 1) == (not rest.endswith(".safetensors"))
    if not on_hub:
        kind = "file" if path.suffix else "file or folder"
        raise CommandError(f"there is no LoRA {kind} {name}{newest_lora(path) or nearest_file(name)}")
    return name


def _found_lora(lora: Lora, from_image: Path | None, note: Callable[[str], None]) -> Lora:
    """With a name that holds from any folder, and the hash of its file, or of the files of its folder."""
    name = lora_file(lora.name)
    path, digest = Path(name), hashlib.sha256()
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) if path.is_dir() else []
    for file in files:
        with file.open("rb") as opened:
            while part := opened.read(2**20):
                digest.update(part)
    now = digest.hexdigest() if files else None
    if from_image is not None and None not in (now, lora.sha256) and now != lora.sha256:
        note(f"the LoRA {name} has changed since {from_image} was made with it: the result will differ")
    return Lora(name=name, scale=lora.scale, sha256=now)


def _say_loras(loras: Sequence[Lora], note: Callable[[str], None]) -> None:
    """Of those that do nothing, or more than may be meant."""
    for lora in loras:
        if lora.scale == 0:
            note(f"--lora {lora.name} has no effect with the weight 0")
    for name, count in Counter(lora.name for lora in loras).items():
        if count > 1:
            whole = sum(lora.scale for lora in loras if lora.name == name)
            note(f"--lora {name} is given {count} times: its weights add up to {whole:g}")


def _found(one: InputPicture, option: str, from_image: Path | None, note) -> tuple[InputPicture, Image.Image]:
    """A picture's file where it is now, or beside the picture that was made of it."""
    path = Path(one.path).expanduser()
    beside = [] if from_image is None else [from_image.parent / path, from_image.parent / path.name]
    there = [place for place in (path, *beside) if place.is_file()]
    hashes = [hashlib.sha256(place.read_bytes()).hexdigest() for place in there] if one.sha256 else []
    place = there[hashes.index(one.sha256)] if one.sha256 in hashes else there[0] if there else path
    picture = open_picture(place, option, from_image)
    digest = hashlib.sha256(place.read_bytes()).hexdigest()
    if one.sha256 not in (None, digest):
        note(f"{place} has changed since {from_image} was made from it: the result will differ")
    return InputPicture(path=str(place.resolve()), sha256=digest), picture


def open_picture(path: Path, option: str, from_image: Path | None = None) -> Image.Image:
    """The first frame, upright."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what is large is said by its tokens
            return decode(str(path), path)
    except FileNotFoundError as error:
        moved = f"; if {from_image} was made from a file that has moved, give {flag(option)}"
        raise CommandError(
            f"there is no picture {path}{nearest_file(path) if from_image is None else moved}"
        ) from error
    except ValueError as error:
        raise CommandError(str(error)) from error


def _check_mask(opened: dict[str, Any], note: Callable[[str], None]) -> None:
    """Of the picture's aspect ratio, one pixel of rounding in either side aside, and white somewhere."""
    mask = opened.get("mask")
    if mask is not None:
        if mask.has_transparency_data and mask.convert("RGBA").getextrema()[3][0] < 255:
            note("what is clear in --mask stays as it is; in the server's API, as in OpenAI's, it is what changes")
        from qwen_image_fast.pipelines.masks import check_ratio, check_white

        shown = opened["image"] if "image" in opened else opened["control"]
        with failing(BAD_INPUT, ValueError):
            check_ratio("--mask", mask, shown[0] if isinstance(shown, list) else shown)
            check_white("--mask", to_mask("--mask", mask))
