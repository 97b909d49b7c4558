"""An estimate of what a forward pass takes on an H200, from what can be known without one; docs/gpu-status.md shows it.

A kernel of ours takes the longest of three times, or a little more where two are alike: its bytes at the speed of a
copy, its instructions at the rate at which the processors issue them, and the waits of its blocks for memory, of which
registers and shared memory let so many be under way at once (gpu_counts.json has these facts, before and after the
kernels were last changed). Products and attention take their operations at the rates of the libraries that compute
them. These rates are stated below with their sources, and measured ones take their place where the newest results of
`gpu_check` on an H200 have any.

    python -m benchmarks.gpu_model
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

COUNTS = Path(__file__).with_name("gpu_counts.json")
BUDGET = Path(__file__).parents[1] / "tests" / "compile_cuda" / "budget.json"
WIDTH, BLOCKS = 3072, 60
TEXT = (64, 16)  # tokens of the prompt and of the negative prompt, as gpu_bench has them


@dataclass(frozen=True)
class Machine:
    """What an H200 does. Rates per second."""

    copy: float = 4.3e12  # bytes read and written: 90 % of the memory's 4.8e12
    weights: float = 3.2e12  # bytes of weights that products of few rows read
    processors: int = 132
    issued: float = 132 * 4 * 1.83e9  # instructions of warps: four schedulers a processor, at the clock of 989 TFLOP/s
    wait: float = 0.5e-6  # seconds from a load to its use
    gap: float = 1.2e-6  # seconds between two kernels of a CUDA graph
    call: float = 11e-6  # seconds of Python for a kernel outside of a graph
    products: float = 680e12  # operations, 8192 rows; 672e12 measured for 4096 x 3072 x 12288 (sglang 33536)
    products_few: float = 600e12  # 2048 rows
    cudnn: float = 600e12  # operations of attention (FlashAttention's assets/flash3_fp16_fwd.png: 609e12)
    flash2: float = 330e12
    flash3: float = 638e12  # 4096 tokens, the same picture
    plan: float = 0.44  # seconds in which cuDNN plans attention of a new length (FunASR 3704, torch 2.11 on a B200)
    queue: float = 477e-6  # seconds of Python to queue a block of a pair
    convolutions: float = 360e12
    efficient: float = 65e12  # torch's memory-efficient attention, 384 channels


def kernel_time(k: dict[str, Any], rows: float, machine: Machine) -> float:
    """Seconds of a kernel for `rows` rows of its op."""
    blocks = max(1.0, k["blocks"] * rows)
    under_way = min(blocks, machine.processors * resident(k))
    times = (
        k["bytes"] * rows / machine.copy,
        k["instructions"] * rows / machine.issued,
        blocks / under_way * k["waits"] * machine.wait,
    )
    return sum(t**4 for t in times) ** 0.25  # 19 % above two that are alike


def resident(k: dict[str, Any]) -> int:
    """Blocks of a kernel that a processor holds at once."""
    registers = -(-k["registers"] // 8) * 8 * -(-k["threads"] // 32) * 32
    limits = [32, 2048 // k["threads"], 65536 // registers]
    if k["shared"]:
        limits.append(227 * 1024 // (k["shared"] + 1024))
    return max(1, min(limits))


def of_copy(k: dict[str, Any], rows: float, machine: Machine) -> float:
    """The speed of a kernel as a share of a copy of as many bytes."""
    return k["bytes"] * rows / machine.copy / kernel_time(k, rows, machine)


@dataclass(frozen=True)
class State:
    """Of the package: its kernels, and how a pass uses the GPU."""

    counts: str  # "before" or "now"
    fused_gelu: bool = True  # in cuBLASLt's epilogue
    text_beside: bool = True  # text products on a stream of their own
    cats: bool = False  # of attention's parts
    chunks: bool = True  # the VAE's attention in products of a library
    sums: bool = True  # of its biases and residuals in few passes


BEFORE, NOW = State("before", False, False, True, False, False), State("now")


def forward(side: int, state: State, counts: dict[str, Any], machine: Machine) -> dict[str, float]:
    """Milliseconds of one branch of a packed guidance pair, an image of `side` x `side` tokens, by item."""
    ops = {op: sides["forward"] for op, sides in counts[state.counts].items()}
    rows, text = 2 * side * side, sum(TEXT)
    large = rows >= 8192
    seconds: dict[str, float] = {}
    seconds["image products"] = 24 * rows * WIDTH**2 / (machine.products if large else machine.products_few)
    lengths = [side * side + n for n in TEXT]
    rate = machine.cudnn if large else machine.flash2  # one sample after another, or one launch
    seconds["attention"] = sum(4 * n * n * WIDTH for n in lengths) / rate
    products = 24 * WIDTH**2 / machine.weights  # two bytes of each of 12 weights
    # Beside the image's products they run where these leave processors idle, in their last wave.
    seconds["text products"] = products * (0.15 if state.text_beside else 1.0)
    if not state.fused_gelu:
        seconds["gelu"] = kernel_time(ops["gelu_tanh"], rows, machine)
    seconds["gate, residual and norm"] = 2 * kernel_time(ops["gate_residual_norm_modulate"], rows, machine)
    passes = 2 * kernel_time(ops["gate_residual_norm_modulate"], text, machine)
    passes += 0.0 if state.fused_gelu else kernel_time(ops["gelu_tanh"], text, machine)
    seconds["the same of the text"] = 0.0 if state.text_beside else passes
    seconds["norm and rotation of q and k"] = kernel_time(ops["qk_norm_rope"], rows + text, machine)
    row = 2 * 2 * WIDTH / machine.copy  # read and written
    copied = (rows + text) * (2 if large else 1) if state.cats else text
    seconds["copies around attention"] = copied * row
    # Products, norms and GELU of each stream, one rotation, attention of each sample where it is large, and copies.
    kernels = 6 + 2 + (not state.fused_gelu) + 1 + (2 if large else 1) + (2 * (1 + large) if state.cats else 1)
    kernels += 2 if not state.cats else 0  # projections of each sample
    kernels += 0 if state.text_beside else 8 + (not state.fused_gelu)
    seconds["gaps between kernels"] = kernels * machine.gap
    return {name: 1e3 * BLOCKS * s / 2 for name, s in seconds.items() if s}


def lengths(counts: dict[str, Any], machine: Machine) -> list[list[str]]:
    """Seconds of a picture with guidance, by how a CUDA graph takes lengths of text: of a length that was there before,
    and of a new one, which costs two plans where cuDNN computes attention (the last block has its own), and where a
    graph has one length two passes that Python queues, one of which also runs."""
    rows = []
    for side, how, rate in (
        (64, "one length, cuDNN", machine.cudnn),
        (64, "any length, FlashAttention-2", machine.flash2),
        (64, "any length, FlashAttention-3", machine.flash3),
        (32, "one length, FlashAttention-2", machine.flash2),
        (32, "any length, FlashAttention-2", machine.flash2),
    ):
        times = forward(side, NOW, counts, machine)
        used = machine.cudnn if side == 64 else machine.flash2  # by the attention of `forward`
        pair = 2e-3 * (sum(times.values()) + times["attention"] * (used / rate - 1))
        new = 2 * machine.queue * BLOCKS + pair + (2 * machine.plan if rate == machine.cudnn else 0)
        cells = [f"{t:.1f}" for steps in (8, 50) for t in (steps * pair, steps * pair + new * how.startswith("one"))]
        rows.append([f"{16 * side} pixels, {how}", *cells])
    return rows


# Of a decoder at 1024 pixels, by channels: pixels that norms see, and those of residual blocks, each of which has a
# second norm behind a bias, and ends in a bias and a residual. Values of upsampled images and of other biases: of the
# first convolution, of attention's two, of a shortcut, of the last convolution.
NORMS = {384: 11 * 128**2 + 5 * 256**2, 192: 256**2 + 6 * 512**2, 96: 7 * 1024**2}
RESIDUAL = {384: 5 * 128**2 + 3 * 256**2, 192: 3 * 512**2, 96: 3 * 1024**2}
UPSAMPLED = 192 * 256**2 + 192 * 512**2 + 96 * 1024**2
OTHER_BIASES = 384 * (5 * 128**2 + 256**2) + 3 * 1024**2
CONVOLUTIONS = 3.83e12  # operations


def decode(state: State, counts: dict[str, Any], machine: Machine) -> dict[str, float]:
    """Milliseconds of the VAE's decoder at 1024 pixels, by item."""
    seconds = {"convolutions": CONVOLUTIONS / machine.convolutions}
    tokens, channels = 128 * 128, 384
    seconds["middle attention"] = 4 * tokens**2 * channels / machine.efficient
    if state.chunks:  # scores in float32: written, through softmax, rounded, read
        seconds["middle attention"] = 4 * tokens**2 * channels / machine.products_few + tokens**2 * 20 / machine.copy
    ops = counts[state.counts]

    def passes(op: str, pixels: dict[int, int]) -> float:
        return sum(kernel_time(ops[f"{op}, {c} channels"]["forward"], n, machine) for c, n in pixels.items())

    ended = sum(c * n for c, n in RESIDUAL.items())
    if state.sums:
        plain = {c: n - RESIDUAL[c] for c, n in NORMS.items()}
        seconds["norms and SiLU"] = passes("channel_norm_silu", plain) + passes("bias, channel_norm_silu", RESIDUAL)
        seconds["biases, residuals"] = passes("bias, residual", RESIDUAL) + OTHER_BIASES * 4 / machine.copy
    else:
        seconds["norms and SiLU"] = passes("channel_norm_silu", NORMS)
        seconds["biases, residuals"] = ((4 + 4 + 6) * ended + 4 * OTHER_BIASES) / machine.copy
    # The phases of an upsampled image are put together, with their bias or behind a pass for it.
    seconds["upsampled images"] = UPSAMPLED * (4 if state.sums else 8) / machine.copy
    return {name: 1e3 * s for name, s in seconds.items()}


