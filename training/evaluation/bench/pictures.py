"""GenEval, GenEval 2, DPG-Bench, OneIG and TIIF: does a picture show what its prompt says?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qwen_image_fast.training.evaluation.bench import metrics, reading
from qwen_image_fast.training.evaluation.bench.detections import fault
from qwen_image_fast.training.evaluation.bench.files import json_file, json_lines, safe, table, wrong
from qwen_image_fast.training.evaluation.bench.items import Answers, Item, Question, Row, Scored, picture_key
from qwen_image_fast.training.evaluation.bench.texts import ask_for_text

_YES_NO = "Look at the picture and answer with one word, yes or no. {}"
_MANY = (
    "Look at the picture and answer these {count} questions, each on a line of its own, with yes or no:\n{questions}"
)
_ONE = "Look at the picture and answer with one word or number. {}"
_FIND = (
    "Find every {names} in the picture. Answer with a JSON list and nothing else, an object for each of them: "
    '{{"class": its name as given here, "score": how sure you are from 0 to 1, "box": [left, top, right, bottom] in '
    'pixels, "color": of red, orange, yellow, green, blue, purple, pink, brown, black, white}}. [] where there is none.'
)
_NOT_COMPUTED = "not computed, as they need networks of their own: {}"


# ---- GenEval ----------------------------------------------------------------------------------------------------


def load_geneval(path: Path, language: str, sources: Path) -> list[Item]:
    path = path / "evaluation_metadata.jsonl" if path.is_dir() else path
    records = json_lines("GenEval", path, ("tag", "include", "prompt"))
    return [Item(f"{i:05}", r["prompt"], r["tag"], r) for i, r in enumerate(records)]


def ask_geneval(item: Item, number: int, picture: Path) -> list[Question]:
    names = ", ".join(dict.fromkeys(one["class"] for one in [*item.data["include"], *item.data.get("exclude", ())]))
    key = picture_key(item, number)
    return [Question(key, reading.SYSTEM, _FIND.format(names=names), (picture,), reading.objects, item.data)]


def score_geneval(items: Sequence[Item], pictures: int, answers: Answers) -> Scored:
    groups: dict[str, list[float]] = {}
    wrong_ones = {}
    for item in items:
        for number in range(pictures):
            key = picture_key(item, number)
            value = answers[key].value
            why = "the judge's answer made no sense" if value is None else fault(item.data, value)
            groups.setdefault(item.group, []).append(float(why is None))
            if why:
                wrong_ones[key] = why
    rows = [Row(group, metrics.mean(values), len(values)) for group, values in groups.items()]
    overall = Row("overall", metrics.mean([row.value for row in rows]), sum(row.of for row in rows))
    return Scored([*rows, overall], wrong_ones)


# ---- GenEval 2 --------------------------------------------------------------------------------------------------


def load_geneval2(path: Path, language: str, sources: Path) -> list[Item]:
    path = path / "geneval2_data.jsonl" if path.is_dir() else path
    records = json_lines("GenEval 2", path, ("prompt", "vqa_list", "skills"))
    return [Item(f"{i:04}", r["prompt"], f"{len(r['vqa_list'])} atoms", r) for i, r in enumerate(records)]


def ask_geneval2(item: Item, number: int, picture: Path) -> list[Question]:
    key = picture_key(item, number)
    return [
        Question(f"{key}.{i}", reading.SYSTEM, _ONE.format(question), (picture,), reading.short)
        for i, (question, _) in enumerate(item.data["vqa_list"])
    ]


def score_geneval2(items: Sequence[Item], pictures: int, answers: Answers) -> Scored:
    atoms: list[float] = []
    prompts: list[float] = []
    skills: dict[str, list[float]] = {}
    wrong_ones = {}
    for item in items:
        for number in range(pictures):
            key = picture_key(item, number)
            given = [answers[f"{key}.{i}"].value for i in range(len(item.data["vqa_list"]))]
            asked = item.data["vqa_list"]
            right = [float(g is not None and metrics.same_answer(g, a)) for g, (_, a) in zip(given, asked)]
            for skill, value in zip(item.data["skills"], right):
                skills.setdefault(skill, []).append(value)
            arithmetic, geometric = metrics.soft_tifa(right)
            atoms.append(arithmetic)
            prompts.append(geometric)
            if arithmetic < 1:
                first = right.index(0.0)
                wrong_ones[key] = f"{asked[first][0]} {given[first] or 'nonsense'}, not {asked[first][1]}"
    rows = [Row(skill, metrics.mean(values), len(values)) for skill, values in skills.items()]
    rows += [Row("atoms (arithmetic mean)", metrics.mean(atoms), len(atoms))]
    rows += [Row("prompts (geometric mean)", metrics.mean(prompts), len(prompts))]
    note = "An atom is right or wrong here; the authors take the probability that their judge gives the right answer."
    return Scored(rows, wrong_ones, (note,))


# ---- DPG-Bench --------------------------------------------------------------------------------------------------


def load_dpg(path: Path, language: str, sources: Path) -> list[Item]:
    """The folder dpg_bench with prompts/ and dpg_bench.csv, whose first row the authors' code skips."""
    columns = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
    rows = table("DPG-Bench", path / "dpg_bench.csv", columns)
    asked: dict[str, dict[int, tuple[str, list[int], str]]] = {}
    for row in rows[1:]:
        depends = [int(one) for one in row["dependency"].split(",")]
        told = row["question_natural_language"], depends, row["tuple"].split("(")[0].strip()
        asked.setdefault(row["item_id"], {})[int(row["proposition_id"])] = told
    items = []
    for name, questions in asked.items():
        file = path / "prompts" / f"{name}.txt"
        if not file.is_file():
            raise wrong("DPG-Bench", path, f"the folder dpg_bench with prompts/{name}.txt")
        items.append(Item(safe(name), file.read_text(encoding="utf-8").strip(), "", {"questions": questions}))
    return items


