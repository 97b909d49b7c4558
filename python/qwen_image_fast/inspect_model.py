"""What a diffusers-layout folder or a file of weights holds, and which GPUs it fits, from configurations and headers.

Of a repository on the hub only json files and the headers of weight files are fetched, never weights.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from qwen_image_fast.checkpoint import BASE_NAME, find_weights
from qwen_image_fast.folders import local_folder, read_json, resolve_folder
from qwen_image_fast.models.precision import precision_of
from qwen_image_fast.models.stored_modulation import SCHEDULES, named, schedules_of_file
from qwen_image_fast.pipelines.residence import plan_for, used_weights
from qwen_image_fast.tensor_files import DTYPES, Entry, read_header
from qwen_image_fast.weights.formats import Opened, open_weights, parts_in
from qwen_image_fast.weights.plan import Plan
from qwen_image_fast.weights.stored import Weight, is_floating

GPU_SIZES = (8, 12, 16, 24, 48, 80, 141)
GB = 10**9
MARGIN_GB = 3.0

MODULATION, HEAD, VISION = "modulation", "language-model head", "vision tower"
KEPT = "modulation vectors"  # of a file without the weights
# Groups of tensors by name: the first pattern that matches; what none matches is the last group.
GROUPS: dict[str, tuple[dict[str, str], str]] = {
    "transformer": (
        {
            MODULATION: r"\.(img|txt)_mod\.|^norm_out\.",
            "text stream": r"\.add_[qkv]_proj\.|\.to_add_out\.|\.norm_added_|\.txt_mlp\.|^txt_",
            "image stream": r"\.to_[qkv]\.|\.to_out\.|\.norm_[qk]\.|\.img_mlp\.|^img_in\.|^proj_out\.",
        },
        "rest",
    ),
    "text encoder": ({HEAD: r"^lm_head\.", VISION: r"^(model\.)?visual\."}, "language model"),
}
GROUPS_OF_CLASS = {
    "QwenImageTransformer2DModel": "transformer",
    "Qwen2_5_VLForConditionalGeneration": "text encoder",
    "Qwen2_5_VLModel": "text encoder",
}
# What a class is to a pipeline, whose names of tensors are read for ours.
PART_OF_CLASS = {
    "QwenImageTransformer2DModel": "transformer",
    "AutoencoderKLQwenImage": "vae",
    "Qwen2_5_VLForConditionalGeneration": "text_encoder",
    "Qwen2_5_VLModel": "text_encoder",
}
FITS = {
    "all": "all parts at once",
    "all_freed": "all, modulation freed",
    "one": "one part at a time",
    "one_freed": "one at a time, modulation freed",
}


@dataclass
class Part:
    """One component. Sizes in bytes: `disk` by format; `groups` in bf16, the whole part where there are any.

    runs: the dtype of the weights once they are loaded, without `torch_dtype`; before it the precision of a file that
        holds 8 or 4 bits that this package computes with.
    """

    name: str
    class_name: str
    config: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    disk: dict[str, int] = field(default_factory=dict)
    runs: str = ""
    bf16: int = 0
    groups: dict[str, int] = field(default_factory=dict)
    schedules: str = ""  # those of which a file has modulation vectors instead of weights
    weights: dict[str, Weight] = field(default_factory=dict, compare=False, repr=False)  # where they lie, which differs
    problem: str | None = None


@dataclass
class Model:
    """A folder or repository and its parts; `pipeline` is None for the folder of a single component."""

    name: str
    pipeline: str | None
    parts: list[Part]

    @property
    def problems(self) -> list[str]:
        return [f"{part.name}: {part.problem}" for part in self.parts if part.problem]

    @property
    def uses_vision(self) -> bool:
        """Text-to-image leaves the vision tower out; pipelines that take pictures need it."""
        return self.pipeline not in (None, "QwenImagePipeline")

    def needed(self, part: Part) -> int:
        """bf16 bytes of a part as this package loads it: without the head, and the tower where it is not used."""
        left_out = part.groups.get(HEAD, 0) + (0 if self.uses_vision else part.groups.get(VISION, 0))
        return part.bf16 - left_out

    def needs(self, margin_gb: float = MARGIN_GB) -> dict[str, float]:
        """GB of memory for each way of `FITS`: weights in bf16, plus the margin."""
        sizes = [self.needed(part) for part in self.parts if part.parameters]
        freed = [self.needed(part) - part.groups.get(MODULATION, 0) for part in self.parts if part.parameters]
        totals = {"all": sum(sizes), "all_freed": sum(freed), "one": max(sizes, default=0)}
        totals["one_freed"] = max(freed, default=0)
        return {way: size / GB + margin_gb for way, size in totals.items()}

    def plan(self, limit: int, dtype: torch.dtype, precision: str | None = None) -> Plan:
        """What stays under a limit of bytes on a CPU, and what is streamed, as a pipeline of this model loads it.

        Raises:
            ValueError: the limit is too small, or the transformer's file has another quantisation than `precision`.
        """
        known = {PART_OF_CLASS.get(part.class_name, part.name): part for part in self.parts if part.weights}
        used = {name: used_weights(part.weights, name, self.uses_vision, False) for name, part in known.items()}
        dtypes: dict[str, torch.dtype | None] = dict.fromkeys(used, dtype)
        return plan_for(used, dtypes, torch.device("cpu"), limit, precision=precision, pictures=self.uses_vision)


def plan_table(plan: Plan, dtype: str, precision: str | None = None) -> Table:
    small = "" if precision is None else f", the transformer's large layers in {precision}"
    table = Table("what", title=f"Under {size_text(plan.limit)}, in {dtype}{small}", title_justify="left")
    table.add_column("bytes")
    for row in plan.rows():
        table.add_row(*row)
    return table


def inspect_model(name_or_path: str | os.PathLike) -> Model:
    """Read a local folder or file of weights, or the json files and headers of a hub repository.

    A damaged or missing part is described in its `problem`; the others are still read.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError, ConnectionError: there is nothing to read.
        ValueError: the folder is no diffusers-layout folder, or its model_index.json is damaged.
    """
    if Path(name_or_path).expanduser().is_file():
        return _read_file(Path(name_or_path).expanduser())
    folder = resolve_folder(name_or_path, allow_patterns=["*.json"])
    hub_name = os.fspath(name_or_path) if local_folder(name_or_path) is None else None
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        names = {k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2 and all(v)}
        parts = [_read_part(folder / name, name, str(cls), hub_name) for name, (_, cls) in names.items()]
        return Model(os.fspath(name_or_path), str(index.get("_class_name", "unknown")), parts)
    if (folder / "config.json").is_file():
        part = _read_part(folder, folder.resolve().name, "", hub_name)
        return Model(os.fspath(name_or_path), None, [part])
    raise ValueError(f"{folder} is not a diffusers-layout folder: it has neither model_index.json nor config.json")


def _read_file(path: Path) -> Model:
    """A file of one part or several, as `from_single_file` reads it."""
    classes = {part: name for name, part in reversed(PART_OF_CLASS.items())}
    parts = []
    for name in parts_in(path):
        opened = open_weights([path], name)
        part = Part(name, classes[name], {"zero_cond_t": True} if opened.zero_cond_t else {})
        _count(part, opened)
        parts.append(part)
    return Model(str(path), None, parts)


def _read_part(folder: Path, name: str, class_name: str, hub_name: str | None) -> Part:
    part = Part(name, class_name or "unknown")
    try:
        if not folder.is_dir():
            raise FileNotFoundError(f"model_index.json names it, but there is no folder {folder}")
        if not (folder / "config.json").is_file():  # a tokenizer, processor or scheduler has a file of its own name
            part.config = _first_config(folder)
            return part
        part.config = read_json(folder / "config.json")
        part.class_name = part.config.get("_class_name") or (part.config.get("architectures") or [part.class_name])[0]
        base_name = BASE_NAME if "_class_name" in part.config else "model"
        if hub_name is None:
            opened = open_weights(find_weights(folder, base_name), PART_OF_CLASS.get(part.class_name))
        else:
            inside = "" if class_name == "" else f"{name}/"
            tensors = _hub_tensors(folder, inside, base_name, hub_name)
            opened = Opened(tensors, set(tensors))
        _check_index(folder / f"{base_name}.safetensors.index.json", opened)
        _count(part, opened)
    except (OSError, ValueError) as error:
        part.problem = str(error)
    return part


def _first_config(folder: Path) -> dict[str, Any]:
    found = [path for path in sorted(folder.glob("*_config.json")) if path.name != "generation_config.json"]
    return read_json(found[0]) if found else {}


def _hub_tensors(folder: Path, inside: str, base_name: str, hub_name: str) -> dict[str, Weight]:
    """The tensors of a repository's files; a file that lies in the local cache is read there."""
    index = folder / f"{base_name}.safetensors.index.json"
    files = sorted(set(_weight_map(index).values())) if index.is_file() else [f"{base_name}.safetensors"]
    tensors: dict[str, Weight] = {}
    for path in (folder / file for file in files):
        for name, tensor in (
            read_header(path) if path.is_file() else _hub_header(hub_name, inside + path.name)
        ).items():
            if name in tensors:
                raise ValueError(f"{name} is in {path.name} and in another shard; remove one")
            tensors[name] = tensor
    return tensors