def left_out(machine: Machine) -> str:
    """What was estimated and left as it is."""
    tiles = 2 * 64 * 64 * WIDTH / (128 * 256) / machine.processors  # of a square product of a pair at 1024 pixels
    reads = 8 * tiles * 2 * machine.wait * BLOCKS / 2 * 1e3
    divisions = 12 * tiles * 180 / 1.83e9 * BLOCKS / 2 * 1e3  # two of 64 bits, 90 cycles each
    return LEFT.format(reads=reads, divisions=divisions, queue=machine.queue * BLOCKS * 1e3)


def measured(results: list[dict[str, Any]]) -> Machine:
    """The stated rates, or those of the newest results of an H200."""
    machine = Machine()
    for r in results:
        if "H200" not in r["gpu"]:
            continue
        for c in r.get("ops", []):
            if c["op"] == "gelu_tanh" and c["dtype"] == "bfloat16" and "copy" in c.get("forward ms", {}):
                machine = replace(machine, copy=c["bytes"] / c["forward ms"]["copy"] * 1e3)
        for rows, name in ((8192, "products"), (2048, "products_few")):
            cases = [c for c in r.get("gemms", []) if c["rows"][0] == rows and "torch" in c["ms"]]
            if cases:
                rate = sum(c["flops"] for c in cases) / sum(c["ms"]["torch"] for c in cases) * 1e3
                machine = replace(machine, **{name: rate})
        return machine
    return machine


