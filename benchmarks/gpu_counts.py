"""What the kernels of a forward pass take, counted by the interpreter of PTX: benchmarks/gpu_counts.json.

    python -m benchmarks.gpu_counts [--update]

Each op runs in bfloat16 on a few rows as wide as the released model's. Of its kernel the file keeps threads of a block,
registers and shared memory (of tests/compile_cuda/budget.json), per row of the op blocks, instructions of warps and
bytes that have to move, and how often a block waits for global memory. Instructions are what ptxas makes of them: those
of PTX by the weights below. What sums the partial results of a backward is left out. `--update` writes what is now;
what was before stays. Needs nvcc, no GPU.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
TARGET = Path(__file__).with_name("gpu_counts.json")
sys.path.insert(0, str(ROOT / "tests"))  # the interpreter

# Machine instructions that an instruction of PTX becomes, by the start of its name; 1 where none fits. Quotients and
# roots in IEEE's rounding are a first guess, its correction and the test for what that cannot do.
WEIGHTS = {
    "div.rn.f32": 9, "div.full": 3, "div.approx": 3, "sqrt.rn": 8, "rcp.rn": 7, "ld.param": 0, "cvta": 0, "mov.f32": 0,
    "mov.u64": 0, "mov.b64": 0, "mul.lo.s64": 4, "mad.lo.s64": 4, "add.s64": 2, "sub.s64": 2, "shl.b64": 2,
    "setp.lt.s64": 2, "setp.ge.s64": 2, "setp.gt.s64": 2, "setp.le.s64": 2, "div.u32": 16, "rem.u32": 18,
    "ex2.approx.f32": 3,
}  # fmt: skip
Facts = dict[str, Any]


def machine_instructions(by_name: dict[str, int]) -> int:
    def weight(name: str) -> int:
        return next((w for start, w in WEIGHTS.items() if name.startswith(start)), 1)

    return sum(n * weight(name) for name, n in by_name.items())


def normal(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16().requires_grad_()


def cases() -> dict[str, tuple[int, int, int, Callable[[], Any]]]:
    """The rows of each call of an op, the bytes that a row moves forward and backward, 0 where it has no kernel of its
    own backward, and the call."""
    from qwen_image_fast.ops import (
        channel_norm_silu,
        gate_residual_norm_modulate,
        gelu_tanh,
        layer_norm_modulate,
        qk_norm_rope,
    )
    from qwen_image_fast.ops.channel_norm_silu import add_channel_norm_silu

    def vectors(count: int) -> list[Tensor]:
        return [normal(1, 3072) for _ in range(count)]

    def heads() -> Any:
        lens = [torch.tensor([0, n // 2, n], dtype=torch.int32) for n in (16, 0)]
        streams = [normal(n, 24, 128) for n in (16, 16, 16, 0, 0, 0)]
        ropes = [torch.rand(n, 64, 2) for n in (16, 0)]
        return qk_norm_rope(*streams, *(normal(128) for _ in range(4)), *ropes, *lens)

    row = 2 * 3072
    found: dict[str, tuple[int, int, int, Callable[[], Any]]] = {
        "layer_norm_modulate": (16, 2 * row, 3 * row, lambda: layer_norm_modulate(normal(16, 3072), *vectors(2))),
        "gate_residual_norm_modulate": (
            16, 4 * row, 6 * row, lambda: gate_residual_norm_modulate(normal(16, 3072), normal(16, 3072), *vectors(3))
        ),
        "gelu_tanh": (2, 8 * row, 12 * row, lambda: gelu_tanh(normal(2, 12288))),
        "qk_norm_rope": (16, 6 * row, 8 * row, heads),
    }  # fmt: skip
    for channels in (96, 192, 384):
        call = lambda n=channels: channel_norm_silu(normal(256, n), normal(n))  # noqa: E731
        found[f"channel_norm_silu, {channels} channels"] = (256, 4 * channels, 6 * channels, call)
    for channels in (96, 192, 384):
        x, v = normal(256, channels).detach(), normal(channels).detach()
        call = lambda x=x, v=v: add_channel_norm_silu(x, v, gamma=v)  # noqa: E731
        found[f"bias, channel_norm_silu, {channels} channels"] = (256, 4 * channels, 0, call)
        call = lambda x=x, v=v: add_channel_norm_silu(x, v, x.clone())  # noqa: E731
        found[f"bias, residual, {channels} channels"] = (256, 6 * channels, 0, call)
    return found


def count(device: Any) -> dict[str, dict[str, Facts]]:
    """op -> forward and backward -> its kernel; `device` is the interpreter, entered."""
    budget = json.loads((ROOT / "tests" / "compile_cuda" / "budget.json").read_text(encoding="utf-8"))["sm_90a"]
    found: dict[str, dict[str, Facts]] = {}
    for op, (rows, *moved, call) in cases().items():
        torch.manual_seed(0)
        device.module.be(seed=1)
        device.module.counts()
        outs = call()
        forward = device.module.counts()
        sides = {"forward": forward}
        if moved[1]:
            outs = outs if isinstance(outs, tuple) else (outs,)
            torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
            sides["backward"] = device.module.counts()
        for (direction, kernels), bytes_of_row in zip(sides.items(), moved):
            ((kernel, counts),) = ((k, c) for k, c in kernels.items() if "sum_chunks" not in k)
            found.setdefault(op, {})[direction] = {"bytes": bytes_of_row, **facts(kernel, counts, rows, budget)}
    return found


def facts(kernel: str, c: dict[str, Any], rows: int, budget: dict[str, list[int]]) -> Facts:
    from compile_cuda.__main__ import demangle

    name = demangle([kernel])[kernel]
    registers, shared = budget[name]
    return {
        "kernel": name,
        "threads": c["threads"],
        "registers": registers,
        "shared": shared,
        "blocks": c["blocks"] / rows,
        "instructions": machine_instructions(c["by_name"]) / rows,
        "waits": c["waits"] / c["blocks"],
    }


def differences(now: Any, kept: Any, allowed: float) -> Iterable[str]:
    """What of `now` the file does not say, by its path; numbers may differ by the share `allowed`."""
    if isinstance(now, dict):
        for key in now.keys() | kept.keys():
            if key not in now or key not in kept:
                yield f"{key} is only in {'the file' if key in kept else 'what was counted'}"
            else:
                yield from (f"{key}: {d}" for d in differences(now[key], kept[key], allowed))
    elif isinstance(now, str):
        if now != kept:
            yield f"{now}, {kept} in the file"
    elif abs(now - kept) > allowed * abs(kept):
        yield f"{now:g}, {kept:g} in the file"


def main(arguments: list[str]) -> int:
    from compile_cuda.__main__ import find_nvcc
    from ptx import build
    from ptx.device import InterpretedDevice

    if reason := find_nvcc()[1]:
        print(f"gpu_counts: kernels are compiled first, and {reason}", file=sys.stderr)
        return 1
    with InterpretedDevice(*build.module("kernels", ROOT / "build" / "ptx")) as device:
        now = count(device)
    kept = json.loads(TARGET.read_text(encoding="utf-8"))
    if "--update" in arguments:
        kept["now"] = now
        text = re.sub(r"\n {3,}(?=[\"}])", " ", json.dumps(kept, indent=1))
        TARGET.write_text(text + "\n", encoding="utf-8")
    for difference in differences(now, kept["now"], 0.0):
        print(difference)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
