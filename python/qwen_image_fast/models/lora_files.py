"""LoRA files: finding one, its tensors, and the scales that it or the configuration beside it gives."""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..checkpoint import PICKLE_SUFFIXES
from ..files import atomic_write
from ..folders import newest_lora, read_json, resolve_folder
from ..tensor_files import CONVERT, read_header
from .lora_keys import Parts, by_layer, component_config, split_components, without_absent
from .lora_kinds import Adapter, Difference, Hadamard, Kronecker, Pair

logger = logging.getLogger(__name__)

_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
TASKS = "qwen_image_fast.tasks"  # of a file's texts: what our training learned it from, such as "ti2i" or "t2i ti2i"
_PEFT_DEFAULT = 8  # of r and alpha, where a configuration does not say


def write_lora(
    folder: str | os.PathLike,
    weight_name: str | None,
    layers: nn.Module | Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
    save_function: Callable[[dict[str, Tensor], str], Any] | None = None,
) -> None:
    """A file of the transformer's adapter, with PEFT's configuration in its texts; by `save_function`, where given."""
    state = layers.state_dict() if isinstance(layers, nn.Module) else layers
    tensors = {f"transformer.{key}": t.detach().to("cpu").contiguous() for key, t in state.items()}
    texts = {"format": "pt"}
    if config:
        named = {f"transformer.{key}": value for key, value in config.items()}
        texts["lora_adapter_metadata"] = json.dumps(named, indent=2, sort_keys=True, default=sorted)
    path = Path(folder, weight_name or _FILES[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    if save_function is not None:
        save_function(tensors, str(path))
    else:
        atomic_write(path, lambda file: file.write(safetensors.torch.save(tensors, texts)))


def locate_lora(
    source: str | os.PathLike, subfolder: str | None, weight_name: str | None, hub: Mapping[str, Any]
) -> tuple[Path, str | None]:
    """A local file, or a folder and the file in it, if that is known; downloaded where `source` is none here."""
    path = Path(source).expanduser()
    if path.exists():
        if hub["revision"] is not None:
            logger.warning("load_lora_weights: revision has no effect, as %s is a local path", path)
        if path.is_file():
            if subfolder is not None or weight_name not in (None, path.name):
                raise ValueError(
                    f"load_lora_weights: subfolder and weight_name must be of a folder, got the file {path}"
                )
            return path, None
        return _inside(path, subfolder), weight_name
    name = os.fspath(source)
    owner, repository, file = (*name.split("/", 2), "", "")[:3]
    if Path(name).suffix in {".safetensors", *PICKLE_SUFFIXES}:
        if path.parent.is_dir() or not file or owner in ("", ".", "..", "~"):
            raise FileNotFoundError(missing(path))
        if weight_name is None:
            name, weight_name = f"{owner}/{repository}", file
    inner = f"{subfolder}/" if subfolder else ""
    patterns = [inner + pattern for pattern in (weight_name or "*.safetensors", "*adapter_config.json")]
    return _inside(resolve_folder(name, allow_patterns=patterns, **hub), subfolder), weight_name


def _inside(folder: Path, subfolder: str | None) -> Path:
    if subfolder is None:
        return folder
    if not (folder / subfolder).is_dir():
        there = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or "none"
        raise FileNotFoundError(
            f"load_lora_weights: {folder} has no subfolder {subfolder!r}; subfolders there: {there}"
        )
    return folder / subfolder


def read_lora(path: Path, weight_name: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file, or of the folder that holds it, and PEFT's configuration of them, if any.

    Raises:
        FileNotFoundError, ValueError: no file, several, or a damaged one; what is wrong is named.
    """
    file = find_lora(path, weight_name)
    if file.suffix in PICKLE_SUFFIXES:
        raise ValueError(_pickled(file))
    read_header(file)  # a damaged file is named
    with safe_open(file, framework="pt") as content:
        state = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118  not a dict
        metadata = content.metadata() or {}
    return state, lora_config(file, metadata)


def lora_config(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's configuration of a file: of its own texts, or beside it; empty where there is none."""
    try:
        config = dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"load_lora_weights: lora_adapter_metadata of {file} must be a JSON object") from error
    if file.name == _FILES[1] and (file.parent / "adapter_config.json").is_file():
        config = read_json(file.parent / "adapter_config.json")
    return config


def _pickled(file: Path) -> str:
    return f"{file} is a pickle, which can run code, and only safetensors are loaded: {CONVERT}"


def find_lora(path: Path, weight_name: str | None = None) -> Path:
    """The file at `path`, or the one in that folder."""
    if weight_name is not None and not path.is_file():
        path = path / weight_name
        if not path.exists():
            raise FileNotFoundError(missing(path))
    if not path.is_dir():
        return path
    for name in _FILES:
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    pickles = sorted(p for p in path.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickles and not files:
        raise ValueError(_pickled(pickles[0]))
    if not files:
        raise FileNotFoundError(
            f"load_lora_weights: {path} holds no LoRA: it has no safetensors file{newest_lora(path)}"
        )
    there = ", ".join(f.name for f in files)
    raise FileNotFoundError(
        f"load_lora_weights: {path} holds several files, name one of them, as {files[0]} or by weight_name: {there}"
    )


def missing(file: Path) -> str:
    """A sentence on a file that is not there, with the nearest of its folder."""
    if not file.parent.is_dir():
        return f"there is no file {file}, and no folder {file.parent}"
    found = (*file.parent.glob("*.safetensors"), *file.parent.glob("*/*.safetensors"))
    names = {path.stem: str(path.relative_to(file.parent)) for path in sorted(found)}
    if near := difflib.get_close_matches(file.stem, names, n=1, cutoff=0.6):
        return f"there is no file {file}; did you mean {names[near[0]]}?"
    shown = ", ".join([*names.values()][:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"there is no file {file}; the folder has {shown or 'no safetensors file'}"


def parse_components(
    state: Mapping[str, Tensor], config: Mapping[str, Any], transformer: Any, text_encoder: Any,
    unknown: list[str] | None = None,
) -> tuple[dict[str, Adapter], dict[str, Adapter], int]:  # fmt: skip
    """The adapters of the transformer and of the text encoder, and how many tensors of the latter are left out.

    The models may be on the meta device; `text_encoder`: None: its part is left out. `unknown`: gets
    the keys that name nothing in them; None: they are an error. ValueError: as `parse_lora`.
    """
    own, whole = split_components(state)
    text = {} if text_encoder is None else without_absent(whole, text_encoder)
    layers = parse_lora(own, transformer, component_config(config, "transformer"), unknown) if own or not text else {}
    found = parse_lora(text, text_encoder, component_config(config, "text_encoder"), unknown) if text else {}
    return layers, found, len(whole) - len(text)


def parse_lora(
    state: Mapping[str, Tensor], model: nn.Module, config: Mapping[str, Any] | None = None,
    left: list[str] | None = None,
) -> dict[str, Adapter]:  # fmt: skip
    """Adapters by layer from the tensors of a file in any of the known styles, all of them of `model`.

    `left`: gets the keys that are not of `model`; None: they are an error.

    An alpha tensor beside a change gives scale = alpha / rank; else `config` does by PEFT's rules (r, lora_alpha or
    alpha, rank_pattern, alpha_pattern, use_rslora); else the scale is 1, and so it is where alpha is null.

    Raises:
        ValueError: keys that name nothing in `model`, parts that are not whole, other shapes, numbers that are none.
    """
    parts = by_layer(state, model, left)
    adapters = {name: _adapter(name, own, model.get_submodule(name), config or {}) for name, own in parts.items()}
    if all(a.scale == 0 and a.bias is None for a in adapters.values()):
        raise ValueError(
            "load_lora_weights: alpha is 0 in every layer, which switches the adapter off; take the alphas out of the "
            "file for a scale of 1"
        )
    return adapters


def _adapter(name: str, parts: Parts, layer: Any, config: Mapping[str, Any]) -> Adapter:
    for part, tensor in parts.items():
        if not (tensor.is_floating_point() or part == "alpha"):
            raise ValueError(f"load_lora_weights: {name} must hold floating-point numbers, got {tensor.dtype}")
        if not torch.isfinite(tensor.float()).all():
            raise ValueError(f"load_lora_weights: {name} must hold finite numbers, got NaN or infinity in its {part}")
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise ValueError(f"load_lora_weights: alpha of {name} must be one number, got {parts['alpha'].numel()}")
    change, rank, shape = _change(name, parts, layer)
    scale = 1.0 if rank is None else _scale(name, rank, parts.get("alpha"), config)
    bias = parts.get("diff_b")
    if "lora_B.bias" in parts:
        bias = parts["lora_B.bias"].float() * scale
    if bias is not None:
        _check_bias(name, bias, layer)
    elif change is None:
        raise ValueError(f"load_lora_weights: {name} must have an adapter beside its {' and '.join(sorted(parts))}")
    return Adapter(change, scale, _magnitude(name, parts.get("dora_scale"), shape, change), bias)


def _change(name: str, parts: Parts, layer: Any) -> tuple[Any, int | None, list[int]]:
    """The change of a layer's weight, if there is one, its rank, if it has one, and the weight's shape."""
    given = parts.keys() - {"alpha", "dora_scale", "diff_b", "lora_B.bias"}
    kinds = {key.split("_")[0] for key in given}
    if len(kinds) > 1:
        raise ValueError(f"load_lora_weights: {name} must have one adapter, got {' and '.join(sorted(given))}")
    linear = isinstance(layer, nn.Linear)  # whose weights may have been released
    shape = [layer.out_features, layer.in_features] if linear else list(layer.weight.shape)
    if not linear and parts.keys() != {"diff"}:
        raise ValueError(
            f"load_lora_weights: {name} is a norm, for which a file may only hold a difference, got {', '.join(parts)}"
        )
    change, rank = _KINDS[kinds.pop()](name, parts, shape) if kinds else (None, None)
    return change, rank, shape


class Described(NamedTuple):
    """What a layer's adapter is; alpha: None where the file says none, for a scale of 1."""

    kind: str
    rank: int | None
    alpha: float | None


def describe_adapters(layers: Mapping[str, Parts], model: nn.Module, config: Mapping[str, Any]) -> dict[str, Described]:
    """The adapters of layers of `model`, of which alone the alphas must have values. ValueError: other shapes."""
    found = {}
    for name, parts in layers.items():
        change, rank, _ = _change(name, parts, model.get_submodule(name))
        alpha = float(parts["alpha"]) if "alpha" in parts else None
        if alpha is None and config and rank is not None:
            key = "lora_alpha" if "lora_alpha" in config else "alpha"
            alpha = pattern_value(config.get("alpha_pattern"), name, config.get(key, _PEFT_DEFAULT))
        kind = "DoRA" if "dora_scale" in parts else KINDS.get(type(change), "differences of biases")
        found[name] = Described(kind, rank or None, alpha)
    return found


def _check_bias(name: str, bias: Tensor, layer: Any) -> None:
    own = None if layer.bias is None else [layer.out_features]
    if list(bias.shape) != own:
        raise ValueError(
            f"load_lora_weights: the bias of {name} must be {own or 'absent, as the layer has none'}, got "
            f"{list(bias.shape)}: the file is for another model"
        )


def _magnitude(name: str, given: Tensor | None, shape: list[int], change: Any) -> Tensor | None:
    """DoRA's magnitudes as [out, 1] or [1, in]; PEFT writes [out]."""
    if given is None:
        return None
    if change is None:
        raise ValueError(
            f"load_lora_weights: {name} must have an adapter beside its magnitude, got the magnitude alone"
        )
    given = given[:, None] if given.dim() == 1 else given
    if list(given.shape) not in ([shape[0], 1], [1, shape[1]]):
        raise ValueError(
            f"load_lora_weights: the magnitude of {name} must be [{shape[0]}, 1] or [1, {shape[1]}], got "
            f"{list(given.shape)}: the file is for another model"
        )
    return given


def _whole(name: str, parts: Parts, wanted: tuple[str, ...]) -> list[Tensor]:
    if lacking := [part for part in wanted if part not in parts]:
        raise ValueError(
            f"load_lora_weights: {name} must have both matrices of its pair, got no {lacking[0]}"
            if len(wanted) == 2
            else f"load_lora_weights: {name} must have {', '.join(wanted)}, got no {lacking[0]}"
        )
    return [parts[part] for part in wanted]


def _product_shape(matrices: tuple[Tensor, ...]) -> list[int] | None:
    """The shape of a matrix or of a product of two, of rank 1 or more; None: there is none."""
    if any(m.dim() != 2 or 0 in m.shape for m in matrices):
        return None
    if len(matrices) == 2 and matrices[0].shape[1] != matrices[1].shape[0]:
        return None
    return [matrices[0].shape[0], matrices[-1].shape[1]]


def _pair(name: str, parts: Parts, shape: list[int]) -> tuple[Pair, int]:
    down, up = _whole(name, parts, ("lora_A", "lora_B"))
    if _product_shape((up, down)) != shape:
        raise ValueError(
            f"load_lora_weights: {name} must be [rank, {shape[1]}] and [{shape[0]}, rank], "
            f"got {list(down.shape)} and {list(up.shape)}: the file is for another model"
        )
    return Pair(down, up), len(down)


def _hadamard(name: str, parts: Parts, shape: list[int]) -> tuple[Hadamard, int]:
    w1a, w1b, w2a, w2b = _whole(name, parts, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
    shapes = [_product_shape((w1a, w1b)), _product_shape((w2a, w2b))]
    if shapes != [shape, shape]:
        raise ValueError(
            f"load_lora_weights: both products of {name} must be {shape}, got matrices of {list(w1a.shape)} and "
            f"{list(w1b.shape)}, {list(w2a.shape)} and {list(w2b.shape)}: the file is for another model"
        )
    return Hadamard((w1a, w1b), (w2a, w2b)), len(w1b)


def _kronecker(name: str, parts: Parts, shape: list[int]) -> tuple[Kronecker, int]:
    factors: list[tuple[Tensor, ...]] = []
    rank = 0
    for factor in ("lokr_w1", "lokr_w2"):
        if factor in parts:
            if f"{factor}_a" in parts or f"{factor}_b" in parts:
                raise ValueError(f"load_lora_weights: {name} must have {factor} or two matrices of it, got both")
            factors.append((parts[factor],))
        else:
            factors.append(tuple(_whole(name, parts, (f"{factor}_a", f"{factor}_b"))))
            rank = len(factors[-1][1]) if factors[-1][1].dim() else 0
    shapes = [_product_shape(f) for f in factors]
    first, second = shapes
    if first is None or second is None or [first[0] * second[0], first[1] * second[1]] != shape:
        raise ValueError(
            f"load_lora_weights: the factors of {name} must multiply to {shape}, got {first} and {second}: the file is "
            "for another model"
        )
    return Kronecker(*factors), rank


def _difference(name: str, parts: Parts, shape: list[int]) -> tuple[Difference, None]:
    if list(parts["diff"].shape) != shape:
        raise ValueError(
            f"load_lora_weights: the difference of {name} must be {shape}, got {list(parts['diff'].shape)}: the file "
            "is for another model"
        )
    return Difference(parts["diff"]), None


_KINDS: dict[str, Any] = {"lora": _pair, "hada": _hadamard, "lokr": _kronecker, "diff": _difference}
KINDS = {Pair: "LoRA", Hadamard: "LoHa", Kronecker: "LoKr", Difference: "differences of weights"}


def _scale(name: str, rank: int, alpha: Tensor | None, config: Mapping[str, Any]) -> float:
    """Of a change of `rank`; 0: both factors of a Kronecker product are whole, for which LyCORIS has no scale."""
    if not config:
        return 1.0 if alpha is None or rank == 0 else float(alpha) / rank
    stored = pattern_value(config.get("rank_pattern"), name, config.get("r"))
    if stored is not None and rank not in (0, stored):
        raise ValueError(f"load_lora_weights: {name} must have the rank of its configuration, {stored}, got {rank}")
    rank = rank or stored or _PEFT_DEFAULT
    if alpha is not None:
        value = float(alpha)
    else:
        key = "lora_alpha" if "lora_alpha" in config else "alpha"
        value = pattern_value(config.get("alpha_pattern"), name, config.get(key, _PEFT_DEFAULT))
    value = rank if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"load_lora_weights: alpha of {name} must be a finite number, got {value!r}")
    return value / (math.sqrt(rank) if config.get("use_rslora") else rank)


def pattern_value(patterns: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the end of a layer's name, as PEFT chooses from rank_pattern.

    A pattern is a regular expression for whole parts of the name between dots, up to its end: "to_q" is a pattern of
    "blocks.0.attn.to_q" and none of "blocks.0.attn.into_q".
    """
    for pattern, value in (patterns or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error as error:
            raise ValueError(f"load_lora_weights: {pattern!r} must be a regular expression ({error})") from error
        if matches:
            return value
    return otherwise
