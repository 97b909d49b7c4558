"""SFT, DPO, Flow-GRPO, DiffusionNFT and AWM at equal processor time: one start, the same prompts, what each learns.

    OMP_NUM_THREADS=1 python -m benchmarks.post_training shapes --work outputs/post-training
    OMP_NUM_THREADS=1 python -m benchmarks.post_training texts --work outputs/post-training-texts --seeds 1

A leg is a run of the method's recipe from the model of the leg before, its learning rate falling to zero. Its updates
are set so that legs take about as long, and curves are over the processor seconds that they took: drawing, rewards and
loading count, measuring does not. What is learned and who judges it: post_training_shapes.py, post_training_texts.py.
What a killed call has finished is not done again. Writes benchmarks/results/<date>-<processor>-post-training-NAME.json
and docs/images/post-training-NAME.png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import post_training_shapes, post_training_texts
from benchmarks.harness import describe_machine, slug
from benchmarks.post_training_world import Method, World
from qwen_image_fast.checkpoint import json_bytes
from qwen_image_fast.files import atomic_write
from qwen_image_fast.training.evaluation.intervals import wilson
from qwen_image_fast.training.evaluation.paired import sign_test, won_lost
from qwen_image_fast.training.run import train

ROOT = Path(__file__).resolve().parent.parent
MODEL = "tiny"
WORLDS = {"shapes": post_training_shapes.WORLD, "texts": post_training_texts.WORLD}


def learn(method: Method, model: str, seed: int, prompts: Path, run: Path, share: float) -> float:
    """One leg; the processor seconds that it took."""
    steps = max(2, round(method.updates * share))
    changes = [*method.changes, f"model.folder={model}", f"seed={seed}", f"steps={steps}", f"checkpoint.every={steps}"]
    if method.recipe != "lora":
        changes.append(f"rollout.prompts={prompts}")
    if method.prompts:
        changes += [f"rollout.count={max(4, round(method.prompts * share))}", f"rollout.updates={steps}"]
    start = time.process_time()
    train(method.recipe, changes, run)
    return round(time.process_time() - start, 1)


def prompts_a_leg(world: World, small: bool) -> int:
    return 9 if small else world.prompts_a_leg


def part(prompts: Path, number: int, count: int) -> Path:
    """The prompts of a leg, the same ones for every method, in a file of their own."""
    path = prompts.with_name(f"prompts-{number + 1}.jsonl")
    lines = prompts.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[number * count : (number + 1) * count]), encoding="utf-8")
    return path


def once(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` gives, kept in a file, from which it is read the next time."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        found = make()
        atomic_write(path, lambda file: file.write(json_bytes(found)))
    return json.loads(path.read_text(encoding="utf-8"))


def measured(world: World, model: str, folder: Path, judge: str, sets: Sequence[str], small: bool) -> dict[str, Any]:
    """By set and judge, which held-out pictures are right."""
    found = {}
    for name in sets:
        path = folder / f"{name}-{slug(judge)}.json"
        found[name] = once(path, lambda name=name: world.judged(model, name, judge, small))
    return found


def run_of(world: World, name: str, seed: int, legs: int, work: Path, small: bool) -> list[dict[str, Any]]:
    """The legs of a method with a seed: seconds so far, and what is right after each."""
    model, seconds, found, share = MODEL, 0.0, [], 0.04 if small else 1.0
    method, count = world.methods[name], prompts_a_leg(world, small)
    for number in range(legs):
        folder = folder_of(work, name, seed, number)
        prompts = part(work / "prompts.jsonl", number, count)

        def leg(run: Path = folder / "run", start: str = model, number: int = number, file: Path = prompts) -> float:
            shutil.rmtree(run, ignore_errors=True)  # of a call that was killed
            return learn(method, start, 10 * seed + number, file, run, share)

        seconds += once(folder / "seconds.json", leg)
        model = str(folder / "run" / "model")
        sets = world.sets if number == legs - 1 else world.sets[:1]
        right = measured(world, model, folder, world.judges[0], sets, small)
        found.append({"seconds": round(seconds, 1), "right": right})
    return found


def folder_of(work: Path, method: str, seed: int, number: int) -> Path:
    return work / f"{slug(method)}-{seed}-{number}"


def finished(world: World, method: str, seed: int, leg: int, work: Path) -> bool:
    return (folder_of(work, method, seed, leg) / f"{world.sets[-1]}-{slug(world.judges[0])}.json").is_file()


def add_judges(world: World, right: dict[str, Any], model: str, folder: Path, small: bool) -> None:
    """To what is right of a model what the other judges, much slower, say of the same pictures."""
    first = world.sets[0]
    for judge in world.judges[1:]:
        right[first] = right[first] | measured(world, model, folder, judge, [first], small)[first]


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


def against(world: World, ends: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Each method against the one that it is to beat, seed by seed and of all seeds together: held-out prompts that it
    alone has right, that the other alone has, and a sign test. ends: what is right at the end, by seed.

    Seeds share the prompts, so the test of all together takes for independent what is not quite.
    """
    found: dict[str, Any] = {}
    name, judge = world.sets[0], world.judges[0]
    for method in [method for method in ends if method != world.against and world.against in ends]:
        pairs = [(sft[name][judge], own[name][judge]) for sft, own in zip(ends[world.against], ends[method])]
        counts = [won_lost(sft, own) for sft, own in pairs]
        counts.append((sum(won for won, _ in counts), sum(lost for _, lost in counts)))
        found[method] = [{"won": won, "lost": lost, "p": round(sign_test(won, lost), 4)} for won, lost in counts]
    return {f"against {world.against}: each seed, then all": found} if found else {}


