"""Tasks of vision on one's own pictures: a folder with `metadata.jsonl`, all of it checked before a model is read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qwen_image_fast.folders import nearest
from qwen_image_fast.pictures import decode, to_mask, to_rgb
from qwen_image_fast.training.evaluation.cases import psnr_outside
from qwen_image_fast.training.evaluation.vision_metrics import (
    SSIM_WINDOW,
    depth_scores,
    intersection_over_union,
    ssim,
)
from qwen_image_fast.training.synthesis.sample import EditSample
from qwen_image_fast.training.synthesis.vision import INSTRUCTIONS

METADATA = "metadata.jsonl"
TASKS = ("depth", "segment", "view")
DEPTH_ANSWERS = ("inverse", "linear")
_FIELDS = ("image", "task", "truth", "instruction", "valid", "scale", "range")
_ONLY_OF = {"scale": ("depth",), "range": ("depth",), "valid": ("depth", "segment")}


@dataclass(frozen=True)
class Given:
    """An example with its truth.

    Attributes:
        pair: what the model is given, and a picture of the right answer at the truth's size.
        name: of the picture in the folder. picture: uint8 [H, W, 3], the source at its own size.
        truth: float64 [H, W] of a depth, bool [H, W] of a mask, uint8 [H, W, 3] of a view. valid: bool [H, W].
        limits: that depths are clipped to. inverse: whether the model answers with inverse depth.
    """

    pair: EditSample
    name: str
    picture: np.ndarray
    truth: np.ndarray
    valid: np.ndarray
    limits: tuple[float, float] = (0.0, 0.0)
    inverse: bool = True

    def scores(self, image: np.ndarray) -> dict[str, float]:
        """Of an answer, uint8 [h, w, 3], brought to the truth's size: bilinear, a view bicubic.

        depth: `depth_scores` of the mean of the channels. segment: IoU of what is above 127 with the mask, where it is
        valid. view: PSNR in dB and `ssim`.
        """
        how = Image.Resampling.BICUBIC if self.pair.kind == "view" else Image.Resampling.BILINEAR
        image = resized(image, self.valid.shape, how)
        if self.pair.kind == "depth":
            answer = image.astype(np.float64).mean(2)
            error, near = depth_scores(answer, self.truth, self.valid, None, self.limits, self.inverse)
            return {"AbsRel": error, "δ1": near}
        if self.pair.kind == "segment":
            made = image.mean(2) > 127
            return {"IoU": intersection_over_union(made[self.valid], self.truth[self.valid])}
        return {"PSNR": psnr_outside(image, self.truth, ~self.valid), "SSIM": ssim(image, self.truth)}


class Examples(Sequence[Given]):
    """The examples of a folder, each read when it is asked for: a set of photographs need not fit into memory.

    Args:
        folder: has `metadata.jsonl`, an object a line: image, task and truth, and maybe instruction, valid, scale and
            range (docs/evaluation.md). Files are named from the folder on.
        tasks: of `TASKS`; lines of others are left out. count: only the first so many of each; None: all.
        language: of the instruction of a depth whose line has none. size: longest side that the model is given; None:
            as the picture is. depth_answers: of `DEPTH_ANSWERS`, what the model's pictures of depth are of.

    Raises:
        ValueError: anything is missing or wrong in the lines that are used; one sentence with the file and the line.
    """

    def __init__(
        self, folder: Path, tasks: Sequence[str] = TASKS, count: int | None = None, language: str = "en",
        size: int | None = None, depth_answers: str = "inverse",
    ):  # fmt: skip
        if depth_answers not in DEPTH_ANSWERS:
            raise ValueError(
                f"evaluate vision: depth answers must be of {', '.join(DEPTH_ANSWERS)}, got {depth_answers}"
            )
        self.folder, self.language, self.size, self.inverse = folder, language, size, depth_answers == "inverse"
        path, self.lines, found = folder / METADATA, dict[int, dict[str, Any]](), dict.fromkeys(tasks, 0)
        if not path.is_file():
            raise ValueError(f"evaluate vision: data must be a folder with {METADATA}, got {folder}")
        self.digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for number, text in enumerate(_text(path).splitlines(), 1):
            if not text.strip():
                continue
            with _line(path, number):
                record = _record(text)
                if record["task"] in found and (count is None or found[record["task"]] < count):
                    found[record["task"]] += 1
                    self.lines[number] = record
        if not self.lines:
            raise ValueError(f"evaluate vision: {path} must have a line with a task of {', '.join(tasks)}, got none")
        self._numbers = list(self.lines)
        for place in range(len(self)):
            self[place]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        number = self._numbers[place]
        with _line(self.folder / METADATA, number):
            return self._opened(self.lines[number])

    def _opened(self, line: Mapping[str, Any]) -> Given:
        kind = line["task"]
        picture = np.asarray(to_rgb(f"image {line['image']}", self._file(line, "image")))
        shape, limits = picture.shape[:2], (0.0, 0.0)
        valid = np.ones(shape, bool)
        if "valid" in line:
            valid = _of_shape("valid", line["valid"], _mask("valid", self._file(line, "valid")), shape)
        path = self._file(line, "truth")
        if kind == "depth":
            truth = _of_shape("truth", line["truth"], _depth(path, line.get("scale")), shape)
            valid, limits = _limited(line["truth"], truth, valid, line.get("range"))
            shown = self._picture_of(truth, valid)
        elif kind == "segment":
            truth = _of_shape("truth", line["truth"], _mask("truth", path), shape)
            if not (truth & valid).any():
                raise ValueError(f"truth must have a pixel of the object where it is valid, got none in {path.name}")
            shown = _grey(np.where(truth, 255, 0))
        else:
            truth = shown = _of_shape("truth", line["truth"], np.asarray(to_rgb(f"truth {path.name}", path)), shape)
            if min(shape) < SSIM_WINDOW:
                raise ValueError(f"image must have {SSIM_WINDOW} pixels or more a side for a view, got {shape}")
        told = line.get("instruction") or INSTRUCTIONS["depth"][self.language == "zh"][0]
        source = picture
        if self.size is not None and max(shape) > self.size:
            height, width = (max(1, round(side * self.size / max(shape))) for side in shape)
            source = resized(picture, (height, width), Image.Resampling.LANCZOS)
        every = np.ones(source.shape[:2], bool)
        pair = EditSample(source, shown, told, every, kind, self.language, (), (), "given")
        return Given(pair, line["image"], picture, truth, valid, limits, self.inverse)

    def _file(self, line: Mapping[str, Any], name: str) -> Path:
        path = self.folder / line[name]
        if not path.is_file():
            raise ValueError(f"{name} must be a file of the folder, there is no {line[name]}")
        return path

    def _picture_of(self, truth: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """The right answer: from 0 to 255 over what is valid, in the space of the model's."""
        value = 1 / truth[valid] if self.inverse else truth[valid]
        spread = value.max() - value.min()
        shown = np.zeros(truth.shape)
        shown[valid] = 255 * (value - value.min()) / (spread or 1.0)
        return _grey(shown + 0.5)


