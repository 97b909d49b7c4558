"""`torchrun --nproc-per-node N -m qwen_image_fast.training RECIPE [CHANGES] --out FOLDER`: the command `train`."""

import sys

from qwen_image_fast.__main__ import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
