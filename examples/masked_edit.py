"""Only what is white in a mask changes: python examples/masked_edit.py photo.jpg mask.png "make it winter" """

import argparse

from PIL import Image, ImageDraw

from qwen_image_fast import QwenImageEditPlusInpaintPipeline, QwenImagePipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("picture", nargs="?", help="without one, the model draws a word, and changes its right half")
parser.add_argument("mask", nargs="?", help="a picture of the same size, white where something may change")
parser.add_argument("instruction", nargs="?", default="make it blue")
parser.add_argument("--model", default="tiny", help="Qwen/Qwen-Image-Edit-2511, a folder, or tiny")
options = parser.parse_args()
if options.picture and not options.mask:
    parser.error("a picture needs a mask beside it")

pipe = QwenImageEditPlusInpaintPipeline.from_pretrained(options.model)
call = {"num_inference_steps": 20, "true_cfg_scale": 1.0, "seed": 1}
if options.picture:
    picture, mask = Image.open(options.picture).convert("RGB"), Image.open(options.mask).convert("L")
else:
    drawing = QwenImagePipeline.from_pipe(pipe)
    picture = drawing('"HELLO" in red on a white ground', height=128, width=128, **call).images[0]
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).rectangle((64, 0, 128, 128), fill=255)
    picture.save("before.png")
result = pipe(picture, options.instruction, mask_image=mask, strength=1.0, **call)
result.images[0].save("masked.png")
print(f"masked.png of {options.picture or 'before.png'}")