def resized(image: np.ndarray, shape: tuple[int, int], how: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    """uint8 [h, w, 3] as [H, W, 3]; itself where it is of that shape."""
    if image.shape[:2] == tuple(shape):
        return image
    return np.asarray(Image.fromarray(image).resize(shape[::-1], how))


@contextmanager
def _line(path: Path, number: int) -> Iterator[None]:
    """Begins the sentence of an error with the file and the line."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"evaluate vision: line {number} of {path}: {error}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"evaluate vision: {path} must be text in UTF-8: {error}") from error


def _record(text: str) -> dict[str, Any]:
    """The line's fields, of the right types."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it must be JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"it must be a JSON object, got {text.strip()[:40]}")
    if unknown := sorted(set(record) - set(_FIELDS)):
        raise ValueError(f"fields must be of {', '.join(_FIELDS)}, got {unknown[0]}{nearest(unknown[0], _FIELDS)}")
    if missing := [name for name in ("image", "task", "truth") if name not in record]:
        raise ValueError(f"it must have {', '.join(missing)}")
    for name in ("image", "task", "truth", "instruction", "valid"):
        if name in record and not (isinstance(record[name], str) and record[name].strip()):
            raise ValueError(f"{name} must be a text, got {record[name]!r}")
    kind = record["task"]
    if kind not in TASKS:
        raise ValueError(f"task must be of {', '.join(TASKS)}, got {kind}")
    for name, tasks in _ONLY_OF.items():
        if name in record and kind not in tasks:
            raise ValueError(f"{name} must be left out of the task {kind}")
    if kind != "depth" and "instruction" not in record:
        what = "the view that is wanted" if kind == "view" else "the object that is wanted"
        raise ValueError(f"instruction must be there for the task {kind}, as it names {what}")
    if "scale" in record and not (_number(record["scale"]) and record["scale"] > 0):
        raise ValueError(f"scale must be a number above 0, got {record['scale']!r}")
    if "range" in record:
        limits = record["range"]
        if not (
            isinstance(limits, list) and len(limits) == 2 and all(map(_number, limits)) and 0 < limits[0] < limits[1]
        ):
            raise ValueError(f"range must be [least, greatest] with 0 < least < greatest, got {limits!r}")
    return record


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _depth(path: Path, scale: float | None) -> np.ndarray:
    """float64 of a .npy file, or of a PNG of 16 bits times the scale, where 0 is no depth."""
    if path.suffix == ".npy":
        if scale is not None:
            raise ValueError(f"scale must be left out with {path.name}, whose values are the depth")
        depth = _array("truth", path)
        if depth.dtype.kind not in "fiu":
            raise ValueError(f"truth must be numbers, got {depth.dtype} in {path.name}")
        return depth.astype(np.float64)
    image = decode(f"truth {path.name}", path)
    if not image.mode.startswith("I"):
        raise ValueError(f"truth must be a .npy file or a PNG of 16 bits for a depth, got {image.mode} in {path.name}")
    if scale is None:
        raise ValueError(f"scale must be there with {path.name}: a value of the PNG times it is the depth")
    return np.asarray(image).astype(np.float64) * scale


def _mask(name: str, path: Path) -> np.ndarray:
    """bool of a .npy file, where it is not 0, or of a picture, where it is above 127."""
    if path.suffix != ".npy":
        return np.asarray(to_mask(f"{name} {path.name}", path).convert("L")) > 127
    mask = _array(name, path)
    if mask.dtype.kind not in "biu":
        raise ValueError(f"{name} must be whole numbers or booleans, got {mask.dtype} in {path.name}")
    return mask != 0


def _array(name: str, path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{name} must be an array as numpy.save writes it, got {path.name}: {error}") from error


def _of_shape(name: str, file: str, array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    wanted = (*shape, 3) if array.ndim == 3 and array.dtype == np.uint8 else shape
    if array.shape != wanted:
        raise ValueError(f"{name} must be {list(wanted)} as its image, got {list(array.shape)} in {file}")
    return array


def _limited(
    file: str, truth: np.ndarray, valid: np.ndarray, limits: Sequence[float] | None
) -> tuple[np.ndarray, tuple[float, float]]:
    """Where the depth counts, and what answers are clipped to: the range, else what the picture has."""
    valid = valid & np.isfinite(truth) & (truth > 0)
    if limits is not None:
        valid &= (truth >= limits[0]) & (truth <= limits[1])
    if not valid.any():
        raise ValueError(f"truth must have a pixel that is valid, finite, above 0 and in range, got none in {file}")
    least, greatest = limits or (truth[valid].min(), truth[valid].max())
    return valid, (float(least), float(greatest))


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.astype(np.uint8)[..., None], 3, axis=2)