def _hub_header(hub_name: str, file: str) -> dict[str, Entry]:
    try:
        found = HfApi().parse_safetensors_file_metadata(hub_name, file).tensors
        return {name: Entry(Path(file), DTYPES[info.dtype], tuple(info.shape), 0) for name, info in found.items()}
    except Exception as error:  # the HTTP library's own errors are among them, and it differs between hub versions
        what = f"the header of {file} could not be read from the hub ({type(error).__name__}: {error})"
        raise ConnectionError(what) from error


def _check_index(index: Path, opened: Opened) -> None:
    """A shard can be whole and still be the wrong one: every tensor of the index must be in some header."""
    if index.is_file() and (missing := sorted(_weight_map(index).keys() - opened.stored)):
        raise ValueError(f"the shards lack {len(missing)} tensors that {index.name} names, such as {missing[0]}")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index.name} has no weight_map of tensor names to files")
    return weight_map


def _count(part: Part, opened: Opened) -> None:
    patterns, rest = GROUPS.get(GROUPS_OF_CLASS.get(part.class_name, ""), ({}, ""))
    if stored := opened.weights.get(SCHEDULES):
        local = isinstance(stored, Entry) and stored.path.is_file()
        part.schedules = named(schedules_of_file(opened.weights)) if local else "what its file says"
        patterns = {KEPT: r"\.vectors$|^modulation_schedules$", **patterns}
        del patterns[MODULATION]
    disk: Counter[str] = Counter()
    groups: Counter[str] = Counter({group: 0 for group in (*patterns, rest) if group})
    for name, weight in opened.weights.items():
        count = math.prod(weight.shape)
        size = 2 * count if is_floating(weight) else weight.nbytes
        part.parameters += 0 if stored and re.search(patterns[KEPT], name) else count
        part.bf16 += size
        disk[weight.kind] += weight.nbytes
        if patterns:
            groups[next((g for g, pattern in patterns.items() if re.search(pattern, name)), rest)] += size
    part.disk, part.groups, part.weights = dict(disk), dict(groups), opened.weights
    kinds = sorted({weight.kind for weight in opened.weights.values() if is_floating(weight)})
    part.runs = "bfloat16 (decoded)" if opened.quantised else ", ".join(kinds)
    if precision := precision_of(opened.weights):
        part.runs = f"{precision} by --precision {precision}, else bfloat16 (decoded)"


