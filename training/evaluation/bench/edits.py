"""GEdit and ImgEdit: was the edit done, and nothing else?"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from qwen_image_fast.extras import needed_for
from qwen_image_fast.files import atomic_write
from qwen_image_fast.training.evaluation.bench import metrics, reading
from qwen_image_fast.training.evaluation.bench.files import checked, json_file, safe, wrong
from qwen_image_fast.training.evaluation.bench.items import Answers, Item, Question, Row, Scored, picture_key

_SUCCESS = (
    "The first picture was to be edited by this instruction, the second is the result: {prompt}\n"
    "Give two whole numbers from 0 to 10. First: how well the result does what the instruction says (0: not at all, "
    "10: perfectly). Second: how well all else is left as it was (0: another picture, 10: nothing else has changed). "
    'Answer with JSON and nothing else: {{"reason": "one sentence", "score": [first, second]}}'
)
_QUALITY = (
    "Give the picture two whole numbers from 0 to 10, whatever it shows. First: how natural it looks (0: wrong light, "
    "shadows and distances everywhere, 10: like a photograph or a finished drawing). Second: how free of faults of "
    "machines (0: distorted, blurred, limbs and faces broken, 10: none). Answer with JSON and nothing else: "
    '{"reason": "one sentence", "score": [first, second]}'
)
_THREE = (
    "The first picture was to be edited by this instruction, the second is the result: {prompt}\n"
    "Give three whole numbers from 1 (worst) to 5 (best): {what}. Neither the second nor the third may be higher than "
    "the first. Answer with three lines and nothing else, each a name, a colon and a number:\n{names}"
)
# ImgEdit's kinds of edits and what is judged of each: whether it was done, how it looks, whether it fits.
_KINDS = {
    "add": ("Add", "whether what was asked for is there, in the right place", "how well it is drawn",
            "how well its light, size and edges fit, and all else is left alone"),
    "adjust": ("Adjust", "whether the attribute changed as asked, of the right thing", "how well it is drawn",
               "whether form and surroundings of the thing are left alone"),
    "extract": ("Extract", "whether the right thing stands alone on a plain ground", "how clean its edges are",
                "whether it looks as it did in the first picture"),
    "replace": ("Replace", "whether the old thing is gone and the new one is there", "how well it is drawn",
                "how well it fits, and all else is left alone"),
    "remove": ("Remove", "whether the thing is gone, and it alone", "how well the place is filled",
               "whether light and texture go on, and all else is left alone"),
    "background": ("Background", "whether the background is the new one", "how clean the edges of the foreground are",
                   "how well light and perspective fit, and the foreground is left alone"),
    "style": ("Style", "how well the style is met", "how well what the picture shows is kept", "how well it is drawn"),
    "compose": ("Hybrid", "whether all parts of the instruction were done", "how well they are drawn",
                "how well they fit together, and all else is left alone"),
    "action": ("Action", "whether body or face do what was asked for", "whether it is the same person or animal",
               "how natural posture and surroundings look"),
}  # fmt: skip


# ---- GEdit ------------------------------------------------------------------------------------------------------


def load_gedit(path: Path, language: str, sources: Path) -> list[Item]:
    """The hub's data set as parquet files in a folder; its pictures are written to `sources` once."""
    with needed_for("reading GEdit"):
        import pyarrow.parquet as pq

    fields = ("key", "task_type", "instruction", "instruction_language", "input_image_raw")
    what = f"a folder of parquet files with {', '.join(fields)}"
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    wanted = {"en": ("en",), "zh": ("cn", "zh")}[language]
    items = []
    for file in files:
        try:
            table = pq.ParquetFile(file)
        except (OSError, ValueError) as error:
            raise wrong("GEdit", path, what) from error
        if not set(fields) <= set(table.schema_arrow.names):
            raise wrong("GEdit", path, what)
        for batch in table.iter_batches(batch_size=16, columns=list(fields)):
            for r in batch.to_pylist():
                if r["instruction_language"] in wanted:
                    source = _stored(r["input_image_raw"]["bytes"], sources / f"{safe(r['key'])}.png")
                    items.append(Item(safe(r["key"]), r["instruction"], r["task_type"], source=source))
    if not items:
        raise wrong("GEdit", path, what)
    return items


