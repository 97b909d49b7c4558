"""Teach the tiny model a sign that it has never seen, and an edit that it cannot do, offline and in minutes on a CPU.

    python examples/lora_demo.py            # everything is in outputs/lora-demo
    python examples/lora_demo.py --small    # the same, too short to learn much

Twelve pictures of a made-up sign become a LoRA, which draws it on prompts that it has not seen. Pairs, plain and
framed, become an edit LoRA. Beside both stand drawn words, so that the model keeps what it could. Pixels are judged:
what is new by training/evaluation/novelties.py, what the model could before by its own test, TinyEval.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
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

SIZE, SEED = 128, 5
CALL = {"height": SIZE, "width": SIZE, "num_inference_steps": 20, "true_cfg_scale": 1.0, "output_type": "np"}
# What the tiny model was trained on, drawn anew. At such captions the model without the LoRA teaches (keep), so that it
# stays what it is: of pictures half are shapes, which a LoRA beside words alone forgets.
WORDS = tiny(size=SIZE, random_strings=0.2, natural=0.2, max_lines=1, max_letters=6)
DRAWN = "preset: tiny, size: 128, random_strings: 0.2, natural: 0.2, max_lines: 1, max_letters: 6"
KEPT = "{{source: synthesis, options: {{{}}}, keep: true, loss_weight: 5}}"
PICTURES, EDITS_OF_WORDS = KEPT.format(DRAWN + ", shapes: 1, arranged: 0.5"), KEPT.format(DRAWN)
# A frame is new at every noise level and drawn by the MLPs too.
FRAMING = ["lora.targets=[attention, mlp, text]", "sigma.mean=0.3"]


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


def pictures_right(pipe: Any, count: int) -> dict[str, int]:
    """TinyEval of pictures: how many of `count` of each task are right."""
    found = {}
    for task in tiny_cases.PICTURES:
        judged = tiny_eval.run_pictures(
            lambda part, first: drawn(pipe, [one.prompt for one in part], first), tiny_cases.pictures(task, count)
        )
        found[task] = sum(one.fault is None for one in judged)
    return found


def edits_right(pipe: Any, count: int) -> dict[str, int]:
    """TinyEval of edits: how many of `count` of each kind are right."""
    found = {}
    for kind in EDITS:
        judged = tiny_eval.run_edits(
            lambda part, first: edited(pipe, [p.source for p in part], [p.instruction for p in part], first),
            tiny_cases.edits(kind, count),
        )
        found[kind] = sum(one.fault is None for one in judged)
    return found


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


def taught(name: str, changes: Sequence[str], out: Path) -> dict[str, float]:
    """Train, and say what it took: seconds, and those of the processor."""
    start, used = time.perf_counter(), time.process_time()
    train(name, ["model.folder=tiny", *changes], out)
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}


def sign_lora(out: Path, steps: int, unseen: int, count: int, seed: int) -> dict[str, Any]:
    asked = novelties.write_sigils(out / "pictures")[:unseen]
    prompts = [novelties.sigil_caption(*colours) for colours in asked]
    pipe = QwenImagePipeline.from_pretrained(SHIPPED)
    before, could = drawn(pipe, prompts), pictures_right(pipe, count)
    mixture = f"data.mixture=[{{source: {out / 'pictures'}, tasks: {{t2i: 1}}}}, {PICTURES}]"
    changes = [mixture, f"steps={steps}", f"seed={seed}", "log.prompts=[the sigil in red on a black ground]"]
    took = taught("lora", changes, out / "sign")
    pipe.load_lora_weights(out / "sign" / "model")
    after = drawn(pipe, prompts)
    sheet([("ten of the twelve pictures", [novelties.sigil(*colours) for colours in novelties.sigil_colours()[:10]]),
           ("unseen prompts, before", before[:10]), ("unseen prompts, with the LoRA", after[:10])],
          out / "sign.png")  # fmt: skip
    return {
        "pictures": 12, "steps": steps, **took, "prompts": len(asked),
        "right": sum(is_sigil(image, *colours) for image, colours in zip(after, asked)),
        "likeness_before": round(float(np.mean([likeness(image) for image in before])), 3),
        "likeness": round(float(np.mean([likeness(image) for image in after])), 3),
        "own_test": own_test(count, could, pictures_right(pipe, count)),
    }  # fmt: skip


def edit_lora(out: Path, steps: int, pairs: int, unseen: int, count: int, seed: int) -> dict[str, Any]:
    novelties.write_frames(out / "pairs", novelties.frame_edits(WORDS, pairs, seed=1))
    asked = novelties.frame_edits(WORDS, unseen, seed=2)
    pictures, instructions = [edit[0] for edit in asked], [edit[2] for edit in asked]
    pipe = QwenImageEditPlusPipeline.from_pretrained(SHIPPED)
    before, could = edited(pipe, pictures, instructions), edits_right(pipe, count)
    mixture = f"data.mixture=[{{source: {out / 'pairs'}}}, {EDITS_OF_WORDS}]"
    took = taught("edit-lora", [mixture, f"steps={steps}", f"seed={seed}", *FRAMING], out / "frame")
    pipe.load_lora_weights(out / "frame" / "model")
    after = edited(pipe, pictures, instructions)
    sheet([("unseen pictures", pictures[:10]), ("frame it in a colour, before", before[:10]),
           ("with the LoRA", after[:10])], out / "frame.png")  # fmt: skip

    given = [as_the_vae_gives(pipe, picture) for picture in pictures]

    def right(made: Sequence[np.ndarray]) -> int:
        edits = zip(made, given, asked)
        return sum(is_framed(image, picture, after, colour) for image, picture, (_, after, _, colour) in edits)

    return {
        "pairs": pairs, "steps": steps, **took, "pictures": unseen, "right_before": right(before),
        "right": right(after), "own_test": own_test(count, could, edits_right(pipe, count)),
    }  # fmt: skip


def own_test(count: int, before: dict[str, int], after: dict[str, int]) -> dict[str, Any]:
    """Of `count` pictures of each task, and of all, how many are right without and with a LoRA."""
    of, right = count * len(before), (sum(before.values()), sum(after.values()))
    return {"of_each": count, "of": of, "before": right[0], "after": right[1],
            "tasks": {task: [before[task], after[task]] for task in before}}  # fmt: skip


def main(
    out: Annotated[Path, typer.Option(help="Folder of everything that is made.")] = Path("outputs/lora-demo"),
    small: Annotated[bool, typer.Option("--small", help="Smaller and shorter.")] = False,
    count: Annotated[int, typer.Option(help="Pictures of each task of the model's own test.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Of the training.")] = 0,
) -> None:
    """Train both, and say what they can do."""
    if out.exists():
        raise SystemExit(f"{out} is already there: remove it, or choose another folder with --out")
    count = 1 if small else count
    found = {
        "sign": sign_lora(out, *((40, 4) if small else (350, 20)), count, seed),
        "frame": edit_lora(out, *((20, 6, 4) if small else (400, 24, 20)), count, seed),
    }
    (out / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    sign, frame = found["sign"], found["frame"]
    print(f"the sign: {sign['right']} of {sign['prompts']} unseen prompts right, {sign['seconds']:.0f} s of training")
    print(
        f"framed: {frame['right']} of {frame['pictures']} unseen pictures, {frame['right_before']} before, "
        f"{frame['seconds']:.0f} s of training"
    )
    for what, test in (("pictures", sign["own_test"]), ("edits", frame["own_test"])):
        print(f"{what} of its own test: {test['before']} of {test['of']} before, {test['after']} with the LoRA")
    print(f"look at {out / 'sign.png'}, {out / 'frame.png'}, and at {compare(out / 'sign')}")


if __name__ == "__main__":
    typer.run(main)
