"""What `gpu_check` measures on a GPU: ops against a copy, the whole transformer against diffusers, training.

    python -m benchmarks.gpu_bench ops|block|transformer|training|compiled results.json

Each suite adds its list to the file after every case, so that a run that is cut short keeps what it has. Times are
medians of event timings with caches overwritten before each sample. Without a GPU it runs on the CPU, for tests.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_block, bench_ops
from benchmarks.harness import Settings, compiled, difference, dtype_name
from qwen_image_fast.ops.joint_attention import describe_attention

# Dense bf16 peak in FLOP/s, by what the device's name contains.
PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "4090": 165e12}
# Rows moved by an op backward, as a multiple of those moved forward.
BACKWARD_BYTES = {
    "layer_norm_modulate": 3 / 2, "gate_residual_norm_modulate": 6 / 4, "qk_norm_rope": 8 / 6, "gelu_tanh": 3 / 2,
    "guided_step": 5 / 4, "channel_norm_silu": 3 / 2,
}  # fmt: skip
TEXT = (64, 16)  # tokens of the prompt and of the negative prompt
Record = dict[str, Any]


def cuda() -> bool:
    return torch.cuda.is_available()


def device() -> str:
    return "cuda" if cuda() else "cpu"


class Clock:
    """Milliseconds of one call on the device, the caches overwritten before it.

    The overwriting also keeps the device busy while the call is queued, so that the launch is not measured.
    """

    def __init__(self, megabytes: int = 512):
        self.evict = torch.empty((megabytes << 18) if cuda() else 1024, device=device())

    def once(self, fn: Callable[[], Any]) -> float:
        self.evict.fill_(1.0)
        if not cuda():
            start = time.perf_counter()
            fn()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        fn()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def __call__(self, fn: Callable[[], Any], rounds: int = 30, warmup: int = 3) -> float:
        for _ in range(warmup):
            fn()
        return statistics.median(self.once(fn) for _ in range(rounds))


# ---- ops ---------------------------------------------------------------------------------------------------------


def ops(heads: int = 24, side: int = 64, compile: bool = False, rounds: int = 30) -> Iterator[Record]:
    """Every op with its bandwidth, and that of a copy of as many bytes; then in bf16 what torch compiles."""
    clock, settings, records = Clock(), Settings(device()), []
    for dtype in (torch.bfloat16, torch.float32):
        for s in bench_ops.subjects(settings, dtype, heads, side, TEXT[0]):
            records.append(measured_op(s, dtype, clock, rounds))
            yield records[-1]
    if not compile:
        return
    for s, record in zip(bench_ops.subjects(settings, torch.bfloat16, heads, side, TEXT[0]), records):
        fused = compiled(s.theirs)
        with torch.no_grad():
            record["forward ms"]["torch compiled"] = ms = clock(lambda f=fused, s=s: f(*s.inputs), rounds)
        if s.flops:
            record["forward TFLOP/s"]["torch compiled"] = s.flops / ms / 1e9
        yield record


def measured_op(s: bench_ops.Subject, dtype: torch.dtype, clock: Clock, rounds: int) -> Record:
    record: Record = {"op": s.op, "dtype": dtype_name(dtype), "label": s.label, "bytes": s.bytes, "flops": s.flops}
    sides = {"ours": s.ours, "torch": s.theirs}
    if s.kernel and cuda() and dtype in (torch.float16, torch.bfloat16):
        sides["ours, own kernel"] = s.kernel
    with torch.no_grad():
        record["difference"] = {
            n: difference(fn(*s.inputs), s.theirs(*s.inputs)) for n, fn in sides.items() if n != "torch"
        }
        times = {name: clock(lambda f=fn: f(*s.inputs), rounds) for name, fn in sides.items()}
        times["copy"] = copy_time(s.bytes, clock, rounds)
    record["forward ms"] = times
    leaves = [t.detach().clone().requires_grad_() for t in s.inputs]
    backward = {}
    for name, fn in sides.items():
        out = fn(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        grads = [torch.ones_like(o) for o in out]
        backward[name] = clock(lambda o=out, g=grads: torch.autograd.grad(o, leaves, g, retain_graph=True), rounds)
    if s.op in BACKWARD_BYTES:
        moved = int(s.bytes * BACKWARD_BYTES[s.op])
        backward["copy"] = copy_time(moved, clock, rounds)
        record["backward bytes"] = moved
        for direction, table, count in (("forward", times, s.bytes), ("backward", backward, moved)):
            record[f"{direction} GB/s"] = count / table["ours"] / 1e6
            record[f"{direction} of copy"] = table["copy"] / table["ours"]
    if s.flops:
        record["forward TFLOP/s"] = {n: s.flops / t / 1e9 for n, t in times.items() if n != "copy"}
        record["backward TFLOP/s"] = {n: 2.5 * s.flops / t / 1e9 for n, t in backward.items()}
    if s.op == "joint_attention":
        record["kernels"] = describe_attention(device(), dtype)
    record["backward ms"] = backward
    return record


def copy_time(moved: int, clock: Clock, rounds: int) -> float:
    source = torch.zeros(max(1, moved // 2), dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    return clock(lambda: target.copy_(source), rounds)


# ---- one block ---------------------------------------------------------------------------------------------------


def block(sides=(64, 32, 83), heads: int = 24, rounds: int = 20, compile: bool = False) -> Iterator[Record]:
    """A middle block in bf16 at 1024, 512 and 1328 pixels, and its matrix products and attention alone.

    diffusers' block is compiled when all else is measured.
    """
    from qwen_image_fast.models.transformer_block import run_block

    clock, weights, measured = Clock(), None, []
    for side in sides:
        pair = bench_block.BlockPair(device(), heads, (side, side), TEXT[0], weights, dtype=torch.bfloat16)
        weights = pair.weights
        with torch.no_grad():
            pair.normalise()
            runs: dict[str, Callable[[], Any]] = {
                "ours": lambda p=pair: p.run_ours(run_block, p.mods),
                "diffusers": lambda p=pair: p.run_diffusers(p.theirs),
                "products alone": pair.products,
            }
            record: Record = {"pixels": side * 16, "difference": difference(runs["ours"](), runs["diffusers"]())}
            times = {name: clock(fn, rounds) for name, fn in runs.items()}
        record |= {"block ms": times, "TFLOP/s": {n: pair.flops / t / 1e9 for n, t in times.items()}}
        measured.append((pair, record))
        yield record
    for pair, record in measured if compile else ():
        fused = compiled(pair.theirs)
        with torch.no_grad():
            ms = clock(lambda p=pair, f=fused: p.run_diffusers(f), rounds)
        record["block ms"]["diffusers compiled"] = ms
        record["TFLOP/s"]["diffusers compiled"] = pair.flops / ms / 1e9
        yield record


# ---- the transformer ---------------------------------------------------------------------------------------------


def random_weights(like: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Uniform with variance 1 / fan-in; norm weights one."""
    weights = {}
    for name, t in like.items():
        bound = (3 / t.shape[-1]) ** 0.5
        weights[name] = torch.empty(t.shape, device=device(), dtype=dtype).uniform_(-bound, bound)
        if "norm" in name and name.endswith("weight") and t.dim() == 1:
            weights[name].fill_(1.0)
    return weights


