"""SFT, DPO, Flow-GRPO, DiffusionNFT and AWM at equal processor time: one start, the same prompts, what each learns.

    OMP_NUM_THREADS=1 python -m benchmarks.post_training --work outputs/post-training --seeds 1

A leg is a run of the method's recipe from the model of the leg before, its learning rate falling to zero. Its updates
are set so that legs take about as long, and curves are over the processor seconds that they took: drawing, rewards and
loading count, measuring does not. What is read: held-out Chinese texts of three characters by a reader that gave no
reward, at the end by a second one, and English words, which must not be lost. What a killed call has finished is not
done again. Writes benchmarks/results/<date>-<processor>-post-training.json and docs/images/post-training.png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import post_training_texts as texts
from benchmarks.harness import describe_machine, slug
from qwen_image_fast.checkpoint import json_bytes
from qwen_image_fast.files import atomic_write
from qwen_image_fast.training.evaluation.intervals import wilson
from qwen_image_fast.training.evaluation.paired import sign_test, won_lost
from qwen_image_fast.training.run import train

ROOT = Path(__file__).resolve().parent.parent
MODEL, SETS = "tiny", {"zh": (80, True), "en": (32, False)}
DRAWN = ["log.every=1", "optimizer.schedule=cosine", "optimizer.warmup=0", "guards.every=0"]
IN_BF16 = [*DRAWN, "rollout.dtype=bfloat16"]
# Method -> recipe, updates of a leg, prompts of a round (0: rounds as the recipe has them), what it changes.
METHODS: dict[str, tuple[str, int, int, list[str]]] = {
    "DPO": ("dpo", texts.UPDATES, texts.PROMPTS, texts.DPO),
    "SFT": ("lora", 105, 0, texts.rendered("zh")),
    "DiffusionNFT": ("nft", 42, 0, IN_BF16),
    "AWM": ("awm", 42, 0, IN_BF16),
    "Flow-GRPO": ("grpo", 24, 0, DRAWN),
}


def learn(method: str, model: str, seed: int, number: int, prompts: Path, run: Path, share: float) -> float:
    """One leg; the processor seconds that it took."""
    recipe, updates, count, changes = METHODS[method]
    steps = max(2, round(updates * share))
    changes = [*changes, f"model.folder={model}", f"seed={10 * seed + number}", f"steps={steps}",
               f"checkpoint.every={steps}"]  # fmt: skip
    if recipe != "lora":
        changes.append(f"rollout.prompts={prompts}")
    if count:
        changes += [f"rollout.count={max(4, round(count * share))}", f"rollout.updates={steps}"]
    start = texts.cpu()
    train(recipe, changes, run)
    return round(texts.cpu() - start, 1)


def once(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` gives, kept in a file, from which it is read the next time."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        found = make()
        atomic_write(path, lambda file: file.write(json_bytes(found)))
    return json.loads(path.read_text(encoding="utf-8"))


def read(model: str, name: str, reader: str, small: bool) -> dict[str, list[bool]]:
    count, hard = SETS[name]
    cases = texts.cases_of(name, 4 if small else count, hard)
    return texts.judged(cases, texts.drawn(model, cases), [reader])


def measured(model: str, folder: Path, reader: str, names: Sequence[str], small: bool) -> dict[str, Any]:
    """By set and reader, which held-out pictures are right."""
    found = {}
    for name in names:
        path = folder / f"{name}-{slug(reader)}.json"
        found[name] = once(path, lambda name=name: read(model, name, reader, small))
    return found


def run_of(method: str, seed: int, legs: int, work: Path, small: bool) -> list[dict[str, Any]]:
    """The legs of a method with a seed: seconds so far, and what is right after each."""
    model, seconds, found, share = MODEL, 0.0, [], 0.04 if small else 1.0
    count = round(METHODS[method][2] * share)
    for number in range(legs):
        folder = folder_of(work, method, seed, number)
        prompts = texts.part(work / "prompts.jsonl", number, count) if count else work / "prompts.jsonl"

        def leg(run: Path = folder / "run", start: str = model, number: int = number, file: Path = prompts) -> float:
            shutil.rmtree(run, ignore_errors=True)  # of a call that was killed
            return learn(method, start, seed, number, file, run, share)

        seconds += once(folder / "seconds.json", leg)
        model = str(folder / "run" / "model")
        names = SETS if number == legs - 1 else ["zh"]
        right = measured(model, folder, texts.READERS[0], list(names), small)
        found.append({"seconds": round(seconds, 1), "right": right})
    return found


def folder_of(work: Path, method: str, seed: int, number: int) -> Path:
    return work / f"{slug(method)}-{seed}-{number}"


def add_second_reader(run: dict[str, Any], model: str, folder: Path, small: bool) -> None:
    """To what is right of a model what a second reader, much slower, says of the same pictures."""
    run["zh"] = run["zh"] | measured(model, folder, texts.READERS[1], ["zh"], small)["zh"]


def points(start: dict[str, Any], legs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the start and after each leg: seconds, and by set and reader the share that is right and a sign test."""
    found = []
    for leg in [{"seconds": 0.0, "right": start}, *legs]:
        point: dict[str, Any] = {"seconds": leg["seconds"]}
        for name, readers in leg["right"].items():
            for reader, right in readers.items():
                won, lost = won_lost(start[name][reader], right)
                low, high = wilson(sum(right), len(right))
                point[f"{name}, {reader}"] = {
                    "right": sum(right), "of": len(right), "interval": [round(low, 3), round(high, 3)],
                    "won": won, "lost": lost, "p": round(sign_test(won, lost), 4),
                }  # fmt: skip
        found.append(point)
    return found


