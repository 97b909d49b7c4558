"""A picture changed by an instruction: python examples/edit.py photo.jpg "make it winter" """

import argparse

from PIL import Image

from qwen_image_fast import QwenImageEditPlusPipeline, QwenImagePipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("picture", nargs="?", help="without one, the model draws a word first")
parser.add_argument("instruction", nargs="?", default="make it blue")
parser.add_argument("--model", default="tiny", help="Qwen/Qwen-Image-Edit-2511, a folder, or tiny")
options = parser.parse_args()

pipe = QwenImageEditPlusPipeline.from_pretrained(options.model)
call = {"num_inference_steps": 20, "true_cfg_scale": 1.0, "seed": 1}
if options.picture:
    picture = Image.open(options.picture).convert("RGB")
else:
    drawing = QwenImagePipeline.from_pipe(pipe)
    picture = drawing('"HELLO" in red on a white ground', height=128, width=128, **call).images[0]
    picture.save("before.png")
pipe(picture, options.instruction, **call).images[0].save("after.png")
print(f"after.png of {options.picture or 'before.png'}")