class Pair:
    """Our transformer and diffusers', on the same random weights."""

    def __init__(self, dtype: torch.dtype, trained: bool = False, **config: Any):
        from diffusers import QwenImageTransformer2DModel as Diffusers

        from qwen_image_fast.models.transformer import QwenImageTransformer2DModel

        with torch.device("meta"):
            self.ours, self.theirs = QwenImageTransformer2DModel(**config), Diffusers(**config)
        weights = random_weights(self.ours.state_dict(), dtype)
        for model in (self.ours, self.theirs):
            model.load_state_dict(weights, assign=True)
            model.eval().requires_grad_(trained)
        # diffusers computes its rotation tables in the constructor, here on no device.
        rope = type(self.theirs.pos_embed)
        self.theirs.pos_embed = rope(10000, list(self.ours.config.axes_dims_rope), scale_rope=True)
        self.dtype = dtype
        self.parameters = sum(t.numel() for t in weights.values())
        self.bytes = sum(t.nbytes for t in weights.values())

    def inputs(self, side: int) -> None:
        c, self.grid = self.ours.config, (1, side, side)
        self.img = torch.randn(1, side * side, c.in_channels, device=device(), dtype=self.dtype)
        self.texts = [torch.randn(1, n, c.joint_attention_dim, device=device(), dtype=self.dtype) for n in TEXT]
        self.timestep = torch.tensor([0.7], device=device(), dtype=self.dtype)

    def by_diffusers(self, texts=None) -> list[torch.Tensor]:
        """One branch of guidance after another, as its pipeline calls it."""
        return [
            self.theirs(
                hidden_states=self.img, encoder_hidden_states=t, timestep=self.timestep, img_shapes=[[self.grid]],
                encoder_hidden_states_mask=None, return_dict=False,
            )[0]
            for t in texts or self.texts
        ]  # fmt: skip

    def by_ours(self, texts=None, modulation=None, any_length: bool = False) -> Callable[[], Any]:
        """Both branches packed; modulation vectors and embedded text, the same at every step, computed before.

        any_length: as a graph of a bucket of texts has them.
        """
        from qwen_image_fast.models.buckets import bucketed
        from qwen_image_fast.models.packing import pack

        texts = texts or self.texts
        layout = pack(
            ((self.grid,),) * len(texts), [t.shape[1] for t in texts], axes_dim=self.ours.config.axes_dims_rope,
            device=device(),
        )  # fmt: skip
        img = self.img[0].repeat(len(texts), 1)
        if modulation is not None:
            txt = self.ours.embed_text(torch.cat([t[0] for t in texts]))
            if any_length:
                layout = bucketed(layout)
                txt = torch.cat([txt, txt.new_zeros(len(layout.txt_rope) - len(txt), txt.shape[1])])
            return lambda: self.ours.forward_packed(img, txt, layout, modulation).chunk(len(texts))
        return lambda: self.ours.forward_packed(
            img, self.ours.embed_text(torch.cat([t[0] for t in texts])), layout, self.ours.modulation(self.timestep)
        ).chunk(len(texts))


