"""Annotating records by a vision-language model: many requests at once, each record once, to be stopped at any time.

What came back is in a table beside the result, keyed by the picture's sha256, written as it comes: a killed run goes on
where it was. When every picture has its answer or its reason, the records are written in their order.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from qwen_image_fast.chat import Chat, ChatEndpoint, EndpointError, checked
from qwen_image_fast.extras import needed_for
from qwen_image_fast.files import atomic_write
from qwen_image_fast.folders import resolve_folder

from .annotated import Outcome, check_beside, pilot_page, write_beside
from .annotation import CAPTION, SYSTEM, prompt_for, read_annotation
from .collect import collect
from .disk import full_disk_is_a_sentence
from .filters.picture import BrokenImage, Picture
from .recipe import AnnotateRecipe, SourceRecipe
from .record import Record
from .shards import write_shards

with needed_for("annotating a data set"):
    import pyarrow as pa
    import pyarrow.parquet as pq

AUDIT = pa.schema(
    [
        ("id", pa.string()), ("origin", pa.string()), ("annotated", pa.bool_()), ("reason", pa.string()),
        ("repairs", pa.string()), ("attempts", pa.int32()), ("seconds", pa.float64()),
    ]
)  # fmt: skip
_AUDIT_ROWS = 4096
_LONGEST_WAIT = 60.0
_WRONG_SETTINGS = (401, 403, 404, 405)


@dataclass(frozen=True)
class AnnotateResult:
    """seen, annotated: records. repaired: of those annotated. rejected: how many went, by reason (its first words).

    unanswered: of those rejected, how many the endpoint failed; another run asks again. beside: captions written beside
    their pictures; had_caption: those that were not, since there was one.
    """

    seen: int
    annotated: int
    repaired: int
    rejected: dict[str, int]
    unanswered: int = 0
    beside: int = 0
    had_caption: int = 0


def captioner(recipe: AnnotateRecipe) -> Chat:
    """The recipe's model: an endpoint, or a folder with a Qwen2.5-VL of transformers.

    Raises:
        FileNotFoundError: there is no model, or no file with the key; the sentence says what to give.
    """
    options = {"temperature": recipe.temperature, "max_tokens": recipe.max_tokens, **recipe.options}
    if recipe.endpoint:
        key = None
        if recipe.api_key_file:
            try:
                key = Path(recipe.api_key_file).expanduser().read_text(encoding="utf-8").strip()
            except OSError as error:
                raise FileNotFoundError(
                    f"annotate: api_key_file must be a file that holds the key, got {recipe.api_key_file}"
                ) from error
        return ChatEndpoint(
            recipe.endpoint, recipe.model, api_key=key, timeout=recipe.timeout, options=options, who="endpoint"
        )
    from transformers import AutoTokenizer

    from qwen_image_fast.models.text_encoder import TURNS, load_captioner
    from qwen_image_fast.models.vision import IMAGE_TOKEN, VisionProcessor, write_caption

    try:
        folder = resolve_folder(recipe.model)
        model, tokenizer = load_captioner(folder), AutoTokenizer.from_pretrained(folder)
        processor = VisionProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"annotate: there is no Qwen2.5-VL in {recipe.model}: give its Hugging Face folder as `model`, or an "
            f"`endpoint` ({error})"
        ) from error
    sampling = {"do_sample": recipe.temperature > 0, **recipe.options}
    if recipe.temperature > 0:
        sampling["temperature"] = recipe.temperature
    one_at_a_time = threading.Lock()

    def ask(system: str, prompt: str, pictures: Sequence[Image.Image | bytes] = ()) -> str:
        text = TURNS % (system, f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>{prompt}")
        with one_at_a_time:
            answer = write_caption(model, tokenizer, pictures[0], processor, text, recipe.max_tokens, **sampling)
        return checked("annotate", answer)

    return ask


def annotate(
    recipe: AnnotateRecipe,
    out: str | Path,
    *,
    chat: Chat | None = None,
    progress: Callable[[], Any] = lambda: None,
    pilot: int | None = None,
) -> AnnotateResult:
    """Write annotated records to `out/shards` and every record's fate to `out/audit.parquet`.

    A record gets the caption as `recaption` and the rest as `metadata["annotation"]`. At most `parallel` requests are
    under way, and so many pictures in memory. The same picture is asked about once, wherever it occurs.

    Args:
        chat: the model; None: `captioner(recipe)`.
        progress: called after each picture that was asked about or was known from an earlier run.
        pilot: ask about so many records and write `out/pilot.html` instead of the result; the same call without it
            goes on.

    Raises:
        RuntimeError: the endpoint failed for `give_up_after` pictures in a row, or refuses all; what is done stays, and
            the same call goes on.
        ValueError: `out` was begun with another model or question, or captions cannot be written beside the pictures.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if recipe.beside:
        check_beside(recipe.sources)
    with full_disk_is_a_sentence(out):
        settings = {"endpoint": recipe.endpoint, "model": recipe.model, "prompt": _prompt(recipe)}
        table = _Table(out / "answers.sqlite", settings)
        try:
            _ask_all(recipe, chat or captioner(recipe), table, progress, pilot)
            return _write_all(recipe, out, table) if pilot is None else _write_pilot(recipe, out, table, pilot)
        finally:
            table.close()


