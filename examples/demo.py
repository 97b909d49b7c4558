"""Make a picture with the tiny Qwen-Image, and time every stage against diffusers on the same weights."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from qwen_image_fast import QwenImagePipeline
from qwen_image_fast.tiny import write_untrained

PROMPT = 'A sign that says "HELLO" in red letters'
CALL = {"negative_prompt": " ", "height": 128, "width": 128, "num_inference_steps": 20}
ROUNDS = 3

console = Console()


def diffusers_pipeline(folder: Path):
    """diffusers' pipeline with a timer around each of its three models."""
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


def main() -> None:
    outputs = Path("outputs")
    folder = outputs / "qwen-image-tiny-untrained"
    if not folder.exists():
        write_untrained(folder)
    console.print(f"The model in {folder} is tiny and untrained: its pictures are noise, its times are real.")

    ours = QwenImagePipeline.from_pretrained(folder, torch_dtype=torch.float32)
    theirs, their_times = diffusers_pipeline(folder)
    runs: dict[str, list[dict[str, float]]] = {"qwen_image_fast": [], "diffusers": []}
    for round_ in range(ROUNDS + 1):  # the first one warms up
        start = time.perf_counter()
        picture = ours(PROMPT, **CALL, seed=0, progress=round_ == 0).images[0]
        ours.times["whole call"] = time.perf_counter() - start
        their_times.clear()
        start = time.perf_counter()
        expected = theirs(PROMPT, **CALL, generator=torch.Generator().manual_seed(0)).images[0]
        their_times["whole call"] = time.perf_counter() - start
        if round_:
            runs["qwen_image_fast"].append(dict(ours.times))
            runs["diffusers"].append(dict(their_times))

    path = outputs / "demo.png"
    picture.save(path)
    difference = np.abs(np.asarray(picture, dtype=int) - np.asarray(expected, dtype=int)).max()

    table = Table("stage", "diffusers", "qwen_image_fast", "faster")
    table.title = f"128x128, {CALL['num_inference_steps']} steps, guidance, {torch.get_num_threads()} threads, float32"
    for stage in ("text encoder", "denoise", "decode", "whole call"):
        a, b = (statistics.median(run[stage] for run in runs[name]) for name in ("diffusers", "qwen_image_fast"))
        table.add_row(stage, f"{a:.3f} s", f"{b:.3f} s", f"{a / b:.2f}x")
    console.print(table)
    console.print(f"Largest difference from diffusers' picture: {difference} of 255.")
    console.print(f"The picture: {path.resolve()}")


if __name__ == "__main__":
    main()
