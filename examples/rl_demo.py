"""Two short rounds of DPO on a model's own pictures of what it draws worst, and what they changed, offline.

    python examples/rl_demo.py                 # everything is in outputs/rl-demo; minutes on two cores
    python examples/rl_demo.py --control       # beside as much processor time of SFT on renderings of such shapes
    python examples/rl_demo.py --small         # too short to learn anything

The weak spot is the shape, alone, counted or beside another, of which the fewest pictures of TinyEval are right
(`qwen-image-fast evaluate tiny`). The model draws other prompts of it several times, the reward says how near the
outlines of what it drew are to those that were asked for, and a better picture of a prompt is preferred to a worse one.
What is reported are prompts of the spot that the rounds do not show, each from several noises, judged as right or wrong
as a whole (number, shapes, colours, places, ground), and all shapes and texts, which must not be lost.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw
from tqdm import tqdm

from qwen_image_fast import QwenImagePipeline
from qwen_image_fast.training.evaluation.intervals import wilson
from qwen_image_fast.training.evaluation.paired import sign_test, won_lost
from qwen_image_fast.training.evaluation.things import likeness
from qwen_image_fast.training.evaluation.tiny_cases import Asked as Case
from qwen_image_fast.training.evaluation.tiny_cases import pictures
from qwen_image_fast.training.evaluation.tiny_eval import Judged, run_pictures
from qwen_image_fast.training.evaluation.tiny_models import TinyRun
from qwen_image_fast.training.rewards.reward import Asked
from qwen_image_fast.training.run import train
from qwen_image_fast.training.tasks.device import emulates
from qwen_image_fast.training.tasks.grid import grid

SIZE, STEPS, JUDGED = 128, 20, 50
SAMPLING = {"num_inference_steps": STEPS, "true_cfg_scale": 1.0}
SHAPES, KEPT = ("single", "two", "counting", "position"), ("text",)
POOL = {"single": 116}  # there are no more; of the other tasks:
OTHERS = 200
LEAST = 8  # pictures by which a spot is known to be weak
NOISES, PROMPTS, UPDATES = 8, 60, 40  # of a prompt that is judged; of a round
# What shape a thing is, is settled near pure noise: the levels are those of recipe tiny/8-placed-shapes.
DTYPE = "auto" if emulates(torch.bfloat16, torch.device("cpu")) else "bfloat16"
DPO = ["optimizer.schedule=cosine", "optimizer.cycles=1", "sigma.mean=2.0", "sigma.std=1.6",
       "rollout.first=2", "rollout.group=8", f"rollout.dtype={DTYPE}", "guards.every=0", "log.every=1",
       'rewards=[{kind: function, options: {name: "rl_demo:outlines"}}]']  # fmt: skip


@dataclass(frozen=True)
class Spot:
    """A shape as a task asks for it."""

    task: str
    shape: str

    def __str__(self) -> str:
        return {"single": f"a {self.shape} alone", "counting": f"several {self.shape}s"}.get(
            self.task, f"a {self.shape} and another shape" + (", placed" if self.task == "position" else "")
        )

    def prompts(self) -> tuple[list[Case], list[Case]]:
        """Those of TinyEval, which are judged, and others, to learn from."""
        pool = list(enumerate(pictures(self.task, POOL.get(self.task, OTHERS))))
        own = [(number, one) for number, one in pool if self.shape in dict(one.things)]
        return [one for number, one in own if number < JUDGED], [one for number, one in own if number >= JUDGED]


def weakest(found: Sequence[Judged]) -> Spot:
    """Of which the smallest share of TinyEval's pictures is right."""
    asked = {(task, one.prompt): one for task in SHAPES for one in pictures(task, JUDGED)}
    right = defaultdict[Spot, list[bool]](list)
    for one in found:
        if one.task in SHAPES:
            for shape in dict(asked[one.task, one.prompt].things):
                right[Spot(one.task, shape)].append(one.fault is None)
    known = {spot: own for spot, own in right.items() if len(own) >= LEAST} or right
    return min(known, key=lambda spot: sum(known[spot]) / len(known[spot]))


def outlines(pictures: Sequence[np.ndarray], asked: Sequence[Asked]) -> list[float]:
    """The reward: from 0 to 1, how near the things of each picture are to those that were asked for.

    A likeness of 0.85 is as good as a higher one, so that right pictures are right alike.
    """
    return [min(1.0, likeness(picture, about.fields["things"]) / 0.85) for picture, about in zip(pictures, asked)]


