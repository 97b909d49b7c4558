"""What is made of a captioner's answers besides shards: captions beside the pictures, and a page of a first few."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from qwen_image_fast.files import atomic_write
from qwen_image_fast.training.text_files import beside

from .collect import CAPTION_SUFFIXES, tables_of
from .examples import thumbnail
from .recipe import SourceRecipe
from .record import Record


@dataclass(frozen=True)
class Outcome:
    """What became of a picture. answer: as JSON; reason: why there is none; trouble: 0: the picture's; 1: the answers
    were of no use; 2: the endpoint's. Another run asks again where it is not 0."""

    answer: str | None
    reason: str | None
    repairs: str
    attempts: int
    seconds: float
    trouble: int = 0


def check_beside(sources: Sequence[SourceRecipe]) -> None:
    """ValueError unless all sources are folders of pictures, which alone have a place beside each."""
    for source in sources:
        root, files = tables_of(source.path)
        if files:
            raise ValueError(
                f"annotate: with `beside`, the sources must be folders of pictures, but {root} is or holds tables: "
                "leave `beside` out, the captions are in the result's shards"
            )


def write_beside(source: SourceRecipe, record: Record, caption: str) -> bool:
    """Write `<name>.txt` beside a picture of a folder; False, and nothing written, where another caption is there."""
    path = Path(source.path).expanduser() / record.origin
    if (there := beside(path, *CAPTION_SUFFIXES)) is not None:
        return there.suffix.lower() == ".txt" and there.is_file() and there.read_bytes() == caption.encode()
    atomic_write(path.with_suffix(".txt"), lambda file: file.write(caption.encode()))
    return True


def pilot_page(shown: Sequence[tuple[Record, Outcome]], prompt: str, max_pixels: int) -> str:
    """A page of records with what became of each, which needs nothing beside it."""
    good = [outcome for _, outcome in shown if outcome.answer is not None]
    seconds = sum(outcome.seconds for outcome in good) / max(1, len(good))
    rows = []
    for record, outcome in shown:
        jpeg = base64.b64encode(thumbnail(record, max_pixels, 320)).decode()
        image = f'<img alt="" src="data:image/jpeg;base64,{jpeg}">' if jpeg else "no picture"
        if outcome.answer is None:
            said = f"<p class=gone>{escape(outcome.reason or '')}</p>"
        else:
            found = json.loads(outcome.answer)
            said = f"<p>{escape(found.pop('caption'))}</p>" + "".join(
                f"<small>{escape(name)}: {escape(json.dumps(value, ensure_ascii=False))}</small><br>"
                for name, value in found.items()
            )
        if outcome.repairs:
            said += f"<small class=gone>repaired: {escape(outcome.repairs)}</small>"
        before = "".join(f"<small>{escape(k)}: {escape(t)}</small><br>" for k, t in record.captions.items())
        rows.append(f"<section>{image}<div><b>{escape(record.origin)}</b><br>{before}{said}</div></section>")
    lead = f"{len(good)} of {len(shown)} annotated, {seconds:.1f} s each."
    return f"""<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1"><title>Pilot</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
section {{ display: flex; gap: 1rem; margin: 1.5rem 0; align-items: start }} img {{ max-width: 320px }}
small {{ color: #666 }} .gone {{ color: #b3441e }} pre {{ white-space: pre-wrap; background: #f4f4f4; padding: .6rem }}
</style>
<h1>Pilot</h1>
<p>{lead} The same command without --pilot goes on; what is answered here is not asked again.</p>
<details><summary>The question</summary><pre>{escape(prompt)}</pre></details>
{"".join(rows)}
</html>
"""
