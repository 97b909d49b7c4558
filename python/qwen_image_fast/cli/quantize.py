"""`qwen-image-fast quantize`: write a transformer in 8 or 4 bits or in float8 once, and say how far it is off."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from qwen_image_fast import __version__
from qwen_image_fast.cli.common import JSON, print_json
from qwen_image_fast.cli.errors import BAD_INPUT, CommandError, err, failing
from qwen_image_fast.cli.errors import out as console
from qwen_image_fast.extras import needed_for
from qwen_image_fast.files import atomic_write, claimed
from qwen_image_fast.folders import local_folder, resolve_folder

RESULT = "quantization.json"


def quantize_command(
    model: Annotated[str, typer.Argument(help="A model's folder or hub name, or that of its transformer; tiny.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the transformer and what is measured.")],
    precision: Annotated[
        str, typer.Option(help="int8, int4, or fp8: a file of half the size, not computed with in 8 bits.")
    ] = "int8",
    lora: Annotated[list[str] | None, typer.Option(help="A LoRA's file, =WEIGHT; merged first; several times.")] = None,
    check: Annotated[bool, typer.Option(help="Compare velocities; needs the memory of both.")] = True,
    pictures: Annotated[int, typer.Option(min=0, help="Pictures with text to draw by both, read and compare.")] = 0,
    drop_modulation: Annotated[
        bool, typer.Option("--drop-modulation", help="Leave its weights out; what they make for these schedules stays.")
    ] = False,
    steps: Annotated[
        list[int] | None, typer.Option(min=1, max=1000, help="Of a schedule that stays; several times.")
    ] = None,
    size: Annotated[list[str] | None, typer.Option(help="Of the pictures, WIDTHxHEIGHT; several times.")] = None,
    lightning: Annotated[list[int] | None, typer.Option(help="4 or 8: Lightning's schedule stays, too.")] = None,
    as_json: JSON = False,
) -> None:
    """Write a transformer in 8 or 4 bits or in float8, in ComfyUI's layout; an interrupted run goes on."""
    if precision not in ("int8", "int4", "fp8"):
        raise CommandError(f"--precision must be int8, int4 or fp8, got {precision}")
    with failing(BAD_INPUT, FileNotFoundError, NotADirectoryError):
        local_folder(model)
    if pictures and not check:
        raise CommandError("--pictures has no effect with --no-check")
    if wrong := [n for n in lightning or () if n not in (4, 8)]:
        raise CommandError(f"--lightning must be 4 or 8, got {wrong[0]}")
    for option, given in (("--steps", steps), ("--size", size), ("--lightning", lightning)):
        if given and not drop_modulation:
            raise CommandError(f"{option} has no effect without --drop-modulation")
    if pictures and drop_modulation:
        raise CommandError("--pictures draws by a schedule of its own: quantise once without --drop-modulation for it")
    if lora:
        from qwen_image_fast.cli.inputs import lora_file

        for text in lora:
            lora_file(_weighted(text)[0])
    kept = Kept(steps or [], size or [], lightning or []) if drop_modulation else None
    with failing(BAD_INPUT, FileNotFoundError, NotADirectoryError, FileExistsError, ValueError):
        if out.exists():
            with claimed(out, RESULT):  # what is there is refused before torch is loaded
                pass
        report = _quantize(model, out, lora or [], check, pictures, not as_json, precision, kept)
    if as_json:
        print_json(report)
        return
    bits = {"int8": "8 bits", "int4": "4 bits, the last block's in 8", "fp8": "float8"}[precision]
    console.print(f"{out}: {report['layers']} layers in {bits}, errors of weights up to {report['largest_error']:.4f}")
    for sigma, error in report.get("velocity_errors", {}).items():
        console.print(f"velocity at sigma {sigma}: {error:.4f}", highlight=False)
    if report["modulation"]:
        console.print(f"without modulation weights, for {report['modulation']}", highlight=False, soft_wrap=True)
    if drawn := report.get("pictures"):
        shares = " and ".join(f"{read['exact']:.0%} ({name})" for name, read in drawn["read"].items())
        psnr = f"PSNR {drawn['psnr']['median']:.1f} dB in the median, {drawn['psnr']['least']:.1f} dB at least"
        console.print(f"{drawn['count']} pictures: texts right in {shares}; {psnr}: {out / 'pictures.png'}",
                      highlight=False, soft_wrap=True)  # fmt: skip
    for line in report["said"]:
        console.print(line, highlight=False)
    [file] = sorted(out.glob("*.safetensors"))
    words = ["qwen-image-fast", "generate", "PROMPT", "--model", model, "--transformer", str(file)]
    words += ["--precision", precision] if precision != "fp8" else ["--dtype", "bfloat16"] if kept else []
    words += kept.first() if kept else []
    console.print(f"use it: {shlex.join(words)}", highlight=False, markup=False, soft_wrap=True)