def _stored(content: bytes, path: Path) -> Path:
    if not path.exists():
        with Image.open(io.BytesIO(content)) as image:
            rgb = image.convert("RGB")
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda file: rgb.save(file, "PNG"))
    return path


def ask_gedit(item: Item, number: int, picture: Path) -> list[Question]:
    key, read = picture_key(item, number), reading.scores(2, 0, 10)
    both = (item.source, picture) if item.source else (picture,)
    return [
        Question(f"{key}.success", reading.SYSTEM, _SUCCESS.format(prompt=item.prompt), both, read),
        Question(f"{key}.quality", reading.SYSTEM, _QUALITY, (picture,), read),
    ]


def score_gedit(items: Sequence[Item], pictures: int, answers: Answers) -> Scored:
    """The means over groups of the means over their pictures; an answer without sense counts as 0."""
    groups: dict[str, list[tuple[float, float, float]]] = {}
    wrong_ones = {}
    for item in items:
        for number in range(pictures):
            key = picture_key(item, number)
            success, quality = (answers[f"{key}.{part}"].value or [0.0, 0.0] for part in ("success", "quality"))
            one = metrics.viescore(success, quality)
            groups.setdefault(item.group, []).append(one)
            if one[2] < 5:
                wrong_ones[key] = f"success and the rest {success}, quality {quality}"
    rows = [Row(name, metrics.mean([one[2] for one in own]), len(own)) for name, own in groups.items()]
    for part, name in enumerate(("SC", "PQ", "overall")):
        means = [metrics.mean([one[part] for one in own]) for own in groups.values()]
        rows.append(Row(name, metrics.mean(means), sum(map(len, groups.values()))))
    return Scored(rows, wrong_ones)


# ---- ImgEdit ----------------------------------------------------------------------------------------------------


def load_imgedit(path: Path, language: str, sources: Path) -> list[Item]:
    """basic_edit.json with the pictures beside it, or the folder of both."""
    path = path / "basic_edit.json" if path.is_dir() else path
    what = "basic_edit.json of id, prompt and edit_type, with the pictures beside it"
    content = json_file("ImgEdit", path, what)
    cases = list(content.items()) if isinstance(content, dict) else []
    checked("ImgEdit", path, [case for _, case in cases], ("id", "prompt", "edit_type"), what)
    items = []
    for key, case in cases:
        source = path.parent / case["id"]
        if case["edit_type"] not in _KINDS or not source.is_file():
            raise wrong("ImgEdit", source, what)
        items.append(Item(safe(key), case["prompt"], _KINDS[case["edit_type"]][0], {"kind": case["edit_type"]}, source))
    return items


def ask_imgedit(item: Item, number: int, picture: Path) -> list[Question]:
    _, *what = _KINDS[item.data["kind"]]
    told = "; ".join(f"{name}, {rule}" for name, rule in zip(("First", "Second", "Third"), what))
    prompt = _THREE.format(prompt=item.prompt, what=told, names="First: 3\nSecond: 2\nThird: 3")
    both = (item.source, picture) if item.source else (picture,)
    return [Question(picture_key(item, number), reading.SYSTEM, prompt, both, reading.score_lines(3, 1, 5))]


def score_imgedit(items: Sequence[Item], pictures: int, answers: Answers) -> Scored:
    """The mean of three, then of a kind, then of the kinds. An answer without sense counts as the least, 1."""
    kinds: dict[str, list[float]] = {}
    wrong_ones = {}
    for item in items:
        for number in range(pictures):
            key = picture_key(item, number)
            value = metrics.mean(answers[key].value or [1.0, 1.0, 1.0])
            kinds.setdefault(item.group, []).append(value)
            if value < 3:
                wrong_ones[key] = f"{value:.2f} of 5"
    rows = [Row(kind, metrics.mean(values), len(values)) for kind, values in kinds.items()]
    rows.append(Row("overall", metrics.mean([row.value for row in rows]), sum(row.of for row in rows)))
    return Scored(rows, wrong_ones)
