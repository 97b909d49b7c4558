"""A transformer file of ComfyUI or GGUF in a pipeline: python examples/weights_of_others.py qwen-image-Q4_K_M.gguf"""

import argparse

import torch

from qwen_image_fast import QwenImagePipeline, QwenImageTransformer2DModel

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("file", help="a .gguf or .safetensors file of a transformer")
parser.add_argument("--model", default="Qwen/Qwen-Image", help="whose other parts are used: a folder, a hub name, tiny")
parser.add_argument("--prompt", default='"HELLO" in red on a white ground')
parser.add_argument("--side", type=int, default=1328, help="pixels")
options = parser.parse_args()

transformer = QwenImageTransformer2DModel.from_single_file(
    options.file, config=options.model, subfolder="transformer", torch_dtype=torch.bfloat16
)
pipe = QwenImagePipeline.from_pretrained(options.model, transformer=transformer, torch_dtype=torch.bfloat16)
size = {"height": options.side, "width": options.side}
pipe(options.prompt, num_inference_steps=20, true_cfg_scale=1.0, seed=7, **size).images[0].save("with-file.png")
print("with-file.png")