class Kept(NamedTuple):
    """Whose modulation vectors are written instead of the weights; no steps or sizes: the model's own."""

    steps: list[int]
    sizes: list[str]
    lightning: list[int]

    def first(self) -> list[str]:
        """The options of `generate` for one of these schedules; none where that is its default."""
        steps = ["--steps", str(self.steps[0])] if self.steps else []
        size = ["--size", self.sizes[0]] if self.sizes else []
        return steps + size or (["--lightning", str(self.lightning[0])] if self.lightning else [])


def _quantize(
    model: str, out: Path, loras: list[str], check: bool, pictures: int, show: bool, precision: str, kept: Kept | None
) -> dict[str, Any]:
    if show:
        err.print(f"{model}: loading torch", markup=False, soft_wrap=True)
    import torch
    from tqdm import tqdm

    from qwen_image_fast import quantize_report
    from qwen_image_fast.checkpoint import check_fit, find_weights, json_bytes, read_config
    from qwen_image_fast.models.stored_modulation import hold_vectors
    from qwen_image_fast.models.stored_modulation import named as names_of
    from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
    from qwen_image_fast.quantize import notes_in, notes_of, quantize
    from qwen_image_fast.weights.formats import check_part, open_weights

    folder = resolve_folder(model)
    place = folder / "transformer" if (folder / "model_index.json").is_file() else folder
    config, files = read_config(place), find_weights(place)
    opened = open_weights(files, "transformer")
    check_part(opened, files, "transformer")
    config |= {"zero_cond_t": True} if opened.zero_cond_t else {}
    with torch.device("meta"):
        layers = QwenImageTransformer2DModel.from_config(config)
    hold_vectors(layers, opened.weights, opened.dtype(None))
    check_fit(layers, opened.weights)
    adapters, named = _loras(loras, layers)
    schedules = [] if kept is None else _schedules(kept, folder, config)
    with claimed(out, RESULT), tqdm(desc="quantise", unit="weight", disable=not show) as bar:

        def said(done: int, of: int) -> None:
            bar.total, bar.n = of, done
            bar.update(0)

        file = out / "diffusion_pytorch_model.safetensors"
        about = {"model": model, "loras": named, "version": __version__}
        if not file.exists() or notes_in(file) != notes_of(precision, about, schedules):
            errors = quantize(opened, file, adapters, about, said, precision, schedules)
            atomic_write(out / "errors.json", lambda f: f.write(json_bytes(errors)))
        errors = json.loads((out / "errors.json").read_text(encoding="utf-8"))
        bar.close()
        atomic_write(out / "config.json", lambda f: f.write(json_bytes(dict(config))))
        report = {
            "model": model, "precision": precision, "loras": named, "layers": len(errors), "bytes": file.stat().st_size,
            "largest_error": max(errors.values()), "errors_by_kind": quantize_report.errors_by_kind(errors),
            "errors": errors, "modulation": names_of(schedules) or None, "said": [],
        }  # fmt: skip
        if check:
            _check(report, folder, place, out, loras, pictures, show)
        atomic_write(out / RESULT, lambda f: f.write(json_bytes(report)))
        (out / "errors.json").unlink()
    return report


def _schedules(kept: Kept, folder: Path, config: Mapping[str, Any]) -> list[Any]:
    """ValueError for a model whose schedules are not known."""
    from qwen_image_fast.model_defaults import generation_of, model_class
    from qwen_image_fast.quantize_modulation import schedules_for
    from qwen_image_fast.request import Text
    from qwen_image_fast.request_fields import RequestError, parse_size
    from qwen_image_fast.schedulers import FlowMatchEulerDiscreteScheduler

    if not (folder / "scheduler").is_dir():
        raise ValueError(
            "--drop-modulation needs the pipeline's folder, for its scheduler; MODEL is a transformer alone"
        )
    if config.get("use_additional_t_cond"):
        raise ValueError("--drop-modulation is not for the Layered model, whose schedule each picture decides")
    own, fields = generation_of(folder, model_class(folder, str(folder))), Text.model_fields
    usual = own.width or fields["width"].default, own.height or fields["height"].default
    try:
        sizes = [parse_size(text, usual) for text in kept.sizes]
    except RequestError as error:
        raise ValueError(error.named(lambda name: f"--{name}")) from error
    for width, height in sizes:
        if min(width, height) < 16:
            raise ValueError(f"--size must be at least 16x16, got {width}x{height}")
        if width % 16 or height % 16:
            raise ValueError(f"--size must be multiples of 16, as pictures are, got {width}x{height}")
    # Where Lightning alone is asked for, nothing else is kept.
    steps = kept.steps or ([] if kept.lightning and not sizes else [own.steps or fields["steps"].default])
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    return schedules_for(scheduler, steps, sizes or [usual], kept.lightning, bool(config.get("zero_cond_t")))


def _weighted(text: str) -> tuple[str, float]:
    """NAME or NAME=WEIGHT."""
    name, _, weight = text.rpartition("=")
    try:
        return (name, float(weight)) if name else (text, 1.0)
    except ValueError:
        return text, 1.0  # the name is refused, with what is wrong


