"""Teach the tiny model a sign that it has never seen, and an edit that it cannot do, offline and in minutes on a CPU.

    python examples/lora_demo.py            # everything is in outputs/lora-demo
    python examples/lora_demo.py --small    # the same, too short to learn much

Twelve pictures of a made-up sign become a LoRA, which draws it on prompts that it has not seen; beside them stand drawn
words without the sign, so that the model keeps what it could. Pairs of pictures, plain and framed, become an edit LoRA.
Pixels are judged, words are read: training/evaluation/novelties.py.
"""

from __future__ import annotations

import dataclasses
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
from qwen_image_fast.training.evaluation import evaluate_text
from qwen_image_fast.training.evaluation.cases import held_out_cases
from qwen_image_fast.training.evaluation.novelties import is_framed, is_sigil, likeness
from qwen_image_fast.training.evaluation.ocr import Reader
from qwen_image_fast.training.evaluation.text_metrics import summarise
from qwen_image_fast.training.run import train
from qwen_image_fast.training.synthesis import novelties, tiny
from qwen_image_fast.training.tasks.grid import grid

SIZE, SEED = 128, 5
CALL = {"height": SIZE, "width": SIZE, "num_inference_steps": 20, "true_cfg_scale": 1.0, "output_type": "np"}
# What the tiny model was trained on, drawn anew. At such captions the model without the LoRA teaches (keep), so that it
# stays what it is.
WORDS = tiny(size=SIZE, random_strings=0.2, natural=0.2, max_lines=1, max_letters=6)
REGULAR = (
    "{source: synthesis, options: {preset: tiny, size: 128, random_strings: 0.2, natural: 0.2, "
    "max_lines: 1, max_letters: 6}, keep: true}"
)
# A frame is new at every noise level and drawn by the MLPs too.
FRAMING = ["lora.targets=[attention, mlp, text]", "sigma.mean=0.3"]


def drawn(pipe: Any, prompts: Sequence[str]) -> list[np.ndarray]:
    made = pipe(list(prompts), seed=SEED, progress=False, **CALL).images
    return [(np.asarray(image) * 255).round().astype(np.uint8) for image in made]


def edited(pipe: Any, pictures: Sequence[np.ndarray], instructions: Sequence[str]) -> list[np.ndarray]:
    given = [[Image.fromarray(picture)] for picture in pictures]
    made = pipe(given, list(instructions), seed=SEED, progress=False, **CALL).images
    return [(np.asarray(image) * 255).round().astype(np.uint8) for image in made]


def as_the_vae_gives(pipe: Any, picture: np.ndarray) -> np.ndarray:
    """A picture encoded and decoded: nothing that the model draws can be nearer to it."""
    pixels = torch.tensor(picture).to(pipe.vae.dtype).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    with torch.inference_mode():
        decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample[0, :, 0]
    return ((decoded.float().permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()


def words_read(pipe: Any, count: int) -> float:
    """The share of held-out words that can be read in the pictures of their captions: the model's own test."""
    cases = held_out_cases(dataclasses.replace(WORDS, random_strings=0.0), count)
    call = {name: value for name, value in CALL.items() if name != "output_type"}
    results = evaluate_text.evaluate(evaluate_text.drawn_by(pipe, **call), cases, WORDS, Reader())
    return summarise([result.score for result in results]).exact


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


def sign_lora(out: Path, steps: int, unseen: int, words: int) -> dict[str, Any]:
    others = novelties.write_sigils(out / "pictures")
    asked = others[:unseen]
    prompts = [novelties.sigil_caption(*colours) for colours in asked]
    pipe = QwenImagePipeline.from_pretrained(SHIPPED)
    before, read_before = drawn(pipe, prompts), words_read(pipe, words)
    start = time.perf_counter()
    mixture = f"data.mixture=[{{source: {out / 'pictures'}, tasks: {{t2i: 1}}}}, {REGULAR}]"
    changes = ["model.folder=tiny", mixture, f"steps={steps}", "log.prompts=[the sigil in red on a black ground]"]
    train("lora", changes, out / "sign")
    seconds = time.perf_counter() - start
    pipe.load_lora_weights(out / "sign" / "model")
    after, read_after = drawn(pipe, prompts), words_read(pipe, words)
    sheet([("ten of the twelve pictures", [novelties.sigil(*colours) for colours in novelties.sigil_colours()[:10]]),
           ("unseen prompts, before", before[:10]), ("unseen prompts, with the LoRA", after[:10])],
          out / "sign.png")  # fmt: skip
    return {
        "pictures": 12, "steps": steps, "seconds": round(seconds, 1), "prompts": len(asked),
        "sign_right": sum(is_sigil(image, *colours) for image, colours in zip(after, asked)),
        "likeness_before": round(float(np.mean([likeness(image) for image in before])), 3),
        "likeness": round(float(np.mean([likeness(image) for image in after])), 3),
        "words": words, "words_read_before": read_before, "words_read": read_after,
    }  # fmt: skip


def edit_lora(out: Path, steps: int, pairs: int, unseen: int) -> dict[str, Any]:
    novelties.write_frames(out / "pairs", novelties.frame_edits(WORDS, pairs, seed=1))
    asked = novelties.frame_edits(WORDS, unseen, seed=2)
    pictures, instructions = [edit[0] for edit in asked], [edit[2] for edit in asked]
    pipe = QwenImageEditPlusPipeline.from_pretrained(SHIPPED)
    before = edited(pipe, pictures, instructions)
    start = time.perf_counter()
    changes = ["model.folder=tiny", f"data.source={out / 'pairs'}", f"steps={steps}", *FRAMING]
    train("edit-lora", changes, out / "frame")
    seconds = time.perf_counter() - start
    pipe.load_lora_weights(out / "frame" / "model")
    after = edited(pipe, pictures, instructions)
    sheet([("unseen pictures", pictures[:10]), ("frame it in a colour, before", before[:10]),
           ("with the LoRA", after[:10])], out / "frame.png")  # fmt: skip

    given = [as_the_vae_gives(pipe, picture) for picture in pictures]

    def right(made: Sequence[np.ndarray]) -> int:
        edits = zip(made, given, asked)
        return sum(is_framed(image, picture, after, colour) for image, picture, (_, after, _, colour) in edits)

    return {
        "pairs": pairs, "steps": steps, "seconds": round(seconds, 1), "pictures": unseen,
        "framed_before": right(before), "framed": right(after),
    }  # fmt: skip


def main(
    out: Annotated[Path, typer.Option(help="Folder of everything that is made.")] = Path("outputs/lora-demo"),
    small: Annotated[bool, typer.Option("--small", help="Smaller and shorter.")] = False,
) -> None:
    """Train both, and say what they can do."""
    if out.exists():
        raise SystemExit(f"{out} is already there: remove it, or choose another folder with --out")
    found = {
        "sign": sign_lora(out, *((40, 4, 4) if small else (350, 20, 100))),
        "frame": edit_lora(out, *((20, 6, 4) if small else (300, 24, 20))),
    }
    (out / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    sign, frame = found["sign"], found["frame"]
    print(
        f"the sign: {sign['sign_right']} of {sign['prompts']} unseen prompts right, {sign['seconds']:.0f} s of training"
    )
    print(f"words that can be read: {sign['words_read_before']:.1%} before, {sign['words_read']:.1%} with the LoRA")
    print(f"framed: {frame['framed']} of {frame['pictures']} unseen pictures, {frame['framed_before']} before")
    print(f"look at {out / 'sign.png'}, {out / 'frame.png'}, and at {compare(out / 'sign')}")


if __name__ == "__main__":
    typer.run(main)
