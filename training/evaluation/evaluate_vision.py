"""`qwen-image-fast evaluate vision`: depth, segmentation, views, edges and colours by instruction, on scenes whose
truth is known; beside every score that of an answer which needs no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qwen_image_fast.checkpoint import json_bytes
from qwen_image_fast.files import atomic_write
from qwen_image_fast.training.evaluation.cases import psnr_outside
from qwen_image_fast.training.evaluation.edit_checks import grown
from qwen_image_fast.training.evaluation.page import Failure, write_page
from qwen_image_fast.training.synthesis.generator import MOST_ATTEMPTS, generator_of
from qwen_image_fast.training.synthesis.recipe import tiny
from qwen_image_fast.training.synthesis.sample import EditSample
from qwen_image_fast.training.synthesis.scenes import BACKDROP, FAR, GROUND, NEAR
from qwen_image_fast.training.synthesis.vision import Task, outlines, task

TRIVIAL = {
    "depth": "a ramp, near below", "segment": "the source", "view": "the source", "edges": "steps of the source's luma",
    "colourise": "the source",
}  # fmt: skip
_STEP = 24.0  # of luma, from a pixel to the next
_SHOWN = 12  # answers of a kind on the page
Scores = dict[str, float]


@dataclass(frozen=True)
class Answer:
    """What was made of a task, uint8 as its target, and the scores of it, of the trivial answer, and of the right one
    after the model's own VAE (empty: not measured)."""

    task: Task
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
    tasks: Sequence[Task],
    through_vae: Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]] | None = None,
    batch: int = 16,
) -> Iterator[Answer]:
    """Let the tasks be done and judge them, in order.

    Args:
        edit: (pairs, number of the first) -> a uint8 picture for each. through_vae: of pictures.
    """
    for start in range(0, len(tasks), batch):
        part = tasks[start : start + batch]
        made = edit([one.pair for one in part], start)
        again = through_vae([one.pair.target for one in part]) if through_vae else [None] * len(part)
        for one, image, right in zip(part, made, again):
            ceiling = {} if right is None else scores(one, right)
            yield Answer(one, image, scores(one, image), scores(one, trivial(one)), ceiling)


def scores(asked: Task, image: np.ndarray) -> Scores:
    """Of an answer, uint8 [H, W, 3].

    depth: `depth_scores` of all that is not backdrop, and AbsRel of the solids alone. segment: IoU of what is not black
    with the solids asked for, and the mean of theirs by colour. edges: `edge_f_score`. view, colourise: PSNR in dB.
    """
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


def depth_scores(
    inverse: np.ndarray, truth: np.ndarray, valid: np.ndarray, aligned_on: np.ndarray | None = None
) -> tuple[float, float]:
    """AbsRel, the mean of |d - d*| / d*, and δ1, the share with max(d / d*, d* / d) < 1.25.

    Args:
        inverse: depth [H, W] up to scale and shift, larger where nearer: d = 1 / (s inverse + t), s and t by least
            squares on 1 / d*, and clipped to [NEAR, FAR].
        truth: d*. valid: which pixels count. aligned_on: those that s and t are found on; None: the same.
    """
    where = valid if aligned_on is None else aligned_on
    wanted = 1 / truth[where].astype(np.float64)
    basis = np.stack([inverse[where], np.ones(wanted.size)], 1)
    scale, shift = np.linalg.lstsq(basis, wanted, rcond=None)[0]
    depth = 1 / np.clip(scale * inverse[valid] + shift, 1 / FAR, 1 / NEAR)
    right = truth[valid].astype(np.float64)
    ratio = np.maximum(depth / right, right / depth)
    return float(np.mean(np.abs(depth - right) / right)), float(np.mean(ratio < 1.25))


def intersection_over_union(made: np.ndarray, wanted: np.ndarray) -> float:
    """Of two masks; 1 where both are empty."""
    union = (made | wanted).sum()
    return float((made & wanted).sum() / union) if union else 1.0


