"""`qwen-image-fast evaluate vision`: depth, segmentation, views, edges and colours by instruction, on scenes whose
truth is known or on pictures with theirs; beside every score that of an answer which needs no model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qwen_image_fast.checkpoint import json_bytes
from qwen_image_fast.files import atomic_write
from qwen_image_fast.training.evaluation.cases import psnr_outside
from qwen_image_fast.training.evaluation.page import Failure, write_page
from qwen_image_fast.training.evaluation.vision_data import Given, resized
from qwen_image_fast.training.evaluation.vision_metrics import depth_scores, edge_f_score, intersection_over_union
from qwen_image_fast.training.synthesis.fonts import FontError, find_fonts, load, missing_glyphs
from qwen_image_fast.training.synthesis.generator import MOST_ATTEMPTS, generator_of
from qwen_image_fast.training.synthesis.recipe import tiny
from qwen_image_fast.training.synthesis.sample import EditSample
from qwen_image_fast.training.synthesis.scenes import BACKDROP, GROUND
from qwen_image_fast.training.synthesis.vision import Task, outlines, task

TRIVIAL = {
    "depth": "a ramp, near below", "segment": "the source", "view": "the source", "edges": "steps of the source's luma",
    "colourise": "the source",
}  # fmt: skip
_STEP = 24.0  # of luma, from a pixel to the next
_SHOWN = 12  # answers of a kind on the page
_CELL = 256  # largest side of a picture on the sheet
_CEILING = "right, through its VAE"
Scores = dict[str, float]


@dataclass(frozen=True)
class Answer:
    """What was made of a task, uint8 as its target, and the scores of it, of the trivial answer, and of the right one
    after the model's own VAE (empty: not measured)."""

    task: Task | Given
    image: np.ndarray
    scores: Scores
    trivial: Scores
    ceiling: Scores


def held_out_tasks(kind: str, count: int, size: int = 128, language: str = "en", seed: int = 0) -> list[Task]:
    """Tasks of one kind, of scenes whose solids training never shows together on that ground."""
    recipe = tiny(128, (language,), pure=0.0, scenes=1.0, vision=(kind,), split="held_out", sizes=((size, size),))
    found = []
    for index in range(count):
        rng = generator_of(seed, index)
        made = (task(recipe, rng, (size, size), language) for _ in range(10 * MOST_ATTEMPTS))
        found.append(next(one for one in made if one is not None))
    return found


def evaluate(
    edit: Callable[[Sequence[EditSample], int], Sequence[np.ndarray]],
    tasks: Sequence[Task] | Sequence[Given],
    through_vae: Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]] | None = None,
    batch: int = 16,
) -> Iterator[Answer]:
    """Let the tasks be done and judge them, in order.

    Args:
        edit: (pairs, number of the first) -> a uint8 picture for each. through_vae: of pictures, each of the size of
            the answer.
    """
    for start in range(0, len(tasks), batch):
        part = tasks[start : start + batch]
        made = edit([one.pair for one in part], start)
        again: Sequence[np.ndarray | None] = [None] * len(part)
        if through_vae:
            right = [resized(one.pair.target, image.shape[:2]) for one, image in zip(part, made)]
            again = through_vae(right)
        for one, image, kept in zip(part, made, again):
            ceiling = {} if kept is None else scores(one, kept)
            yield Answer(one, image, scores(one, image), scores(one, trivial(one)), ceiling)


def scores(asked: Task | Given, image: np.ndarray) -> Scores:
    """Of an answer, uint8 [H, W, 3].

    depth: `depth_scores` of all that is not backdrop, and AbsRel of the solids alone. segment: IoU of what is not black
    with the solids asked for, and the mean of theirs by colour. edges: `edge_f_score`. view, colourise: PSNR in dB.
    Of given pictures see `Given.scores`.
    """
    if isinstance(asked, Given):
        return asked.scores(image)
    pair, ids, truth = asked.pair, asked.view.ids, asked.view.depth
    if pair.kind == "depth":
        inverse = image.astype(np.float64).mean(2)
        error, near = depth_scores(inverse, truth, ids != BACKDROP)
        return {"AbsRel": error, "δ1": near,
                "AbsRel of solids": depth_scores(inverse, truth, ids > GROUND, ids != BACKDROP)[0]}  # fmt: skip
    if pair.kind == "segment":
        return _segment_scores(asked, image)
    if pair.kind == "edges":
        return {"F": edge_f_score(image.mean(2) > 127, outlines(ids))}
    return {"PSNR": psnr_outside(image, pair.target, np.zeros(ids.shape, bool))}


def trivial(asked: Task | Given) -> np.ndarray:
    """An answer that needs no model, see TRIVIAL."""
    source = asked.picture if isinstance(asked, Given) else asked.pair.source
    if asked.pair.kind == "depth":
        height, width = source.shape[:2]
        ramp = np.linspace(0, 255, height)[:, None, None]
        return np.broadcast_to(ramp, (height, width, 3)).astype(np.uint8)
    if asked.pair.kind == "edges":
        luma = source.mean(2)
        steps = np.zeros(luma.shape, bool)
        steps[:, :-1] |= np.abs(np.diff(luma, axis=1)) > _STEP
        steps[:-1] |= np.abs(np.diff(luma, axis=0)) > _STEP
        return np.repeat(np.where(steps, 255, 0).astype(np.uint8)[..., None], 3, axis=2)
    return source


