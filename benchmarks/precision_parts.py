"""Which layers the error of 8 and 4 bits is made of: one velocity of the tiny model, parts of it in fewer bits.

    python -m benchmarks.precision_parts [--prompts 3] [--whole] [--out RESULTS.json]

Against the model in float32: the model in bfloat16; whole models in 8 bits, integers and float8 (its formula in
PyTorch), and in 4, computing in float32 and in bfloat16;
in float32 the layers of one block, or of one kind in all blocks, in 8 bits with all others exact, or with them in 4.
--whole leaves the parts out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import processor_name
from qwen_image_fast import QwenImagePipeline
from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.models.int8_linear import Int8Linear, quantised
from qwen_image_fast.models.precision import int8_layers
from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
from qwen_image_fast.quantize_report import velocity_errors

PROMPTS = ("a red circle on white", "the word HELLO in black", "two blue squares on yellow")
SIDE = 128
FLOAT8 = ", then float8"  # of a precision: integers that become float8, as on a GPU that prefers it


def load(dtype: torch.dtype) -> Any:
    return QwenImageTransformer2DModel.from_pretrained(SHIPPED, subfolder="transformer", torch_dtype=dtype)


def small(dtype: torch.dtype, bits: Callable[[str], str | None]) -> Any:
    """The model with each layer in the precision that `bits` says for its name; None: as it is."""
    model = load(dtype)
    for path, layer in int8_layers(model).items():
        if precision := bits(path):
            parent, _, name = path.rpartition(".")
            made = quantised(layer.weight, precision=precision.removesuffix(FLOAT8))
            made = made.in_float8() if precision.endswith(FLOAT8) else made
            setattr(model.get_submodule(parent), name, Int8Linear(made, layer.bias))
    return model


def block_of(path: str) -> str:
    return f"block {path.split('.')[1]}"


def kind_of(path: str) -> str:
    return path.split(".", 2)[2]


def measure(prompts: int, parts: bool) -> dict[str, Mapping[str, float]]:
    """Relative errors by what is in fewer bits, and noise level."""
    pipe = QwenImagePipeline.from_pretrained("tiny")
    call = {"height": SIDE, "width": SIDE, "num_inference_steps": 8, "output_type": "latent", "true_cfg_scale": 1.0}
    side, given = SIDE // 16, []
    for prompt in PROMPTS[:prompts]:
        clean = torch.as_tensor(pipe(prompt, seed=0, progress=False, **call).images).reshape(1, side * side, -1)
        given.append((clean, pipe.encode_prompt(prompt)[0]))
    exact = load(torch.float32)
    paths = list(int8_layers(exact))

    def error(model: Any) -> dict[str, float]:
        errors = [velocity_errors(exact, model, clean, embeds, (side, side)) for clean, embeds in given]
        return {s: round((sum(e[s] ** 2 for e in errors) / len(errors)) ** 0.5, 5) for s in errors[0]}

    last = block_of(paths[-1])

    def four(path: str) -> str:
        return "int8" if block_of(path) == last else "int4"

    found: dict[str, Mapping[str, float]] = {"bfloat16": error(load(torch.bfloat16))}
    forms: dict[str, Callable[[str], str]] = {
        "8 bits": lambda _: "int8",
        "8 bits, float8": lambda _: "int8" + FLOAT8,
        "4 bits": four,
        "4 bits, all blocks": lambda _: "int4",
    }
    for name, bits in forms.items():
        for dtype in (torch.float32, torch.bfloat16):
            found[f"{name}, in {str(dtype).removeprefix('torch.')}"] = error(small(dtype, bits))
    for group in (block_of, kind_of) if parts else ():
        for part in sorted(set(map(group, paths))):
            found[f"{part} in 8 bits"] = error(
                small(torch.float32, lambda path, part=part, group=group: "int8" if group(path) == part else None)
            )
            found[f"{part} in 8 bits, others in 4"] = error(
                small(torch.float32, lambda path, part=part, group=group: "int8" if group(path) == part else "int4")
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    errors = measure(arguments.prompts, not arguments.whole)
    for name, by_sigma in errors.items():
        print(f"{name:45}", *(f"{100 * e:6.2f}" for e in by_sigma.values()), flush=True)
    if arguments.out is not None:
        about = {"date": datetime.now(UTC).date().isoformat(), "cpu": processor_name(), "prompts": arguments.prompts}
        arguments.out.write_text(json.dumps({**about, "velocity_errors": errors}, indent=1) + "\n")


if __name__ == "__main__":
    main()
