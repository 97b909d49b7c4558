"""`qwen-image-fast evaluate text`: draw prompts, read the pictures, count."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_image_fast.checkpoint import json_bytes
from qwen_image_fast.files import atomic_write
from qwen_image_fast.training.evaluation.cases import TextCase
from qwen_image_fast.training.evaluation.colour_metrics import ground_colour, text_colour
from qwen_image_fast.training.evaluation.intervals import wilson
from qwen_image_fast.training.evaluation.ocr import Reader
from qwen_image_fast.training.evaluation.paired import sign_test, won_lost
from qwen_image_fast.training.evaluation.text_metrics import TextScore, score, summarise
from qwen_image_fast.training.synthesis.fonts import Face, find_fonts
from qwen_image_fast.training.synthesis.preview import contact_sheet
from qwen_image_fast.training.synthesis.recipe import SynthesisRecipe
from qwen_image_fast.training.synthesis.sample import Sample

# Pictures on a sheet.
_SHEET = 48


@dataclass(frozen=True)
class Result:
    """One picture: what was asked for, what was read, and whether all its colours are right (None: none named)."""

    case: TextCase
    image: np.ndarray
    read: tuple[str, ...]
    score: TextScore
    colours_right: bool | None


def evaluate(
    draw: Callable[[Sequence[TextCase], int], Sequence[np.ndarray]],
    cases: Sequence[TextCase],
    recipe: SynthesisRecipe,
    reader: Reader,
    batch: int = 16,
) -> Iterator[Result]:
    """Draw and judge the cases in order.

    Args:
        draw: (cases, number of the first one) -> a uint8 picture [H, W, 3] for each.
        recipe: gives the colours that a picture can have.
    """
    for start in range(0, len(cases), batch):
        part = cases[start : start + batch]
        for case, image in zip(part, draw(part, start)):
            yield judge(case, image, recipe, reader)


def judge(case: TextCase, image: np.ndarray, recipe: SynthesisRecipe, reader: Reader) -> Result:
    """Read one picture and compare it with what was asked for."""
    lines = reader.read(image)
    read = tuple(line.text for line in lines)
    right = None
    if case.colours:
        whole = (0, 0, image.shape[1], image.shape[0])
        # Texts from top to bottom, as the lines read; where their numbers differ, one judgement of the whole picture.
        boxes = [line.box for line in lines] if len(lines) == len(case.texts) else [whole]
        wanted = [case.colours.get(f"text {i}" if i else "text") for i in range(len(boxes))]
        right = ground_colour(image, recipe.ground_colours) == case.colours["ground"] and all(
            text_colour(image, box, recipe.text_colours) == name for box, name in zip(boxes, wanted)
        )
    return Result(case, image, read, score(case.texts, read, case.language), right)


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """Metrics by language: those of `TextSummary`, the 95 % interval of the exact ones, colour accuracy, and exact
    match by the length of the text."""
    out: dict[str, Any] = {}
    for language in sorted({r.case.language for r in results}):
        own = [r for r in results if r.case.language == language]
        judged = [r.colours_right for r in own if r.colours_right is not None]
        lengths: dict[int, list[bool]] = {}
        for r in own:
            lengths.setdefault(max(map(len, r.case.texts)), []).append(r.score.exact)
        out[language] = dataclasses.asdict(summarise([r.score for r in own])) | {
            "exact_interval": list(wilson(sum(r.score.exact for r in own), len(own))),
            "colour_accuracy": sum(judged) / len(judged) if judged else None,
            "exact_by_length": {n: [sum(v), len(v)] for n, v in sorted(lengths.items())},
        }
    return out


def write_report(
    results: Sequence[Result], folder: Path, settings: dict[str, Any], before: dict[str, Any] | None = None
) -> dict[str, Any]:
    """`results.json`, `samples.png` and, where there are some, `failures.png` in a folder; returns the summary.

    before: of `results_before`; each language of the summary then has what `compared` finds as `against`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    totals = summary(results)
    for language, found in (compared(before, results) if before else {}).items():
        totals[language]["against"] = found
    rows = [
        {"prompt": r.case.prompt, "texts": r.case.texts, "read": r.read, "exact": r.score.exact,
         "colours_right": r.colours_right}
        for r in results
    ]  # fmt: skip
    content = {"settings": settings, "summary": totals, "pictures": rows}
    atomic_write(folder / "results.json", lambda file: file.write(json_bytes(content)))
    faces = find_fonts()
    _sheet(results[:_SHEET], folder / "samples.png", faces)
    failures = [r for r in results if not r.score.exact or r.colours_right is False]
    if failures:
        _sheet(failures[:_SHEET], folder / "failures.png", faces)
    return totals