def write_prompts(path: Path, asked: Sequence[Case], count: int) -> Path:
    """So many lines for `rollout.prompts`, those that there are in turn."""
    lines = [{"prompt": one.prompt, "things": one.things} for one in itertools.islice(itertools.cycle(asked), count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def judged(model: str, tasks: Sequence[str], count: int) -> list[Judged]:
    """Pictures of TinyEval's prompts, always from the same noise."""
    return TinyRun(model, tasks, count, SIZE, 0, 16, SAMPLING).judged()


def judged_spot(model: str, asked: Sequence[Case], noises: int) -> list[Judged]:
    """Each prompt from so many noises, always the same ones and none of TinyEval's."""
    pipe = QwenImagePipeline.from_pretrained(model)

    def draw(part: Sequence[Case], first: int) -> list[np.ndarray]:
        made = pipe([one.prompt for one in part], seed=100_000 + first, height=SIZE, width=SIZE, output_type="np",
                    progress=False, **SAMPLING)  # fmt: skip
        return [(np.asarray(image) * 255).round().astype(np.uint8) for image in made.images]

    often = [one for one in asked for _ in range(noises)]
    return list(tqdm(run_pictures(draw, often), total=len(often), unit="picture"))


def compared(before: Sequence[Judged], after: Sequence[Judged]) -> dict[str, Any]:
    """Both numbers, the interval of the second, won and lost, a sign test."""
    was, now = ([one.fault is None for one in own] for own in (before, after))
    won, lost = won_lost(was, now)
    low, high = wilson(sum(now), len(now))
    return {
        "before": f"{sum(was)} of {len(was)}", "after": f"{sum(now)} of {len(now)}", "won": won, "lost": lost,
        "p": round(sign_test(won, lost), 5), "interval": [round(low, 3), round(high, 3)],
    }  # fmt: skip


def cpu() -> float:
    return time.process_time()


def logged(run: Path, name: str) -> list[tuple[int, float]]:
    """Steps and values of a run's log."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line[name]) for line in lines if name in line]


def picture(path: Path, spot: Spot, states: Sequence[Sequence[Judged]], rounds: Sequence[Path]) -> None:
    """Pictures of the spot that changed from wrong to right, before and after, and the curves beneath them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    first, last = states[0], states[-1]
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
    right = [[one.fault is None for one in state] for state in states]
    shares, bounds = [np.mean(own) for own in right], [wilson(sum(own), len(own)) for own in right]
    reach = [[abs(bound[k] - value) for bound, value in zip(bounds, shares)] for k in (0, 1)]
    left.errorbar(range(len(states)), shares, yerr=reach, marker="o", capsize=3, label=str(spot))
    left.set_xticks(range(len(states)), ["before", *(f"round {k + 1}" for k in range(len(rounds)))])
    left.set_ylabel("right, held out")
    left.legend(loc="lower right")
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
    count, updates, noises, of_each = (4, 2, 1, 1) if small else (PROMPTS, UPDATES, NOISES, JUDGED)
    print(f"{model}: what does it draw worst?", flush=True)
    tiny_eval = [judged(model, (*SHAPES, *KEPT), of_each)]
    spot = weakest(tiny_eval[0])
    asked, others = spot.prompts()
    asked = asked[: 2 if small else None]
    print(f"{spot}: {len(asked)} prompts that are held out, {noises} pictures of each", flush=True)
    states, runs, spent, at = [judged_spot(model, asked, noises)], [], [], model
    print(f"{sum(one.fault is None for one in states[0])} of {len(states[0])} are right; {rounds} rounds of {count} "
          f"prompts and {updates} updates", flush=True)  # fmt: skip
    prompts = write_prompts(out / "prompts.jsonl", others, count)
    for number in range(rounds):
        run, start = out / f"round-{number + 1}", cpu()
        changes = [
            f"model.folder={at}", f"seed={number}", f"steps={updates}", f"rollout.updates={updates}",
            f"rollout.prompts={prompts}", f"rollout.count={count}", f"checkpoint.every={updates}", *DPO,
        ]  # fmt: skip
        train("dpo", changes + (["batch=2"] if small else []), run)
        spent.append(round(cpu() - start, 1))
        at = str(run / "model")
        runs.append(run)
        states.append(judged_spot(at, asked, noises))
    tiny_eval.append(judged(at, (*SHAPES, *KEPT), of_each))
    content: dict[str, Any] = {
        "model": model, "cpu": processor(), "threads": torch.get_num_threads(), "spot": str(spot),
        "prompts_a_round": count, "different_prompts": min(count, len(others)), "updates_a_round": updates,
        "cpu_seconds_a_round": spent, "changes": DPO, "reward": "overlap of each thing with the outline asked for",
        "pairs": [value for run in runs for _, value in logged(run, "learnt_from")],
        "after_a_round": [compared(states[0], state) for state in states[1:]],
        "compared": {str(spot): compared(states[0], states[-1]), **of_tasks(*tiny_eval)},
    }  # fmt: skip
    if control:
        content["sft_control"] = sft_control(model, spot, sum(spent), out / "sft", states[0], asked, noises)
    picture(out / "rl-demo.png", spot, states, runs)
    content["seconds"] = round(time.perf_counter() - begin, 1)
    (out / "results.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, found in content["compared"].items():
        changed = f"won {found['won']}, lost {found['lost']}, p = {found['p']:.3g}"
        print(f"{name}: {found['before']} right before, {found['after']} after; {changed}")
    print(f"{content['seconds']:.0f} s; look at {out / 'rl-demo.png'}")


def of_tasks(before: Sequence[Judged], after: Sequence[Judged]) -> dict[str, dict[str, Any]]:
    """What must not be lost: all shapes of TinyEval, and its texts."""
    sets = {"all shapes of TinyEval": SHAPES, "its texts": KEPT}
    return {
        name: compared(*([one for one in own if one.task in tasks] for own in (before, after)))
        for name, tasks in sets.items()
    }


def sft_control(
    model: str, spot: Spot, seconds: float, run: Path, before: Sequence[Judged], asked: Sequence[Case], noises: int
) -> dict[str, Any]:
    """Flow matching on renderings of shapes, half of them the spot's, for as much processor time."""
    kinds = [spot.shape] * 3 + [shape for shape in ("circle", "square", "triangle", "star") if shape != spot.shape]
    arranged = 0.0 if spot.task == "single" else 0.55
    options = f"{{preset: tiny, size: {SIZE}, shapes: 1.0, pure: 0.0, arranged: {arranged}, kinds: {kinds}}}"
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
    spent, after = round(cpu() - start, 1), judged_spot(str(run / "model"), asked, noises)
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
