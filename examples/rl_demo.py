"""Two short rounds of DPO on a model's own pictures of what it draws worst, and what they changed, offline.

    python examples/rl_demo.py                 # everything is in outputs/rl-demo; minutes on two cores
    python examples/rl_demo.py --control       # beside as much processor time of SFT on renderings of such prompts
    python examples/rl_demo.py --small         # too short to learn anything

A round's prompts are of the tasks that it draws worst: as many of each as it drew wrongly, and a few of the others. The
model draws each prompt several times, the reward says how near the outlines of what it drew are to those
that were asked for, and a better picture of a prompt is preferred to a worse one. What is reported are the tasks of
`qwen-image-fast evaluate tiny`: prompts that the rounds do not show, judged as right or wrong as a whole (number,
shapes, colours, places, ground), and texts, which must not be lost. Of a model that draws hardly any of them rightly
little is learned; the shipped one draws 193 of 200: docs/post_training.md.
"""

from __future__ import annotations

import itertools
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

from qwen_image_fast.training.evaluation.intervals import wilson
from qwen_image_fast.training.evaluation.paired import sign_test, won_lost
from qwen_image_fast.training.evaluation.things import likeness
from qwen_image_fast.training.evaluation.tiny_cases import pictures
from qwen_image_fast.training.evaluation.tiny_eval import Judged
from qwen_image_fast.training.evaluation.tiny_models import TinyRun
from qwen_image_fast.training.rewards.reward import Asked
from qwen_image_fast.training.run import train
from qwen_image_fast.training.tasks.grid import grid

SIZE, STEPS, JUDGED = 128, 20, 50
SHAPES, KEPT = ("single", "two", "counting", "position"), ("text",)
PROMPTS, UPDATES = 160, 40  # of a round
SINGLE = 60  # prompts of a single shape that are not judged: there are not many more
# What shape a thing is, is settled near pure noise: the levels are those of recipe tiny/8-placed-shapes.
DPO = ["optimizer.schedule=cosine", "optimizer.cycles=1", "sigma.mean=2.0", "sigma.std=1.6",
       "rollout.first=2", "rollout.group=8", "rollout.dtype=bfloat16", "guards.every=0", "log.every=1",
       'rewards=[{kind: function, options: {name: "rl_demo:outlines"}}]']  # fmt: skip


def outlines(pictures: Sequence[np.ndarray], asked: Sequence[Asked]) -> list[float]:
    """The reward: from 0 to 1, how near the things of each picture are to those that were asked for.

    A likeness of 0.85 is as good as a higher one, so that right pictures are right alike.
    """
    return [min(1.0, likeness(picture, about.fields["things"]) / 0.85) for picture, about in zip(pictures, asked)]


