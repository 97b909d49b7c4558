"""The model of the released size on this machine, with random weights: loading, streaming from the disk, exactness.

    python -m benchmarks.full_size [--only PART ...] [--folder FOLDER] [--limit 10GB] [--size 256] [--out RESULTS.json]

Writes the transformer (41 GB), measures, removes it, then the same with the text encoder (15 GB), and, where --only
names them, with the transformer in 8 bits (27 GB, half of it modulation in bfloat16), which then takes 15 GB of
memory, and in 4 bits (24 GB), which takes 9. `whole` is a pipeline of 18 GB, from a prompt to a picture. Every phase is
a process of its own; the parent holds nothing. Memory is what the system says of the process (/proc/self/status): the
peak of all its pages, and which of them are its own (RssAnon) or pages of files, which can be given back (RssFile).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.full_size_files import BLOCKS, WIDTH, WRITERS, slice_of

if TYPE_CHECKING:
    from qwen_image_fast.weights.plan import Plan

LIMITS = {"int8": "17GB", "int4": "12GB", "whole": "12GB"}
SLICE = 3  # blocks of the exact comparison; the last of them is not like those in the middle


def status() -> dict[str, int]:
    with open("/proc/self/status") as file:
        found = dict(line.split(":", 1) for line in file if line.startswith(("VmHWM", "Rss", "VmSwap")))
    return {name: int(value.split()[0]) * 1024 for name, value in found.items()}


def reset_peak() -> None:
    """Have VmHWM count from here."""
    Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def plans_kept() -> Iterator[list[Plan]]:
    """The plans that pipelines make in the meantime."""
    from qwen_image_fast.pipelines import residence

    plans: list[Plan] = []
    original = residence.make_plan
    residence.make_plan = lambda *a: plans.append(original(*a)) or plans[-1]  # type: ignore[func-returns-value]
    try:
        yield plans
    finally:
        residence.make_plan = original


def load_mapped(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The transformer without a limit: its pages stay where they are until somebody uses them."""
    import torch

    from qwen_image_fast.models.transformer import QwenImageTransformer2DModel

    begin = time.perf_counter()
    model = QwenImageTransformer2DModel.from_pretrained(folder / "transformer")
    seconds = time.perf_counter() - begin
    assert model.dtype == torch.bfloat16
    return {"seconds": seconds, "bytes": model.get_memory_footprint()}


def step(folder: Path, arguments: argparse.Namespace, precision: str | None = None) -> dict[str, Any]:
    """Pictures from random conditions, without guidance; what does not fit is streamed from its files."""
    import torch

    from qwen_image_fast.models.vae import AutoencoderKLQwenImage
    from qwen_image_fast.pipelines import residence
    from qwen_image_fast.pipelines.text_to_image import QwenImagePipeline
    from qwen_image_fast.weights.plan import working_bytes

    with torch.device("meta"):
        vae = AutoencoderKLQwenImage().to(torch.bfloat16)
    vae.to_empty(device="cpu")
    for p in vae.parameters():
        p.detach().normal_(0, 0.02)
    plans = []
    original = residence.make_plan
    residence.make_plan = lambda *a: plans.append(original(*a)) or plans[-1]  # type: ignore[func-returns-value]
    begin = time.perf_counter()
    pipe = QwenImagePipeline.from_pretrained(
        folder, vae=vae.eval(), text_encoder=None, tokenizer=None, torch_dtype=torch.bfloat16, precision=precision,
        memory_limit=LIMITS[precision] if precision else arguments.limit,
    )  # fmt: skip
    found: dict[str, Any] = {"load_seconds": time.perf_counter() - begin, "loaded": status()}
    plan, ring = plans[0], pipe.transformer.streamed.ring
    embeds = torch.randn(1, 64, 3584, generator=torch.Generator().manual_seed(0)).bfloat16()
    for size in arguments.size:
        marks: list[tuple[float, ...]] = []
        compute = type(pipe.transformer).modulation

        def mark(marks=marks) -> None:
            rate = ring.rate
            marks.append((time.perf_counter(), time.process_time(), rate.read, rate.reading, rate.waited))

        def on_step(pipe, i, t, tensors, mark=mark):
            mark()
            return {}

        def modulation(self, *args, mark=mark, compute=compute):
            mark()
            out = compute(self, *args)
            mark()
            return out

        type(pipe.transformer).modulation = modulation
        result = pipe(
            prompt_embeds=embeds, width=size, height=size, num_inference_steps=arguments.steps, seed=0, progress=False,
            callback_on_step_end=on_step, callback_on_step_end_tensor_inputs=(),
        )  # fmt: skip
        type(pipe.transformer).modulation = compute
        assert result.images[0].size == (size, size)
        names = ("seconds", "processor_seconds", "read_bytes", "reading_seconds", "waited_seconds")
        parts = [dict(zip(names, (y - x for x, y in zip(a, b)))) for a, b in zip(marks, marks[1:])]
        # Vectors of the schedule before serve again; then the first step has no mark to begin at.
        computed = len(parts) > arguments.steps
        found[f"{size}px"] = {
            "modulation": parts[0] if computed else None, "steps": parts[1:] if computed else parts,
            "decode_seconds": pipe.times["decode"],
        }  # fmt: skip
    measured = status()
    counted = plan.peak - plan.working + working_bytes(WIDTH, BLOCKS, 2, max(arguments.size), 1)
    return {
        **found, "guidance": False, "precision": precision or "bfloat16", "plan": dict(plan.rows()),
        "plan_peak_bytes": plan.peak, "plan_peak_of_this_size_bytes": counted,
        "peak_over_plan_of_this_size": measured["VmHWM"] / counted, "swap_bytes": measured["VmSwap"],
    }  # fmt: skip


