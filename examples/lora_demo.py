"""Teach the tiny model a sign that it has never seen, and an edit that it cannot do, offline and in minutes on a CPU.

    python examples/lora_demo.py            # everything is in outputs/lora-demo
    python examples/lora_demo.py --count 20 # judge more of what the model could before: as the results in docs/lora.md
    python examples/lora_demo.py --small    # the same, too short to learn much

Twelve pictures of a made-up sign become a LoRA, which draws it on prompts that it has not seen. Pairs, plain and
framed, become an edit LoRA. Beside both stand drawn words, so that the model keeps what it could. Both are trained at
once, by a process each, and pixels are judged by both: what is new by training/evaluation/novelties.py, what the model
could before by its own test, TinyEval.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw

from qwen_image_fast import QwenImageEditPlusPipeline, QwenImagePipeline
from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.training.compare import compare
from qwen_image_fast.training.evaluation import tiny_cases, tiny_eval
from qwen_image_fast.training.evaluation.novelties import is_framed, is_sigil, likeness
from qwen_image_fast.training.run import train
from qwen_image_fast.training.synthesis import novelties, tiny
from qwen_image_fast.training.synthesis.recipe import EDITS
from qwen_image_fast.training.tasks.grid import grid
from qwen_image_fast.training.terminal import Terminal

SIZE, SEED = 128, 5
CALL = {"height": SIZE, "width": SIZE, "num_inference_steps": 20, "true_cfg_scale": 1.0, "output_type": "np"}
# What the tiny model was trained on, drawn anew. At such captions the model without the LoRA teaches (keep), so that it
# stays what it is: of pictures half are shapes, which a LoRA beside words alone forgets.
DRAWN: dict[str, Any] = {"size": SIZE, "random_strings": 0.2, "natural": 0.2, "max_lines": 1, "max_letters": 6}
WORDS, WORDS_AND_SHAPES = tiny(**DRAWN), tiny(**DRAWN, shapes=1, arranged=0.5)
# So many that few are seen often, and few enough for their latents to be made once.
KNOWN_PICTURES, KNOWN_EDITS = 96, 400
# A frame is new at every noise level and drawn by the MLPs too.
FRAMING = ["lora.targets=[attention, mlp, text]", "sigma.mean=0.3"]


@lru_cache(maxsize=4)
def pipeline(edits: bool, lora: Path | None) -> Any:
    """The tiny model, with a LoRA or without, for pictures or for edits."""
    pipe: Any = (QwenImageEditPlusPipeline if edits else QwenImagePipeline).from_pretrained(SHIPPED)
    if lora is not None:
        pipe.load_lora_weights(lora)
    return pipe


def drawn(pipe: Any, prompts: Sequence[str], seed: int = SEED) -> list[np.ndarray]:
    made = pipe(list(prompts), seed=seed, progress=False, **CALL).images
    return [(np.asarray(image) * 255).round().astype(np.uint8) for image in made]


def edited(
    pipe: Any, pictures: Sequence[np.ndarray], instructions: Sequence[str], seed: int = SEED
) -> list[np.ndarray]:
    given = [[Image.fromarray(picture)] for picture in pictures]
    made = pipe(given, list(instructions), seed=seed, progress=False, **CALL).images
    return [(np.asarray(image) * 255).round().astype(np.uint8) for image in made]


def as_the_vae_gives(pipe: Any, picture: np.ndarray) -> np.ndarray:
    """A picture encoded and decoded: nothing that the model draws can be nearer to it."""
    pixels = torch.tensor(picture).to(pipe.vae.dtype).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    with torch.inference_mode():
        decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample[0, :, 0]
    return ((decoded.float().permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()


def signs(asked: Sequence[tuple[str, str]], lora: Path | None) -> tuple[list[np.ndarray], dict[str, Any]]:
    """The sign in colours, and how many are right."""
    made = drawn(pipeline(False, lora), [novelties.sigil_caption(*colours) for colours in asked])
    right = sum(is_sigil(image, *colours) for image, colours in zip(made, asked))
    return made, {"right": right, "likeness": round(float(np.mean([likeness(image) for image in made])), 3)}


def frames(asked: Sequence[Any], lora: Path | None) -> tuple[list[np.ndarray], int]:
    """Pictures framed, and how many are right."""
    pipe = pipeline(True, lora)
    made = edited(pipe, [edit[0] for edit in asked], [edit[2] for edit in asked])
    given = [as_the_vae_gives(pipe, edit[0]) for edit in asked]
    edits = zip(made, given, asked)
    return made, sum(is_framed(image, picture, after, colour) for image, picture, (_, after, _, colour) in edits)


def right_of(task: str, count: int, lora: Path | None) -> int:
    """TinyEval of a task, one of pictures or of edits: how many of `count` are right."""
    pipe = pipeline(task in EDITS, lora)
    if task in EDITS:
        judged = tiny_eval.run_edits(
            lambda part, first: edited(pipe, [p.source for p in part], [p.instruction for p in part], first),
            tiny_cases.edits(task, count),
        )
    else:
        judged = tiny_eval.run_pictures(
            lambda part, first: drawn(pipe, [one.prompt for one in part], first), tiny_cases.pictures(task, count)
        )
    return sum(one.fault is None for one in judged)


def sheet(rows: Sequence[tuple[str, Sequence[np.ndarray]]], path: Path) -> None:
    """Rows of pictures with their names above them."""
    strips, most = [], max(len(pictures) for _, pictures in rows)
    white = np.full((SIZE, SIZE, 3), 255, dtype=np.uint8)
    for name, pictures in rows:
        strip = grid([*pictures, *[white] * (most - len(pictures))], columns=most)
        label = Image.new("RGB", (strip.shape[1], 22), "white")
        ImageDraw.Draw(label).text((4, 5), name, fill="black")
        strips += [np.asarray(label), strip]
    Image.fromarray(np.concatenate(strips)).save(path)


def taught(name: str, new: str, known: Path, changes: Sequence[str], out: Path) -> dict[str, float]:
    """Train on what is new beside what is known, and say what it took: seconds, and those of the processor."""
    start, used = time.perf_counter(), time.process_time()
    mixture = f"data.mixture=[{{{new}}}, {{source: {known}, keep: true, loss_weight: 5, hold_out: 0}}]"
    # What is seen again and again is encoded once.
    once = [f"data.encoded={out.parent / 'encoded'}", "log.validate_every=0"]
    with Terminal(name, lines=True) as terminal:
        train(name, ["model.folder=tiny", mixture, *once, *changes], out, terminal=terminal)
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}


def learn_sign(out: Path, steps: int, seed: int) -> dict[str, float]:
    novelties.write_known(out / "known", WORDS_AND_SHAPES, KNOWN_PICTURES)
    changes = [f"steps={steps}", f"seed={seed}", "log.prompts=[the sigil in red on a black ground]"]
    return taught("lora", f"source: {out / 'pictures'}, tasks: {{t2i: 1}}", out / "known", changes, out / "sign")


def learn_frame(out: Path, steps: int, pairs: int, seed: int) -> dict[str, float]:
    novelties.write_frames(out / "pairs", novelties.frame_edits(WORDS, pairs, seed=1))
    novelties.write_known_edits(out / "known-edits", WORDS, KNOWN_EDITS)
    changes = [f"steps={steps}", f"seed={seed}", *FRAMING]
    return taught("edit-lora", f"source: {out / 'pairs'}", out / "known-edits", changes, out / "frame")


def own_test(count: int, before: dict[str, Future], after: dict[str, Future]) -> dict[str, Any]:
    """Of `count` pictures of each task, and of all, how many are right without and with a LoRA."""
    tasks = {task: [before[task].result(), after[task].result()] for task in before}
    right = [sum(found) for found in zip(*tasks.values())]
    return {"of_each": count, "of": count * len(tasks), "before": right[0], "after": right[1], "tasks": tasks}


def at_work(threads: int) -> None:
    torch.set_num_threads(threads)


def both(
    out: Path, steps: tuple[int, int], pairs: int, unseen: int, count: int, seed: int, jobs: int
) -> dict[str, Any]:
    """Train and judge both LoRAs with so many processes at a time; pictures of it are written."""
    asked = novelties.write_sigils(out / "pictures")[:unseen]
    plain = novelties.frame_edits(WORDS, unseen, seed=2)
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads half
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, context, at_work, (threads,)) as pool:
        # The longer one first; whoever is done judges the model as it was.
        framing, signing = (
            pool.submit(learn_frame, out, steps[1], pairs, seed),
            pool.submit(learn_sign, out, steps[0], seed),
        )

        def judged(edits: bool, lora: Path | None) -> tuple[Future, dict[str, Future]]:
            new = pool.submit(frames, plain, lora) if edits else pool.submit(signs, asked, lora)
            tasks = EDITS if edits else tiny_cases.PICTURES
            return new, {task: pool.submit(right_of, task, count, lora) for task in tasks}

        before = [judged(edits, None) for edits in (False, True)]
        learning = signing.result()
        sign = judged(False, out / "sign" / "model")
        framing_took = framing.result()
        frame = judged(True, out / "frame" / "model")
        (plain_signs, sign_before), (drawn_signs, sign_after) = before[0][0].result(), sign[0].result()
        (plain_frames, frame_before), (drawn_frames, frame_after) = before[1][0].result(), frame[0].result()
        found = {
            "sign": {
                "pictures": 12, "steps": steps[0], **learning, "prompts": len(asked), "right": sign_after["right"],
                "likeness_before": sign_before["likeness"], "likeness": sign_after["likeness"],
                "own_test": own_test(count, before[0][1], sign[1]),
            },
            "frame": {
                "pairs": pairs, "steps": steps[1], **framing_took, "pictures": unseen, "right_before": frame_before,
                "right": frame_after, "own_test": own_test(count, before[1][1], frame[1]),
            },
        }  # fmt: skip
    sheet([("ten of the twelve pictures", [novelties.sigil(*colours) for colours in novelties.sigil_colours()[:10]]),
           ("unseen prompts, before", plain_signs[:10]), ("unseen prompts, with the LoRA", drawn_signs[:10])],
          out / "sign.png")  # fmt: skip
    sheet([("unseen pictures", [edit[0] for edit in plain[:10]]),
           ("frame it in a colour, before", plain_frames[:10]), ("with the LoRA", drawn_frames[:10])],
          out / "frame.png")  # fmt: skip
    return found


def main(
    out: Annotated[Path, typer.Option(help="Folder of everything that is made.")] = Path("outputs/lora-demo"),
    small: Annotated[bool, typer.Option("--small", help="Smaller and shorter.")] = False,
    count: Annotated[int, typer.Option(help="Pictures of each task of the model's own test.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Of the training.")] = 0,
    jobs: Annotated[int, typer.Option(help="Processes at a time.", min=1)] = 2,
) -> None:
    """Train both, and say what they can do."""
    if out.exists():
        raise SystemExit(f"{out} is already there: remove it, or choose another folder with --out")
    start = time.perf_counter()
    if small:
        found = both(out, (40, 20), 6, 4, 1, seed, jobs)
    else:
        found = both(out, (350, 350), 24, 20, count, seed, jobs)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    found["whole"] = {
        "seconds": round(time.perf_counter() - start, 1), "jobs": jobs, "cores": os.cpu_count(),
        "cpu_seconds": round(sum(one.ru_utime + one.ru_stime for one in used), 1),
        "load_average": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    (out / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    sign, frame = found["sign"], found["frame"]
    print(f"the sign: {sign['right']} of {sign['prompts']} unseen prompts right, {sign['seconds']:.0f} s of training")
    print(
        f"framed: {frame['right']} of {frame['pictures']} unseen pictures, {frame['right_before']} before, "
        f"{frame['seconds']:.0f} s of training"
    )
    for what, test in (("pictures", sign["own_test"]), ("edits", frame["own_test"])):
        print(f"{what} of its own test: {test['before']} of {test['of']} before, {test['after']} with the LoRA")
    print(f"{found['whole']['seconds']:.0f} s, {found['whole']['cpu_seconds']:.0f} of a processor")
    print(f"look at {out / 'sign.png'}, {out / 'frame.png'}, and at {compare(out / 'sign')}")


if __name__ == "__main__":
    typer.run(main)