def write_prompts(folder: Path, rounds: int, count: int, wrong: Sequence[int] = (0, 0, 0, 0)) -> list[Path]:
    """A file for each round: at most `count` prompts of the tasks in turn, none of them one that is judged.

    wrong: of each task, how many pictures were. The shares are as one more than these: none is left out.
    """
    shares = [-(-count * (1 + n) // (len(wrong) + sum(wrong))) for n in wrong]
    shares[0] = min(shares[0], SINGLE)
    chosen: list[list[Any]] = []  # by task, of all rounds
    for task, share in zip(SHAPES, shares):
        pool = pictures(task, JUDGED + min(rounds * share, SINGLE if task == "single" else rounds * share))[JUDGED:]
        chosen.append(list(itertools.islice(itertools.cycle(pool), rounds * share)))
    files = []
    for number in range(rounds):
        rows = itertools.zip_longest(*(own[number * n : (number + 1) * n] for own, n in zip(chosen, shares)))
        lines = [{"prompt": one.prompt, "things": one.things} for row in rows for one in row if one is not None]
        del lines[count:]
        files.append(folder / f"prompts-{number + 1}.jsonl")
        files[-1].write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return files


def judged(model: str, tasks: Sequence[str], count: int) -> list[Judged]:
    """Pictures of prompts that are always the same ones, from the same noise."""
    print(f"drawing and judging prompts that are held out: {model}", flush=True)
    sampling = {"num_inference_steps": STEPS, "true_cfg_scale": 1.0}
    return TinyRun(model, tasks, count, SIZE, 0, 16, sampling).judged()


def compared(before: Sequence[Judged], after: Sequence[Judged]) -> dict[str, dict[str, Any]]:
    """Of each task and of all shapes together: both numbers, the interval of the second, won and lost, a sign test."""
    found = {}
    for name, tasks in {**{task: (task,) for task in (*SHAPES, *KEPT)}, "all shapes": SHAPES}.items():
        was, now = ([one.fault is None for one in own if one.task in tasks] for own in (before, after))
        if now:
            won, lost = won_lost(was, now)
            low, high = wilson(sum(now), len(now))
            found[name] = {
                "before": f"{sum(was)} of {len(was)}", "after": f"{sum(now)} of {len(now)}", "won": won, "lost": lost,
                "p": round(sign_test(won, lost), 5), "interval": [round(low, 3), round(high, 3)],
            }  # fmt: skip
    return found


def cpu() -> float:
    return time.process_time()


def logged(run: Path, name: str) -> list[tuple[int, float]]:
    """Steps and values of a run's log."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line[name]) for line in lines if name in line]


def picture(path: Path, states: Sequence[Sequence[Judged]], rounds: Sequence[Path]) -> None:
    """Prompts whose pictures changed from wrong to right, before and after, and the curves beneath them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    first, last = ([one for one in state if one.task in SHAPES] for state in (states[0], states[-1]))
    order = sorted(range(len(first)), key=lambda i: (last[i].fault is not None, first[i].fault is None))
    better = [i for i in order if last[i].fault is None and first[i].fault is not None]
    worse = [i for i in order if last[i].fault is not None and first[i].fault is None]
    chosen = [*better[:: max(1, len(better) // 9)][:9], *worse[:3]]  # what was lost is shown, too
    chosen += [i for i in order if i not in chosen][: max(0, 10 - len(chosen))]
    rows = []
    for label, state in (("before", first), ("after", last)):
        strip = grid([state[i].shown[0] for i in chosen[:10]], columns=10)
        head = Image.new("RGB", (strip.shape[1], 20), "white")
        ImageDraw.Draw(head).text((4, 4), label, fill="black")
        rows += [np.asarray(head), strip]
    figure, (top, left, lower) = plt.subplots(3, 1, figsize=(9, 7.2), height_ratios=[2.3, 2.4, 1.2])
    top.imshow(np.concatenate(rows))
    top.axis("off")
    for task in SHAPES:
        right = [[one.fault is None for one in state if one.task == task] for state in states]
        shares, bounds = [np.mean(own) for own in right], [wilson(sum(own), len(own)) for own in right]
        reach = [[abs(bound[k] - value) for bound, value in zip(bounds, shares)] for k in (0, 1)]
        left.errorbar(range(len(states)), shares, yerr=reach, marker="o", capsize=3, label=task)
    left.set_xticks(range(len(states)), ["before", *(f"round {k + 1}" for k in range(len(rounds)))])
    left.set_ylabel("right, held out")
    left.legend(loc="lower right", ncols=2)
    start = 0
    for run in rounds:
        points = logged(run, "implicit_accuracy")
        lower.plot([start + step for step, _ in points], [value for _, value in points], color="tab:green")
        start += points[-1][0] if points else 0
    lower.set_xlabel("updates")
    lower.set_ylabel("pairs ordered")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    out: Annotated[Path, typer.Option(help="Folder of everything that is made.")] = Path("outputs/rl-demo"),
    model: Annotated[str, typer.Option(help="tiny, or the folder of a model of 128 px of the tiny world.")] = "tiny",
    rounds: Annotated[int, typer.Option(help="of drawing and learning.", min=1)] = 2,
    control: Annotated[bool, typer.Option("--control", help="Beside it, SFT for as much processor time.")] = False,
    small: Annotated[bool, typer.Option("--small", help="Too short to learn anything.")] = False,
) -> None:
    """Two rounds, and what they changed."""
    if out.exists():
        raise SystemExit(f"{out} is already there: remove it, or choose another folder with --out")
    out.mkdir(parents=True)
    begin = time.perf_counter()
    count, updates, of_each = (4, 2, 1) if small else (PROMPTS, UPDATES, JUDGED)
    print(f"{model} is to draw shapes better: {rounds} rounds of up to {count} prompts, {updates} updates", flush=True)
    states = [judged(model, (*SHAPES, *KEPT), of_each)]
    wrong = [sum(one.fault is not None for one in states[0] if one.task == task) for task in SHAPES]
    prompts, runs, spent, at = write_prompts(out, rounds, count, wrong), [], [], model
    asked = [len(file.read_text(encoding="utf-8").splitlines()) for file in prompts]
    for number in range(rounds):
        run, start = out / f"round-{number + 1}", cpu()
        changes = [
            f"model.folder={at}", f"seed={number}", f"steps={updates}", f"rollout.updates={updates}",
            f"rollout.prompts={prompts[number]}", f"rollout.count={asked[number]}", f"checkpoint.every={updates}", *DPO,
        ]  # fmt: skip
        train("dpo", changes + (["batch=2"] if small else []), run)
        spent.append(round(cpu() - start, 1))
        at = str(run / "model")
        runs.append(run)
        states.append(judged(at, (*SHAPES, *KEPT) if number == rounds - 1 else SHAPES, of_each))
    content: dict[str, Any] = {
        "model": model, "cpu": processor(), "threads": torch.get_num_threads(), "prompts_a_round": asked,
        "updates_a_round": updates, "cpu_seconds_a_round": spent, "changes": DPO,
        "reward": "overlap of each thing with the outline that was asked for",
        "pairs": [value for run in runs for _, value in logged(run, "learnt_from")],
        "compared": [compared(states[0], state) for state in states[1:]],
    }  # fmt: skip
    if control:
        content["sft_control"] = sft_control(model, sum(spent), out / "sft", states[0], of_each)
    picture(out / "rl-demo.png", states, runs)
    content["seconds"] = round(time.perf_counter() - begin, 1)
    (out / "results.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, found in content["compared"][-1].items():
        changed = f"won {found['won']}, lost {found['lost']}, p = {found['p']:.3g}"
        print(f"{name}: {found['before']} before, {found['after']} after; {changed}")
    print(f"{content['seconds']:.0f} s; look at {out / 'rl-demo.png'}")


def sft_control(model: str, seconds: float, run: Path, before: Sequence[Judged], of_each: int) -> dict[str, Any]:
    """Flow matching on renderings of shapes, for as much processor time."""
    options = f"{{preset: tiny, size: {SIZE}, shapes: 1.0, pure: 0.0, arranged: 0.55}}"
    common = [f"model.folder={model}", "checkpoint.every=1000", "model.train_text_encoder=false", "lora.rank=0",
              "optimizer.lr=3e-4", "optimizer.schedule=cosine", "optimizer.warmup=0", "optimizer.weight_decay=0",
              "optimizer.ema=0", "batch=32", "sigma.mean=2.0", "sigma.std=1.6", "data.text_dropout=0", "log.every=10",
              "log.validate_every=0", "log.sample_every=0", "data.source=synthesis", f"data.options={options}",
              ]  # fmt: skip
    start = cpu()
    train("lora", [*common, "steps=8"], run.with_name("sft-timed"))
    each = (cpu() - start) / 8  # loading included, so a little short of the time
    steps, start = max(1, math.floor(seconds / each)), cpu()
    train("lora", [*common, f"steps={steps}"], run)
    spent, after = round(cpu() - start, 1), judged(str(run / "model"), (*SHAPES, *KEPT), of_each)
    return {"steps": steps, "cpu_seconds": spent, "compared": compared(before, after)}


def processor() -> str:
    """Of this machine, by its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    typer.run(main)
