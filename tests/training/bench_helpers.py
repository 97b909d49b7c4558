"""Small sets of prompts in the files of every benchmark, pictures, and judges that answer what they are told to."""

import io
import json
import threading

import numpy as np
from PIL import Image

from qwen_image_fast.training.evaluation.bench.benchmarks import BENCHMARKS
from qwen_image_fast.training.evaluation.bench.judges import Judge
from qwen_image_fast.training.evaluation.bench.run import BenchRun, digest


def lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def geneval(folder):
    lines(folder / "evaluation_metadata.jsonl", [
        {"tag": "two_object", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}],
         "prompt": "a photo of a dog and a cat"},
        {"tag": "counting", "include": [{"class": "cup", "count": 2}], "exclude": [{"class": "cup", "count": 3}],
         "prompt": "a photo of two cups"},
    ])  # fmt: skip
    return folder


def geneval2(folder):
    lines(folder / "geneval2_data.jsonl", [
        {"prompt": "four white bicycles", "atom_count": 3, "skills": ["count", "attribute", "object", "object"],
         "vqa_list": [["How many bicycles?", "four"], ["Are they white?", "Yes"], ["Any bicycles?", "Yes"],
                      ["Any cars?", "No"]]},
    ])  # fmt: skip
    return folder


def dpg(folder):
    head = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple"
    head += ",question_natural_language"
    rows = ["x,t,k,1,0,entity,whole,entity - whole (skipped),Skipped?",
            "12,t,k,1,0,entity,whole,entity - whole (dog),Is there a dog?",
            "12,t,k,2,1,attribute,color,attribute - color (dog),Is the dog red?",
            '12,t,k,3,"1,2",relation,spatial,relation - spatial (dog),Is the red dog left?',
            "12,t,k,4,0,global,,global (),Is it a drawing?"]  # fmt: skip
    text(folder / "dpg_bench.csv", "\n".join([head, *rows]) + "\n")
    text(folder / "prompts" / "12.txt", "a drawing of a red dog\n")
    return folder


def oneig(folder):
    text(folder / "OneIG-Bench.csv", "category,id,prompt_en\nGeneral_Object,000,a red dog\nText_Rendering,001,a sign\n"
                                     "Knowledge_Reasoning,000,why\n")  # fmt: skip
    asked = {"question": json.dumps({"1": "A dog?", "2": "Red?"}), "dependency": json.dumps({"1": [0], "2": [1]})}
    for kind in ("anime", "human", "object"):
        text(
            folder / f"scripts/alignment/Q_D/{kind}.json",
            json.dumps({"000": asked} if kind == "object" else {"9": asked}),
        )
    text(folder / "scripts/text/text_content.csv", "id,text_content\n001,Big SALE today\n")
    text(folder / "OneIG-Bench-ZH.csv", "category,id,prompt_cn\nMultilingualism,000,红狗\nText_Rendering,001,牌子\n")
    for kind in ("anime", "human", "object", "multilingualism"):
        text(folder / f"scripts/alignment/Q_D/{kind}_zh.json", json.dumps({"000": asked}))
    text(folder / "scripts/text/text_content_zh.csv", "id,text_content\n001,今天 大减价\n")
    return folder


def tiif(folder):
    told = {"type": "color", "short_description": "a red dog", "long_description": "a dog that is red"}
    lines(folder / "testmini_prompts/color_prompts.jsonl", [told])
    lines(folder / "testmini_eval_prompts/color_eval_prompts.jsonl",
          [{"type": "color", "yn_question_list": ["A dog?", "Blue?"], "yn_answer_list": ["yes", "no"]}])  # fmt: skip
    return folder


def cvtg(folder):
    for kind in ("CVTG", "CVTG-Style"):
        for regions in (2, 3, 4, 5):
            data = [{"index": 0, "prompt": f"signs that say {' and '.join(repr(f'Word{i}') for i in range(regions))}"}]
            text(folder / kind / f"{regions}.json", json.dumps({"data_list": data}))
    return folder


def chinese_word(folder):
    for level, characters in ((1, "一二三"), (2, "丁"), (3, "鑫")):
        text(folder / f"level{level}.txt", characters + "\n")
    return folder


def long_text(folder):
    told = {"prompt_id": 0, "prompt": "a sign", "text": ["To be, or", "not to be"], "category": "signs"}
    lines(folder / "text_prompts.jsonl", [told])
    return folder


def picture(colour, size=(32, 32)):
    return Image.new("RGB", size, colour)