def section(results: list[dict[str, Any]]) -> str:
    """Of docs/gpu-status.md."""
    counts, machine = json.loads(COUNTS.read_text(encoding="utf-8")), measured(results)
    text = HEAD
    for title, before, now in (
        ("1024 pixels, one branch of a pair, ms", *(forward(64, s, counts, machine) for s in (BEFORE, NOW))),
        ("512 pixels, one branch of a pair, ms", *(forward(32, s, counts, machine) for s in (BEFORE, NOW))),
        ("VAE, decoding 1024 pixels, ms", *(decode(s, counts, machine) for s in (BEFORE, NOW))),
    ):
        rows = [[n, *(f"{t[n]:.1f}" if n in t else "0" for t in (before, now))] for n in before]
        text += table([title, "before", "now"], [*rows, ["sum", *(f"{sum(t.values()):.1f}" for t in (before, now))]])
    head = ["", "8 steps", "8 steps, new length", "50 steps", "50 steps, new length"]
    text += LENGTHS + table(head, lengths(counts, machine)) + left_out(machine)
    rows = []
    for op in counts["now"]:
        for direction in counts["now"][op]:
            cells = [op, direction]
            for state in ("before", "now"):
                if op not in counts[state]:
                    cells += [""] * 5
                    continue
                k, size = counts[state][op][direction], 4096 if "channels" not in op else 512 * 512
                cells += [f"{k['registers']}", f"{resident(k) * k['threads']}", f"{k['waits']:.0f}",
                          f"{k['instructions'] * 32 / k['bytes']:.2f}", f"{of_copy(k, size, machine):.0%}"]  # fmt: skip
            rows.append(cells)
    names = ["registers", "threads", "waits", "instructions a byte", "of a copy"]
    text += KERNELS + table(["op", "", *[f"{n} {s}" for s in ("before:", "now:") for n in names]], rows)
    return text + integers()


