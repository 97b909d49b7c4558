"""Every fused op at the released model's width against what diffusers runs in its place, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import (
    BASELINE,
    COMPILED,
    OURS,
    Bar,
    Case,
    Settings,
    compare,
    compiled,
    dtype_name,
    find,
    speedup,
)
from qwen_image_fast import ops
from qwen_image_fast.models.packing import pack
from qwen_image_fast.ops.linear_amx import AVAILABLE

SUITE = "ops"
FUSED = ("layer_norm_modulate", "gate_residual_norm_modulate", "qk_norm_rope", "guided_step")
GOAL = 2.0
AXES = (16, 56, 56)
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@dataclass
class Subject:
    """An op and what it replaces, on the same inputs.

    Attributes:
        inputs: the floating-point inputs that have gradients. ours, theirs: called with them.
        bytes: read and written by an ideal forward pass. flops: where products dominate instead.
        kernel: what `ours` is where it takes the CUDA kernel of this package before torch's; None: it always does.
    """

    op: str
    label: str
    inputs: list[Tensor]
    ours: Callable
    theirs: Callable
    bytes: int
    flops: int | None = None
    kernel: Callable | None = None


def subjects(settings: Settings, dtype: torch.dtype, heads: int = 24, side: int = 32, txt: int = 128):
    """The cases: `side`^2 image tokens and `txt` text tokens of `heads` heads of 128."""
    for function in (
        layer_norm_modulate, gate_residual_norm_modulate, qk_norm_rope, gelu_tanh, guided_step, channel_norm_silu
    ):  # fmt: skip
        yield function(settings.device, dtype, heads, side, txt)
    if AVAILABLE and settings.device == "cpu" and dtype == torch.float32:
        yield linear_amx(dtype, heads, side)
    yield joint_attention(settings.device, dtype, heads, side, (txt,))
    yield joint_attention(settings.device, dtype, heads, side, (txt, txt // 4))


def random(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def layer_norm_modulate(device, dtype, heads, side, txt) -> Subject:
    rows, width = side * side, heads * 128
    norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
    x, shift, scale = (random(device, dtype, *s) for s in ((1, rows, width), (1, width), (1, width)))

    def theirs(x, shift, scale):
        return norm(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    label = f"{rows} x {width}"
    return Subject("layer_norm_modulate", label, [x, shift, scale], ops.layer_norm_modulate, theirs, 2 * x.nbytes)


def gate_residual_norm_modulate(device, dtype, heads, side, txt) -> Subject:
    rows, width = side * side, heads * 128
    norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
    x, y = (random(device, dtype, 1, rows, width) for _ in range(2))
    gate, shift, scale = (random(device, dtype, 1, width) for _ in range(3))

    def theirs(x, y, gate, shift, scale):
        residual = x + gate.unsqueeze(1) * y
        return residual, norm(residual) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    inputs = [x, y, gate, shift, scale]
    op = ops.gate_residual_norm_modulate
    return Subject("gate_residual_norm_modulate", f"{rows} x {width}", inputs, op, theirs, 4 * x.nbytes)


def qk_norm_rope(device, dtype, heads, side, txt) -> Subject:
    from diffusers.models.normalization import RMSNorm
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope, apply_rotary_emb_qwen

    rows, head_dim = side * side, 128
    layout = pack((((1, side, side),),), [txt], axes_dim=AXES, device=device)
    img_freqs, txt_freqs = QwenEmbedRope(10000, list(AXES), scale_rope=True)(
        [[(1, side, side)]], max_txt_seq_len=txt, device=torch.device(device)
    )
    norms = [RMSNorm(head_dim, eps=1e-6).to(device, dtype) for _ in range(4)]
    weights = [random(device, dtype, head_dim) for _ in range(4)]
    for norm, weight in zip(norms, weights):
        norm.weight = nn.Parameter(weight, requires_grad=False)
    streams = [random(device, dtype, n, heads, head_dim) for n in (rows, rows, rows, txt, txt, txt)]

    def theirs(*streams):
        img_q, img_k, img_v, txt_q, txt_k, txt_v = (t[None] for t in streams)
        img_q, img_k, txt_q, txt_k = (n(t) for n, t in zip(norms, (img_q, img_k, txt_q, txt_k)))
        img_q, img_k = (apply_rotary_emb_qwen(t, img_freqs, use_real=False) for t in (img_q, img_k))
        txt_q, txt_k = (apply_rotary_emb_qwen(t, txt_freqs, use_real=False) for t in (txt_q, txt_k))
        pairs = ((txt_q, img_q), (txt_k, img_k), (txt_v, img_v))
        return tuple(torch.cat(pair, dim=1) for pair in pairs)

    def ours(*streams):
        return ops.qk_norm_rope(
            *streams, *weights, layout.img_rope, layout.txt_rope, layout.cu_img, layout.cu_txt, 1e-6
        )

    moved = 2 * sum(t.nbytes for t in streams) + layout.img_rope.nbytes + layout.txt_rope.nbytes
    return Subject("qk_norm_rope", f"{rows} + {txt} tokens, {heads} x {head_dim}", streams, ours, theirs, moved)


def gelu_tanh(device, dtype, heads, side, txt) -> Subject:
    """Out of place: in place, as the model calls it without gradients, repeated calls would not see the same input."""
    x = random(device, dtype, 1, side * side, 4 * heads * 128)

    def theirs(x):
        return F.gelu(x, approximate="tanh")

    return Subject("gelu_tanh", f"{side * side} x {x.shape[-1]}", [x], ops.gelu_tanh, theirs, 2 * x.nbytes)


def guided_step(device, dtype, heads, side, txt) -> Subject:
    from diffusers import FlowMatchEulerDiscreteScheduler

    rows, index, guidance = side * side, 5, 4.0
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(20, device=device)
    timestep = scheduler.timesteps[index]
    dt = (scheduler.sigmas[index + 1] - scheduler.sigmas[index]).reshape(1).to(device)
    sample, cond, uncond = (random(device, dtype, 1, rows, 64) for _ in range(3))

    def theirs(sample, cond, uncond):
        scheduler._step_index = index
        combined = uncond + guidance * (cond - uncond)
        cond_norm = torch.norm(cond, dim=-1, keepdim=True)
        noise_norm = torch.norm(combined, dim=-1, keepdim=True)
        velocity = combined * (cond_norm / noise_norm)
        return scheduler.step(velocity, timestep, sample, return_dict=False)[0]

    def ours(sample, cond, uncond):
        return ops.guided_step(sample, cond, uncond, dt, guidance)

    return Subject("guided_step", f"{rows} x 64", [sample, cond, uncond], ours, theirs, 4 * sample.nbytes)


def channel_norm_silu(device, dtype, heads, side, txt) -> Subject:
    """At full size, where the VAE has 96 channels; channels last for both."""
    pixels, channels = 16 * side, 4 * heads
    x, gamma = random(device, dtype, 1, pixels, pixels, channels), random(device, dtype, channels)

    def theirs(x, gamma):
        y = F.normalize(x.permute(0, 3, 1, 2).float(), dim=1).to(dtype) * channels**0.5 * gamma[:, None, None]
        return F.silu(y).permute(0, 2, 3, 1)

    label = f"{pixels} x {pixels} x {channels}"
    return Subject("channel_norm_silu", label, [x, gamma], ops.channel_norm_silu, theirs, 2 * x.nbytes)


def linear_amx(dtype, heads, side) -> Subject:
    rows, width = side * side, heads * 128
    x, weight, bias = (random("cpu", dtype, *s) for s in ((rows, width), (width, width), (width,)))
    weight /= width**0.5

    def ours(x, weight, bias):
        return ops.linear_amx([x], [weight], [bias])[0]

    label = f"{rows} x {width}, {width} columns"
    moved = 2 * x.nbytes + weight.nbytes
    return Subject("linear_amx", label, [x, weight, bias], ours, F.linear, moved, 2 * rows * width * width)


def joint_attention(device, dtype, heads, side, txt: tuple[int, ...]) -> Subject:
    """One sample; or several with prompts of different lengths, which diffusers pads and masks."""
    rows, head_dim, longest = side * side, 128, max(txt)
    lengths = tuple(n + rows for n in txt)
    q, k, v = (random(device, dtype, sum(lengths), heads, head_dim) for _ in range(3))
    mask = None
    if len(set(txt)) > 1:
        mask = torch.arange(longest + rows, device=device) >= longest - torch.tensor(txt, device=device)[:, None]
        mask = mask[:, None, None, :]

    def theirs(*qkv):
        if mask is not None:
            qkv = tuple(
                torch.stack([F.pad(s, (0, 0, 0, 0, longest + rows - len(s), 0)) for s in t.split(lengths)]) for t in qkv
            )
        else:
            qkv = tuple(t[None] for t in qkv)
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in qkv), attn_mask=mask).transpose(1, 2)
        return torch.cat([o[longest + rows - n :] for o, n in zip(out, lengths)])

    def ours(*qkv):
        return ops.joint_attention(*qkv, lengths)

    label = f"{rows} image + {' and '.join(str(n) for n in txt)} text tokens"
    flops = sum(4 * n * n * heads * head_dim for n in lengths)

    def kernel(*qkv):
        return torch.ops.qwen_image_fast.joint_attention(*qkv, lengths, lengths)[0]

    return Subject("joint_attention", label, [q, k, v], ours, theirs, 4 * q.nbytes, flops, kernel)


def training(fn: Callable, inputs: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Forward, then the gradients of all inputs for a fixed gradient of the results."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    with torch.no_grad():
        out = fn(*inputs)
    grads = [torch.ones_like(t) for t in (out if isinstance(out, tuple) else (out,))]

    def run():
        out = fn(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        return torch.autograd.grad(out, leaves, grads)

    return run


def inference(fn: Callable, inputs: list[Tensor]) -> Callable:
    def run():
        with torch.no_grad():
            return fn(*inputs)

    return run


def copy_of(bytes: int, device: str) -> Callable:
    """A copy that moves `bytes` in all."""
    source = torch.ones(bytes // 8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def compare_subject(subject: Subject, dtype: torch.dtype, backward: bool, settings: Settings) -> Case:
    direction = "forward + backward" if backward else "forward"
    wrap = training if backward else inference
    variants = {BASELINE: wrap(subject.theirs, subject.inputs), OURS: wrap(subject.ours, subject.inputs)}
    if settings.compile:
        variants[COMPILED] = wrap(compiled(subject.theirs), subject.inputs)
    return compare(
        SUITE, f"{subject.op} {subject.label} {dtype_name(dtype)} {direction}", variants, settings,
        tolerance=TOLERANCE[dtype], cold=True, bytes=None if backward else subject.bytes,
        flops=None if backward else subject.flops,
        roof=None if backward or subject.flops else copy_of(subject.bytes, settings.device),
        goals={OURS: GOAL} if subject.op in FUSED and dtype == torch.float32 and not backward else {},
        tags={"op": subject.op, "dtype": dtype_name(dtype), "direction": direction, "label": subject.label},
    )  # fmt: skip


def cases(settings: Settings, dtypes=(torch.float32, torch.bfloat16), **sizes: int) -> Iterator[Case]:
    torch.manual_seed(0)
    for dtype in dtypes:
        for subject in subjects(settings, dtype, **sizes):
            yield compare_subject(subject, dtype, False, settings)
            # torch's attention backward in 16 bit takes several seconds on a CPU, and joint_attention calls it too.
            if subject.op != "joint_attention" or dtype == torch.float32 or settings.device.startswith("cuda"):
                yield compare_subject(subject, dtype, True, settings)


def bars(measured: list[Case]) -> list[Bar]:
    found = {op: find(measured, SUITE, op=op, dtype="float32", direction="forward") for op in FUSED}
    return [Bar(f"{op} over diffusers eager, float32", GOAL, speedup(case, OURS)) for op, case in found.items()]