def plot(curves: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """Shares over seconds: a thin line of each seed, a thick one of their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.6))
    key = f"zh, {texts.READERS[0]}"
    low, high = next(iter(curves.values()))[0][0][key]["interval"]
    axes.axhspan(100 * low, 100 * high, color="0.93", label="95 % interval of the start")
    for number, (method, runs) in enumerate(curves.items()):
        seconds = [[point["seconds"] for point in run] for run in runs]
        shares = [[100 * point[key]["right"] / point[key]["of"] for point in run] for run in runs]
        colour = f"C{number}"
        if len(runs) > 1:
            for x, y in zip(seconds, shares):
                axes.plot(x, y, color=colour, alpha=0.35, linewidth=1)
        axes.plot(np.mean(seconds, 0), np.mean(shares, 0), color=colour, marker="o", linewidth=2, label=method)
    axes.set_xlabel("processor seconds of drawing, rewards and learning")
    axes.set_ylabel("held-out Chinese texts of 3 characters, exact (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(curves: dict[str, list[list[dict[str, Any]]]]) -> str:
    """The ends of all runs."""
    lines = []
    for method, runs in curves.items():
        for seed, run in enumerate(runs):
            values = [f"{name}: {v['right']} of {v['of']} (+{v['won']} -{v['lost']}, p = {v['p']:.3g})"
                      for name, v in run[-1].items() if isinstance(v, dict)]  # fmt: skip
            lines.append(f"{method}, seed {seed}: {run[-1]['seconds']:.0f} s; " + "; ".join(values))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of runs, from which a killed call goes on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--legs", type=int, default=2)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--small", action="store_true", help="too short to learn anything")
    parser.add_argument("--out", type=Path, help="JSON of the results")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/images/post-training.png")
    options = parser.parse_args()
    machine, date = describe_machine("cpu"), datetime.date.today().isoformat()
    out = options.out or ROOT / f"benchmarks/results/{date}-{slug(machine['device'])}-post-training.json"
    small, work, last = options.small, options.work, options.legs - 1
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "prompts.jsonl").is_file():
        texts.write_prompts(work / "prompts.jsonl", "zh", options.legs * (9 if small else texts.PROMPTS))
    start = measured(MODEL, work / "start", texts.READERS[0], list(SETS), small)
    found: dict[str, list[list[dict[str, Any]]]] = {method: [] for method in options.methods}

    def write() -> dict[str, Any]:
        curves = {name: [points(start, run) for run in runs] for name, runs in found.items() if runs}
        report = {
            "date": date, "machine": machine, "model": "the shipped tiny one",
            "prompts": "random Chinese texts of three characters that are trained on; SFT: renderings of such, with "
                       "three in twenty English",
            "reward": "recognition of the text's band, half where a colour is wrong",
            "methods": {name: METHODS[name] for name in curves}, "curves": curves,
        }  # fmt: skip
        atomic_write(out, lambda file: file.write(json_bytes(report)))
        plot(curves, options.picture)
        return curves

    for seed in range(options.seeds):
        for method in options.methods:
            found[method].append(run_of(method, seed, options.legs, work, small))
            write()
    add_second_reader(start, MODEL, work / "start", small)
    for seed in range(options.seeds):
        for method in options.methods:
            folder = folder_of(work, method, seed, last)
            add_second_reader(found[method][seed][last]["right"], str(folder / "run/model"), folder, small)
            write()
    print(table(write()))


if __name__ == "__main__":
    main()
