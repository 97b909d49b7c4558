"""A picture from a prompt to pixels by the model that comes with the package: the doctor's last test."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from qwen_image_fast import ops
from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.pipelines.text_to_image import QwenImagePipeline

PROMPT = '"HI" in red on a white ground'
# Of 255: what two roundings may differ by on the CPU; on CUDA torch's convolutions round to TF32, which ones by size.
ALLOWED = {"cpu": 2, "cuda": 8}


@dataclass
class Drawn:
    """Side in pixels, seconds of the call, largest difference from the picture of the references, of 255."""

    side: int = 128
    seconds: float | None = None
    difference: int | None = None
    problem: str | None = None


def draw(device: str = "cpu") -> Drawn:
    """By the ops and by their references, in float32, two steps each; whatever is raised is the problem."""
    drawn = Drawn()
    try:
        pipe = QwenImagePipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32, device=device)

        def pixels() -> np.ndarray:
            call = {"height": drawn.side, "width": drawn.side, "num_inference_steps": 2, "true_cfg_scale": 1.0}
            return np.asarray(pipe(PROMPT, **call, seed=0, progress=False).images[0], dtype=int)

        start = time.perf_counter()
        ours = pixels()
        drawn.seconds = time.perf_counter() - start
        with ops.reference():
            expected = pixels()
        drawn.difference = int(abs(ours - expected).max())
        if expected.std() < 1:
            drawn.problem = "the picture is of one colour"
        elif drawn.difference > ALLOWED[device]:
            drawn.problem = f"it differs from that of the references by {drawn.difference} of 255"
    except Exception as error:  # a library that is too old or too new, a damaged installation
        drawn.problem = f"{type(error).__name__}: {error}"
    return drawn
