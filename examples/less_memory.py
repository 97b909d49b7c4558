"""The model within a limit, or in 8 or 4 bits: python examples/less_memory.py --precision int8"""

import argparse
import resource
import time

import torch

from qwen_image_fast import QwenImagePipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="tiny", help="a folder, a hub name, or the model that comes with the package")
parser.add_argument("--precision", choices=("int8", "int4"), help="an approximation; without it nothing changes")
parser.add_argument("--limit", help="as 20GB: what does not fit is read from its files at every step, exactly")
parser.add_argument("--prompt", default='"HELLO" in red on a white ground')
parser.add_argument("--side", type=int, default=128, help="pixels; 1328 for the released models")
options = parser.parse_args()

begin = time.perf_counter()
pipe = QwenImagePipeline.from_pretrained(
    options.model, torch_dtype=torch.bfloat16, precision=options.precision, memory_limit=options.limit
)
print(f"loaded in {time.perf_counter() - begin:.1f} s")
call = {"height": options.side, "width": options.side, "num_inference_steps": 20, "true_cfg_scale": 1.0, "seed": 1}
pipe(options.prompt, **call).images[0].save("less-memory.png")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(f"less-memory.png, at most {peak:.1f} GB of memory, {pipe.times['denoise'] / 20:.2f} s a step")
