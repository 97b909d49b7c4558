"""The diffusers pipeline that you have, accelerated and put back: python examples/speed_up_diffusers.py"""

import argparse
import time

import diffusers
import numpy as np
import torch

import qwen_image_fast
from qwen_image_fast.folders import resolve_folder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="tiny", help="a folder, a hub name, or the model that comes with the package")
parser.add_argument("--side", type=int, default=128, help="pixels; 1328 for the released models")
options = parser.parse_args()

pipe = diffusers.QwenImagePipeline.from_pretrained(resolve_folder(options.model), torch_dtype=torch.float32)


def draw():
    start = time.perf_counter()
    result = pipe(
        '"HELLO" in red on a white ground', negative_prompt=" ", true_cfg_scale=4.0, num_inference_steps=20,
        height=options.side, width=options.side, generator=torch.Generator().manual_seed(7), output_type="np",
    )  # fmt: skip
    return result.images[0], time.perf_counter() - start


theirs, their_seconds = draw()
print(qwen_image_fast.accelerate(pipe))
ours, our_seconds = draw()
print(f"{their_seconds:.1f} s before, {our_seconds:.1f} s after, once each and the first run warms up")
print(f"largest difference of a pixel: {255 * np.abs(theirs - ours).max():.2f} of 255")
qwen_image_fast.restore(pipe)
