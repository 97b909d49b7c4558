"""The whole tiny pipeline: prompt to image with classifier-free guidance, 128 x 128 pixels, 20 steps."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import (
    BASELINE,
    COMPILED,
    OURS,
    Bar,
    Case,
    Settings,
    compare,
    compiled,
    find,
    speedup,
    stage_times,
)

SUITE = "pipeline"
GOAL, GOAL_DROP_IN = 2.0, 1.5
DROP_IN = "diffusers accelerated"
PROMPT = 'A red bicycle in front of a blue door, a sign that says "open"'
# Two of 255 steps of brightness, in the images' unit.
TOLERANCE = 2.0


def diffusers_pipeline(folder: Path, device: str):
    from diffusers import QwenImagePipeline

    pipe = QwenImagePipeline.from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_diffusers(pipe, steps: int):
    return lambda: pipe(
        PROMPT, negative_prompt=" ", height=128, width=128, num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


def call_ours(pipe, steps: int):
    return lambda: (
        pipe(
            PROMPT, negative_prompt=" ", height=128, width=128, num_inference_steps=steps, seed=0, progress=False
        ).images
    )


def image_difference(images, reference) -> float:
    """The largest difference of a pixel value, 0 to 255."""
    pairs = zip(images, reference, strict=True)
    return max(float(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max()) for a, b in pairs)


def cases(settings: Settings, steps: int = 20) -> Iterator[Case]:
    from qwen_image_fast import accelerate
    from qwen_image_fast.pipelines.text_to_image import QwenImagePipeline
    from qwen_image_fast.tiny import write_untrained

    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "tiny"
        write_untrained(folder)
        eager, drop_in = (diffusers_pipeline(folder, settings.device) for _ in range(2))
        ours = QwenImagePipeline.from_pretrained(folder, torch_dtype=torch.float32).to(settings.device)
        accelerate(drop_in)
        variants = {
            BASELINE: call_diffusers(eager, steps),
            OURS: call_ours(ours, steps),
            DROP_IN: call_diffusers(drop_in, steps),
        }
        if settings.compile:
            pipe = diffusers_pipeline(folder, settings.device)
            pipe.transformer = compiled(pipe.transformer)
            variants[COMPILED] = call_diffusers(pipe, steps)
        case = compare(
            SUITE, f"tiny pipeline, CFG, 128 x 128, {steps} steps", variants, settings, tolerance=TOLERANCE,
            measure_difference=image_difference, tags={"steps": steps}, goals={OURS: GOAL, DROP_IN: GOAL_DROP_IN},
            note="difference in steps of 255; compiled: the transformer",
        )  # fmt: skip
        for name, pipe in ((BASELINE, eager), (DROP_IN, drop_in)):
            parts = {"text encoder": (pipe, "encode_prompt"), "decode": (pipe.vae, "decode")}
            with stage_times(settings.device, parts) as seconds:
                variants[name]()
            case.stages[name] = {**seconds, "denoise and rest": case.timings[name].median - sum(seconds.values())}
        variants[OURS]()
        case.stages[OURS] = dict(ours.times)
        yield case


def bars(measured: list[Case]) -> list[Bar]:
    case = find(measured, SUITE)
    return [
        Bar("tiny pipeline, stand-alone, over diffusers eager", GOAL, speedup(case, OURS)),
        Bar("tiny pipeline, drop-in, over diffusers eager", GOAL_DROP_IN, speedup(case, DROP_IN)),
    ]
