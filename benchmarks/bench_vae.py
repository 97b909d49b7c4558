"""The VAE on one image: encoding, decoding, a training step of the decoder, each layer, memory, and strips of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import (
    BASELINE,
    COMPILED,
    OURS,
    Bar,
    Case,
    Settings,
    Timing,
    compare,
    compiled,
    find,
    peak_extra_memory,
    speedup,
    time_call,
)
from qwen_image_fast.models.vae import AutoencoderKLQwenImage
from qwen_image_fast.ops import channel_norm_silu, conv3x3, pack_conv3x3

SUITE = "vae"
DROP_IN = "diffusers accelerated"
DIRECT = "torch"
# Speed-ups over diffusers eager and compiled; and what memory may take of diffusers'.
GOALS = {"decode": (6.0, 4.0), "encode": (4.0, None), "train": (2.0, None)}
GOAL_MEMORY = 0.5
# The side of an image decoded in strips of rows, and what that may take.
STRIPS = (4096, 4 * 10**9)
# (channels in, out, pixels of the input / side of the image, upsampling, how many of them decode an image)
LAYERS = (
    (384, 384, 1 / 8, False, 10),
    (384, 192, 1 / 8, True, 1),
    (192, 384, 1 / 4, False, 1),
    (384, 384, 1 / 4, False, 5),
    (384, 192, 1 / 4, True, 1),
    (192, 192, 1 / 2, False, 6),
    (192, 96, 1 / 2, True, 1),
    (96, 96, 1, False, 6),
    (96, 3, 1, False, 1),
)


def models(settings: Settings, **config):
    """(diffusers, diffusers accelerated, ours) with the same random weights."""
    from diffusers import AutoencoderKLQwenImage as Reference

    from qwen_image_fast import accelerate

    torch.manual_seed(0)
    theirs, drop_in = (Reference(**config).to(settings.device).eval() for _ in range(2))
    drop_in.load_state_dict(theirs.state_dict())
    ours = AutoencoderKLQwenImage(**config).to(settings.device).eval()
    ours.load_state_dict(theirs.state_dict())
    accelerate(drop_in)
    return theirs, drop_in, ours


def encoder_call(model) -> Callable[[Tensor], Tensor]:
    def run(x):
        with torch.no_grad():
            return model.encode(x, return_dict=False)[0].parameters

    return run


def decoder_call(model) -> Callable[[Tensor], Tensor]:
    def run(z):
        with torch.no_grad():
            return model.decode(z, return_dict=False)[0]

    return run


def training_call(model) -> Callable[[Tensor], Tensor]:
    """One step of the decoder: loss, gradients of all its parameters, SGD with a rate that changes nothing."""
    parameters = list(model.decoder.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.0)

    def run(z):
        optimizer.zero_grad()
        loss = model.decode(z, return_dict=False)[0].square().mean()
        loss.backward()
        optimizer.step()
        return parameters[0].grad

    return run


def cases(
    settings: Settings, sides: tuple[int, ...] = (256, 512), memory_side: int = 1024, strips=STRIPS, **config
) -> Iterator[Case]:
    if settings.quick:
        sides, memory_side, strips, config = (64,), 64, (128, 10**8), {"base_dim": 32, "num_res_blocks": 1} | config
    theirs, drop_in, ours = models(settings, **config)
    for side in sides:
        x = torch.rand(1, 3, 1, side, side, device=settings.device) * 2 - 1
        z = torch.randn(1, ours.config.z_dim, 1, side // 8, side // 8, device=settings.device)
        for task, call, argument in (("decode", decoder_call, z), ("encode", encoder_call, x)):
            variants = {BASELINE: theirs, DROP_IN: drop_in, OURS: ours}
            calls = {name: call(model) for name, model in variants.items()}
            if settings.compile:
                calls[COMPILED] = compiled(call(theirs))
            yield task_case(task, side, calls, argument, settings)
    z = torch.randn(1, ours.config.z_dim, 1, sides[0] // 8, sides[0] // 8, device=settings.device)
    calls = {name: training_call(m) for name, m in ((BASELINE, theirs), (DROP_IN, drop_in), (OURS, ours))}
    yield task_case("train", sides[0], calls, z, settings)
    yield memory_case(memory_side, theirs, ours, settings)
    if settings.device == "cpu":
        yield strips_case(*strips, ours, settings)
    yield from layer_cases(sides[0], ours.config.base_dim, settings)


def task_case(task: str, side: int, calls: dict[str, Callable], argument: Tensor, settings: Settings) -> Case:
    goal, _ = GOALS[task]
    return compare(
        SUITE, f"{task} {side} x {side}", {name: lambda fn=fn: fn(argument) for name, fn in calls.items()}, settings,
        tolerance=1e-3, tags={"task": task, "side": side}, goals={OURS: goal},
    )  # fmt: skip


def memory_case(side: int, theirs, ours, settings: Settings) -> Case:
    """Peak extra memory of one decoded image; ours has its transformed weights already. One call each."""
    ratio = ours.spatial_compression_ratio
    z = torch.randn(1, ours.config.z_dim, 1, side // ratio, side // ratio, device=settings.device)
    decoder_call(ours)(z[..., :2, :2])
    timings, memory, results = {}, {}, []
    for name, model in ((BASELINE, theirs), (OURS, ours)):
        call, seconds = decoder_call(model), []
        memory[name] = peak_extra_memory(
            lambda call=call, seconds=seconds: seconds.append(
                time_call(lambda: results.append(call(z)), settings.device)
            ),
            settings.device,
        )
        timings[name] = Timing.of(seconds)
    difference = (results[0] - results[1]).abs().max().item()
    return Case(
        SUITE, f"memory of decode {side} x {side}", {"task": "memory", "side": side}, timings, {}, difference, 1e-3,
        memory=memory, note="one call each",
    )  # fmt: skip


def strips_case(side: int, limit: int, ours, settings: Settings) -> Case:
    """One image decoded in strips of rows under a memory limit, against the same at a quarter of the side as a whole.

    The quarter is only timed: FLOPs but for attention are 1/16.
    """
    ratio, seconds = ours.spatial_compression_ratio, []
    z = torch.randn(1, ours.config.z_dim, 1, side // ratio, side // ratio, device=settings.device)
    call, small = decoder_call(ours), z[..., : side // ratio // 4, : side // ratio // 4].contiguous()
    call(small[..., :2, :2])
    whole = time_call(lambda: call(small), settings.device)
    ours.set_memory_limit(limit)
    try:
        peak = peak_extra_memory(lambda: seconds.append(time_call(lambda: call(z), settings.device)), settings.device)
    finally:
        ours.set_memory_limit(None)
    return Case(
        SUITE, f"decode {side} x {side} in strips", {"task": "strips", "side": side, "limit": limit},
        {OURS: Timing.of(seconds), f"{side // 4} x {side // 4} whole": Timing.of([whole])}, {},
        memory={OURS: peak}, note=f"memory limit {limit} bytes; one call each",
    )  # fmt: skip


def layer_cases(side: int, base_dim: int, settings: Settings) -> Iterator[Case]:
    """Norm, SiLU, upsampling, convolution and bias of each layer of the decoder against torch's, with its norm fused.

    FLOPs are those of the direct convolution, of the doubled image where it upsamples; the roof is one matrix product
    of so many: Winograd can be above it.
    """
    for channels, out_channels, scale, upsample, count in LAYERS:
        widths = [c if c < 16 else c * base_dim // 96 for c in (channels, out_channels)]
        yield layer_case(*widths, int(side * scale), upsample, count, settings)


def layer_case(channels: int, out_channels: int, side: int, upsample: bool, count: int, settings: Settings) -> Case:
    x = torch.randn(1, side, side, channels, device=settings.device)
    weight = torch.randn(out_channels, channels, 3, 3, device=settings.device) / (9 * channels) ** 0.5
    bias, gamma = torch.randn(out_channels, device=settings.device), torch.rand(channels, device=settings.device)
    packed, fused = pack_conv3x3(weight, upsample), None if upsample else gamma
    tap = weight.contiguous(memory_format=torch.channels_last)

    def direct():
        y = x if fused is None else channel_norm_silu(x, gamma)
        y = y.permute(0, 3, 1, 2)
        y = F.interpolate(y, scale_factor=2.0, mode="nearest-exact") if upsample else y
        return F.conv2d(y, tap, bias, padding=1).permute(0, 2, 3, 1)

    flops = 2 * 9 * channels * out_channels * side * side * (4 if upsample else 1)
    rows = max(1, flops // (2 * 512 * 512))
    a, b = torch.randn(rows, 512, device=settings.device), torch.randn(512, 512, device=settings.device)
    what = "upsampling " if upsample else ""
    return compare(
        SUITE, f"{what}{channels} to {out_channels}, {side} x {side} ({count} in the decoder)",
        {DIRECT: direct, OURS: lambda: conv3x3(x, weight, bias, None, fused, upsample, True, packed)}, settings,
        tolerance=1e-4, roof=lambda: torch.mm(a, b), flops=flops,
        tags={"task": "layer", "channels": channels, "out": out_channels, "side": side, "upsample": upsample},
    )  # fmt: skip


def bars(measured: list[Case]) -> list[Bar]:
    found = []
    for case in measured:
        if case.suite != SUITE or case.tags["task"] not in GOALS:
            continue
        eager, over_compiled = GOALS[case.tags["task"]]
        found.append(Bar(f"{case.name} over diffusers eager", eager, speedup(case, OURS)))
        if over_compiled:
            ratio = speedup(case, OURS, COMPILED)
            found.append(Bar(f"{case.name} over diffusers compiled", over_compiled, ratio))
    memory = find(measured, SUITE, task="memory")
    if memory is not None:
        share = memory.memory[OURS] / memory.memory[BASELINE] if memory.memory[BASELINE] else None
        found.append(Bar(f"{memory.name}, part of diffusers'", GOAL_MEMORY, share, at_most=True))
    strips = find(measured, SUITE, task="strips")
    if strips is not None:
        found.append(Bar(f"{strips.name}, bytes", strips.tags["limit"], strips.memory[OURS] or None, at_most=True))
    return found