def _segment_scores(asked: Task, image: np.ndarray) -> Scores:
    ids = asked.view.ids
    if asked.wanted:
        found = intersection_over_union(image.mean(2) > 127, ids == asked.wanted)
        return {"IoU": found, "IoU by solid": found}
    palette = np.array([(0, 0, 0), *asked.colours()], np.float64)
    nearest = np.linalg.norm(image[..., None, :] - palette, axis=-1).argmin(-1)
    each = [intersection_over_union(nearest == number, ids == number) for number in range(1, len(palette))]
    return {"IoU": intersection_over_union(nearest > 0, ids > GROUND), "IoU by solid": float(np.mean(each))}


def summary(answers: Iterable[Answer]) -> dict[str, dict[str, Any]]:
    """By kind: how many, and the mean of each score."""
    return _summary([_row(one) for one in answers])


def _row(one: Answer) -> dict[str, Any]:
    pair, named = one.task.pair, {"image": one.task.name} if isinstance(one.task, Given) else {}
    return {"task": pair.kind, "instruction": pair.instruction, **named, "scores": one.scores, "trivial": one.trivial,
            _CEILING: one.ceiling}  # fmt: skip


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == kind]
        means = {name: _means([row[of] for row in own])
                 for name, of in (("model", "scores"), ("trivial", "trivial"), (_CEILING, _CEILING))}  # fmt: skip
        out[kind] = {"pictures": len(own), "trivial answer": TRIVIAL[kind], **means}
    return out


def _means(found: Sequence[Scores]) -> Scores:
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def table(totals: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The summary as rows of text, the head first."""
    rows = [["task", "score", "model", "trivial answer", "which", "the right one through its VAE"]]
    for kind, v in totals.items():
        for name, value in v["model"].items():
            ceiling = v[_CEILING].get(name)
            cells = [_number(name, value), _number(name, v["trivial"][name]), v["trivial answer"]]
            rows.append([kind, name, *cells, "" if ceiling is None else _number(name, ceiling)])
    return rows


def _number(name: str, value: float) -> str:
    return f"{value:.1f} dB" if name == "PSNR" else f"{value:.3f}"


def write_report(answers: Iterable[Answer], folder: Path, model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """`results.json`, `report.html` and `answers.png` (source, answer, right answer) in a folder; the summary.

    Of the answers, taken one by one, only those that are shown are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, shown = list[dict[str, Any]](), dict[str, list[Answer]]()
    for one in answers:
        rows.append(_row(one))
        own = shown.setdefault(one.task.pair.kind, [])
        if len(own) < _SHOWN:
            own.append(one)
    totals = _summary(rows)
    content = {"model": model, "settings": settings, "summary": totals, "pictures": rows}
    told = [", ".join(f"{name}: {value}" for name, value in settings.items())]
    pages = {f"{kind}: source, answer, right answer": [_figure(one) for one in own] for kind, own in shown.items()}
    write_page(folder / "report.html", f"Vision tasks of {model}", told, table(totals), pages)
    image = sheet([one for own in shown.values() for one in own])
    atomic_write(folder / "answers.png", lambda file: image.save(file, "PNG"))
    atomic_write(folder / "results.json", lambda file: file.write(json_bytes(content)))
    return totals


def sheet(answers: Sequence[Answer], across: int = 3, gap: int = 8) -> Image.Image:
    """The first few answers of each kind, a kind a row: under the instruction the source, the answer, the right one."""
    rows: dict[str, list[Answer]] = {}
    for one in answers:
        rows.setdefault(one.task.pair.kind, []).append(one)
    shown = [one for own in rows.values() for one in own[:across]]
    height, width = (min(_CELL, max(one.task.pair.source.shape[axis] for one in shown)) for axis in (0, 1))
    step, pitch = 3 * width + 3 * gap, height + 3 * gap
    made = Image.new("RGB", (min(across, max(map(len, rows.values()))) * step + gap, len(rows) * pitch + gap), "white")
    draw, font = ImageDraw.Draw(made), _font("".join(one.task.pair.instruction for one in shown))
    for row, own in enumerate(rows.values()):
        for column, one in enumerate(own[:across]):
            left, top = gap + column * step, gap + row * pitch
            draw.text((left, top - 2), one.task.pair.instruction, fill="black", font=font)
            for place, picture in enumerate((one.task.pair.source, one.image, one.task.pair.target)):
                fitted = Image.fromarray(picture)
                fitted.thumbnail((width, height))
                made.paste(fitted, (left + place * (width + gap // 2), top + 2 * gap))
    return made


def _font(text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own, or where that has not all letters one of the machine that has."""
    if not text.isascii():
        with contextlib.suppress(FontError, ImportError):
            faces = find_fonts()
            return load(min(faces, key=lambda face: len(missing_glyphs(face, text))), 12)
    return ImageFont.load_default(12)


def _figure(answer: Answer) -> Failure:
    pair = answer.task.pair
    said = ", ".join(f"{name} {_number(name, value)}" for name, value in answer.scores.items())
    return Failure(pair.instruction, said, (pair.source, answer.image, pair.target))
