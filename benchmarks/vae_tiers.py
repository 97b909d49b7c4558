"""The tiers of the VAE's convolutions on a CPU: error against float64 and time of every layer, error of whole images
and of photographs, in each dtype.

    python -m benchmarks.vae_tiers --threads 2

Writes benchmarks/results/<date>-<processor>-vae-tiers.json and docs/images/vae-photographs.png. An error is a root mean
square or a maximum over all values, as a part of the root mean square of what float64 gives.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from benchmarks.bench_vae import LAYERS
from benchmarks.harness import Settings, Timing, describe_machine, dtype_name, measure, slug
from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.models import vae_conv
from qwen_image_fast.models.vae import AutoencoderKLQwenImage
from qwen_image_fast.ops import channel_norm_silu, conv3x3, pack_conv3x3
from qwen_image_fast.ops.conv3x3 import conv3x3_reference

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PICTURE = ROOT / "benchmarks" / "results", ROOT / "docs" / "images" / "vae-photographs.png"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of scikit-image: (name, top, left) of a part of 256 x 256 pixels.
PHOTOGRAPHS = (("astronaut", 0, 96), ("coffee", 64, 120), ("chelsea", 16, 80))
# What the differences in the picture are multiplied by.
FACTORS = {torch.float32: 20_000, torch.bfloat16: 20}

# (channels in, out, pixels of the input / side of the image, upsampling): the decoder's, its first, and the encoder's
# first and last.
SHAPES = (*(layer[:4] for layer in LAYERS), (16, 384, 1 / 8, False), (3, 96, 1, False), (384, 32, 1 / 8, False))

Errors = dict[str, dict[str, float]]


def errors(results: dict[str, Tensor], exact: Tensor) -> Errors:
    scale = exact.square().mean().sqrt()
    return {
        name: {
            "rms": ((value.double() - exact).square().mean().sqrt() / scale).item(),
            "max": ((value.double() - exact).abs().max() / scale).item(),
        }
        for name, value in results.items()
    }


# ---- one convolution -------------------------------------------------------------------------------------------------


def layers(side: int) -> Iterator[dict[str, Any]]:
    """Each 3x3 convolution of an image of `side`^2 pixels, on random values and weights that keep the variance.

    "torch" is norm, SiLU and convolution in plain PyTorch, "exact" what that tier computes.
    """
    settings = Settings(rounds=5, warmup=1)
    for channels, out_channels, scale, upsample in SHAPES:
        generator = torch.Generator().manual_seed(channels + out_channels)
        size = int(side * scale)

        def normal(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        wide = normal(1, size, size, channels), normal(out_channels, channels, 3, 3) / (9 * channels) ** 0.5
        bias, gamma = normal(out_channels), 1 + 0.3 * normal(channels)
        for dtype in DTYPES:
            x, weight, b, g = (t.to(dtype) for t in (*wide, bias, gamma))
            norm = None if upsample else g
            exact = conv3x3_reference(
                x.double(), weight.double(), b.double(), None, None if norm is None else norm.double(), upsample
            )
            packed = pack_conv3x3(weight, upsample)
            calls = {
                "exact": functools.partial(direct, x, weight, b, norm, upsample),
                "winograd": functools.partial(conv3x3, x, weight, b, None, norm, upsample, True, packed),
            }
            results = {name: call() for name, call in calls.items()}
            results["torch"] = conv3x3_reference(x, weight, b, None, norm, upsample)
            if upsample:
                results["folded as on CUDA"] = vae_conv._join_phases(x, vae_conv.pack_conv2d(weight, True), b, True)
            seconds = {name: Timing.of(samples) for name, samples in measure(calls, settings).items()}
            yield {
                "channels": channels, "out": out_channels, "side": size, "upsample": upsample,
                "dtype": dtype_name(dtype), "errors": errors(results, exact),
                "seconds": {name: timing.median for name, timing in seconds.items()},
            }  # fmt: skip


def direct(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None, upsample: bool) -> Tensor:
    """The layer as "exact" computes it."""
    y = x if gamma is None else channel_norm_silu(x, gamma)
    y = y.permute(0, 3, 1, 2)
    y = F.interpolate(y, scale_factor=2.0, mode="nearest-exact") if upsample else y
    return F.conv2d(y, weight, bias, padding=1).permute(0, 2, 3, 1)


# ---- whole images ----------------------------------------------------------------------------------------------------


def variants(theirs, ours, dtype: torch.dtype) -> dict[str, Any]:
    """diffusers' model and ours in each tier, in `dtype`."""
    found = {"diffusers": copy.deepcopy(theirs).to(dtype)}
    for convolution in ("auto", "exact"):
        found[convolution] = copy.deepcopy(ours).to(dtype)
        found[convolution].set_convolution(convolution)
    return found