def gedit(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    picture("red").save(file, "PNG")
    rows = [{"key": f"k{i}", "task_type": kind, "instruction": f"do {i}", "instruction_language": language,
             "input_image_raw": {"bytes": file.getvalue(), "path": None}}
            for i, (kind, language) in enumerate([("color_alter", "en"), ("color_alter", "en"), ("text_change", "en"),
                                                  ("text_change", "cn")])]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


def imgedit(folder):
    cases = {"1": {"id": "animal/0.png", "prompt": "add a hat", "edit_type": "add"},
             "2": {"id": "animal/0.png", "prompt": "remove the dog", "edit_type": "remove"}}  # fmt: skip
    (folder / "animal").mkdir(parents=True, exist_ok=True)
    picture("red").save(folder / "animal/0.png")
    text(folder / "basic_edit.json", json.dumps(cases))
    return folder


SETS = {"geneval": geneval, "geneval2": geneval2, "dpg": dpg, "oneig": oneig, "tiif": tiif, "cvtg": cvtg,
        "chinese-word": chinese_word, "long-text": long_text, "gedit": gedit, "imgedit": imgedit}  # fmt: skip


def started(name, folder, pictures=None, **settings):
    """A run of a small set, with its pictures drawn, each of another colour."""
    benchmark = BENCHMARKS[name]
    language = benchmark.languages[0]
    items = benchmark.load(SETS[name](folder / "prompts"), language, folder / "out/sources")
    told = {"model": "mine", "prompts": digest(items), **settings}
    run = BenchRun(name, language, items, pictures or benchmark.pictures, folder / "out", told)
    run.open()
    run.draw(coloured, seed=0, batch=3)
    return run


def coloured(prompts, sources, seeds):
    return [Image.fromarray(np.full((16, 16, 3), 10 * seed + 5, np.uint8)) for seed in seeds]


DOG, CUP = {"class": "dog", "score": 0.99, "box": [0, 0, 9, 9]}, {"class": "cup", "score": 0.99, "box": [0, 0, 9, 9]}
CAT = {**DOG, "class": "cat"}


class Fake:
    """A judge that answers by the first of `replies` whose key the question's key or words contain, and counts."""

    def __init__(self, replies, name="judge"):
        self.replies, self.asked, self.lock = replies, [], threading.Lock()
        self.judge = Judge(name, "chat", self.answer)

    def answer(self, question):
        with self.lock:
            self.asked.append(question.key)
        for key, reply in self.replies.items():
            if key in question.key or key in question.prompt:
                if isinstance(reply, Exception):
                    raise reply
                return reply
        raise AssertionError(question)


def scores(run, judge, **options):
    answers = run.judge(judge, 2, **options)
    run.score(judge.name, answers)
    result = json.loads((run.out / "results.json").read_text())
    assert result["judge"] == judge.name and all(s["judge"] == judge.name for s in result["scores"])
    return {s["name"]: s["value"] for s in result["scores"]}, result


# Benchmark → what the judge answers, and what is scored, by hand.
CASES = {
    # Of four pictures of each prompt one has both animals, none has two cups.
    "geneval": ({"00000-0": json.dumps([DOG, CAT]), "00000": json.dumps([DOG]), "00001": json.dumps([CUP] * 3)},
                {"two_object": 0.25, "counting": 0.0, "overall": 0.125}),
    # Three of four right: 3/4, and the root of a product with a zero.
    "geneval2": ({"How many": "4", "white": "yes", "bicycles?": "no", "cars": "No."},
                 {"count": 1, "attribute": 1, "object": 0.5, "atoms (arithmetic mean)": 0.75,
                  "prompts (geometric mean)": 0}),
    # Dog yes, red no, so left counts as no although it was yes; drawing yes: 2 of 4. Categories before that.
    "dpg": ({"there a dog": "yes", "dog red": "no", "dog left": "yes", "drawing": "Yes"},
            {"entity": 100, "attribute": 0, "relation": 100, "global": 100, "overall": 50}),
    # Alignment: dog no, so red no. Text: "big SALE" without its last word of five letters and a space.
    "oneig": ({"A dog?": "no", "Red?": "yes", "text-001": "big SALE"},
              {"alignment": 0, "text": 1 - 6 * 1 * (1 / 3) / 100}),
    # Short: one of two right; long: both.
    "tiif": ({"short": "yes\nyes", "long": "1. yes\n2. no"},
             {"color, short": 50, "color, long": 100, "overall, short": 50, "overall, long": 100}),
    # Every picture says "WORD0 word1": two words of two, three, four and five. NED: 1 for those; for a word without its
    # like the nearest, one letter of five away.
    "cvtg": ({"": "WORD0\nword1"},
             {"word accuracy, 2 regions": 1, "word accuracy, 3 regions": 2 / 3, "word accuracy, 4 regions": 0.5,
              "word accuracy, 5 regions": 0.4, "word accuracy": 8 / 14,
              "NED": (16 + 12 * (1 - 1 / 5.00001)) / 28}),
    # One of three, one of one, none of one: two of five.
    "chinese-word": ({"L1-04e00": "一", "L1": "未", "L2": "丁", "L3": "NONE"},
                     {"level 1": 100 / 3, "level 2": 100, "level 3": 0, "overall": 40}),
    # "to be or" of "to be or not to be".
    "long-text": ({"": "To be, or"}, {"signs": 0.5, "overall": 0.5}),
    # k0: least 4 and 9, root 6; k1: 0; k2: 8 and 8. Means over groups: SC (2 + 8) / 2, PQ (9 + 8) / 2, O (3 + 8) / 2.
    "gedit": ({"k0-0.success": '{"score": [4, 9]}', "k1-0.success": '{"score": [0, 9]}',
               "k2-0.success": '{"score": [8, 9]}', "k2-0.quality": '{"score": [8, 8]}',
               "quality": '{"score": [9, 10]}'},
              {"color_alter": 3, "text_change": 8, "SC": 5, "PQ": 8.5, "overall": 5.5}),
    # 4 for the hat; 2 for the dog.
    "imgedit": ({"1-0": "First: 5\nSecond: 4\nThird: 3", "2-0": "First: 2\nSecond: 2\nThird: 2"},
                {"Add": 4, "Remove": 2, "overall": 3}),
}  # fmt: skip