def ask_yes_no(item: Item, number: int, picture: Path) -> list[Question]:
    key = picture_key(item, number)
    return [
        Question(f"{key}.{i}", reading.SYSTEM, _YES_NO.format(told[0]), (picture,), reading.yes_or_no)
        for i, told in item.data["questions"].items()
    ]


def score_dpg(items: Sequence[Item], pictures: int, answers: Answers) -> Scored:
    """Categories are of a prompt's last picture, before what depends on a no is set to no, as the authors count."""
    categories: dict[str, list[float]] = {}
    overall, wrong_ones = [], {}
    for item in items:
        questions = item.data["questions"]
        values = []
        for number in range(pictures):
            key = picture_key(item, number)
            said = {i: bool(answers[f"{key}.{i}"].value) for i in questions}
            values.append(metrics.with_dependencies(said, {i: told[1] for i, told in questions.items()}))
            if not all(said.values()):
                wrong_ones[key] = "no: " + "; ".join(questions[i][0] for i, yes in said.items() if not yes)
            if number == pictures - 1:
                for i, yes in said.items():
                    categories.setdefault(questions[i][2].split("-")[0].strip(), []).append(float(yes))
        overall.append(metrics.mean(values))
    rows = [Row(name, 100 * metrics.mean(values), len(values)) for name, values in categories.items()]
    return Scored([*rows, Row("overall", 100 * metrics.mean(overall), len(overall))], wrong_ones)


# ---- OneIG ------------------------------------------------------------------------------------------------------

_ONEIG_CLASSES = {
    "Anime_Stylization": "anime",
    "Portrait": "human",
    "General_Object": "object",
    "Text_Rendering": "text",
    "Multilingualism": "multilingualism",
}


def load_oneig(path: Path, language: str, sources: Path) -> list[Item]:
    """The authors' repository: a CSV of prompts, Q_D/ of questions and text_content of texts, at any depth."""
    mark = "_zh" if language == "zh" else ""
    prompts = _one(path, "OneIG-Bench-ZH.csv" if language == "zh" else "OneIG-Bench.csv")
    rows = table("OneIG", prompts, ("category", "id"))
    names = ("prompt_cn", "prompt_zh") if language == "zh" else ("prompt_en",)
    column = next((name for name in names if name in rows[0]), None)
    if column is None:
        raise wrong("OneIG", prompts, f"a CSV file with the column {' or '.join(names)}")
    questions: dict[str, dict[str, dict]] = {}
    for kind in ("anime", "human", "object", *(("multilingualism",) if mark else ())):
        file = _one(path, f"Q_D/{kind}{mark}.json")
        questions[kind] = json_file("OneIG", file, "JSON of questions and dependencies")
    texts = {
        r["id"]: r["text_content"]
        for r in table("OneIG", _one(path, f"text_content{mark}.csv"), ("id", "text_content"))
    }
    items = []
    for row in rows:
        kind, number = _ONEIG_CLASSES.get(row["category"], row["category"]), row["id"]
        asked = questions.get(kind, {}).get(number)
        if asked is None and not (kind == "text" and number in texts):
            continue
        data: dict = {"language": language}
        if asked is not None:
            parts = [
                json.loads(part) if isinstance(part, str) else part for part in (asked["question"], asked["dependency"])
            ]
            data["questions"] = {int(i): (told, [int(p) for p in parts[1][i]]) for i, told in parts[0].items()}
        else:
            data["text"] = texts[number]
        items.append(Item(safe(f"{kind}-{number}"), row[column], kind, data))
    if not items:
        raise wrong("OneIG", path, "the authors' repository, whose ids belong together")
    return items