def encoded(model, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.encode(x, return_dict=False)[0].parameters


def decoded(model, z: Tensor) -> Tensor:
    with torch.no_grad():
        return model.decode(z, return_dict=False)[0]


def folded(model, z: Tensor) -> Tensor:
    """An image by the arithmetic of the path of CUDA, computed by torch's convolutions on the CPU."""
    with mock.patch.object(vae_conv, "uses_cuda", lambda conv, x: True):
        return decoded(model, z)


def images(theirs, ours, x: Tensor, z: Tensor, **about: Any) -> Iterator[dict[str, Any]]:
    """The moments of an image and the image of latents, in every dtype, against ours in float64 (which the tests hold
    to diffusers' by 1e-9). Also how far a decoded pixel is off, in steps of 255."""
    for dtype in DTYPES:
        models = variants(theirs, ours, dtype)
        rounded = copy.deepcopy(ours).to(dtype).double()  # float64 from the weights that this dtype has
        for task, call, given in (("encode", encoded, x), ("decode", decoded, z)):
            exact = call(rounded, given.to(dtype).double())
            results = {name: call(model, given.to(dtype)) for name, model in models.items()}
            if task == "decode":
                results["folded as on CUDA"] = folded(models["auto"], given.to(dtype))
            record = {**about, "task": task, "dtype": dtype_name(dtype), "errors": errors(results, exact)}
            if task == "decode":
                record["largest error in steps of 255"] = {
                    name: ((value.double() - exact).abs().max() * 127.5).item() for name, value in results.items()
                }
            yield record


def released(side: int) -> Iterator[dict[str, Any]]:
    """The released size with random weights of the variance of a trained network."""
    from diffusers import AutoencoderKLQwenImage as Reference

    theirs = Reference().eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma"):
            parameter.data = 1 + 0.3 * noise
        else:
            parameter.data = noise * (0.2 if parameter.ndim == 1 else 0.5 / parameter[0].numel() ** 0.5)
    ours = AutoencoderKLQwenImage().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(1, 3, 1, side, side, generator=generator) * 2 - 1
    z = torch.randn(1, 16, 1, side // 8, side // 8, generator=generator)
    yield from images(theirs, ours, x, z, model="released size, random weights", pixels=[side, side])


# ---- photographs -----------------------------------------------------------------------------------------------------


def photograph(name: str) -> Tensor:
    """A photograph of scikit-image: [1, 3, 1, H, W] in [-1, 1], float64."""
    import skimage.data

    pixels = torch.from_numpy(getattr(skimage.data, name)().copy())
    return pixels.permute(2, 0, 1)[None, :, None].double() / 127.5 - 1


def photographs() -> tuple[list[dict[str, Any]], Image.Image]:
    """Parts of photographs through encoder and decoder of the tiny model, and the picture of them."""
    from diffusers import AutoencoderKLQwenImage as Reference

    theirs = Reference.from_pretrained(SHIPPED, subfolder="vae", torch_dtype=torch.float32).eval()
    ours = AutoencoderKLQwenImage.from_pretrained(SHIPPED / "vae", torch_dtype=torch.float32).eval()
    records, rows = [], []
    for name, top, left in tqdm(PHOTOGRAPHS, desc="photographs", unit="photograph"):
        x = photograph(name)[..., top : top + 256, left : left + 256]
        z = encoded(ours.float(), x.float())[:, : ours.z_dim]
        about = {"model": "tiny, trained", "photograph": name, "pixels": list(x.shape[3:])}
        records += images(theirs, ours, x.float(), z, **about)
        shown = [x]
        for dtype, factor in FACTORS.items():
            models = variants(theirs, ours, dtype)
            trips = {n: decoded(m, encoded(m, x.to(dtype))[:, : m.z_dim]).double() for n, m in models.items()}
            difference = (trips["auto"] - trips["diffusers"]).abs()
            records.append(
                {**about, "task": "round trip", "dtype": dtype_name(dtype),
                 "ours to diffusers, steps of 255": {
                     "max": (difference.max() * 127.5).item(), "mean": (difference.mean() * 127.5).item()},
                 "PSNR to the photograph": {n: psnr(t, x) for n, t in trips.items()}}
            )  # fmt: skip
            if dtype == torch.float32:
                shown += [trips["diffusers"], trips["auto"]]
            shown.append(difference * factor - 1)
        rows.append([to_picture(t) for t in shown])
    return records, sheet(rows)


def psnr(a: Tensor, b: Tensor) -> float:
    return (20 * torch.log10(2 / (a - b).square().mean().sqrt())).item()


def to_picture(x: Tensor) -> Image.Image:
    pixels = ((x[0, :, 0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def sheet(rows: list[list[Image.Image]]) -> Image.Image:
    titles = ["photograph", "diffusers", "here", *(f"difference x {f}, {dtype_name(d)}" for d, f in FACTORS.items())]
    side, head, gap = rows[0][0].width, 24, 4
    size = len(titles) * (side + gap) - gap, head + len(rows) * (side + gap) - gap
    made = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(made)
    for column, title in enumerate(titles):
        draw.text((column * (side + gap) + 2, 4), title, fill="black", font_size=14)
        for row, pictures in enumerate(rows):
            made.paste(pictures[column], (column * (side + gap), head + row * (side + gap)))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    torch.set_num_threads(parser.parse_args().threads)
    found, picture = photographs()
    machine = describe_machine("cpu")
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "layers": list(tqdm(layers(128), desc="layers", unit="case")),
        "images": [*found, *tqdm(released(64), desc="released size", unit="case")],
    }
    name = f"{report['date']}-{slug(machine['device'])}-vae-tiers.json"
    (RESULTS / name).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    picture.save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