def _prompt(recipe: AnnotateRecipe) -> str:
    return prompt_for(recipe.language, recipe.question or CAPTION)


def _records(recipe: AnnotateRecipe) -> Iterator[tuple[SourceRecipe, Record]]:
    for source in recipe.sources:
        for record in collect(**dataclasses.asdict(source)):
            yield source, record


def _ask_all(recipe: AnnotateRecipe, chat: Chat, table: _Table, progress: Callable[[], Any], most: int | None) -> None:
    pending: dict[Future[Outcome], str] = {}
    failures, stop = 0, threading.Event()

    def settle(futures: set[Future[Outcome]]) -> None:
        nonlocal failures
        for future in futures:
            outcome = future.result()
            table.put(pending.pop(future), outcome)
            progress()
            if outcome.trouble or outcome.answer is not None:
                failures = failures + 1 if outcome.trouble else 0
            if failures >= recipe.give_up_after:
                raise RuntimeError(
                    f"annotate: the endpoint failed for {failures} pictures in a row: {outcome.reason}; what is done "
                    "is kept, run the same command again to go on"
                )

    with ThreadPoolExecutor(recipe.parallel) as pool:
        try:
            for _, record in itertools.islice(_records(recipe), most):
                if record.id in pending.values():
                    progress()
                    continue
                if table.settled(record.id):
                    progress()
                    continue
                if len(pending) >= recipe.parallel:
                    settle(wait(pending, return_when=FIRST_COMPLETED).done)
                pending[pool.submit(_outcome, record, recipe, chat, stop)] = record.id
            while pending:
                settle(wait(pending, return_when=FIRST_COMPLETED).done)
        finally:
            stop.set()  # where something failed: what is under way is waited for, and kept
            for future, key in pending.items():
                if not future.cancel() and future.exception() is None and not future.result().trouble:
                    table.put(key, future.result())


def _outcome(record: Record, recipe: AnnotateRecipe, chat: Chat, stop: threading.Event) -> Outcome:
    start = time.monotonic()
    picture = Picture(record, recipe.max_pixels)
    try:
        shown = _shown(picture, recipe.max_side, isinstance(chat, ChatEndpoint))
    except BrokenImage as error:
        return Outcome(None, str(error), "", 0, 0.0)
    chance = random.Random(record.id)
    for attempt in range(1, recipe.attempts + 1):
        pause, trouble = 0.0, 1
        try:
            found, repairs = read_annotation(chat(SYSTEM, _prompt(recipe), [shown]))
            answer = json.dumps(dataclasses.asdict(found), ensure_ascii=False)
            return Outcome(answer, None, "; ".join(dict.fromkeys(repairs)), attempt, time.monotonic() - start)
        except EndpointError as error:
            reason = str(error)
            if error.status in _WRONG_SETTINGS:
                raise RuntimeError(f"{reason}; check endpoint, model and api_key_file, and run it again") from error
            if error.status is not None and error.status < 500 and error.status not in (408, 409, 425, 429):
                return Outcome(None, reason, "", attempt, time.monotonic() - start, trouble)
            # Doubled each time, and never at the same moment as the other requests.
            pause = error.retry_after or recipe.backoff * 2 ** (attempt - 1) * chance.uniform(0.5, 1.5)
            trouble = 2
        except ValueError as error:  # `InvalidAnnotation`, or no text of a local model
            reason = str(error)
        if attempt < recipe.attempts and stop.wait(min(pause, _LONGEST_WAIT)):
            break
    return Outcome(None, reason, "", attempt, time.monotonic() - start, trouble)


