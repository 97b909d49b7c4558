"""Draw a word with the tiny Qwen-Image that comes with the package, edit it twice, and time it against diffusers."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from qwen_image_fast import QwenImageEditPlusPipeline, QwenImagePipeline
from qwen_image_fast.folders import SHIPPED

STEPS = 20
ROUNDS = 3
GAP, CAPTION = 8, 24

console = Console()


def diffusers_pipeline(folder: Path):
    """diffusers' pipeline of the same weights, with a timer around each of its three models."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    pipe = diffusers.QwenImagePipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    times: dict[str, float] = {}

    def timed(owner, name: str, stage: str) -> None:
        inner = getattr(owner, name)

        def call(*args, **kwargs):
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            times[stage] = times.get(stage, 0.0) + time.perf_counter() - start
            return result

        setattr(owner, name, call)

    timed(pipe.text_encoder, "forward", "text encoder")
    timed(pipe.transformer, "forward", "denoise")
    timed(pipe.vae, "decode", "decode")
    return pipe, times


def compare(prompt: str, seed: int) -> Table:
    """Our times and diffusers', in turn on one machine, as medians."""
    call = {"negative_prompt": " ", "height": 128, "width": 128, "num_inference_steps": STEPS}
    ours = QwenImagePipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)
    theirs, their_times = diffusers_pipeline(SHIPPED)
    runs: dict[str, list[dict[str, float]]] = {"qwen_image_fast": [], "diffusers": []}
    for round_ in range(ROUNDS + 1):  # the first one warms up
        start = time.perf_counter()
        picture = ours(prompt, **call, seed=seed, progress=False).images[0]
        ours.times["whole call"] = time.perf_counter() - start
        their_times.clear()
        start = time.perf_counter()
        expected = theirs(prompt, **call, generator=torch.Generator().manual_seed(seed)).images[0]
        their_times["whole call"] = time.perf_counter() - start
        if round_:
            runs["qwen_image_fast"].append(dict(ours.times))
            runs["diffusers"].append(dict(their_times))
    difference = np.abs(np.asarray(picture, dtype=int) - np.asarray(expected, dtype=int)).max()
    table = Table("stage", "diffusers", "qwen_image_fast", "faster")
    table.title = f"128x128, {STEPS} steps, guidance, {torch.get_num_threads()} threads, float32"
    table.caption = f"largest difference between the two pictures: {difference} of 255"
    if (load := os.getloadavg()[0]) > (os.cpu_count() or 1) + 2:  # two threads are this program's own
        table.caption += f"\nother programs keep this machine busy (load {load:.1f}): the times say little"
    for stage in ("text encoder", "denoise", "decode", "whole call"):
        a, b = (statistics.median(run[stage] for run in runs[name]) for name in ("diffusers", "qwen_image_fast"))
        table.add_row(stage, f"{a:.3f} s", f"{b:.3f} s", f"{a / b:.2f}x")
    return table


def side_by_side(pictures: list[Image.Image], captions: list[str], scale: int = 2) -> Image.Image:
    """Pictures in a row, each above what was asked for."""
    width, height = (side * scale for side in pictures[0].size)
    sheet = Image.new("RGB", ((width + GAP) * len(pictures) + GAP, height + CAPTION + 2 * GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pictures, captions)):
        left = GAP + i * (width + GAP)
        sheet.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (left, GAP))
        draw.text((left, height + 2 * GAP), caption, fill="black")
    return sheet


def main(
    text: Annotated[str, typer.Option(help="up to six letters or digits work best")] = "HELLO",
    colour: Annotated[str, typer.Option(help="red, orange, yellow, green, blue, purple, black or white")] = "red",
    ground: Annotated[str, typer.Option(help="white, black, yellow, pink, light blue or dark blue")] = "white",
    then: Annotated[str, typer.Option(help="the text that the first edit writes")] = "WORLD",
    then_colour: Annotated[str, typer.Option(help="the colour that the second edit gives")] = "blue",
    seed: int = 0,
    times: Annotated[bool, typer.Option(help="compare with diffusers")] = True,
) -> None:
    prompt = f'"{text}" in {colour} on a {ground} ground'
    captions = [prompt, f'change the text to "{then}"', f"make it {then_colour}"]
    editor = QwenImageEditPlusPipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)
    drawer = QwenImagePipeline(**{name: getattr(editor, name) for name in QwenImagePipeline.parts})
    start = time.perf_counter()
    pictures = [
        drawer(prompt, height=128, width=128, num_inference_steps=STEPS, true_cfg_scale=1.0, seed=seed).images[0]
    ]
    for instruction in captions[1:]:
        made = editor(pictures[-1], instruction, num_inference_steps=STEPS, true_cfg_scale=1.0, seed=seed)
        pictures.append(made.images[0])
    console.print(f"One picture and two edits in {time.perf_counter() - start:.1f} s.")
    path = Path("outputs") / "demo.png"
    path.parent.mkdir(exist_ok=True)
    side_by_side(pictures, captions).save(path)
    if times:
        console.print(compare(prompt, seed))
    console.print(f"The pictures: {path.resolve()}")


if __name__ == "__main__":
    typer.run(main)
