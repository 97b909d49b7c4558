"""CVTG-2K, ChineseWord and LongText-Bench: does a picture say what it must?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from qwen_image_fast.folders import read_text
from qwen_image_fast.training.evaluation.bench import metrics, reading
from qwen_image_fast.training.evaluation.bench.files import checked, json_file, json_lines, safe, wrong
from qwen_image_fast.training.evaluation.bench.items import Answers, Item, Question, Row, Scored, picture_key
from qwen_image_fast.training.evaluation.text_metrics import score, summarise

_CHINESE_WORD = "一张白纸的特写，纸的中央用黑色毛笔写着一个汉字“{}”。"


def ask_for_text(item: Item, number: int, picture: Path) -> list[Question]:
    """All the text of a picture."""
    return [Question(picture_key(item, number), reading.SYSTEM, reading.READ_ALL, (picture,), reading.read_text)]


# ---- CVTG-2K ----------------------------------------------------------------------------------------------------


def load_cvtg(path: Path, language: str, sources: Path) -> list[Item]:
    """The folder with CVTG/2.json to 5.json and CVTG-Style/; the texts are what a prompt has in single quotes."""
    items = []
    for kind in ("CVTG", "CVTG-Style"):
        for regions in (2, 3, 4, 5):
            file = path / kind / f"{regions}.json"
            content = json_file("CVTG-2K", file, 'the folder with CVTG/2.json and so on, of {"data_list": [...]}')
            listed = content.get("data_list") if isinstance(content, dict) else None
            for r in checked(
                "CVTG-2K", file, listed or [], ("prompt", "index"), "JSON with data_list of prompt and index"
            ):
                words = " ".join(re.findall(r"'(.*?)'", r["prompt"])).lower()
                items.append(
                    Item(safe(f"{kind}-{regions}-{r['index']}"), r["prompt"], f"{regions} regions", {"text": words})
                )
    return items


def score_cvtg(items: Sequence[Item], pictures: int, answers: Answers) -> Scored:
    groups: dict[str, list] = {}
    wrong_ones = {}
    for item in items:
        for number in range(pictures):
            key = picture_key(item, number)
            read = answers[key].value or ""
            one = score([item.data["text"]], read.splitlines())
            groups.setdefault(item.group, []).append(one)
            if one.words_right < one.words:
                wrong_ones[key] = f"reads {read or 'nothing'}"
    everything = summarise([one for own in groups.values() for one in own])
    rows = [Row(f"word accuracy, {name}", summarise(own).word_accuracy, len(own)) for name, own in groups.items()]
    rows += [Row("word accuracy", everything.word_accuracy, everything.pictures)]
    rows += [Row("NED", everything.ned, everything.pictures)]
    keys = [f"{picture_key(item, number)}.clip" for item in items for number in range(pictures)]
    if any(key in answers for key in keys):
        near = [answers[key].value for key in keys]
        return Scored([*rows, Row("CLIPScore", metrics.mean(near), len(near), clip=True)], wrong_ones)
    return Scored(rows, wrong_ones, ("not computed, as it needs a network of its own: CLIPScore; --clip gives one",))


# ---- ChineseWord ------------------------------------------------------------------------------------------------


def load_chinese_word(path: Path, language: str, sources: Path) -> list[Item]:
    """A folder with level1.txt to level3.txt, the characters of the Table of General Standard Chinese Characters."""
    items = []
    for level in (1, 2, 3):
        try:
            characters = read_text(path / f"level{level}.txt")
        except OSError as error:
            raise wrong("ChineseWord", path, "a folder with level1.txt, level2.txt and level3.txt") from error
        for c in dict.fromkeys("".join(characters.split())):
            items.append(Item(f"L{level}-{ord(c):05x}", _CHINESE_WORD.format(c), f"level {level}", {"text": c}))
    if not items:
        raise wrong("ChineseWord", path, "files with characters")
    return items


def score_chinese_word(items: Sequence[Item], pictures: int, answers: Answers) -> Scored:
    levels: dict[str, list[float]] = {}
    wrong_ones = {}
    for item in items:
        for number in range(pictures):
            key = picture_key(item, number)
            read = "".join((answers[key].value or "").split())
            levels.setdefault(item.group, []).append(float(read == item.data["text"]))
            if read != item.data["text"]:
                wrong_ones[key] = f"reads {read or 'nothing'}"
    rows = [Row(level, 100 * metrics.mean(values), len(values)) for level, values in levels.items()]
    every = [value for values in levels.values() for value in values]
    note = "The report does not publish its prompts; one of ours asks for every character."
    return Scored([*rows, Row("overall", 100 * metrics.mean(every), len(every))], wrong_ones, (note,))


# ---- LongText-Bench ---------------------------------------------------------------------------------------------


def load_long_text(path: Path, language: str, sources: Path) -> list[Item]:
    """The file text_prompts.jsonl or text_prompts_zh.jsonl, or the folder with them."""
    if path.is_dir():
        path = path / ("text_prompts_zh.jsonl" if language == "zh" else "text_prompts.jsonl")
    items = []
    for r in json_lines("LongText-Bench", path, ("prompt_id", "prompt", "text", "category")):
        text = " ".join(r["text"]) if isinstance(r["text"], list) else r["text"]
        items.append(
            Item(f"{int(r['prompt_id']):04}", r["prompt"], r["category"], {"text": text, "language": language})
        )
    return items


def score_long_text(items: Sequence[Item], pictures: int, answers: Answers) -> Scored:
    groups: dict[str, list[tuple[int, int]]] = {}
    wrong_ones = {}
    for item in items:
        for number in range(pictures):
            key = picture_key(item, number)
            read = answers[key].value or ""
            right, of = metrics.multiset_match(item.data["text"], read, item.data["language"])
            groups.setdefault(item.group, []).append((right, of))
            if right < of:
                wrong_ones[key] = f"{right} of {of}: reads {read or 'nothing'}"
    counts = {**groups, "overall": [one for own in groups.values() for one in own]}
    rows = [Row(name, sum(r for r, _ in own) / sum(n for _, n in own), len(own)) for name, own in counts.items()]
    return Scored(rows, wrong_ones)
