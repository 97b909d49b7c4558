"""Gaps of a taxonomy filled by retrieval (report, section 3.2): the records of a pool that are nearest to them.

First every record of the pool gets a vector, part by part, kept on the disk. Then faiss finds the nearest to each text
and picture of each gap, by the cosine, among all. At last the pool is read again, and what was taken is written.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_image_fast.extras import needed_for
from qwen_image_fast.files import atomic_write

from .audit import AuditWriter, rows_of
from .disk import full_disk_is_a_sentence
from .embed import Embedder, embedder_of, of_length_one
from .journal import Journal
from .parts import Part, read_part, same
from .recipe import PRECISIONS, GapRecipe, RetrieveRecipe
from .record import Record
from .shards import write_shards

with needed_for("data retrieve"):
    import pyarrow as pa
    import pyarrow.parquet as pq

AUDIT = pa.schema(
    [
        ("id", pa.string()), ("origin", pa.string()), ("source", pa.string()), ("kept", pa.bool_()),
        ("node", pa.string()), ("score", pa.float64()), ("query", pa.string()), ("reason", pa.string()),
    ]
)  # fmt: skip
_ROWS = pa.schema(
    [
        ("id", pa.string()), ("origin", pa.string()), ("source", pa.string()), ("reason", pa.string()),
        ("vector", pa.list_(pa.float32())),
    ]
)  # fmt: skip
FOLDER = ".retrieving"
_AT_ONCE = 64
_DIGITS = 5  # of a score: what further ones say depends on the machine


@dataclass(frozen=True)
class Filled:
    """Of a gap. there: records of `have`; taken: of the pool; least, most: their cosines, None where none was taken."""

    node: str
    count: int
    there: int
    taken: int
    least: float | None
    most: float | None


@dataclass(frozen=True)
class _Match:
    """How near a record is to a gap, and to which of its texts and pictures."""

    score: float
    node: str
    query: str


def check_index() -> None:
    """MissingPackage, before a model is loaded, where there is no faiss."""
    with needed_for("data retrieve"):
        import faiss  # noqa: F401


def retrieve(
    recipe: RetrieveRecipe,
    out: str | Path,
    *,
    embedder: Embedder | None = None,
    progress: Callable[[int, int], Any] = lambda count, total: None,
) -> list[Filled]:
    """Write what fills the gaps to `out/shards`, with `node` in its metadata, and every record's fate to
    `out/audit.parquet`.

    The nearest of all come first: a record goes to the gap that it is nearest to and that is not full. The same recipe
    gives the same result. A killed run goes on with the same call, and a finished one is done again for other gaps:
    vectors that are there are not made again.

    Args:
        embedder: makes the vectors; None: that of the recipe.
        progress: called with the number of further records that have vectors, and of all.

    Raises:
        ValueError: nothing is missing, `out` was begun with other sources or another model, or a source has changed
            since.
    """
    there, counts = _read_have(recipe.have)
    missing = {gap.node: max(0, gap.count - counts[gap.node]) for gap in recipe.gaps}
    if not any(missing.values()):
        raise ValueError("retrieve: nothing is missing: `have` has as many records of each gap as it should have")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out, FOLDER, "retrieve", ("have", "gaps", "precision", "shard_records"))
    with full_disk_is_a_sentence(out):
        total = journal.begin(recipe)
        if not journal.planned_as(recipe):
            raise ValueError(f"retrieve: the sources have other records than before: remove {journal.folder}")
        made = embedder or embedder_of(recipe)
        asked = [(gap, *_queries(gap, made)) for gap in recipe.gaps if missing[gap.node]]
        progress(total - sum(part.count for _, part in journal.missing()), total)
        for number, part in journal.missing():
            _embed(recipe, journal, number, part, made)
            progress(part.count, total)
        fates = dict(_reasons(journal, there))
        taken, near = _assign(_matches(recipe, journal, asked, fates, sum(missing.values())), recipe.gaps, missing)
        _write(recipe, journal, fates, taken, near)
        journal.appear()
    return [_filled(gap, counts[gap.node], taken) for gap in recipe.gaps]


def _filled(gap: GapRecipe, there: int, taken: Mapping[int, _Match]) -> Filled:
    scores = [match.score for match in taken.values() if match.node == gap.node]
    return Filled(gap.node, gap.count, there, len(scores), min(scores, default=None), max(scores, default=None))


def _read_have(folders: list[str]) -> tuple[set[str], collections.Counter[str]]:
    """Ids of the records in shards, and how many each node has."""
    there: set[str] = set()
    counts: collections.Counter[str] = collections.Counter()
    for folder in folders:
        with pq.ParquetFile(Path(folder).expanduser() / "index.parquet") as table:
            for batch in table.iter_batches(columns=["id", "category", "metadata"]):
                for row in batch.to_pylist():
                    there.add(row["id"])
                    counts[str(json.loads(row["metadata"]).get("node") or row["category"])] += 1
    return there, counts


def _embed(recipe: RetrieveRecipe, journal: Journal, number: int, part: Part, embedder: Embedder) -> None:
    def write_all(file: Any) -> None:
        with AuditWriter(file, _ROWS) as table:
            waiting: list[Record] = []

            def flush() -> None:
                for record, vector, why in zip(waiting, *embedder.records(waiting)):
                    row = {"id": record.id, "origin": record.origin, "source": record.source, "reason": why or None}
                    table.write({**row, "vector": vector})
                waiting.clear()

            for record in read_part(part, recipe.sources[part.source]):
                waiting.append(record)
                if len(waiting) == _AT_ONCE:
                    flush()
            if waiting:
                flush()

    atomic_write(journal.rows(number), write_all)


def _reasons(journal: Journal, there: set[str]) -> Iterator[tuple[int, str]]:
    """(number, why it cannot be taken) of records that are no candidates."""
    first: dict[bytes, int] = {}
    number = 0
    for table in journal.tables(["id", "reason"]):
        for row in table.to_pylist():
            key = bytes.fromhex(row["id"])
            if row["reason"]:
                yield number, row["reason"]
            elif row["id"] in there:
                yield number, "the data set has it"
            elif (before := first.setdefault(key, number)) != number:
                yield number, f"the file is the same as that of record {before + 1}"
            number += 1


def _queries(gap: GapRecipe, embedder: Embedder) -> tuple[list[str], np.ndarray]:
    """What is looked for, by name, and its vectors."""
    texts = gap.texts or ([] if gap.pictures else [gap.node])
    return [*texts, *gap.pictures], embedder.queries(texts, [Path(file).expanduser() for file in gap.pictures])


def _matches(
    recipe: RetrieveRecipe, journal: Journal, asked: list[tuple[GapRecipe, list[str], np.ndarray]],
    fates: Mapping[int, str], most: int,
) -> dict[str, dict[int, _Match]]:  # fmt: skip
    """By node, its nearest records by number: `most`, as many as all gaps take together, for others may come first."""
    index, numbers, centre = _index(recipe, journal, fates)
    found: dict[str, dict[int, _Match]] = {}
    for gap, names, vectors in asked if index is not None else ():
        best = found.setdefault(gap.node, {})
        scores, places = index.search(of_length_one(vectors - centre), min(len(numbers), most))
        for name, some, where in zip(names, np.round(scores.astype(np.float64), _DIGITS).tolist(), places.tolist()):
            for score, place in zip(some, where):
                number = int(numbers[place])
                if number not in best or score > best[number].score:
                    best[number] = _Match(score, gap.node, name)
    return found


def _index(recipe: RetrieveRecipe, journal: Journal, fates: Mapping[int, str]) -> tuple[Any, np.ndarray, np.ndarray]:
    """faiss' index of the candidates, the number of each, and what is subtracted from all vectors: of captions their
    mean, since the states of a language model all point in nearly the same direction."""
    with needed_for("data retrieve"):
        import faiss

    def candidates() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        start = 0
        for table in journal.tables(["vector"]):
            which = [n for n in range(len(table)) if start + n not in fates]
            if which:
                column = table.column("vector").take(which).combine_chunks()
                yield np.array(which) + start, column.flatten().to_numpy().reshape(len(which), -1)
            start += len(table)

    numbers = [some for some, _ in candidates()]
    if not numbers:
        return None, np.empty(0, np.int64), np.zeros(1, np.float32)
    centre = np.zeros(1, np.float32)
    if recipe.by == "captions":
        total = sum(vectors.sum(0, dtype=np.float64) for _, vectors in candidates())
        centre = (total / sum(map(len, numbers))).astype(np.float32)
    index = None
    for _, vectors in candidates():
        rows = of_length_one(vectors - centre)
        if index is None:
            index = faiss.index_factory(rows.shape[1], PRECISIONS[recipe.precision], faiss.METRIC_INNER_PRODUCT)
            index.train(rows)  # float16 asks for it, and learns nothing
        index.add(rows)
    return index, np.concatenate(numbers), centre


def _assign(
    found: Mapping[str, Mapping[int, _Match]], gaps: list[GapRecipe], missing: Mapping[str, int]
) -> tuple[dict[int, _Match], dict[int, _Match]]:
    """(who is taken, and for what; what others were nearest to), the nearest first, equals in order of the records."""
    order = {gap.node: place for place, gap in enumerate(gaps)}
    least = {gap.node: gap.least for gap in gaps}
    pairs = [(number, match) for some in found.values() for number, match in some.items()]
    pairs.sort(key=lambda pair: (-pair[1].score, pair[0], order[pair[1].node]))
    left, taken, near = dict(missing), dict[int, _Match](), dict[int, _Match]()
    for number, match in pairs:
        if number not in taken and left[match.node] and match.score >= least[match.node]:
            left[match.node] -= 1
            taken[number] = match
        near.setdefault(number, match)
    return taken, near


def _write(
    recipe: RetrieveRecipe, journal: Journal, fates: Mapping[int, str], taken: Mapping[int, _Match],
    near: Mapping[int, _Match],
) -> None:  # fmt: skip
    result = journal.result()
    gaps = {gap.node: gap for gap in recipe.gaps}

    def fate(number: int) -> dict[str, Any]:
        match = taken.get(number) or near.get(number)
        if match is None:
            return {"kept": False, "reason": fates.get(number, "others are nearer to every gap")}
        row = {"kept": number in taken, "node": match.node, "score": match.score, "query": match.query}
        if number in taken:
            return row | {"reason": f"{match.node}: its cosine to {match.query!r} is {match.score:.4f}"}
        least = gaps[match.node].least
        why = f"less than {least:g}" if match.score < least else "and nearer ones fill the gap"
        return row | {"reason": f"{match.node}: its cosine to {match.query!r} is {match.score:.4f}, {why}"}

    def write_all(file: Any) -> None:
        with AuditWriter(file, AUDIT) as audit:

            def kept() -> Iterator[Record]:
                number = 0
                for part_number, part in journal.parts():
                    records = read_part(part, recipe.sources[part.source])
                    for known in rows_of(journal.rows(part_number)):
                        row = {name: known[name] for name in ("id", "origin", "source")} | fate(number)
                        record = same(next(records, None), row, "retrieve")
                        audit.write(row)
                        if row["kept"]:
                            category = record.category or gaps[row["node"]].category
                            added = {"node": row["node"], "retrieved": {"query": row["query"], "score": row["score"]}}
                            metadata = {**record.metadata, **added}
                            yield dataclasses.replace(record, category=category, metadata=metadata)
                        number += 1

            write_shards(kept(), result / "shards", shard_records=recipe.shard_records)

    atomic_write(result / "audit.parquet", write_all)
