"""Forms of 4-bit weights: errors of weights and of one velocity, without data: `python -m benchmarks.int4_forms`.

Weights are random normal numbers of the released width, and those of the tiny model, rotated as in `precision="int4"`.
Activations are in 8 bits in all of them, by the model's own kernels: a decoded weight is rounded to 8 bits first, which
adds a tenth of the error at most. Writes benchmarks/results/<date>-int4-forms.json, or `--out`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import describe_machine
from qwen_image_fast import QwenImagePipeline, QwenImageTransformer2DModel
from qwen_image_fast.files import atomic_write
from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.models.int8_linear import Int8Linear, quantised
from qwen_image_fast.models.precision import int8_layers
from qwen_image_fast.ops import Int8Weight, _int8
from qwen_image_fast.quantize_report import velocity_errors

# Levels of least squared error of normal numbers (Lloyd and Max), and those of NF4 (arXiv 2305.14314).
LLOYD = (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0691, 2.7326)
NF4 = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105, 0.0, 0.0795803, 0.1609302, 0.2461123,
       0.3379152, 0.4407098, 0.562617, 0.7229568, 1.0)  # fmt: skip
PROMPTS = ("a red circle on white", "the word HELLO in black", "two blue squares on yellow")


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    return levels[torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)]


def of_rows(w: Tensor) -> Tensor:
    """Integers from -7 to 7, a scale for a row."""
    scale = w.abs().amax(1, keepdim=True) / 7
    return (w / scale).round().clamp(-7, 7) * scale


def with_zero(w: Tensor, group: int) -> Tensor:
    """scale * (integer - zero), of the best of 20 ranges of each group."""
    x = w.view(len(w), -1, group)
    low, high, found = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), []
    for share in (1.0 - 0.02 * i for i in range(20)):
        scale = ((high - low) * share / 15).clamp_min(1e-12)
        zero = (-(low * share + (low + high) * (1 - share) / 2) / scale).round().clamp(0, 15)
        found.append((((x / scale) + zero).round().clamp(0, 15) - zero) * scale)
    return best(x, found).view_as(w)


def of_codebook(w: Tensor, group: int, levels: Tensor, float8: bool) -> Tensor:
    """scale * level, of the best of 20 scales of each group, in float8 or in full."""
    x, whole = w.view(len(w), -1, group), w.abs().amax() / 400
    top, found = x.abs().amax(-1, keepdim=True) / levels.abs().max(), []
    for share in (0.6 + 0.03 * i for i in range(20)):
        scale = (top * share / whole).to(torch.float8_e4m3fn).float() * whole if float8 else top * share
        found.append(nearest(x / scale.clamp_min(1e-12), levels) * scale)
    return best(x, found).view_as(w)


def best(x: Tensor, found: list[Tensor]) -> Tensor:
    """Of each group the one that is nearest."""
    errors = torch.stack([(y - x).square().sum(-1) for y in found])
    return torch.stack(found).gather(0, errors.argmin(0)[None, ..., None].expand(1, *x.shape))[0]


def ours(w: Tensor) -> Tensor:
    weight = Int8Weight.of_floats(w, 1)
    return weight.values() * weight.scales[:, None]


def forms() -> dict[str, tuple[float, Callable[[Tensor], Tensor]]]:
    """Bits of a number, and what becomes of rotated weights."""
    lloyd = torch.tensor([*(-v for v in reversed(LLOYD)), *LLOYD])
    nf4 = torch.tensor(NF4)
    return {
        "integers, a scale for a row": (4.0, of_rows),
        "integers with a zero, groups of 64": (4.31, lambda w: with_zero(w, 64)),
        "integers with a zero, groups of 32": (4.63, lambda w: with_zero(w, 32)),
        "NF4, groups of 64": (4.25, lambda w: of_codebook(w, 64, nf4, False)),
        "Lloyd-Max levels, groups of 16 with float8 scales": (4.5, lambda w: of_codebook(w, 16, lloyd, True)),
        "int4: levels fitted to groups of 16, times of 7 bits": (4.5, ours),
    }


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


def velocities(
    form: Callable[[Tensor], Tensor], pipe: Any, clean: list[Tensor], embeds: list[Tensor]
) -> dict[str, float]:
    """Errors at each noise level, over all prompts."""
    small = QwenImageTransformer2DModel.from_pretrained(SHIPPED, subfolder="transformer", torch_dtype=torch.float32)
    for path, layer in int8_layers(small).items():
        group = _int8.group_of(layer.in_features)
        weight = _int8.rotated(form(_int8.rotated(layer.weight.detach(), group)), group)
        parent, _, name = path.rpartition(".")
        setattr(small.get_submodule(parent), name, Int8Linear(quantised(weight), layer.bias))
    each = [velocity_errors(pipe.transformer, small, c, e, (8, 8)) for c, e in zip(clean, embeds)]
    return {sigma: (sum(e[sigma] ** 2 for e in each) / len(each)) ** 0.5 for sigma in each[0]}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    pipe = QwenImagePipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)
    call = {"height": 128, "width": 128, "num_inference_steps": 8, "output_type": "latent", "true_cfg_scale": 1.0}
    clean = [torch.as_tensor(pipe(p, seed=0, progress=False, **call).images).reshape(1, 64, -1) for p in PROMPTS]
    embeds = [pipe.encode_prompt(p)[0] for p in PROMPTS]
    random = torch.randn(256, 3072, generator=torch.Generator().manual_seed(0))
    layers = int8_layers(pipe.transformer).values()
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": describe_machine("cpu"), "forms": {}}
    for name, (bits, form) in forms().items():
        rotated = [_int8.rotated(layer.weight, _int8.group_of(layer.in_features)) for layer in layers]
        one = {"bits": bits, "normal": error(form(random), random)}
        one["tiny"] = max(error(form(w), w) for w in rotated)
        one["velocity"] = velocities(form, pipe, clean, embeds)
        found["forms"][name] = one
        print(name, one, flush=True)
    path = given.out or Path(f"benchmarks/results/{found['date']}-int4-forms.json")
    atomic_write(path, lambda file: file.write((json.dumps(found, indent=1) + "\n").encode()))
    print(path)


if __name__ == "__main__":
    main()