def exact(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The first blocks of the same files, streamed against resident: the same bits."""
    import torch

    from qwen_image_fast.pipelines.text_to_image import QwenImagePipeline

    small = folder.parent / "slice"
    slice_of(folder / "transformer", small / "transformer", SLICE)
    for name in ("scheduler", "model_index.json"):
        copy = shutil.copytree if (folder / name).is_dir() else shutil.copyfile
        if not (small / name).exists():
            copy(folder / name, small / name)
    outputs = []
    for limit in (None, "3GB"):
        pipe = QwenImagePipeline.from_pretrained(
            small, vae=None, text_encoder=None, tokenizer=None, torch_dtype=torch.bfloat16,
            **({} if limit is None else {"memory_limit": limit}),
        )  # fmt: skip
        assert (pipe.transformer.streamed is not None) == (limit is not None)
        embeds = torch.randn(1, 64, 3584, generator=torch.Generator().manual_seed(0)).bfloat16()
        seen: list[Any] = []
        hook = pipe.transformer.transformer_blocks[1].register_forward_hook(
            lambda module, args, out, seen=seen: seen.extend(t.clone() for stream in out for t in stream)
        )
        call = {"width": 256, "height": 256, "num_inference_steps": 1, "seed": 0, "output_type": "latent"}
        latents = pipe(prompt_embeds=embeds, progress=False, **call).images[0]
        hook.remove()
        outputs.append([*seen, latents])
        streamed = 0 if limit is None else len(pipe.transformer.streamed.unit_of)
        del pipe, hook  # what is mapped would count for the process that the plan starts from
        gc.collect()
    shutil.rmtree(small)
    equal = [torch.equal(a, b) for a, b in zip(*outputs)]
    finite = all(bool(t.isfinite().all()) for t in outputs[0])
    return {
        "blocks": SLICE,
        "streamed_matrices": streamed,
        "tensors_compared": len(equal),
        "equal": all(equal) and finite,
    }


def text(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One prompt of 98 tokens through the streamed text encoder, and through one that is mapped: the same bits."""
    import torch

    from qwen_image_fast.pipelines.text_to_image import QwenImagePipeline

    ids = torch.randint(1000, 100000, (1, 98), generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {}
    states = []
    for name, limit in (("streamed", "6GB"), ("mapped", None)):
        begin = time.perf_counter()
        reset_peak()
        with plans_kept() as plans:
            pipe = QwenImagePipeline.from_pretrained(
                folder, transformer=None, vae=None, tokenizer=None, scheduler=None, torch_dtype=torch.bfloat16,
                **({} if limit is None else {"memory_limit": limit}),
            )  # fmt: skip
        found[f"{name}_load_seconds"] = time.perf_counter() - begin
        found[f"{name}_loaded"] = status()
        for turn in ("first", "second"):
            begin = time.perf_counter()
            with torch.no_grad():
                state = pipe.text_encoder(input_ids=ids, use_cache=False).last_hidden_state
            found[f"{name}_{turn}_prompt_seconds"] = time.perf_counter() - begin
        states.append(state)
        found[f"{name}_peak"] = status()
        for plan in plans:
            found |= {"plan": dict(plan.rows()), "plan_peak_bytes": plan.peak}
            found["peak_over_plan"] = found[f"{name}_peak"]["VmHWM"] / plan.peak
        del pipe
        gc.collect()
    return {**found, "equal": torch.equal(*states) and bool(states[0].isfinite().all())}


def whole(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """From a prompt to a picture of each size under one limit: every part read from its files, nothing given."""
    import torch

    from qwen_image_fast.pipelines.text_to_image import QwenImagePipeline

    reset_peak()
    begin = time.perf_counter()
    with plans_kept() as plans:
        pipe = QwenImagePipeline.from_pretrained(
            folder, torch_dtype=torch.bfloat16, precision="int4", memory_limit=LIMITS["whole"]
        )
    found: dict[str, Any] = {"load_seconds": time.perf_counter() - begin, "loaded": status()}
    rings = {part: getattr(pipe, part).streamed.ring for part in ("text_encoder", "transformer")}
    peaks: dict[str, dict[str, int]] = {}

    def on_stage(name: str) -> None:
        """At the beginning of a stage: what the one before took."""
        peaks.setdefault(stages[-1], {})
        peaks[stages[-1]] = {**status(), "read_bytes": rings["transformer"].rate.read}
        stages.append(name)
        reset_peak()

    pipe.on_stage = on_stage
    for size in arguments.size:
        stages = ["load"]
        peaks = {}
        begin = time.perf_counter()
        [picture] = pipe(
            f"a red fox in the snow, picture {size}", width=size, height=size, num_inference_steps=arguments.steps,
            seed=0, progress=False,
        ).images  # fmt: skip
        seconds = time.perf_counter() - begin
        on_stage("end")
        assert picture.size == (size, size)
        found[f"{size}px"] = {"seconds": seconds, "stages": dict(pipe.times), "peaks": peaks}
    [plan] = plans
    largest = max(peak["VmHWM"] for key in found if key.endswith("px") for peak in found[key]["peaks"].values())
    return {
        **found, "precision": "int4", "limit": LIMITS["whole"], "plan": dict(plan.rows()), "plan_peak_bytes": plan.peak,
        "peak_over_plan": largest / plan.peak,
    }  # fmt: skip


PHASES: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "load_mapped": load_mapped, "step": step, "exact": exact, "text": text,
    "int8": partial(step, precision="int8"), "int4": partial(step, precision="int4"), "whole": whole,
}  # fmt: skip

PARTS = {
    "transformer": ("load_mapped", "exact", "step"), "text_encoder": ("text",), "int8": ("int8",), "int4": ("int4",),
    "whole": ("whole",),
}  # fmt: skip


def run_phase(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.full_size", "--phase", name, "--folder", str(folder)]
    command += ["--limit", arguments.limit, "--size", *map(str, arguments.size), "--steps", str(arguments.steps)]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.returncode, "error": done.stderr[-2000:]}
    said = [line for line in done.stderr.splitlines() if "slower than planned" in line]
    return {"said": said, **json.loads(done.stdout.splitlines()[-1]), "process_seconds": time.perf_counter() - begin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("full_size"))
    parser.add_argument("--limit", default="10GB")
    parser.add_argument("--size", type=int, nargs="*", default=[256])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=["transformer", "text_encoder"], choices=WRITERS)
    parser.add_argument("--keep", action="store_true", help="Leave the files on the disk.")
    parser.add_argument("--phase", choices=PHASES)
    arguments = parser.parse_args()
    if arguments.phase:
        found = PHASES[arguments.phase](arguments.folder, arguments)
        print(json.dumps({**found, "memory_bytes": status()}))
        return
    from benchmarks.harness import processor_name
    from qwen_image_fast.folders import SHIPPED

    results: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(), "cpu": processor_name(), "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"), "python": platform.python_version(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "load_average": os.getloadavg()[0],
        "on_disk": "every block's weights written in full, 60 files of 680 MB; the values of one block, rolled by the "
        "number of each; no sparse files, no links; the page cache was not emptied between phases",
    }  # fmt: skip
    for part, phases in PARTS.items():
        if part not in arguments.only:
            continue
        folder = arguments.folder / f"of-{part}"
        place = folder if part == "whole" else folder / ("transformer" if part in LIMITS else part)
        begin = time.perf_counter()
        size = sum(p.stat().st_size for p in place.rglob("*.safetensors")) if place.is_dir() else WRITERS[part](place)
        results[part] = {"bytes": size, "write_seconds": time.perf_counter() - begin}
        shutil.copytree(SHIPPED / "scheduler", folder / "scheduler", dirs_exist_ok=True)
        shutil.copytree(SHIPPED / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
        shutil.copyfile(SHIPPED / "model_index.json", folder / "model_index.json")
        for phase in phases:
            results[part][phase] = run_phase(phase, folder, arguments)
            print(phase, json.dumps(results[part][phase], indent=1), flush=True)
        if not arguments.keep:
            shutil.rmtree(place)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
