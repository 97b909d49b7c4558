"""Every step of a picture as it appears, and how to stop early: python examples/look_inside.py"""

import argparse

from qwen_image_fast import QwenImagePipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="tiny", help="a folder, a hub name, or the model that comes with the package")
parser.add_argument("--side", type=int, default=128, help="pixels; 1328 for the released models")
parser.add_argument("--stop-after", type=int, default=20, help="steps")
options = parser.parse_args()

pipe = QwenImagePipeline.from_pretrained(options.model)


def watch(pipe, step, timestep, tensors):
    latents = tensors["latents"]
    print(f"step {step + 1}: t = {float(timestep):.0f}, latents of deviation {float(latents[0].std()):.2f}")
    pipe._interrupt = step + 1 >= options.stop_after
    return {}


result = pipe(
    '"HELLO" in red on a white ground', height=options.side, width=options.side, num_inference_steps=20,
    true_cfg_scale=1.0, seed=7, callback_on_step_end=watch,
)  # fmt: skip
result.images[0].save("looked-inside.png")