def _shown(picture: Picture, side: int, endpoint: bool) -> Image.Image | bytes:
    """What the model is shown: the file where an endpoint can read it as it is, else the picture, upright and small."""
    pixels, content = picture.rgb, picture.record.image
    if endpoint and max(picture.size) <= side and picture.orientation == 1 and content.startswith(b"\xff\xd8\xff"):
        return content
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def _write_all(recipe: AnnotateRecipe, out: Path, table: _Table) -> AnnotateResult:
    counts: collections.Counter[str] = collections.Counter()
    rejected: collections.Counter[str] = collections.Counter()

    def records(write: Callable[[dict[str, Any]], None]) -> Iterator[Record]:
        for source, record in _records(recipe):
            outcome = _outcome_of(record, table)
            counts["seen"] += 1
            row = {"id": record.id, "origin": record.origin, "annotated": outcome.answer is not None}
            write(row | {name: getattr(outcome, name) for name in ("reason", "repairs", "attempts", "seconds")})
            if outcome.answer is None:
                rejected[(outcome.reason or "").partition(":")[0].partition(", got")[0]] += 1
                counts["unanswered"] += outcome.trouble == 2
                continue
            counts["annotated"] += 1
            counts["repaired"] += bool(outcome.repairs)
            found = json.loads(outcome.answer)
            caption = " ".join(filter(None, (recipe.trigger.strip(), found.pop("caption"))))
            if recipe.beside:
                counts["beside" if write_beside(source, record, caption) else "had_caption"] += 1
            captions = {**record.captions, "recaption": caption}
            yield dataclasses.replace(record, captions=captions, metadata={**record.metadata, "annotation": found})

    def write_audit(file: BinaryIO) -> None:
        with pq.ParquetWriter(file, AUDIT) as audit:
            rows: list[dict[str, Any]] = []

            def write(row: dict[str, Any]) -> None:
                rows.append(row)
                if len(rows) == _AUDIT_ROWS:
                    audit.write_table(pa.Table.from_pylist(rows, AUDIT))
                    rows.clear()

            write_shards(records(write), out / "shards", shard_records=recipe.shard_records)
            audit.write_table(pa.Table.from_pylist(rows, AUDIT))

    atomic_write(out / "audit.parquet", write_audit)
    return _result(counts, rejected)


def _result(counts: collections.Counter[str], rejected: collections.Counter[str]) -> AnnotateResult:
    names = ("unanswered", "beside", "had_caption")
    of_all = (counts["seen"], counts["annotated"], counts["repaired"], dict(rejected.most_common()))
    return AnnotateResult(*of_all, **{name: counts[name] for name in names})


def _outcome_of(record: Record, table: _Table) -> Outcome:
    if record.fault and not record.image:
        return Outcome(None, record.fault, "", 0, 0.0)
    reason = "it was not in its source when the pictures were asked about"
    return table.get(record.id) or Outcome(None, reason, "", 0, 0.0)


def _write_pilot(recipe: AnnotateRecipe, out: Path, table: _Table, count: int) -> AnnotateResult:
    counts: collections.Counter[str] = collections.Counter()
    rejected: collections.Counter[str] = collections.Counter()
    shown = []
    for _, record in itertools.islice(_records(recipe), count):
        outcome = _outcome_of(record, table)
        counts["seen"] += 1
        counts["annotated"] += outcome.answer is not None
        counts["repaired"] += bool(outcome.repairs)
        counts["unanswered"] += outcome.trouble == 2
        if outcome.answer is None:
            rejected[(outcome.reason or "").partition(":")[0].partition(", got")[0]] += 1
        shown.append((record, outcome))
    page = pilot_page(shown, _prompt(recipe), recipe.max_pixels)
    atomic_write(out / "pilot.html", lambda file: file.write(page.encode()))
    return _result(counts, rejected)


class _Table:
    """Outcomes by the picture's sha256, on disk; used by one thread. Each is committed before the next is asked for."""

    def __init__(self, path: Path, settings: dict[str, str]):
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS outcome (id TEXT PRIMARY KEY, answer TEXT, reason TEXT, repairs TEXT, "
            "attempts INTEGER, seconds REAL, trouble INTEGER) WITHOUT ROWID"
        )
        self._database.execute("CREATE TABLE IF NOT EXISTS setting (name TEXT PRIMARY KEY, value TEXT)")
        before = dict(self._database.execute("SELECT name, value FROM setting"))
        for name, value in settings.items():
            if before.get(name, value) != value:
                self._database.close()
                raise ValueError(
                    f"annotate: {path.parent} was begun with another {name}: give another --out, or the same {name}"
                )
        self._database.executemany("INSERT OR REPLACE INTO setting VALUES (?, ?)", settings.items())

    def settled(self, key: str) -> bool:
        return bool(self._database.execute("SELECT 1 FROM outcome WHERE id = ? AND NOT trouble", (key,)).fetchone())

    def put(self, key: str, outcome: Outcome) -> None:
        row = (key, *dataclasses.astuple(outcome))
        self._database.execute("INSERT OR REPLACE INTO outcome VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def get(self, key: str) -> Outcome | None:
        query = "SELECT answer, reason, repairs, attempts, seconds, trouble FROM outcome WHERE id = ?"
        row = self._database.execute(query, (key,)).fetchone()
        return None if row is None else Outcome(*row)

    def close(self) -> None:
        self._database.close()
