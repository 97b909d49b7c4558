"""Two short rounds of DPO on a model's own pictures of what it writes worst, and what they changed, offline.

    python examples/rl_demo.py                 # everything is in outputs/rl-demo; minutes on two cores
    python examples/rl_demo.py --control       # beside as much processor time of SFT on renderings of such prompts
    python examples/rl_demo.py --whole         # and more held-out prompts, the other language, edits
    python examples/rl_demo.py --small         # too short to learn anything

A round: the model draws each prompt several times, a recogniser that is shown where the text stands gives the reward,
and a better picture of a prompt is preferred to a worse one. What is reported is read by two other readers, which look
for the text themselves and gave no reward, on prompts whose words training never shows.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Sequence
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


def write_prompts(path: Path, language: str, count: int) -> Path:
    """Hard prompts with the places of their texts, of texts that are trained on: of ten seven in the language that is
    to be learnt, three Chinese characters or five and six letters, and three in the other, so that it is kept."""
    recipes = {name: tiny(SIZE, (name,), random_strings=0.8, max_letters=6, max_lines=1) for name in ("zh", "en")}
    lines, places, other = [], {"zh": 0, "en": 0}, {"zh": "en", "en": "zh"}[language]
    while len(lines) < count:
        name = language if len(lines) % 10 < 7 else other
        places[name] += 1
        sample = make(recipes[name], 11, places[name])
        if len(sample.lines[0]) >= {"zh": 3, "en": 5}[name]:
            lines.append({"prompt": sample.caption, "texts": list(sample.lines), "colours": sample.colours,
                          "boxes": [list(map(int, box)) for box in sample.boxes]})  # fmt: skip
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def weakest(model: str, count: int) -> str:
    """The language in which the model writes fewer of the held-out texts."""
    found = {}
    for language in ("zh", "en"):
        cases = cases_of(language, count)
        found[language] = np.mean(judged(cases, drawn(model, cases), READERS[:1])[READERS[0]])
    return min(found, key=lambda name: found[name])


def cases_of(language: str, count: int) -> list[TextCase]:
    return held_out_cases(tiny(SIZE, (language,), max_letters=6, max_lines=1), count) if count else []


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
    for name in readers:
        reader = Reader(side=320, turned=False) if name == READERS[0] else Reader()
        results = [evaluate_text.judge(case, image, recipe, reader) for case, image in zip(cases, pictures)]
        found[name] = [result.score.exact for result in results]
        found.setdefault("colours", [bool(result.colours_right) for result in results])
    return found


def edits(model: str, count: int) -> dict[str, Any]:
    if not count:
        return {}
    pipe = QwenImageEditPlusPipeline.from_pretrained(model, torch_dtype=torch.bfloat16)
    pairs = held_out_edits(tiny(SIZE, max_letters=6, max_lines=1), count, "text")
    edit = evaluate_edit.edited_by(pipe, num_inference_steps=STEPS, true_cfg_scale=1.0, seed=0)
    found = evaluate_edit.summary(list(evaluate_edit.evaluate_edits(edit, pairs, Reader())))["text"]
    return {"text_exact": found["text_exact"], "psnr_outside": found["psnr_outside"]}


def measured(model: str, counts: dict[str, int], changed: int, readers: Sequence[str] = READERS) -> dict[str, Any]:
    """What a model can do, on prompts that are always the same ones."""
    print(f"drawing and reading held-out texts: {model}", flush=True)
    found: dict[str, Any] = {"pictures": {}}
    for language, count in counts.items():
        if count:
            cases = cases_of(language, count)
            pictures = drawn(model, cases)
            found[language] = judged(cases, pictures, readers)
            found["pictures"][language] = pictures
    return found | {"edits": edits(model, changed)}


def shares(found: dict[str, Any]) -> dict[str, Any]:
    """The shares of `measured`, to be written down."""
    texts = {
        language: {name: round(float(np.mean(right)), 4) for name, right in found[language].items()}
        for language in ("zh", "en")
        if language in found
    }
    return texts | ({"edits": found["edits"]} if found["edits"] else {})


def judgements(found: dict[str, Any]) -> dict[str, Any]:
    """Of `measured`, by language and reader, a 1 for each picture that says what it should, else a 0."""
    return {
        language: {name: "".join(map(str, map(int, right))) for name, right in found[language].items()}
        for language in ("zh", "en")
        if language in found
    }


def compared(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """By language and reader: both shares, the interval of the second, won and lost, and a sign test."""
    out: dict[str, Any] = {}
    for language in ("zh", "en"):
        for name in READERS if language in before else ():
            was, now = before[language][name], after[language][name]
            won, lost = won_lost(was, now)
            low, high = wilson(sum(now), len(now))
            out.setdefault(language, {})[name] = {
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
    path: Path, language: str, cases: Sequence[TextCase], results: Sequence[dict[str, Any]], rounds: Sequence[Path]
) -> None:
    """Prompts whose pictures changed from wrong to right, before and after, and the curves beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    first, last = results[0], results[-1]
    was, now = first[language][READERS[0]], last[language][READERS[0]]
    chosen = [i for i in range(len(was)) if now[i] and not was[i]][:8]
    chosen += [i for i in range(len(was)) if was[i] and not now[i]][: max(0, 8 - len(chosen))]  # what was lost, too
    chosen += [i for i in range(len(was)) if i not in chosen][: max(0, 8 - len(chosen))]
    rows = []
    for label, found in (("before", first), ("after", last)):
        strip = grid([found["pictures"][language][i] for i in chosen], columns=8)
        head = Image.new("RGB", (strip.shape[1], 20), "white")
        ImageDraw.Draw(head).text((4, 4), label, fill="black")
        rows += [np.asarray(head), strip]
    pictures = np.concatenate(rows)
    figure, (top, left, lower) = plt.subplots(3, 1, figsize=(9, 7.2), height_ratios=[2.6, 2, 1.2])
    top.imshow(pictures)
    top.axis("off")
    for reader in READERS:
        places = [n for n, found in enumerate(results) if reader in found[language]]
        right = [results[n][language][reader] for n in places]
        values, bounds = [np.mean(own) for own in right], [wilson(sum(own), len(own)) for own in right]
        reach = [[abs(bound[k] - value) for bound, value in zip(bounds, values)] for k in (0, 1)]
        left.errorbar(places, values, yerr=reach, marker="o", capsize=3, label=reader)
    left.set_xticks(range(len(results)), ["before", *(f"round {k + 1}" for k in range(len(rounds)))])
    left.set_ylabel(f"exact texts ({language}), held out")
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
    language: Annotated[str, typer.Option(help="zh or en; empty: the one in which the model is worse.")] = "",
    rounds: Annotated[int, typer.Option(help="of drawing and learning.", min=1)] = 2,
    control: Annotated[bool, typer.Option("--control", help="Beside it, SFT for as much processor time.")] = False,
    whole: Annotated[
        bool, typer.Option("--whole", help="More rounds' prompts, measured on more; with the control.")
    ] = False,
    small: Annotated[bool, typer.Option("--small", help="Too short to learn anything.")] = False,
) -> None:
    """Two rounds, and what they changed."""
    if out.exists():
        raise SystemExit(f"{out} is already there: remove it, or choose another folder with --out")
    out.mkdir(parents=True)
    begin, chosen = time.perf_counter(), language or weakest(model, 4 if small else 24)
    other = {"zh": "en", "en": "zh"}[chosen]
    counts = {chosen: 4, other: 0} if small else {chosen: 200, other: 200} if whole else {chosen: 80, other: 0}
    changed = 0 if small or not whole else 100
    drawn_, updates = (4, 2) if small else (176, 100) if whole else (80, 48)
    print(f"{model} is to write {chosen} better: {rounds} rounds of {drawn_} prompts and {updates} updates", flush=True)
    prompts = write_prompts(out / "prompts.jsonl", chosen, rounds * drawn_)
    results, runs, spent, at = [measured(model, counts, changed)], [], [], model
    for number in range(rounds):
        run, start = out / f"round-{number + 1}", cpu()
        changes = [
            f"model.folder={at}", f"seed={number}", f"steps={updates}", f"rollout.updates={updates}",
            f"rollout.prompts={_part(prompts, number, drawn_)}", f"rollout.count={drawn_}",
            "rollout.dtype=bfloat16", "optimizer.schedule=cosine", "optimizer.cycles=1", "guards.every=0",
            "log.every=1", f"checkpoint.every={updates}",
        ]  # fmt: skip
        train("dpo", changes + (["rollout.group=3", "rollout.first=2", "batch=2"] if small else []), run)
        spent.append(round(cpu() - start, 1))
        at = str(run / "model")
        runs.append(run)
        last = number == rounds - 1
        if last:
            results.append(measured(at, counts, changed))
        else:
            results.append(measured(at, {chosen: counts[chosen]}, 0, READERS[:1]))
    content: dict[str, Any] = {
        "model": model, "language": chosen, "cpu": processor(), "threads": torch.get_num_threads(),
        "prompts_a_round": drawn_, "updates_a_round": updates, "cpu_seconds_a_round": spent,
        "reward": "recognition of the text's band, half where a colour is wrong",
        "results": [shares(found) for found in results], "judged": [judgements(found) for found in results],
        "compared": compared(results[0], results[-1]),
    }  # fmt: skip
    if whole or control:
        content["sft_control"] = sft_control(model, chosen, sum(spent), out / "sft", results[0], counts, changed)
    picture(out / "rl-demo.png", chosen, cases_of(chosen, counts[chosen]), results, runs)
    content["seconds"] = round(time.perf_counter() - begin, 1)
    (out / "results.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, found in content["compared"][chosen].items():
        print(
            f"{chosen}, {name}: {found['before']} before, {found['after']} after; won {found['won']}, "
            f"lost {found['lost']}, p = {found['p']:.3g}"
        )
    print(f"{content['seconds']:.0f} s; look at {out / 'rl-demo.png'}")


def sft_control(
    model: str, language: str, seconds: float, run: Path, before: dict[str, Any], counts: dict[str, int], changed: int
) -> dict[str, Any]:
    """Flow matching on renderings of such prompts, for as much processor time."""
    other = {"zh": "en", "en": "zh"}[language]
    common = [f"model.folder={model}", "model.train_text_encoder=false", "lora.rank=0", "optimizer.lr=3e-4",
              "optimizer.schedule=cosine", "optimizer.warmup=0", "optimizer.weight_decay=0", "optimizer.ema=0",
              "batch=32", "sigma.mean=0.8", "data.text_dropout=0", "log.every=10", "log.validate_every=0",
              "log.sample_every=0", "checkpoint.every=1000",
              f"data.mixture=[{_rendered(language, 0.7)}, {_rendered(other, 0.3)}]"]  # fmt: skip
    start = cpu()
    train("lora", [*common, "steps=8"], run.with_name("sft-timed"))
    each = (cpu() - start) / 8  # loading included, so a little short of the time
    steps, start = max(1, math.floor(seconds / each)), cpu()
    train("lora", [*common, f"steps={steps}"], run)
    spent = round(cpu() - start, 1)
    after = measured(str(run / "model"), counts, changed)
    return {"steps": steps, "cpu_seconds": spent, "results": shares(after), "compared": compared(before, after),
            "judged": judgements(after)}  # fmt: skip


def _rendered(language: str, weight: float) -> str:
    options = (
        f"{{preset: tiny, size: {SIZE}, languages: [{language}], random_strings: 0.8, max_letters: 6, max_lines: 1}}"
    )
    return f"{{name: {language}, weight: {weight}, source: synthesis, options: {options}}}"


def _part(prompts: Path, number: int, count: int) -> Path:
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