def _sheet(results: Sequence[Result], path: Path, faces: Sequence[Face]) -> None:
    def labelled(r: Result) -> Sample:
        read = " / ".join(r.read) or "nothing"
        colours = "" if r.colours_right in (True, None) else "; a colour is wrong"
        label = r.case.prompt if r.score.exact and not colours else f"{r.case.prompt} → {read}{colours}"
        return Sample(r.image, label, r.case.texts, r.case.language, dict(r.case.colours), (), "pure")

    sheet = contact_sheet([labelled(r) for r in results], faces, columns=8)
    atomic_write(path, lambda file: sheet.save(file, "PNG"))


def table(totals: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    rows = [
        "| language | pictures | text exact | 95 % interval | word accuracy | NED | text score | colours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for language, values in totals.items():
        colours = "" if values["colour_accuracy"] is None else f"{values['colour_accuracy']:.1%}"
        low, high = values["exact_interval"]
        rows.append(
            f"| {language} | {values['pictures']} | {values['exact']:.1%} | {low:.0%} to {high:.0%} "
            f"| {values['word_accuracy']:.1%} "
            f"| {values['ned']:.3f} | {values['text_score']:.1%} | {colours} |"
        )
    return "\n".join(rows)


def drawn_by(pipe: Any, **arguments: Any) -> Callable[[Sequence[TextCase], int], list[np.ndarray]]:
    """A `draw` for `evaluate` from a text-to-image pipeline; picture i has the seed `seed + i`."""
    seed = arguments.pop("seed", 0)

    def draw(cases: Sequence[TextCase], first: int) -> list[np.ndarray]:
        made = pipe([case.prompt for case in cases], seed=seed + first, output_type="np", progress=False, **arguments)
        return [(np.asarray(image) * 255).round().astype(np.uint8) for image in made.images]

    return draw


def read_results(folder: Path) -> dict[str, Any]:
    """What `write_report` wrote."""
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def results_before(path: Path, cases: Sequence[TextCase]) -> dict[str, Any]:
    """The results of a run before, of the same prompts.

    Args:
        path: its `results.json`, or the folder with it.

    Raises:
        ValueError: it is none of `evaluate text`, or of other prompts.
    """
    try:
        file = path / "results.json" if path.is_dir() else path
        content = json.loads(file.read_text(encoding="utf-8"))
        told = [(row["prompt"], tuple(row["texts"]), bool(row["exact"])) for row in content["pictures"]]
        settings = dict(content["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"evaluate text: --against must be results of evaluate text, got {path}") from error
    if [one[:2] for one in told] != [(case.prompt, case.texts) for case in cases]:
        raise ValueError(
            f"evaluate text: --against must be of the same prompts, got {len(told)} others in {path}; give the same "
            "--count, --languages, --seed and what else chooses them"
        )
    return {"path": str(path), "settings": settings, "exact": [one[2] for one in told]}


def compared(before: dict[str, Any], results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """By language: how many pictures became exact, how many no longer are, and the p of the sign test on these."""
    out = {}
    for language in sorted({r.case.language for r in results}):
        pairs = [(was, r.score.exact) for was, r in zip(before["exact"], results) if r.case.language == language]
        won, lost = won_lost([was for was, _ in pairs], [now for _, now in pairs])
        out[language] = {"path": before["path"], "won": won, "lost": lost, "p": sign_test(won, lost)}
    return out
