"""Read and write diffusers-layout folders: json configurations and safetensors weights, whole or in shards.

    folder/config.json
    folder/<base>[.<variant>].safetensors                              one file, or
    folder/<base>[.<variant>]-00001-of-0000N.safetensors, ...          shards, named by
    folder/<base>.safetensors.index[.<variant>].json                   {"metadata": ..., "weight_map": {name: file}}

`<base>` is `diffusion_pytorch_model` for diffusers models, `model` for transformers models. A single safetensors file:
tensor_files.py. Pickled weights are never opened.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn

from qwen_image_fast.files import atomic_write_all
from qwen_image_fast.folders import PathLike, read_json, resolve_folder
from qwen_image_fast.tensor_files import DTYPE_NAMES, tensor_writer
from qwen_image_fast.weights.formats import Opened, open_weights
from qwen_image_fast.weights.memory import check_fits, need_of
from qwen_image_fast.weights.reading import read_weights
from qwen_image_fast.weights.stored import Weight, is_floating

BASE_NAME = "diffusion_pytorch_model"
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
# Fields of released configurations that the constructor of the class no longer has and that change nothing.
LEGACY_FIELDS = {"QwenImageTransformer2DModel": {"pooled_projection_dim"}}
# How the weights are stored; the files say so themselves, and whether that is read.
STORAGE_FIELD = "quantization_config"


def pretrained_folder(name_or_path: PathLike, subfolder: str | None, files: Iterable[str], **hub) -> Path:
    """`resolve_folder` for one component: only `files` (patterns) of `subfolder` are downloaded; returns its folder."""
    prefix = f"{subfolder}/" if subfolder else ""
    root = resolve_folder(name_or_path, allow_patterns=[prefix + pattern for pattern in files], **hub)
    if subfolder and not (root / subfolder).is_dir():
        there = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "none"
        raise FileNotFoundError(f"from_pretrained: {root} has no subfolder {subfolder!r}; subfolders there: {there}")
    return root / subfolder if subfolder else root


def json_bytes(value: Mapping) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def read_config(folder: PathLike, filename: str = "config.json") -> dict[str, Any]:
    """The configuration file of a component's folder; where it is missing, the error names subfolders that have one."""
    folder = Path(folder)
    if not (folder / filename).is_file():
        have = sorted(p.parent.name for p in folder.glob(f"*/{filename}"))
        hint = f"; name one of its folders, or pass it as subfolder=: {', '.join(have)}" if have else ""
        raise FileNotFoundError(f"read_config: {folder} has no {filename}{hint}")
    return read_json(folder / filename)


def check_config(config: Mapping[str, Any], cls: Any) -> dict[str, Any]:
    """The constructor arguments of `cls` in a stored configuration.

    Bookkeeping (keys with a leading underscore) and known legacy fields are dropped. ValueError where the configuration
    is of another class, has a field that `cls` does not know, or lacks one that it needs.
    """
    stored = config.get("_class_name", cls.__name__)
    if stored != cls.__name__:
        raise ValueError(f"check_config: this is the configuration of a {stored}, expected {cls.__name__}")
    parameters = dict(list(inspect.signature(cls.__init__).parameters.items())[1:])
    dropped = (LEGACY_FIELDS.get(cls.__name__, set()) | {STORAGE_FIELD}) - parameters.keys()
    fields = {k: v for k, v in config.items() if not k.startswith("_") and k not in dropped}
    needed = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    problems = [f"missing field {name!r}" for name in sorted(needed - fields.keys())]
    for name in sorted(fields.keys() - parameters.keys()):
        near = difflib.get_close_matches(name, parameters, n=1, cutoff=0.5)
        problems.append(f"unknown field {name!r}" + (f" (nearest known: {near[0]!r})" if near else ""))
    if problems:
        raise ValueError(f"check_config: not a configuration of {cls.__name__}: {', '.join(problems)}")
    return fields


