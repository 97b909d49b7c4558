"""A run under way on the disk: its parts, and the rows of those that are judged, which are not judged again."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_image_fast.extras import needed_for
from qwen_image_fast.files import atomic_write
from qwen_image_fast.training.recipe.fields import differences

from .parts import Part, plan, read_plan, write_plan
from .recipe import FilterRecipe, RetrieveRecipe

with needed_for("filtering a data set"):
    import pyarrow as pa
    import pyarrow.parquet as pq

FOLDER = ".filtering"


@dataclass(frozen=True)
class Attempt:
    """An earlier process began the part and ended. place: of the record it was at, -1 unknown; deaths: there."""

    place: int = -1
    deaths: int = 0


class Journal:
    """The folder of a run: `recipe.json`, `parts.jsonl`, and `rows/<part>.parquet` of each part that is done.

    Args:
        out: of the result; the folder in it is there until the result is.
        folder: its name. command: whose run it is, for errors. free: fields of the recipe that may be others when the
            run goes on; `ray` says where, not what.
    """

    def __init__(self, out: Path, folder: str = FOLDER, command: str = "filter", free: Sequence[str] = ("ray",)):
        self.folder, self._command, self._free = out / folder, command, free

    def begin(self, recipe: FilterRecipe | RetrieveRecipe) -> int:
        """Plan the run, or find that it was planned; the number of records.

        Raises:
            ValueError: another recipe was begun here.
        """
        settings = self.folder / "recipe.json"
        if settings.is_file():
            before, now = json.loads(settings.read_text(encoding="utf-8")), dataclasses.asdict(recipe)
            before |= {name: now[name] for name in self._free}
            if changes := differences(before, now):
                raise ValueError(
                    f"{self._command}: {self.folder.parent} was begun with another recipe ({'; '.join(changes)}): give "
                    f"the same again to go on, another --out, or remove {self.folder}"
                )
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            (self.folder / "rows").mkdir(parents=True)
            write_plan(plan(recipe.sources), self.folder / "parts.jsonl")
            text = json.dumps(dataclasses.asdict(recipe), ensure_ascii=False).encode()
            atomic_write(settings, lambda file: file.write(text))  # last: a plan without it is begun anew
        return sum(part.count for _, part in self.parts())

    def planned_as(self, recipe: FilterRecipe | RetrieveRecipe) -> bool:
        """Whether the sources have the same records, by their names and numbers, as when the run was planned."""
        pairs = itertools.zip_longest(plan(recipe.sources), read_plan(self.folder / "parts.jsonl"))
        return all(now == then for now, then in pairs)

    def parts(self) -> Iterator[tuple[int, Part]]:
        return enumerate(read_plan(self.folder / "parts.jsonl"))

    def missing(self) -> Iterator[tuple[int, Part]]:
        """Those that are not judged."""
        return ((number, part) for number, part in self.parts() if not self.rows(number).exists())

    def rows(self, number: int) -> Path:
        return self.folder / "rows" / f"{number:07d}.parquet"

    def tables(self, columns: list[str]) -> Iterator[pa.Table]:
        """Columns of the rows of all parts, in order; each row's place among all is the run's number of the record."""
        for number, _ in self.parts():
            yield pq.read_table(self.rows(number), columns=columns)

    def attempt(self, number: int) -> Attempt | None:
        """What an earlier process left that began to judge a part and did not end it; None: nobody has begun it."""
        try:
            words = self._tried(number).read_text(encoding="ascii").split()
        except FileNotFoundError:
            return None
        return Attempt(*map(int, words)) if len(words) == 2 else Attempt()

    def attempting(self, number: int, attempt: Attempt) -> None:
        path = self._tried(number)
        path.with_suffix(".new").write_text(f"{attempt.place} {attempt.deaths}", encoding="ascii")
        os.replace(path.with_suffix(".new"), path)

    def done(self, number: int) -> None:
        self._tried(number).unlink(missing_ok=True)

    def result(self) -> Path:
        """A new folder for the result, in which it becomes whole."""
        shutil.rmtree(self.folder / "result", ignore_errors=True)
        (self.folder / "result").mkdir()
        return self.folder / "result"

    def appear(self) -> None:
        """Move the result into its place, the audit last: by that a result is known to be whole."""
        out = self.folder.parent
        shutil.rmtree(out / "shards", ignore_errors=True)
        found = (self.folder / "result").iterdir()
        for path in sorted(found, key=lambda path: (path.name == "audit.parquet", path.name)):
            os.replace(path, out / path.name)

    def end(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _tried(self, number: int) -> Path:
        return self.folder / "rows" / f"{number:07d}.tried"
