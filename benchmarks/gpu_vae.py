"""The VAE on a GPU, for `gpu_check`: decoding against diffusers, and each convolution by cuDNN and by CUTLASS.

    python -m benchmarks.gpu_vae results.json

What the layers' records say decides the table in `qwen_image_fast/ops/conv2d.py`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.bench_vae import LAYERS, decoder_call, encoder_call, models
from benchmarks.gpu_bench import Clock, Record, cuda, device, peak, write
from benchmarks.harness import Settings, difference
from qwen_image_fast.drop_in.vae_flops import decoding_flops
from qwen_image_fast.models.vae_conv import pack_conv2d
from qwen_image_fast.ops.conv2d import conv2d


def vae(sides=(1024, 512), rounds: int = 10, dtype: torch.dtype = torch.bfloat16, **config) -> Iterator[Record]:
    """Images of the released VAE with random weights: milliseconds, TFLOP/s of what is computed, times diffusers'."""
    clock = Clock()
    theirs, drop_in, ours = (m.to(dtype) for m in models(Settings(device()), **config))
    variants = {"ours": ours, "drop-in": drop_in, "diffusers": theirs}
    for side in sides:
        z = torch.randn(1, ours.config.z_dim, 1, side // 8, side // 8, device=device()).to(dtype)
        x = (torch.rand(1, ours.config.input_channels, 1, side, side, device=device()) * 2 - 1).to(dtype)
        for task, call, argument in (("decode", decoder_call, z), ("encode", encoder_call, x)):
            calls = {name: functools.partial(call(model), argument) for name, model in variants.items()}
            record: Record = {"task": task, "pixels": side, "dtype": str(dtype).removeprefix("torch.")}
            record["difference"] = difference(calls["ours"](), calls["diffusers"]())
            times = {name: clock(fn, rounds) for name, fn in calls.items()}
            record |= {"ms": times, "times": times["diffusers"] / times["ours"]}
            record["memory"] = {name: peak(fn) for name, fn in calls.items() if name != "drop-in"}
            if task == "decode":
                _, flops = decoding_flops(drop_in, side)
                record |= {"flops": flops, "TFLOP/s": flops / times["ours"] / 1e9}
            yield record
    if cuda():
        yield from layers(clock, sides[0], dtype, rounds)


def layers(clock: Clock, side: int, dtype: torch.dtype, rounds: int) -> Iterator[Record]:
    """Each convolution of the decoder with its residual: cuDNN and a sum, or one kernel of CUTLASS's."""
    for channels, out_channels, scale, upsample, count in LAYERS:
        if out_channels % 8:
            continue
        size = int(side * scale)
        x = torch.randn(1, size, size, channels, device=device()).to(dtype)
        weight = (torch.randn(out_channels, channels, 3, 3, device=device()) / (9 * channels) ** 0.5).to(dtype)
        weight = pack_conv2d(weight, upsample)
        bias = torch.randn(weight.shape[0], device=device()).to(dtype)
        taps = weight.shape[2]
        residual = None if upsample else torch.randn(1, size, size, weight.shape[0], device=device()).to(dtype)
        calls = {
            kernel: lambda kernel=kernel, a=(x, weight, bias, residual): conv2d(*a, (1, 1), kernel)
            for kernel in ("torch", "cutlass")
        }
        times = {name: clock(fn, rounds) for name, fn in calls.items()}
        flops = 2 * taps * taps * channels * weight.shape[0] * (size + 2 - taps + 1) ** 2
        yield {
            "task": "layer", "label": f"{channels} -> {weight.shape[0]}, {taps}x{taps}, {size}^2", "count": count,
            "table": [channels, weight.shape[0], taps], "difference": difference(calls["cutlass"](), calls["torch"]()),
            "ms": times, "TFLOP/s": {n: flops / t / 1e9 for n, t in times.items()},
        }  # fmt: skip


if __name__ == "__main__":
    write(vae(), Path(sys.argv[1]))