# ---- output -----------------------------------------------------------------------------------------------------


def as_json(model: Model, margin_gb: float = MARGIN_GB) -> dict[str, Any]:
    """The report as a JSON object; sizes in bytes unless the key says otherwise."""
    needs = model.needs(margin_gb)
    parts = [
        {
            "name": part.name,
            "class": part.class_name,
            "parameters": part.parameters,
            "disk_bytes": part.disk,
            "runs_in": part.runs,
            "bf16_bytes": part.bf16,
            "bf16_bytes_loaded": model.needed(part),
            "bf16_bytes_of_groups": part.groups,
            **({"modulation_vectors_for": part.schedules} if part.schedules else {}),
            "config": part.config,
        }
        for part in model.parts
    ]
    fits = {str(size): {way: need <= size for way, need in needs.items()} for size in GPU_SIZES}
    return {
        "model": model.name,
        "pipeline": model.pipeline,
        "parts": parts,
        "margin_gb": margin_gb,
        "needs_gb": needs,
        "fits_gpu_gb": fits,
        "problems": model.problems,
    }


def render(model: Model, margin_gb: float = MARGIN_GB) -> RenderableType:
    """The report as rich tables."""
    runs = ", ".join(f"{part.name} {part.runs}" for part in model.parts if part.runs)
    blocks: list[RenderableType] = [_parts_table(model)]
    blocks += [Text(f"Runs in: {runs}")] if runs else []
    blocks += [_config_table(model)] if any(_short(part.config) for part in model.parts) else []
    blocks += [_groups_table(part) for part in model.parts if part.groups]
    if not model.problems and any(part.parameters for part in model.parts):
        blocks += [_fits(model, margin_gb), Text(_assumptions(model, margin_gb), style="dim")]
    return Group(*blocks)


