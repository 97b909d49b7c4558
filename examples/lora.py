"""A LoRA loaded, weighted and switched off: python examples/lora.py style.safetensors --model Qwen/Qwen-Image"""

import argparse

from qwen_image_fast import QwenImagePipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("lora", help="a .safetensors file in any of the 15 styles of keys, or a folder with one")
parser.add_argument("--prompt", default='"HELLO" in red on a white ground')
parser.add_argument("--model", default="tiny", help="a folder, a hub name, or the model that comes with the package")
parser.add_argument("--side", type=int, default=128, help="pixels; 1328 for the released models")
options = parser.parse_args()

pipe = QwenImagePipeline.from_pretrained(options.model)
call = {"height": options.side, "width": options.side, "num_inference_steps": 20, "true_cfg_scale": 1.0, "seed": 7}
name = pipe.load_lora_weights(options.lora)
for strength in (1.0, 0.5):
    pipe.set_adapters(name, strength)
    pipe(options.prompt, **call).images[0].save(f"lora-{strength}.png")
pipe.disable_lora()
pipe(options.prompt, **call).images[0].save("lora-off.png")
print("lora-1.0.png, lora-0.5.png and lora-off.png")
