"""Two short rounds of DPO on a model's own pictures of what it writes worst, and what they changed, offline.

    python examples/rl_demo.py                 # everything is in outputs/rl-demo; minutes on two cores
    python examples/rl_demo.py --control       # beside as much processor time of SFT on renderings of such prompts
    python examples/rl_demo.py --whole         # and more held-out prompts, the other language, edits
    python examples/rl_demo.py --small         # too short to learn anything

A round: the model draws each prompt several times, a recogniser that is shown where the text stands gives the reward,
and a better picture of a prompt is preferred to a worse one. What is reported is read by two other readers, which look
for the text themselves and gave no reward, on prompts whose words training never shows. With the shipped weights
nothing is gained that can be told from chance: docs/post_training.md.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw

from qwen_image_fast import QwenImageEditPlusPipeline, QwenImagePipeline
from qwen_image_fast.training.evaluation import evaluate_edit, evaluate_text
from qwen_image_fast.training.evaluation.cases import TextCase, held_out_cases, held_out_edits
from qwen_image_fast.training.evaluation.intervals import wilson
from qwen_image_fast.training.evaluation.ocr import Reader
from qwen_image_fast.training.evaluation.paired import sign_test, won_lost
from qwen_image_fast.training.run import train
from qwen_image_fast.training.synthesis import tiny
from qwen_image_fast.training.synthesis.generator import make
from qwen_image_fast.training.tasks.grid import grid

SIZE, STEPS = 128, 20
READERS = ("reader at 320 px", "reader at 736 px")
HARD = {"zh": 3, "en": 5}  # characters from which a text is hard for the shipped model
OTHER = {"zh": "en", "en": "zh"}
# A round: two pictures of each prompt, six more where these differ; the learning rate falls to zero in it.
PROMPTS, UPDATES = 220, 40
DPO = ["rollout.first=2", "rollout.group=8", "rollout.dtype=bfloat16", "optimizer.schedule=cosine",
       "optimizer.cycles=1", "guards.every=0", "log.every=1"]  # fmt: skip


def write_prompts(path: Path, language: str, count: int) -> Path:
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


def edits(model: str, count: int) -> dict[str, Any]:
    pipe = QwenImageEditPlusPipeline.from_pretrained(model, torch_dtype=torch.bfloat16)
    pairs = held_out_edits(tiny(SIZE, max_letters=6, max_lines=1), count, "text")
    edit = evaluate_edit.edited_by(pipe, num_inference_steps=STEPS, true_cfg_scale=1.0, seed=0)
    found = evaluate_edit.summary(list(evaluate_edit.evaluate_edits(edit, pairs, Reader(side=320, turned=False))))
    return {"text_exact": found["text"]["text_exact"], "psnr_outside": found["text"]["psnr_outside"]}


Right = dict[str, dict[str, list[bool]]]  # by set of prompts and reader, or "colours": which pictures are right


def measured(
    model: str, sets: dict[str, list[TextCase]], readers: Sequence[str] = READERS
) -> tuple[Right, dict[str, list[np.ndarray]]]:
    """What a model writes rightly, on prompts that are always the same ones, and the pictures."""
    print(f"drawing and reading held-out texts: {model}", flush=True)
    pictures = {name: drawn(model, cases) for name, cases in sets.items()}
    return {name: judged(sets[name], own, readers) for name, own in pictures.items()}, pictures


def compared(before: Right, after: Right) -> dict[str, Any]:
    """By set and reader: both numbers, the interval of the second, won and lost, and a sign test."""
    out: dict[str, Any] = {}
    for name, own in after.items():
        for reader, now in own.items():
            was = before[name][reader]
            won, lost = won_lost(was, now)
            low, high = wilson(sum(now), len(now))
            out.setdefault(name, {})[reader] = {
                "before": f"{sum(was)} of {len(was)}", "after": f"{sum(now)} of {len(now)}", "won": won, "lost": lost,
                "p": round(sign_test(won, lost), 5), "interval": [round(low, 3), round(high, 3)],
            }  # fmt: skip
    return out


def cpu() -> float:
    return time.process_time()


def losses_of(run: Path) -> list[tuple[int, float]]:
    """Step and implicit accuracy of a run's log."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["implicit_accuracy"]) for line in lines if "implicit_accuracy" in line]


