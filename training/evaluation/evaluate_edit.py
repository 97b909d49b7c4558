"""`qwen-image-fast evaluate edit`: edit pictures, read them back, and see what else changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_image_fast.checkpoint import json_bytes
from qwen_image_fast.files import atomic_write
from qwen_image_fast.training.evaluation.cases import psnr_outside
from qwen_image_fast.training.evaluation.edit_checks import KEPT, as_placed, must_be_read, seen_done
from qwen_image_fast.training.evaluation.ocr import Reader
from qwen_image_fast.training.evaluation.text_metrics import TextScore, score, summarise
from qwen_image_fast.training.synthesis.fonts import find_fonts
from qwen_image_fast.training.synthesis.preview import contact_sheet
from qwen_image_fast.training.synthesis.sample import EditSample

_SHEET = 36


@dataclass(frozen=True)
class EditResult:
    """One edit: the pair, what was made, what was read in it, PSNR in dB outside the pair's mask and everywhere.

    score: of the text of the whole picture. seen: see `edit_checks.seen_done`.
    """

    pair: EditSample
    image: np.ndarray
    read: tuple[str, ...]
    score: TextScore
    outside: float
    psnr: float
    seen: bool | None

    @property
    def done(self) -> bool | None:
        """The edit was made and nothing else: what must be seen is seen, what must be read is read, and outside of the
        change the picture keeps 28 dB. None: pixels cannot tell."""
        if self.seen is None and self.pair.kind != "text":
            return None
        reads = self.score.exact or not must_be_read(self.pair)
        return self.seen is not False and reads and not self.outside < KEPT


def evaluate_edits(
    edit: Callable[[Sequence[EditSample], int], Sequence[np.ndarray]],
    pairs: Sequence[EditSample],
    reader: Reader,
    batch: int = 16,
) -> Iterator[EditResult]:
    """Edit and judge the pairs in order; `edit`: (pairs, number of the first) -> a uint8 picture for each."""
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        for asked, image in zip(part, edit(part, start)):
            pair = as_placed(asked, image)
            # A shape may be read as a symbol, which is no text.
            lines = tuple(line.text for line in reader.read(image) if any(c.isalnum() for c in line.text))
            everywhere = np.zeros(pair.mask.shape, bool)
            yield EditResult(
                pair, image, lines, score(pair.target_lines, lines, pair.language),
                psnr_outside(image, pair.target, pair.mask), psnr_outside(image, pair.target, everywhere),
                seen_done(pair, image),
            )  # fmt: skip


def summary(results: Sequence[EditResult]) -> dict[str, Any]:
    """By kind of edit: how many were done, text metrics of the whole picture, median PSNR outside of the changed area
    and of all of it."""
    out: dict[str, Any] = {}
    for kind in sorted({r.pair.kind for r in results}):
        own = [r for r in results if r.pair.kind == kind]
        text = summarise([r.score for r in own])
        outside = [r.outside for r in own if np.isfinite(r.outside)]
        judged = [r.done for r in own if r.done is not None]
        out[kind] = {
            "pictures": len(own),
            "done": sum(judged) / len(judged) if judged else None,
            "text_exact": text.exact,
            "word_accuracy": text.word_accuracy,
            "psnr_outside": float(np.median(outside)) if outside else None,
            "psnr_outside_28_db": sum(v >= 28 for v in outside) / len(outside) if outside else None,
            "psnr": float(np.median([r.psnr for r in own])),
        }
    return out


def write_report(results: Sequence[EditResult], folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """`results.json` and `samples.png` (before and after, with the instruction) in a folder; returns the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    totals = summary(results)
    rows = [
        {"instruction": r.pair.instruction, "kind": r.pair.kind, "texts": r.pair.target_lines, "read": r.read,
         "done": r.done, "text_exact": r.score.exact, "psnr_outside": r.outside}
        for r in results
    ]  # fmt: skip
    content = {"settings": settings, "summary": totals, "pictures": rows}
    atomic_write(folder / "results.json", lambda file: file.write(json_bytes(content)))
    shown = [made_pair(r) for r in results[:_SHEET]]
    sheet = contact_sheet(shown, find_fonts(), columns=6, cell=128)
    atomic_write(folder / "samples.png", lambda file: sheet.save(file, "PNG"))
    return totals


def made_pair(result: EditResult) -> EditSample:
    """Source and what was made of it, as an editing pair for a contact sheet."""
    pair = result.pair
    good = result.score.exact if result.done is None else result.done
    label = pair.instruction if good else f"{pair.instruction} → {' / '.join(result.read) or 'nothing'}"
    none = np.zeros_like(pair.mask)
    return EditSample(
        pair.source, result.image, label, none, pair.kind, pair.language, pair.source_lines, result.read, pair.strategy
    )


def table(totals: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    rows = ["| edit | pictures | done | whole text exact | PSNR outside (median) |", "|---|---|---|---|---|"]
    for kind, v in totals.items():
        done = "" if v["done"] is None else f"{v['done']:.1%}"
        outside = "" if v["psnr_outside"] is None else f"{v['psnr_outside']:.1f} dB"
        rows.append(f"| {kind} | {v['pictures']} | {done} | {v['text_exact']:.1%} | {outside} |")
    return "\n".join(rows)


def edited_by(pipe: Any, **arguments: Any) -> Callable[[Sequence[EditSample], int], list[np.ndarray]]:
    """An `edit` for `evaluate_edits` from an editing pipeline; picture i has the seed `seed + i`."""
    seed = arguments.pop("seed", 0)

    def edit(pairs: Sequence[EditSample], first: int) -> list[np.ndarray]:
        made = pipe(
            image=[[pair.source] for pair in pairs], prompt=[pair.instruction for pair in pairs],
            seed=seed + first, output_type="np", progress=False, **arguments,
        )  # fmt: skip
        return [(np.asarray(image) * 255).round().astype(np.uint8) for image in made.images]

    return edit
