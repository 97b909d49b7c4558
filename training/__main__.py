"""`torchrun --nproc-per-node N -m qwen_image_fast.training RECIPE [CHANGES] --out FOLDER`: the command `train`."""

import sys

from qwen_image_fast.cli import app

app(["train", *sys.argv[1:]])