def plot(world: World, curves: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """Shares over seconds: the mean of the seeds, and from the lowest to the highest of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9.6, 4.6))
    key = f"{world.sets[0]}, {world.judges[0]}"
    low, high = next(iter(curves.values()))[0][0][key]["interval"]
    axes.axhspan(100 * low, 100 * high, color="0.93", label="95 % interval of the start")
    for number, (method, runs) in enumerate(curves.items()):
        runs = [run for run in runs if len(run) == len(runs[0])]
        seconds = [[point["seconds"] for point in run] for run in runs]
        shares = [[100 * point[key]["right"] / point[key]["of"] for point in run] for run in runs]
        x, y, colour = np.mean(seconds, 0), np.mean(shares, 0), f"C{number}"
        # Bars beside each other: methods take about as long.
        beside = x + (number - (len(curves) - 1) / 2) * 0.012 * x.max() * (x > 0)
        reach = [y - np.min(shares, 0), np.max(shares, 0) - y]
        label = f"{method} ({len(runs)} seed{'s' * (len(runs) > 1)})"
        axes.errorbar(
            beside, y, yerr=reach, color=colour, marker="o", linewidth=2, elinewidth=1.2, capsize=3, label=label
        )
    axes.set_xlabel("processor seconds of drawing, rewards and learning")
    axes.set_ylabel(world.learned)
    axes.grid(alpha=0.3)
    title = "mean of the seeds;\nbars: lowest to highest" if max(map(len, curves.values())) > 1 else None
    axes.legend(title=title, loc="upper left", bbox_to_anchor=(1.01, 1))
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
    parser.add_argument("world", choices=WORLDS, help="what is learned")
    parser.add_argument("--work", type=Path, required=True, help="folder of runs, from which a killed call goes on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--legs", type=int, default=2)
    parser.add_argument("--methods", nargs="*", help="default: all")
    parser.add_argument("--finished", action="store_true", help="report what is finished, and run nothing")
    parser.add_argument("--small", action="store_true", help="too short to learn anything")
    parser.add_argument("--out", type=Path, help="JSON of the results")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    world, small, work, last = WORLDS[options.world], options.small, options.work, options.legs - 1
    methods = options.methods or list(world.methods)
    if unknown := sorted(set(methods) - set(world.methods)):
        parser.error(f"--methods must be of {', '.join(world.methods)}, got {', '.join(unknown)}")
    machine, date = describe_machine("cpu"), datetime.date.today().isoformat()
    name = f"post-training-{options.world}"
    out = options.out or ROOT / f"benchmarks/results/{date}-{slug(machine['device'])}-{name}.json"
    work.mkdir(parents=True, exist_ok=True)
    world.write_prompts(work / "prompts.jsonl", options.legs * prompts_a_leg(world, small))
    start = measured(world, MODEL, work / "start", world.judges[0], world.sets, small)
    found: dict[str, list[list[dict[str, Any]]]] = {method: [] for method in methods}

    def write() -> dict[str, Any]:
        curves = {name: [points(start, run) for run in runs] for name, runs in found.items() if runs}
        ends = {name: [run[-1]["right"] for run in runs] for name, runs in found.items() if runs}
        report = {
            "date": date, "machine": machine, "model": "the shipped tiny one", "prompts": world.prompts,
            "reward": world.reward, "methods": {name: world.methods[name]._asdict() for name in curves},
            "curves": curves, **against(world, ends),
        }  # fmt: skip
        atomic_write(out, lambda file: file.write(json_bytes(report)))
        plot(world, curves, options.picture or ROOT / f"docs/images/{name}.png")
        return curves

    for seed in range(options.seeds):
        for method in methods:
            if options.finished and not (len(found[method]) == seed and finished(world, method, seed, last, work)):
                continue
            found[method].append(run_of(world, method, seed, options.legs, work, small))
            write()
    add_judges(world, start, MODEL, work / "start", small)
    for method in methods:
        for seed in range(len(found[method])):
            folder = folder_of(work, method, seed, last)
            add_judges(world, found[method][seed][last]["right"], str(folder / "run/model"), folder, small)
    print(table(write()))


if __name__ == "__main__":
    main()
