"""TinyEval: what a model of the tiny world can do, judged by pixels alone; `qwen-image-fast evaluate tiny`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qwen_image_fast.checkpoint import json_bytes
from qwen_image_fast.files import atomic_write
from qwen_image_fast.training.evaluation.cases import psnr_outside
from qwen_image_fast.training.evaluation.colour_metrics import ground_colour, text_colour
from qwen_image_fast.training.evaluation.edit_checks import KEPT, as_placed, grown, ink, seen_done
from qwen_image_fast.training.evaluation.glyphs import read_at
from qwen_image_fast.training.evaluation.intervals import wilson
from qwen_image_fast.training.evaluation.page import Failure, write_page
from qwen_image_fast.training.evaluation.things import fault
from qwen_image_fast.training.evaluation.tiny_cases import PICTURES, SIDE, Asked, recipe
from qwen_image_fast.training.synthesis.colours import TINY_GROUND_COLOURS, TINY_TEXT_COLOURS
from qwen_image_fast.training.synthesis.recipe import EDITS
from qwen_image_fast.training.synthesis.sample import EditSample

VAE = "vae"
TASKS = (*PICTURES, *(f"edit {kind}" for kind in EDITS), VAE)
_STRAY = 0.05  # share of a text's ink that may stand elsewhere
_SHOWN = 12  # failures of a task on the page

Draw = Callable[[Sequence[Asked], int], Sequence[np.ndarray]]
Edit = Callable[[Sequence[EditSample], int], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Judged:
    """A picture: its task, what was asked for, what is wrong with it (None: nothing), and what the page shows of it:
    the picture for a prompt, source and result of an edit."""

    task: str
    prompt: str
    fault: str | None
    shown: tuple[np.ndarray, ...]


def run_pictures(draw: Draw, asked: Sequence[Asked], batch: int = 16) -> Iterator[Judged]:
    """Draw and judge in order; `draw`: (prompts, number of the first) -> a uint8 picture for each, of any size."""
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        for one, image in zip(part, draw(part, start)):
            image = at_side(image)
            yield Judged(one.task, one.prompt, picture_fault(one, image), (image,))


def run_edits(edit: Edit, pairs: Sequence[EditSample], batch: int = 16) -> Iterator[Judged]:
    """Edit and judge in order, as `run_pictures`."""
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        for pair, image in zip(part, edit(part, start)):
            image = at_side(image)
            yield Judged(f"edit {pair.kind}", pair.instruction, edit_fault(pair, image), (pair.source, image))


def run_vae(reconstruct: Draw, asked: Sequence[Asked], batch: int = 16) -> Iterator[Judged]:
    """Judge what the model's VAE makes of right pictures: where it fails no picture of the model can be right."""
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        for one, image in zip(part, reconstruct(part, start)):
            yield Judged(VAE, one.prompt, picture_fault(one, at_side(image)), (one.right, image))


def picture_fault(asked: Asked, image: np.ndarray) -> str | None:
    """What is wrong with a picture, uint8 [128, 128, 3]; None: nothing."""
    if not asked.text:
        return fault(image, asked.things, asked.ground, asked.relation)
    read = read_at(image, asked.right, asked.box, asked.text, recipe().faces("en")[0])
    if read != asked.text:
        return f"reads {read}" if read.strip("?") else "shows no text that can be read"
    near = grown(ink(asked.right), 6)
    if (ink(image) & ~near).sum() > _STRAY * ink(asked.right).sum():
        return "something stands beside the text"
    if (name := text_colour(image, asked.box, TINY_TEXT_COLOURS)) != asked.colour:
        return f"the text is {name or 'faint'}"
    name = ground_colour(image, TINY_GROUND_COLOURS)
    return None if name == asked.ground else f"the ground is {name}"


def edit_fault(pair: EditSample, image: np.ndarray) -> str | None:
    """What is wrong with an edited picture, uint8 [128, 128, 3]; None: the edit was done, every text says what it must,
    and what was not to be touched keeps 28 dB."""
    pair = as_placed(pair, image)
    if seen_done(pair, image) is False:
        return "the edit was not done"
    for box, text in zip(pair.boxes, pair.target_lines):
        if (read := read_at(image, pair.target, box, text, recipe().faces(pair.language)[0])) != text:
            return f"reads {read}" if read.strip("?") else "the text is not there"
        if pair.kind == "text":
            wanted = text_colour(pair.target, box, TINY_TEXT_COLOURS)
            if (name := text_colour(image, box, TINY_TEXT_COLOURS)) != wanted:
                return f"the text is {name or 'faint'}"
    outside = psnr_outside(image, pair.target, pair.mask)
    return f"{outside:.1f} dB outside of the change" if outside < KEPT else None


def at_side(image: np.ndarray) -> np.ndarray:
    """A picture of any size at 128 pixels, where the checks are exact."""
    if image.shape[:2] == (SIDE, SIDE):
        return image
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX))


def summary(judged: Sequence[Judged]) -> dict[str, dict[str, Any]]:
    """By task, in the order of `TASKS`: pictures, right ones, their share and its 95 % interval."""
    out: dict[str, dict[str, Any]] = {}
    for task in TASKS:
        own = [one for one in judged if one.task == task]
        if own:
            right = sum(one.fault is None for one in own)
            low, high = wilson(right, len(own))
            out[task] = {"pictures": len(own), "right": right, "share": right / len(own), "low": low, "high": high}
    return out


def table(totals: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The summary as rows of text, the head first."""
    rows = [["task", "right", "of", "share", "95 % interval"]]
    for task, v in totals.items():
        interval = f"{v['low']:.0%} to {v['high']:.0%}"
        rows.append([task, str(v["right"]), str(v["pictures"]), f"{v['share']:.0%}", interval])
    return rows


def write_report(judged: Sequence[Judged], folder: Path, model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """`results.json` and `report.html` in a folder; returns the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    totals = summary(judged)
    rows = [{"task": one.task, "prompt": one.prompt, "fault": one.fault} for one in judged]
    content = {"model": model, "settings": settings, "summary": totals, "pictures": rows}
    failures = {
        f"{task}: {totals[task]['pictures'] - totals[task]['right']} of {totals[task]['pictures']} wrong": [
            Failure(one.prompt, one.fault, one.shown) for one in judged if one.task == task and one.fault is not None
        ][:_SHOWN]
        for task in totals
    }
    told = [", ".join(f"{name}: {value}" for name, value in settings.items())]
    write_page(folder / "report.html", f"TinyEval of {model}", told, table(totals), failures)
    atomic_write(folder / "results.json", lambda file: file.write(json_bytes(content)))
    return totals