def _one(path: Path, name: str) -> Path:
    """The file of this name in a folder, in depth."""
    for found in sorted(path.rglob(name)):
        return found
    raise wrong("OneIG", path, f"the authors' repository with {name}")


def ask_oneig(item: Item, number: int, picture: Path) -> list[Question]:
    return ask_yes_no(item, number, picture) if "questions" in item.data else ask_for_text(item, number, picture)


def score_oneig(items: Sequence[Item], pictures: int, answers: Answers) -> Scored:
    alignment: list[float] = []
    read: list[tuple[int, bool, int, int]] = []
    wrong_ones = {}
    language = items[0].data["language"]
    for item in items:
        for number in range(pictures):
            key = picture_key(item, number)
            if questions := item.data.get("questions"):
                said = {i: bool(answers[f"{key}.{i}"].value) for i in questions}
                parents = {i: told[1] for i, told in questions.items()}
                alignment.append(metrics.with_dependencies(said, parents, once=True))
                if not all(said.values()):
                    wrong_ones[key] = "no: " + "; ".join(questions[i][0] for i, yes in said.items() if not yes)
            else:
                made = answers[key].value or ""
                read.append(metrics.oneig_text(item.data["text"], made, language))
                if not read[-1][1]:
                    wrong_ones[key] = f"reads {made or 'nothing'}"
    rows = [Row("alignment", metrics.mean(alignment), len(alignment))] if alignment else []
    if read:
        rows.append(Row("text", metrics.oneig_text_score(read, language), len(read)))
    return Scored(rows, wrong_ones, (_NOT_COMPUTED.format("reasoning, style, diversity"),))


# ---- TIIF -------------------------------------------------------------------------------------------------------


def load_tiif(path: Path, language: str, sources: Path) -> list[Item]:
    """The folder data: testmini_prompts with a line for each line of testmini_eval_prompts; short and long prompts."""
    items = []
    folder = path / "testmini_eval_prompts"
    for file in sorted(folder.glob("*.jsonl")):
        for i, record in enumerate(json_lines("TIIF", file, ("type", "yn_question_list", "yn_answer_list"))):
            for length in ("short", "long"):
                prompt = record.get(f"{length}_description")
                if prompt is None:
                    prompt = _tiif_prompts(path, record["type"])[i][f"{length}_description"]
                items.append(
                    Item(safe(f"{record['type']}-{i:03}-{length}"), prompt, f"{record['type']}, {length}", record)
                )
    if not items:
        raise wrong("TIIF", path, "the folder data with testmini_eval_prompts/*.jsonl")
    return items


def _tiif_prompts(path: Path, kind: str) -> list[dict]:
    for file in sorted((path / "testmini_prompts").glob("*.jsonl")):
        records = json_lines("TIIF", file, ("type", "short_description", "long_description"))
        if records[0]["type"] == kind:
            return records
    raise wrong("TIIF", path, f"the folder data with testmini_prompts of {kind}")


def ask_tiif(item: Item, number: int, picture: Path) -> list[Question]:
    asked = item.data["yn_question_list"]
    listed = "\n".join(f"{i}. {question}" for i, question in enumerate(asked, 1))
    prompt = _MANY.format(count=len(asked), questions=listed)
    read = reading.yes_or_no_lines(len(asked))
    return [Question(picture_key(item, number), reading.SYSTEM, prompt, (picture,), read)]


def score_tiif(items: Sequence[Item], pictures: int, answers: Answers) -> Scored:
    kinds: dict[str, list[float]] = {}
    wrong_ones = {}
    for item in items:
        wanted = [str(a).strip().lower() == "yes" for a in item.data["yn_answer_list"]]
        for number in range(pictures):
            key = picture_key(item, number)
            said = answers[key].value or [None] * len(wanted)
            right = [float(s is not None and s == w) for s, w in zip(said, wanted)]
            kinds.setdefault(item.group, []).extend(right)
            if min(right) < 1:
                wrong_ones[key] = item.data["yn_question_list"][right.index(0.0)]
    rows = [Row(kind, 100 * metrics.mean(values), len(values)) for kind, values in sorted(kinds.items())]
    for length in ("short", "long"):
        own = [row for row in rows if row.name.endswith(f", {length}")]
        if own:
            rows.append(Row(f"overall, {length}", metrics.mean([r.value for r in own]), sum(r.of for r in own)))
    note = "Overall is the mean over the types of prompts; the report's is over nine groups of them."
    return Scored(rows, wrong_ones, (note,))