def picture(
    path: Path, rights: Sequence[Right], drawings: Sequence[dict[str, list[np.ndarray]]], rounds: Sequence[Path]
) -> None:
    """Prompts whose pictures changed from wrong to right, before and after, and the curves beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    name = next(iter(rights[0]))
    was, now = rights[0][name][READERS[0]], rights[-1][name][READERS[0]]
    chosen = [i for i in range(len(was)) if now[i] and not was[i]][:8]
    chosen += [i for i in range(len(was)) if was[i] and not now[i]][: max(0, 8 - len(chosen))]  # what was lost, too
    chosen += [i for i in range(len(was)) if i not in chosen][: max(0, 8 - len(chosen))]
    rows = []
    for label, found in (("before", drawings[0]), ("after", drawings[-1])):
        strip = grid([found[name][i] for i in chosen], columns=8)
        head = Image.new("RGB", (strip.shape[1], 20), "white")
        ImageDraw.Draw(head).text((4, 4), label, fill="black")
        rows += [np.asarray(head), strip]
    figure, (top, left, lower) = plt.subplots(3, 1, figsize=(9, 7.2), height_ratios=[2.6, 2, 1.2])
    top.imshow(np.concatenate(rows))
    top.axis("off")
    for reader in READERS:
        places = [n for n, right in enumerate(rights) if reader in right[name]]
        right = [rights[n][name][reader] for n in places]
        values, bounds = [np.mean(own) for own in right], [wilson(sum(own), len(own)) for own in right]
        reach = [[abs(bound[k] - value) for bound, value in zip(bounds, values)] for k in (0, 1)]
        left.errorbar(places, values, yerr=reach, marker="o", capsize=3, label=reader)
    left.set_xticks(range(len(rights)), ["before", *(f"round {k + 1}" for k in range(len(rounds)))])
    left.set_ylabel(f"exact texts ({name}), held out")
    left.legend()
    start = 0
    for run in rounds:
        points = losses_of(run)
        lower.plot([start + step for step, _ in points], [value for _, value in points], color="tab:green")
        start += points[-1][0] if points else 0
    lower.set_xlabel("updates")
    lower.set_ylabel("pairs ordered")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    out: Annotated[Path, typer.Option(help="Folder of everything that is made.")] = Path("outputs/rl-demo"),
    model: Annotated[str, typer.Option(help="tiny, or the folder of a model of 128 px that writes.")] = "tiny",
    language: Annotated[str, typer.Option(help="zh or en: what it is to write better.")] = "zh",
    rounds: Annotated[int, typer.Option(help="of drawing and learning.", min=1)] = 2,
    control: Annotated[bool, typer.Option("--control", help="Beside it, SFT for as much processor time.")] = False,
    whole: Annotated[bool, typer.Option("--whole", help="More held-out prompts, edits, and the control.")] = False,
    small: Annotated[bool, typer.Option("--small", help="Too short to learn anything.")] = False,
) -> None:
    """Two rounds, and what they changed."""
    if language not in HARD:
        raise SystemExit(f"--language must be zh or en, got {language}")
    if out.exists():
        raise SystemExit(f"{out} is already there: remove it, or choose another folder with --out")
    out.mkdir(parents=True)
    begin, hard = time.perf_counter(), f"{language} of {HARD[language]} characters or more"
    count, updates = (4, 2) if small else (PROMPTS, UPDATES)
    sets = {hard: cases_of(language, 4 if small else 80, hard=True)}
    if whole:
        sets |= {name: cases_of(name, 200) for name in (language, OTHER[language])}
    print(f"{model} is to write {hard} better: {rounds} rounds of {count} prompts, {updates} updates", flush=True)
    prompts = write_prompts(out / "prompts.jsonl", language, rounds * count)
    runs, spent, at = [], [], model
    first = measured(model, sets)
    rights, drawings = [first[0]], [first[1]]
    for number in range(rounds):
        run, start = out / f"round-{number + 1}", cpu()
        changes = [
            f"model.folder={at}", f"seed={number}", f"steps={updates}", f"rollout.updates={updates}",
            f"rollout.prompts={part(prompts, number, count)}", f"rollout.count={count}", f"checkpoint.every={updates}",
            *DPO,
        ]  # fmt: skip
        train("dpo", changes + (["batch=2"] if small else []), run)
        spent.append(round(cpu() - start, 1))
        at = str(run / "model")
        runs.append(run)
        last = number == rounds - 1
        right, drawing = measured(at, sets) if last else measured(at, {hard: sets[hard]}, READERS[:1])
        rights.append(right)
        drawings.append(drawing)
    content: dict[str, Any] = {
        "model": model, "language": language, "cpu": processor(), "threads": torch.get_num_threads(),
        "prompts_a_round": count, "updates_a_round": updates, "cpu_seconds_a_round": spent, "changes": DPO,
        "reward": "recognition of the text's band, half where a colour is wrong",
        "compared": [compared(rights[0], right) for right in rights[1:]],
    }  # fmt: skip
    if whole:
        content["text_edits"] = {"before": edits(model, 100), "after": edits(at, 100)}
    if whole or control:
        content["sft_control"] = sft_control(model, language, sum(spent), out / "sft", rights[0], sets)
    picture(out / "rl-demo.png", rights, drawings, runs)
    content["seconds"] = round(time.perf_counter() - begin, 1)
    (out / "results.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, readers in content["compared"][-1].items():
        for reader, found in readers.items():
            print(
                f"{name}, {reader}: {found['before']} before, {found['after']} after; won {found['won']}, "
                f"lost {found['lost']}, p = {found['p']:.3g}"
            )
    print(f"{content['seconds']:.0f} s; look at {out / 'rl-demo.png'}")


def sft_control(
    model: str, language: str, seconds: float, run: Path, before: Right, sets: dict[str, list[TextCase]]
) -> dict[str, Any]:
    """Flow matching on renderings of such prompts, for as much processor time."""
    common, start = [f"model.folder={model}", "checkpoint.every=1000", *rendered(language)], cpu()
    train("lora", [*common, "steps=8"], run.with_name("sft-timed"))
    each = (cpu() - start) / 8  # loading included, so a little short of the time
    steps, start = max(1, math.floor(seconds / each)), cpu()
    train("lora", [*common, f"steps={steps}"], run)
    spent, (right, _) = round(cpu() - start, 1), measured(str(run / "model"), sets)
    return {"steps": steps, "cpu_seconds": spent, "compared": compared(before, right)}


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


def part(prompts: Path, number: int, count: int) -> Path:
    """The prompts of a round, in a file of their own."""
    path = prompts.with_name(f"prompts-{number + 1}.jsonl")
    lines = prompts.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[number * count : (number + 1) * count]), encoding="utf-8")
    return path


def processor() -> str:
    """Of this machine, by its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    typer.run(main)
