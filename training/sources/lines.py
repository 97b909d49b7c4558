"""Files of lines for what comes after training: prompts to draw, and pairs of pictures of which one is preferred.

prompts   a prompt a line, or {"prompt": ..., "texts": [...], "colours": {"text": "red", "ground": "white"},
          "boxes": [[left, top, right, bottom], ...]}, where the texts are to stand, in pixels
pairs     {"prompt": ..., "chosen": "a.png", "rejected": "b.png", "references": [...]}; paths from the file's folder

Lines that begin with # are comments, as in the prompts of `generate`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qwen_image_fast.folders import read_text
from qwen_image_fast.pictures import to_rgb
from qwen_image_fast.training.recipe.fields import RecipeError


@dataclass(frozen=True)
class PromptLine:
    """number: of the line. fields: what else it says."""

    number: int
    prompt: str
    texts: tuple[str, ...] | None
    colours: dict[str, str]
    boxes: tuple[tuple[int, int, int, int], ...]
    fields: dict[str, Any]


@dataclass(frozen=True)
class PairLine:
    """Paths of pictures, found. rejected: None where the line names none."""

    number: int
    prompt: str
    chosen: Path
    rejected: Path | None
    references: tuple[Path, ...]


def prompt_lines(name: str) -> list[PromptLine]:
    """The prompts of a file.

    Raises:
        RecipeError: a line is not what it must be, with its number.
    """
    found = []
    for number, line in _lines(name, "rollout.prompts"):
        fields: dict[str, Any] = {"prompt": line}
        if line.startswith("{"):
            fields = _fields(line, "rollout.prompts", name, number)
        prompt, texts, colours, boxes = (fields.pop(key, None) for key in ("prompt", "texts", "colours", "boxes"))
        where = f"recipe: rollout.prompts: line {number} of {name}"
        if not isinstance(prompt, str) or not prompt.strip():
            raise RecipeError(f'{where} must have a text "prompt", it has {", ".join(fields) or "nothing"}')
        if not (texts is None or (isinstance(texts, list) and all(isinstance(t, str) and t for t in texts))):
            raise RecipeError(f"{where}: texts must be a list of texts, got {texts!r:.80}")
        if not (colours is None or (isinstance(colours, dict) and all(map(_word, [*colours, *colours.values()])))):
            raise RecipeError(f'{where}: colours must be such as {{"text": "red"}}, got {colours!r:.80}')
        boxes = [] if boxes is None else boxes
        if not (isinstance(boxes, list) and all(map(_is_box, boxes))):
            raise RecipeError(
                f"{where}: boxes must be lists of left, top, right and bottom in whole pixels, got {boxes!r:.80}"
            )
        places = tuple((a, b, c, d) for a, b, c, d in boxes)
        own = None if texts is None else tuple(texts)
        found.append(PromptLine(number, prompt, own, colours or {}, places, fields))
    if not found:
        raise RecipeError(f"recipe: rollout.prompts: {name} has no prompt")
    return found


def pair_lines(name: str, *, both: bool) -> list[PairLine]:
    """The pairs of a file; `both`: whether each must have a rejected picture.

    Raises:
        RecipeError: a line is not what it must be, or names a picture that is not there.
    """
    found, folder = [], Path(name).expanduser().parent
    for number, line in _lines(name, "pairs"):
        where = f"recipe: pairs: line {number} of {name}"
        fields = _fields(line, "pairs", name, number)
        for key in ("prompt", "chosen", *(("rejected",) if both else ())):
            if not isinstance(fields.get(key), str) or not fields[key].strip():
                raise RecipeError(f'{where} must have a text "{key}", it has {", ".join(fields) or "nothing"}')
        references = fields.get("references") or []
        if not isinstance(references, list):
            raise RecipeError(f"{where}: references must be a list of paths, got {references!r:.80}")
        rejected = fields.get("rejected") or None
        named = [fields["chosen"], *([rejected] if rejected else []), *references]
        paths = [folder / str(Path(str(path)).expanduser()) for path in named]
        for path in paths:
            if not path.is_file():
                raise RecipeError(f"{where}: there is no picture {path}")
            try:
                Image.open(path).close()  # its head alone
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                raise RecipeError(f"{where}: {path} is no picture: {error}") from error
        if rejected and paths[0].resolve() == paths[1].resolve():
            raise RecipeError(f"{where}: chosen and rejected must be two pictures, both are {paths[0]}")
        at = 2 if rejected else 1
        pair = PairLine(number, fields["prompt"], paths[0], paths[1] if rejected else None, tuple(paths[at:]))
        found.append(pair)
    if not found:
        raise RecipeError(f"recipe: pairs: {name} has no pair")
    return found


def pictures_of(paths: Sequence[Path]) -> list[np.ndarray]:
    """uint8 [H, W, 3] each; ValueError where a file is damaged."""
    return [np.asarray(to_rgb(f"pairs: {path}", path)) for path in paths]


def digest(name: str) -> str:
    """Of what a file says."""
    return hashlib.sha256(Path(name).expanduser().read_bytes()).hexdigest()[:16]


def _word(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_box(box: Any) -> bool:
    whole = isinstance(box, list) and len(box) == 4 and all(isinstance(v, int) and type(v) is not bool for v in box)
    return whole and box[0] < box[2] and box[1] < box[3]


def _lines(name: str, field: str) -> Iterator[tuple[int, str]]:
    try:
        content = read_text(Path(name).expanduser())
    except (OSError, ValueError) as error:
        raise RecipeError(f"recipe: {field}: {name} cannot be read: {error}") from error
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line.strip()


def _fields(line: str, field: str, name: str, number: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"recipe: {field}: line {number} of {name} must be JSON: {error.msg} at column {error.colno}"
        ) from error
    if not isinstance(found, dict):
        raise RecipeError(f"recipe: {field}: line {number} of {name} must be a JSON object, got {line:.40}")
    return found