def _names(base_name: str, variant: str | None) -> tuple[str, str]:
    """Stem of the weight files, and the name of the index: the variant sits in different places in the two."""
    dot_variant = f".{variant}" if variant else ""
    return base_name + dot_variant, f"{base_name}.safetensors.index{dot_variant}.json"


def weight_patterns(base_name: str, variant: str | None = None) -> list[str]:
    """Download patterns for one variant of the weights, and no other."""
    stem, index = _names(base_name, variant)
    return [f"{stem}.safetensors", f"{stem}-*-of-*.safetensors", index]


def has_weights(folder: PathLike, base_name: str = BASE_NAME, variant: str | None = None) -> bool:
    """Whether there are weight files of that variant."""
    stem, index_name = _names(base_name, variant)
    return any((Path(folder) / name).is_file() for name in (index_name, f"{stem}.safetensors"))


def find_weights(folder: PathLike, base_name: str = BASE_NAME, variant: str | None = None) -> list[Path]:
    """The safetensors files that hold a model's weights: the shards of the index where there is one, else one file."""
    folder = Path(folder)
    stem, index_name = _names(base_name, variant)
    if (folder / index_name).is_file():
        return _find_shards(folder, index_name)
    if (folder / f"{stem}.safetensors").is_file():
        return [folder / f"{stem}.safetensors"]
    files = sorted(p.name for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
    safe = [n for n in files if n.endswith(".safetensors") or ".safetensors.index" in n]
    pickled = [n for n in files if Path(n).suffix in PICKLE_SUFFIXES]
    if pickled and not safe:
        raise ValueError(
            f"find_weights: {folder} holds only pickled weights ({_some(pickled)}); pickles can run code and are not "
            "read: load them where you trust them and save them as safetensors"
        )
    there = f"the folder has: {_some(safe)}" if safe else "the folder has no safetensors file"
    raise FileNotFoundError(f"find_weights: {folder} has no {stem}.safetensors and no {index_name}; {there}")


def _find_shards(folder: Path, index_name: str) -> list[Path]:
    weight_map = read_json(folder / index_name).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"find_weights: {folder / index_name} has no weight_map of tensor names to files")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name or "\\" in name]:
        raise ValueError(f"find_weights: {folder / index_name} must name files of its own folder, got {_some(outside)}")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"find_weights: {folder} lacks {len(missing)} of the {len(names)} shards that {index_name} names: "
            f"{_some(missing)}; copy or download them again"
        )
    return [folder / name for name in names]


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def load_state_into(
    model: nn.Module,
    files: Iterable[PathLike] | Opened,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    strict: bool = True,
    part: str | None = None,
    convert: Callable[[nn.Module, dict[str, Weight]], dict[str, Weight]] | None = None,
    mapped: bool = True,
    later: Collection[str] = (),
) -> None:
    """Give `model`, built on the meta device, the weights of `files`, on `device`; formats: weights/formats.py.

    Floating-point tensors become `dtype`; None keeps each as stored, but makes all bfloat16 where any is quantised.
    Besides the result, the host holds some 16 MB, and some 40 MB where weights are decoded. `mapped`: large weights
    that stay on the CPU as they are stored are pages of the files, which the system reads when they are used. `later`:
    names that are left on the meta device.
    Names, shapes and kinds are compared before anything is read: ValueError lists what is missing, unexpected or of
    another shape. `strict=False` passes over names that the model does not have, and lets a name be missing where the
    model already has a value. A buffer that is not stored must be made in the constructor with an explicit device
    (`torch.arange(n, device="cpu")`), which `torch.device("meta")` does not override; it is then moved to `device`.
    `convert` may put other layers into the model, with the weights that it leaves out of what it returns.
    """
    device = torch.device(device)
    opened = files if isinstance(files, Opened) else open_weights(files, part)
    check_fit(model, opened.weights, strict)
    wanted = model.state_dict().keys()
    taken = {name: weight for name, weight in opened.weights.items() if name in wanted and name not in later}
    dtype = opened.dtype(dtype)
    if convert is None:
        check_fits({part or type(model).__name__: need_of(taken.values(), dtype, device)}, device)
    else:
        taken = convert(model, taken)
    tensors = read_weights(taken, dtype, device, mapped)
    model.load_state_dict(tensors, strict=False, assign=True)
    places = [*model.named_parameters(), *model.named_buffers()]
    if left := [name for name, t in places if t.is_meta and name not in later]:
        raise ValueError(
            f"load_state_into: {type(model).__name__} still has no values for {_some(left)}: add them to the files, or "
            'create buffers that are not stored with an explicit device, as in torch.arange(n, device="cpu")'
        )
    if not later:
        model.to(device)
        return
    for module in model.modules():  # `to` does not know what to do with parameters that have no values
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def check_fit(model: nn.Module, entries: Mapping[str, Weight], strict: bool = True) -> None:
    """ValueError where weights, not yet read, are not those of `model`: what is missing, unexpected or different."""
    wanted = model.state_dict()
    problems: dict[str, list[str]] = {"missing": [], "unexpected": [], "different": []}
    for name, tensor in wanted.items():
        shown, entry = f"{name} {list(tensor.shape)}", entries.get(name)
        if entry is None:
            if strict or tensor.is_meta:
                problems["missing"].append(shown)
        elif tuple(tensor.shape) != entry.shape:
            problems["different"].append(f"{shown} is {list(entry.shape)} in the file")
        elif tensor.dtype.is_floating_point != is_floating(entry):
            problems["different"].append(
                f"{shown} is {tensor.dtype} in the model, {getattr(entry, 'dtype', entry.kind)} in the file"
            )
    if strict:
        problems["unexpected"] = [f"{name} {list(e.shape)}" for name, e in entries.items() if name not in wanted]
    if any(problems.values()):
        text = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names)
        raise ValueError(f"load_state_into: these are not the weights of this {type(model).__name__}; {text}")


