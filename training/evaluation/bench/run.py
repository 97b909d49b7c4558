"""The three stages of a benchmark, each of which goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from qwen_image_fast.checkpoint import json_bytes
from qwen_image_fast.files import atomic_write
from qwen_image_fast.training.evaluation.bench import metrics
from qwen_image_fast.training.evaluation.bench.answers import AnswerFile, ask_all
from qwen_image_fast.training.evaluation.bench.benchmarks import BENCHMARKS, PUBLISHED, PUBLISHED_JUDGE
from qwen_image_fast.training.evaluation.bench.items import Answer, Benchmark, Item, Question, Scored, picture_key
from qwen_image_fast.training.evaluation.bench.judges import Judge
from qwen_image_fast.training.evaluation.page import Failure, write_page

# (prompts, their source pictures or None, a seed for each) -> a picture for each.
Draw = Callable[[Sequence[str], Sequence[Path | None], Sequence[int]], Sequence[Image.Image]]
_SHOWN = 48  # failures on the page


@dataclass(frozen=True)
class BenchRun:
    """A benchmark of one model in one folder: `pictures/`, `answers.jsonl`, `results.json`, `report.html`.

    Args:
        name: in `BENCHMARKS`. items: of its `load`, all or the first. pictures: of each prompt.
        settings: what the pictures depend on: the model, `digest` of all items and more; a folder with pictures of
            others is refused.
    """

    name: str
    language: str
    items: Sequence[Item]
    pictures: int
    out: Path
    settings: dict[str, Any]

    @property
    def benchmark(self) -> Benchmark:
        return BENCHMARKS[self.name]

    def open(self) -> None:
        """Claim the folder for these settings.

        Raises:
            ValueError: it has pictures of others.
        """
        told = {"benchmark": self.name, "language": self.language, "pictures": self.pictures, **self.settings}
        file = self.out / "settings.json"
        if file.exists() and any((self.out / "pictures").glob("*.png")):
            before = json.loads(file.read_text(encoding="utf-8"))
            for name, value in told.items():
                if before.get(name) != value:
                    raise ValueError(
                        f"evaluate bench: {self.out} was begun with {name} {before.get(name)}, got {value}; give "
                        "another --out"
                    )
        else:
            (self.out / "pictures").mkdir(parents=True, exist_ok=True)
            atomic_write(file, lambda f: f.write(json_bytes(told)))

    def missing(self) -> list[tuple[int, int]]:
        """(number of the item, of its picture) of the pictures that are not there."""
        return [
            (i, n) for i, item in enumerate(self.items) for n in range(self.pictures) if not self.file(item, n).exists()
        ]

    def draw(self, draw: Draw, seed: int, batch: int, progress: Callable[[int], object] = lambda n: None) -> None:
        """Draw what is missing: picture n of item i gets the seed `seed + pictures i + n`, alone or with others."""
        missing = self.missing()
        for start in range(0, len(missing), batch):
            part = missing[start : start + batch]
            items = [self.items[i] for i, _ in part]
            seeds = [seed + self.pictures * i + n for i, n in part]
            made = draw([item.prompt for item in items], [item.source for item in items], seeds)
            for item, (_, n), image in zip(items, part, made):
                self._store(image, self.file(item, n))
            progress(len(part))

    def cut(self, folder: Path) -> None:
        """Take the pictures from grids of 2 x 2, `<id>.png`, instead of drawing them.

        Raises:
            ValueError: one is missing, or has fewer pictures than there must be.
        """
        for i in sorted({i for i, _ in self.missing()}):
            item = self.items[i]
            path = folder / f"{item.id}.png"
            if not path.is_file() or self.pictures > 4:
                raise ValueError(f"evaluate bench: --grids must have {item.id}.png, of 2 x 2 pictures, got {folder}")
            with Image.open(path) as grid:
                for n, image in enumerate(metrics.crops(grid.convert("RGB"))[: self.pictures]):
                    self._store(image, self.file(item, n))

    def questions(self, kind: str = "") -> Iterator[Question]:
        """In the order of the items; what a judge of kind `clip` is asked, or any other."""
        ask = self.benchmark.ask_clip if kind == "clip" else self.benchmark.ask
        if ask is None:
            raise ValueError(f"questions: {self.name} must have a score by a CLIP, got none")
        for item in self.items:
            for n in range(self.pictures):
                yield from ask(item, n, self.file(item, n))

    def judge(
        self, judge: Judge, parallel: int, progress: Callable[[], object] = lambda: None, pause: float = 1.0
    ) -> dict[str, Answer]:
        """All answers; see `ask_all`."""
        file = AnswerFile(self.out / "answers.jsonl", judge.name)
        try:
            return ask_all(
                self.questions(judge.kind), judge.ask, file, parallel=parallel, pause=pause, progress=progress
            )
        finally:
            file.close()

    def score(self, judge: str, answers: dict[str, Answer], clip: str = "") -> tuple[list[list[str]], list[str]]:
        """Write `results.json` and `report.html`; returns the table, and notes on it.

        judge, clip: names of who gave the answers."""
        scored = self.benchmark.score(self.items, self.pictures, answers)
        senseless = [key for key, answer in answers.items() if answer.value is None]
        rows = self._table(scored, judge, clip)
        notes = list(scored.notes)
        if senseless:
            notes.append(
                f"{len(senseless)} of {len(answers)} answers made no sense after three attempts and count as wrong."
            )
        content = {
            "settings": json.loads((self.out / "settings.json").read_text(encoding="utf-8")),
            "judge": judge,
            "scores": [
                {"name": r.name, "value": r.value, "of": r.of, "judge": clip if r.clip else judge} for r in scored.rows
            ],
            "answers": len(answers),
            "senseless": senseless,
            "notes": notes,
            "wrong": scored.wrong,
        }
        title = f"{self.benchmark.title} of {self.settings['model']}"
        told = [f"Judged by {judge}. Numbers of another judge are not comparable."]
        heading = f"{len(scored.wrong)} of {len(self.items) * self.pictures} pictures are not right"
        write_page(self.out / "report.html", title, told, rows, {heading: self._failures(scored)}, notes)
        atomic_write(self.out / "results.json", lambda file: file.write(json_bytes(content)))
        return rows, notes

    def file(self, item: Item, number: int) -> Path:
        return self.out / "pictures" / f"{picture_key(item, number)}.png"

    def _table(self, scored: Scored, judge: str, clip: str) -> list[list[str]]:
        published = PUBLISHED.get((self.name, self.language), {})
        there = [f"Qwen-Image's report, by {PUBLISHED_JUDGE[self.name]}"] if published else []
        rows = [["score", f"by {judge}", "of", *there]]
        for row in scored.rows:
            number = published.get(row.name)
            told = [""] if number is None else [f"{number:g}"]
            name = f"{row.name} (by {clip})" if row.clip else row.name
            rows.append([name, f"{row.value:.4g}", str(row.of), *(told if published else [])])
        return rows

    def _failures(self, scored: Scored) -> list[Failure]:
        found = []
        for item in self.items:
            for n in range(self.pictures):
                why = scored.wrong.get(picture_key(item, n))
                if why and len(found) < _SHOWN:
                    shown = (self.file(item, n),) if item.source is None else (item.source, self.file(item, n))
                    found.append(Failure(item.prompt, why, shown))
        return found

    def _store(self, image: Image.Image, path: Path) -> None:
        atomic_write(path, lambda file: image.save(file, "PNG"))


def digest(items: Sequence[Item]) -> str:
    """A hash of all prompts."""
    told = [[item.id, item.prompt, item.group] for item in items]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