def _parts_table(model: Model) -> Table:
    title = escape(f"{model.name}: {model.pipeline or 'one component'}")
    table = Table("part", Column("class", overflow="fold"), title=title, title_justify="left")
    for heading in ("parameters", "on disk", "in bf16"):
        table.add_column(heading, justify="right")
    for part in model.parts:
        if part.problem:
            table.add_row(escape(part.name), escape(part.class_name), "[red]damaged[/red]", "", "")
            continue
        disk = "\n".join(f"{size_text(size)} {kind}" for kind, size in part.disk.items())
        weights: tuple[str, ...] = (f"{part.parameters:,}", disk, size_text(part.bf16)) if part.parameters else ()
        table.add_row(escape(part.name), escape(part.class_name), *weights)
    total = sum(part.bf16 for part in model.parts)
    table.add_section()
    disk_total = sum(sum(part.disk.values()) for part in model.parts)
    count = sum(part.parameters for part in model.parts)
    table.add_row("together", "", f"{count:,}", size_text(disk_total), size_text(total))
    return table


def _config_table(model: Model) -> Table:
    table = Table("part", "configuration", title="Configurations", title_justify="left")
    for part in model.parts:
        if values := _short(part.config):
            table.add_row(escape(part.name), Text(", ".join(f"{k} {v}" for k, v in values.items())))
    return table


def _short(config: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, flags that are set and short lists; the rest is in the json output."""

    def is_short(value: Any) -> bool:
        if isinstance(value, list):
            return 0 < len(value) <= 4 and all(isinstance(v, (int, float)) for v in value)
        return isinstance(value, (int, float)) and value is not False

    return {k: v for k, v in config.items() if not k.startswith("_") and is_short(v)}


def _groups_table(part: Part) -> Table:
    notes = {
        MODULATION: "can be freed once the schedule is known: its vectors are then a table",
        KEPT: f"instead of the weights, for {part.schedules}, no other schedule",
        HEAD: "not needed, not loaded",
        VISION: "needed only where pictures are an input",
    }
    table = Table("group", title=escape(f"Inside the {part.name}"), title_justify="left")
    table.add_column("in bf16", justify="right")
    table.add_column("share", justify="right")
    table.add_column("note")
    for group, size in part.groups.items():
        table.add_row(group, size_text(size), f"{size / max(part.bf16, 1):.0%}", notes.get(group, ""))
    return table


def _fits(model: Model, margin_gb: float) -> Table | str:
    needs = model.needs(margin_gb)
    if (most := max(needs.values())) <= min(GPU_SIZES):
        return f"Fits, in bf16, a GPU of {min(GPU_SIZES)} GB and more: {most:.1f} GB with all parts at once"
    table = Table("GPU", title="What fits, in bf16", title_justify="left")
    for way, need in needs.items():
        table.add_column(f"{FITS[way]}\n{need:.1f} GB", justify="center")
    for size in GPU_SIZES:
        cells = ["[green]fits[/green]" if need <= size else "[red]no[/red]" for need in needs.values()]
        table.add_row(f"{size} GB", *cells)
    return table


def _assumptions(model: Model, margin_gb: float) -> str:
    vision = "with" if model.uses_vision else "without"
    return (
        f"Counted: weights in bf16, the text encoder without its language-model head and {vision} its vision tower, "
        f"plus {margin_gb:g} GB for activations and the CUDA context, an assumption for one picture of 1328x1328 with "
        "guidance, not a measurement. 1 GB is 10^9 bytes, also for the card. Modulation freed: the memory while "
        "sampling; until the schedule's vectors are computed, these weights are in memory too, on the GPU or before on "
        "the CPU. One part at a time: the caller moves the parts in and out."
    )


def size_text(size: float) -> str:
    """12345678 -> "12.3 MB"; decimal units."""
    if size < 1000:
        return f"{size:.0f} B"
    unit = 3 if size >= 1e9 else 2 if size >= 1e6 else 1
    value = size / 1000**unit
    return f"{value:.{0 if value >= 100 else 1}f} {('kB', 'MB', 'GB')[unit - 1]}"