# Bytes of shared memory that the launch of a kernel asks for, at the released model's widths, and threads.
INTEGERS = {
    "int8_rows_row<BFloat16, true, false>": ("rotate and round, 3072 wide", 4 * 3072, 192),
    "int8_rows_row<BFloat16, true, true>": ("the same, to float8", 4 * 3072, 192),
    "linear_int8_tile<BFloat16, Int8>": ("products, weights in 8 bits", 3 * 16 * 1024, 128),
    "linear_int8_tile<BFloat16, Int4>": ("products, weights in 4 bits", 3 * (8192 + 8 * 576), 128),
    "linear_int8_tile<BFloat16, E4m3>": ("products of float8", 3 * 16 * 1024, 128),
    "device_kernel<LinearInt8Sm90<false, bfloat16_t, 6, LargeTile> >": ("weights in 8 bits by wgmma", 214016, 384),
    "device_kernel<LinearInt8Sm90<true, bfloat16_t, 2, LargeTile> >": ("the same, gate and residual", 230400, 384),
}


def integers() -> str:
    """The kernels of 8-bit layers: what they take of a multiprocessor."""
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))
    rows = []
    for kernel, (what, shared, threads) in INTEGERS.items():
        of_each = [budget[architecture].get(kernel) for architecture in ("sm_80", "sm_90a", "sm_100a")]
        registers = [str(found[0]) if found else "" for found in of_each]
        facts = {"registers": of_each[1][0], "threads": threads, "shared": shared + of_each[1][1]}
        rows.append([what, *registers, f"{shared / 1024:.1f}", str(threads), str(resident(facts))])
    head = [
        "",
        "registers, sm_80",
        "sm_90a",
        "sm_100a",
        "shared memory, KiB",
        "threads",
        "blocks on a processor of sm_90a",
    ]
    return INTEGERS_HEAD + table(head, rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


HEAD = """
## An estimate for an H200, not a measurement

What `python -m benchmarks.gpu_model` makes of the compiled kernels and of rates that others measured, or of those of
the newest results of an H200 once there are any. "Before" is the package before its kernels were last changed for what
this model says. Both branches of guidance are packed, CUDA graphs on.
"""
LENGTHS = """
Steps of a picture with guidance, in seconds, by how a CUDA graph takes the length of the prompt
(`enable_cuda_graphs(lengths=)`). "auto" has graphs of one length on Hopper where an image has 1408 tokens or more and
FlashAttention-3 is not activated for torch, and of any length elsewhere:
"""
LEFT = """
The drop-in's loop asks for one branch after another. Python queues each in {queue:.0f} ms, more than the GPU takes at
512 pixels; `accelerate(pipe, cuda_graphs=True)` takes that away.

Left as it is, of CUTLASS's linear layers, which gain nothing as long as cuBLASLt computes them, as it does until a
measurement says otherwise: the bias and gate that `linear_gate_residual` reads before each of the eight parts of a
tile, at most {reads:.1f} ms of a branch at 1024 pixels, if every part waits for them (all read at once would take 128
registers). Its products have four stages now, as the others; and no tile divides numbers of 64 bits any more, which
took {divisions:.1f} ms if nothing hid it.
"""
KERNELS = """
The kernels, in bfloat16 at 4096 tokens (channel_norm_silu: 512 x 512 pixels): registers of a thread, threads on a
processor, waits of a block for memory one after another, instructions of a thread for each byte, and the speed as a
share of a copy's.
"""

INTEGERS_HEAD = """
The kernels of layers in 8 bits, in bfloat16, as compiled; those by `wgmma` hand registers from the threads that load
to those that multiply. No time is estimated: at what rate `mma.sync` and `wgmma` multiply integers on this GPU is not
known here. Products of float8 are compiled for sm_89 in the place of sm_80; they are interpreted like the others, and
have never run on a GPU.
"""

if __name__ == "__main__":
    from benchmarks.gpu_status import results as all_results

    print(section(all_results()))
