"""The texts that `post_training.py` compares methods on: prompts for training, held-out ones, readers, renderings.

The reward is a recogniser that is shown where the text stands. What is reported is read by two other readers, which
look for the text themselves and gave no reward, on prompts whose words training never shows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks.post_training_world import Method, World
from qwen_image_fast import QwenImagePipeline
from qwen_image_fast.training.evaluation import evaluate_text
from qwen_image_fast.training.evaluation.cases import TextCase, held_out_cases
from qwen_image_fast.training.evaluation.ocr import Reader
from qwen_image_fast.training.synthesis import tiny
from qwen_image_fast.training.synthesis.generator import make

SIZE, STEPS = 128, 20
READERS = ("reader at 320 px", "reader at 736 px")
HARD = {"zh": 3, "en": 5}  # characters from which a text is hard for the shipped model
OTHER = {"zh": "en", "en": "zh"}


def write_prompts(path: Path, count: int, language: str = "zh") -> Path:
    """Hard prompts of texts that are trained on, each text once, with the places where these stand."""
    recipe, lines, seen, place = tiny(SIZE, (language,), random_strings=1.0, max_letters=6, max_lines=1), [], set(), 0
    while len(lines) < count:
        sample, place = make(recipe, 11, place), place + 1
        if len(sample.lines[0]) >= HARD[language] and sample.lines not in seen:
            seen.add(sample.lines)
            lines.append({"prompt": sample.caption, "texts": list(sample.lines), "colours": sample.colours,
                          "boxes": [list(map(int, box)) for box in sample.boxes]})  # fmt: skip
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def cases_of(language: str, count: int, hard: bool = False) -> list[TextCase]:
    """The first held-out texts of a language; `hard`: only those, and each text once."""
    recipe = tiny(SIZE, (language,), max_letters=6, max_lines=1)
    if not hard:
        return held_out_cases(recipe, count)
    found = held_out_cases(recipe, 6 * count, seed=1)
    long: dict[tuple[str, ...], TextCase] = {}
    for case in found:
        if len(case.texts[0]) >= HARD[language]:
            long.setdefault(case.texts, case)
    return list(long.values())[:count]


def drawn(model: str, cases: Sequence[TextCase]) -> list[np.ndarray]:
    pipe = QwenImagePipeline.from_pretrained(model, torch_dtype=torch.bfloat16)
    draw = evaluate_text.drawn_by(
        pipe, height=SIZE, width=SIZE, num_inference_steps=STEPS, true_cfg_scale=1.0, seed=0
    )  # fmt: skip
    return [image for i in range(0, len(cases), 16) for image in draw(cases[i : i + 16], i)]


def judged(
    cases: Sequence[TextCase], pictures: Sequence[np.ndarray], readers: Sequence[str] = READERS
) -> dict[str, list[bool]]:
    """By reader, which pictures say what they should; and by the first, which have the right colours."""
    recipe, found = tiny(SIZE), dict[str, list[bool]]()
    workers = torch.get_num_threads()

    def read(name: str, worker: int) -> list[evaluate_text.Result]:
        reader = Reader(side=320, turned=False) if name == READERS[0] else Reader()
        own = list(zip(cases, pictures))[worker::workers]
        return [evaluate_text.judge(case, image, recipe, reader) for case, image in own]

    with ThreadPoolExecutor(workers) as pool:
        for name in readers:
            parts = list(pool.map(lambda worker, name=name: read(name, worker), range(workers)))
            results = [parts[i % workers][i // workers] for i in range(len(cases))]
            found[name] = [result.score.exact for result in results]
            found.setdefault("colours", [bool(result.colours_right) for result in results])
    return found


def rendered(language: str) -> list[str]:
    """What makes recipe lora a run of all weights on renderings: hard texts in the language, some in the other."""
    shares = {language: 0.85, OTHER[language]: 0.15}
    options = f"preset: tiny, size: {SIZE}, random_strings: 0.8, max_letters: 6, max_lines: 1"
    parts = [
        f"{{name: {name}, weight: {share}, source: synthesis, options: {{{options}, languages: [{name}]}}}}"
        for name, share in shares.items()
    ]
    return ["model.train_text_encoder=false", "lora.rank=0", "optimizer.lr=3e-4", "optimizer.schedule=cosine",
            "optimizer.warmup=0", "optimizer.weight_decay=0", "optimizer.ema=0", "batch=32", "sigma.mean=0.8",
            "data.text_dropout=0", "log.every=10", "log.validate_every=0", "log.sample_every=0",
            f"data.mixture=[{', '.join(parts)}]"]  # fmt: skip


def read(model: str, name: str, reader: str, small: bool) -> dict[str, list[bool]]:
    count, hard = SETS[name]
    cases = cases_of(name, 4 if small else count, hard)
    return judged(cases, drawn(model, cases), [reader])


SETS = {"zh": (80, True), "en": (32, False)}  # how many texts, and whether only hard ones
# A round of dpo: two pictures of each prompt, six more where these differ; the learning rate falls to zero in it.
DPO = ["rollout.first=2", "rollout.group=8", "rollout.dtype=bfloat16", "optimizer.schedule=cosine",
       "optimizer.cycles=1", "guards.every=0", "log.every=1"]  # fmt: skip
DRAWN = ["log.every=1", "optimizer.schedule=cosine", "optimizer.warmup=0", "guards.every=0"]
IN_BF16 = [*DRAWN, "rollout.dtype=bfloat16"]
WORLD = World(
    learned="held-out Chinese texts of 3 characters, exact (%)",
    prompts="random Chinese texts of three characters that are trained on; SFT: renderings of such, 3 of 20 English",
    reward="recognition of the text's band, half where a colour is wrong",
    methods={
        "DPO": Method("dpo", 40, 220, DPO),
        "SFT": Method("lora", 105, 0, rendered("zh")),
        "DiffusionNFT": Method("nft", 42, 0, IN_BF16),
        "AWM": Method("awm", 42, 0, IN_BF16),
        "Flow-GRPO": Method("grpo", 24, 0, DRAWN),
    },
    prompts_a_leg=220,
    write_prompts=write_prompts,
    judged=read,
    sets=tuple(SETS),
    against="SFT",
    judges=READERS,
)