def edge_f_score(made: np.ndarray, wanted: np.ndarray) -> float:
    """2 P R / (P + R): the share of what was made that is within a pixel of what is wanted, and the reverse."""
    if not made.any() or not wanted.any():
        return float(made.any() == wanted.any())
    precision = (made & grown(wanted, 1)).sum() / made.sum()
    recall = (wanted & grown(made, 1)).sum() / wanted.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def trivial(asked: Task) -> np.ndarray:
    """An answer that needs no model, see TRIVIAL."""
    source = asked.pair.source
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


def summary(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """By kind: how many, and the mean of each score."""
    out: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(one.task.pair.kind for one in answers):
        own = [one for one in answers if one.task.pair.kind == kind]
        out[kind] = {
            "pictures": len(own), "trivial answer": TRIVIAL[kind], "model": _means([one.scores for one in own]),
            "trivial": _means([one.trivial for one in own]),
            "right, through its VAE": _means([one.ceiling for one in own]),
        }  # fmt: skip
    return out


def _means(found: Sequence[Scores]) -> Scores:
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def table(totals: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The summary as rows of text, the head first."""
    rows = [["task", "score", "model", "trivial answer", "which", "the right one through its VAE"]]
    for kind, v in totals.items():
        for name, value in v["model"].items():
            ceiling = v["right, through its VAE"].get(name)
            cells = [_number(name, value), _number(name, v["trivial"][name]), v["trivial answer"]]
            rows.append([kind, name, *cells, "" if ceiling is None else _number(name, ceiling)])
    return rows


def _number(name: str, value: float) -> str:
    return f"{value:.1f} dB" if name == "PSNR" else f"{value:.3f}"


def write_report(answers: Sequence[Answer], folder: Path, model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """`results.json`, `report.html` and `answers.png` (source, answer, right answer) in a folder; the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    totals = summary(answers)
    rows = [
        {"task": one.task.pair.kind, "instruction": one.task.pair.instruction, "scores": one.scores,
         "trivial": one.trivial, "right, through its VAE": one.ceiling}
        for one in answers
    ]  # fmt: skip
    content = {"model": model, "settings": settings, "summary": totals, "pictures": rows}
    shown = {f"{kind}: source, answer, right answer": [_figure(one) for one in answers if one.task.pair.kind == kind]
             for kind in totals}  # fmt: skip
    told = [", ".join(f"{name}: {value}" for name, value in settings.items())]
    pages = {heading: figures[:_SHOWN] for heading, figures in shown.items()}
    write_page(folder / "report.html", f"Vision tasks of {model}", told, table(totals), pages)
    atomic_write(folder / "answers.png", lambda file: sheet(answers).save(file, "PNG"))
    atomic_write(folder / "results.json", lambda file: file.write(json_bytes(content)))
    return totals


def sheet(answers: Sequence[Answer], across: int = 3, gap: int = 8) -> Image.Image:
    """The first few answers of each kind, a kind a row: under the instruction the source, the answer, the right one."""
    rows: dict[str, list[Answer]] = {}
    for one in answers:
        rows.setdefault(one.task.pair.kind, []).append(one)
    height, width = answers[0].image.shape[:2]
    step, pitch = 3 * width + 3 * gap, height + 3 * gap
    made = Image.new("RGB", (min(across, max(map(len, rows.values()))) * step + gap, len(rows) * pitch + gap), "white")
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(12)
    for row, own in enumerate(rows.values()):
        for column, one in enumerate(own[:across]):
            left, top = gap + column * step, gap + row * pitch
            draw.text((left, top - 2), one.task.pair.instruction, fill="black", font=font)
            for place, picture in enumerate((one.task.pair.source, one.image, one.task.pair.target)):
                made.paste(Image.fromarray(picture), (left + place * (width + gap // 2), top + 2 * gap))
    return made


def _figure(answer: Answer) -> Failure:
    pair = answer.task.pair
    said = ", ".join(f"{name} {_number(name, value)}" for name, value in answer.scores.items())
    return Failure(pair.instruction, said, (pair.source, answer.image, pair.target))