def save_state(
    state: Mapping[str, torch.Tensor],
    folder: PathLike,
    *,
    base_name: str = BASE_NAME,
    max_shard_size: int | str = "10GB",
    variant: str | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write tensors as one safetensors file, or as shards of at most `max_shard_size` bytes and their index.

    `extra_files` (name: content, such as config.json) appear together with the weights. Files of an earlier save of the
    same base name and variant are removed at the end. Tensors go through the host one at a time. A tensor larger than
    a shard gets its own. Until all is written, the disk holds the earlier files and the new ones.
    """
    for name, tensor in state.items():
        if tensor.is_meta or tensor.layout != torch.strided or tensor.dtype not in DTYPE_NAMES:
            what = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise ValueError(f"save_state: {name} must be dense, with data, of a type safetensors knows, got {what}")
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    stem, index_name = _names(base_name, variant)
    pattern = stem + "{suffix}.safetensors"
    plan = split_torch_state_dict_into_shards(dict(state), filename_pattern=pattern, max_shard_size=max_shard_size)
    shards = {name: {key: state[key] for key in keys} for name, keys in plan.filename_to_tensors.items()}
    writers = {folder / name: tensor_writer(tensors) for name, tensors in shards.items()}
    extra = dict(extra_files or {})
    if plan.is_sharded:
        extra[index_name] = json_bytes({"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    for name, content in extra.items():
        writers[folder / name] = _bytes_writer(content)
    atomic_write_all(writers)

    # The index first: without it the shards are only stray files, with it and without them the folder is broken.
    stale = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors")
    old = [p for p in folder.iterdir() if p not in writers and (p.name == index_name or stale.fullmatch(p.name))]
    for path in sorted(old, key=lambda p: p.name != index_name):
        path.unlink()


def _bytes_writer(content: bytes) -> Callable[[BinaryIO], Any]:
    return lambda file: file.write(content)