def graphed(fn: Callable[[], Any]) -> Callable[[], Any]:
    """`fn` captured once and replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fn()

    def replay():
        graph.replay()
        return out

    return replay


def flops(tokens: int, width: int, layers: int) -> int:
    """Matrix products of the blocks without modulation, and attention, of one sample forward."""
    return layers * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)


def transformer(
    sides=(64, 32, 83), layers: int = 60, rounds: int = 5, compile: bool = False, seconds: float = 50.0, **config
) -> Iterator[Record]:
    """The released transformer with random bf16 weights: a guidance pair at 1024, 512 and 1328 pixels.

    diffusers' blocks are compiled anew for each size, as long as fewer than `seconds` have passed.
    """
    start = time.monotonic()
    pair = Pair(torch.bfloat16, num_layers=layers, **config)
    clock, records = Clock(), {}
    for side in sides:
        pair.inputs(side)
        with torch.no_grad():
            ours = pair.by_ours(modulation=pair.ours.modulation(pair.timestep))
            record: Record = {
                "pixels": side * 16, "layers": layers, "parameters": pair.parameters, "weight bytes": pair.bytes,
                "difference": difference(list(ours()), pair.by_diffusers()),
            }  # fmt: skip
            count = sum(flops(side * side + n, pair.ours.inner_dim, layers) for n in TEXT)
            times = {"ours": clock(ours, rounds, 1), "diffusers": clock(pair.by_diffusers, rounds, 1)}
            record["memory"] = {"ours": peak(ours), "diffusers": peak(pair.by_diffusers)}
            record |= {"pair ms": times, "TFLOP/s": {n: count / t / 1e9 for n, t in times.items()}}
            records[side] = record
            yield record
    for side, record in records.items() if cuda() else ():
        pair.inputs(side)
        with torch.no_grad():
            modulation = pair.ours.modulation(pair.timestep)
            for name, any_length in (("ours, CUDA graph", False), ("ours, graph of any length", True)):
                replay = graphed(pair.by_ours(modulation=modulation, any_length=any_length))
                record["pair ms"][name] = clock(replay, rounds, 1)
                del replay
        yield record
    if compile:
        pair.theirs.compile_repeated_blocks(dynamic=False)
    for side, record in records.items() if compile else ():
        if time.monotonic() - start > seconds:
            return
        pair.inputs(side)
        with torch.no_grad():
            record["pair ms"]["diffusers compiled"] = clock(pair.by_diffusers, rounds, 2)
        yield record


def peak(fn: Callable[[], Any]) -> int:
    """Bytes allocated during one call above what was allocated before."""
    if not cuda():
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# ---- training ----------------------------------------------------------------------------------------------------


def training(side: int = 64, layers: int = 8, rounds: int = 5, **config) -> Iterator[Record]:
    """Forward and backward of a few layers, all weights trained: time, memory, and model FLOP utilisation."""
    pair = Pair(torch.bfloat16, trained=True, num_layers=layers, **config)
    pair.inputs(side)
    text, clock = pair.texts[:1], Clock()
    run_ours = pair.by_ours(text)

    def step(model, forward) -> None:
        model.zero_grad(set_to_none=True)
        torch.stack([o.float().square().mean() for o in forward()]).sum().backward()

    steps = {
        "ours": lambda: step(pair.ours, run_ours),
        "diffusers": lambda: step(pair.theirs, lambda: pair.by_diffusers(text)),
    }
    times = {name: clock(fn, rounds, 2) for name, fn in steps.items()}
    count = 3 * flops(side * side + TEXT[0], pair.ours.inner_dim, layers)
    record: Record = {
        "pixels": side * 16, "layers": layers, "step ms": times, "memory": {n: peak(fn) for n, fn in steps.items()},
        "TFLOP/s": {n: count / t / 1e9 for n, t in times.items()},
    }  # fmt: skip
    name = torch.cuda.get_device_name() if cuda() else ""
    top = next((p for n, p in PEAKS.items() if n in name), None)
    if top:
        record["MFU"] = {n: count / t * 1e3 / top for n, t in times.items()}
    yield record


def compiled_variants() -> Iterator[Record]:
    """Transformer and block again, shorter, with what torch compiles of diffusers'."""
    yield from transformer(sides=(64, 32), rounds=3, compile=True)
    yield from block(sides=(64,), rounds=5, compile=True)


SUITES: dict[str, Callable[..., Iterator[Record]]] = {
    "ops": ops, "block": block, "transformer": transformer, "training": training, "compiled": compiled_variants
}  # fmt: skip


def write(records: Iterator[Record], target: Path) -> None:
    """The records as JSON, the file written anew after each; one that comes again has been added to."""
    seen: list[Record] = []
    for record in records:
        if not any(r is record for r in seen):
            seen.append(record)
        part = target.with_suffix(".part")
        part.write_text(json.dumps(seen, indent=1) + "\n", encoding="utf-8")
        os.replace(part, target)
        print(json.dumps(record), flush=True)


def main(suite: str, target: Path, **arguments: Any) -> None:
    write(SUITES[suite](**arguments), target)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