def _loras(names: list[str], layers: Any) -> tuple[list[tuple[Any, float]], list[dict[str, Any]]]:
    """The adapters of the files, with their weights, and what is said of them."""
    from qwen_image_fast.models.lora_files import find_lora, parse_lora, read_lora
    from qwen_image_fast.models.lora_keys import component_config, split_components
    from qwen_image_fast.request_fields import Lora
    from qwen_image_fast.weights.places import single_file

    adapters, named = [], []
    for text in names:
        name, scale = _weighted(text)
        Lora(name=name, scale=scale)  # a ValueError for a weight that is none
        path = find_lora(Path(name)) if Path(name).is_dir() else single_file(name)
        state, config = read_lora(path)
        own, others = split_components(state)
        if others:
            raise ValueError(
                f"--lora must be of the transformer alone, got {path}, which also changes the text encoder"
            )
        adapters.append((parse_lora(own, layers, component_config(config, "transformer")), scale))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        named.append({"name": name, "scale": scale, "sha256": digest})
    return adapters, named


def _check(
    report: dict[str, Any], folder: Path, place: Path, out: Path, loras: list[str], pictures: int, show: bool
) -> None:
    """Put velocity errors, and what pictures show, into the report."""
    import torch

    from qwen_image_fast import QwenImagePipeline, QwenImageTransformer2DModel
    from qwen_image_fast.quantize_report import velocity_errors

    if place == folder:
        report["said"].append("velocities were not compared: MODEL is a transformer alone; give the pipeline's folder")
        return
    needed = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) + report["bytes"]
    if needed > (there := _memory()):
        text = f"velocities were not compared: both models need {needed / 1e9:.0f} GB, {there / 1e9:.0f} GB are free"
        report["said"].append(text)
        return
    if show:
        err.print(f"{out}: comparing velocities with those of {report['model']}", markup=False, soft_wrap=True)
    pipe = QwenImagePipeline.from_pretrained(folder)
    for text in loras:
        name, scale = _weighted(text)
        pipe.set_adapters(pipe.load_lora_weights(name), scale)
    if loras:
        pipe.fuse_lora()
    how = {"dtype": pipe.transformer.dtype} if report["precision"] == "fp8" else {"precision": report["precision"]}
    small = QwenImageTransformer2DModel.from_pretrained(out, **how)
    prompts = ["a red circle on white", "the word HELLO in black", "two blue squares on yellow"]
    side = 128 if pipe.transformer.inner_dim < 1024 else 512
    call = {"height": side, "width": side, "num_inference_steps": 8, "output_type": "latent", "true_cfg_scale": 1.0}
    errors = []
    for prompt in prompts:
        clean = torch.as_tensor(pipe(prompt, seed=0, progress=False, **call).images).reshape(1, (side // 16) ** 2, -1)
        embeds = pipe.encode_prompt(prompt)[0]
        errors.append(velocity_errors(pipe.transformer, small, clean, embeds, (side // 16, side // 16)))
    report["velocity_errors"] = {s: (sum(e[s] ** 2 for e in errors) / len(errors)) ** 0.5 for s in errors[0]}
    if pictures:
        if show:
            err.print(f"{out}: drawing {pictures} pictures by both and reading them", markup=False, soft_wrap=True)
        report["pictures"] = _pictures(pipe, small, side, pictures, out, report["precision"], show)


def _pictures(pipe: Any, small: Any, side: int, count: int, out: Path, precision: str, show: bool) -> dict[str, Any]:
    """Draw captions by both, read the texts, and write pairs of pictures side by side."""
    from PIL import Image
    from tqdm import tqdm

    from qwen_image_fast.quantize_report import psnr, side_by_side

    with needed_for("evaluate"):
        from qwen_image_fast.training.evaluation.cases import held_out_cases
        from qwen_image_fast.training.evaluation.evaluate_text import drawn_by, evaluate, summary
        from qwen_image_fast.training.evaluation.ocr import Reader
        from qwen_image_fast.training.synthesis.recipe import tiny

        recipe, reader = tiny(128, ("en",), max_letters=6, max_lines=1), Reader()
    cases, made, exact = held_out_cases(recipe, count), {}, pipe.transformer
    for name, model in (("exact", exact), (precision, small)):
        pipe.transformer = model
        draw = drawn_by(pipe, seed=0, height=side, width=side, num_inference_steps=20, true_cfg_scale=1.0)
        results = evaluate(draw, cases, recipe, reader)
        made[name] = list(tqdm(results, desc=name, total=count, unit="picture", disable=not show))
    pipe.transformer = exact
    pairs = [(a.image, b.image) for a, b in zip(made["exact"], made[precision])]
    sheet = Image.fromarray(side_by_side(pairs[:48]))
    atomic_write(out / "pictures.png", lambda f: sheet.save(f, "PNG"))
    values = sorted(psnr(a, b) for a, b in pairs)
    said = {name: summary(results)["en"] for name, results in made.items()}
    read = {n: {k: s[k] for k in ("exact", "word_accuracy", "ned", "colour_accuracy")} for n, s in said.items()}
    return {"count": count, "psnr": {"median": values[len(values) // 2], "least": values[0]}, "read": read}


def _memory() -> int:
    """Bytes that are free, or can be."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62
