"""Pictures from prompts, of different sizes in one packed batch: python examples/generate.py --model Qwen/Qwen-Image"""

import argparse

from qwen_image_fast import QwenImagePipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="tiny", help="a folder, a hub name, or the model that comes with the package")
parser.add_argument("--side", type=int, default=128, help="pixels; 1328 for the released models")
options = parser.parse_args()

pipe = QwenImagePipeline.from_pretrained(options.model)
side = options.side
result = pipe(
    ['"HELLO" in red on a white ground', '"RIVER" in white on a blue ground'],
    height=[side, side], width=[side, side * 3 // 2], num_inference_steps=20, true_cfg_scale=1.0, seed=7,
)  # fmt: skip
for i, (image, seed) in enumerate(zip(result.images, result.seeds)):
    image.save(f"picture-{i}.png")
    print(f"picture-{i}.png  {image.size[0]}x{image.size[1]}  seed {seed}")
