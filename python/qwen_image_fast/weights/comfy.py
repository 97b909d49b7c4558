"""The quantised weights of ComfyUI's safetensors files, and of those made alike.

    L.weight, L.weight_scale, ...; L.comfy_quant = bytes of {"format": ...}     or one entry of the file's metadata
                                   `_quantization_metadata` = {"layers": {L: {"format": ...}}}
    L.weight, L.scale_weight [, L.scale_input]; scaled_fp8                      the older form; musubi-tuner's, by block
    L.weight (float8), L.weight_scale                                           ModelOpt, LightX2V

Scales of activations (`input_scale`, `scale_input`) are passed over: activations are not quantised here.
Source: https://github.com/comfyanonymous/ComfyUI/blob/master/QUANTIZATION.md and comfy-kitchen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from qwen_image_fast.tensor_files import Entry
from qwen_image_fast.weights import scales
from qwen_image_fast.weights.reading import read_entry
from qwen_image_fast.weights.stored import Part, StoredWeight

CONFIG = ".comfy_quant"
# The older names of what a layer has, and the newer.
OLDER = {"scale_weight": "weight_scale", "scale_input": "input_scale", "scale_weight_tensor": "weight_scale_tensor"}
SUFFIXES: tuple[str, ...] = (
    "weight",
    "weight_scale",
    "weight_scale_tensor",
    "input_scale",
    "weight_s_rel",
    "weight_s_channel",
)
SUFFIXES += ("weight_codebook", "weight_correction", "comfy_quant", *OLDER)


class _Layer:
    """What a file holds of one layer, by suffix, and the settings of its format."""

    def __init__(self, name: str, config: Mapping[str, Any], tensors: Mapping[str, Entry]) -> None:
        self.name, self.config, self.tensors = name, config, tensors

    def __getitem__(self, suffix: str) -> Entry:
        if suffix not in self.tensors:
            raise self.error(f"lacks {self.name}.{suffix}")
        return self.tensors[suffix]

    def setting(self, key: str, default: int) -> int:
        inner = self.config.get("params")
        return int(self.config.get(key, inner.get(key, default) if isinstance(inner, dict) else default))

    def error(self, what: str) -> ValueError:
        path = self.tensors["weight"].path
        return ValueError(f"{path} is damaged or of an unknown tool: it {what}; download or convert it again")

    def wants(self, suffix: str, *shapes: tuple[int, ...]) -> Entry:
        """A tensor of one of these shapes, in the first of them."""
        entry = self[suffix]
        if entry.shape not in shapes:
            raise self.error(f"has {self.name}.{suffix} of shape {list(entry.shape)}, expected {list(shapes[0])}")
        return entry._replace(shape=shapes[0])


def take_scaled(rest: dict[str, Entry], metadata: Mapping[str, str]) -> dict[str, StoredWeight]:
    """Take the quantised layers, and what describes them, out of `rest`.

    Raises:
        ValueError: a format that is not read, or tensors that do not fit it.
    """
    configs = _configs(rest, metadata)
    rest.pop("scaled_fp8", None)
    found = {}
    for name, config in configs.items():
        if f"{name}.weight" not in rest:  # of another part of the file
            continue
        tensors = {}
        for suffix in SUFFIXES:
            if (entry := rest.pop(f"{name}.{suffix}", None)) is not None:
                tensors[OLDER.get(suffix, suffix)] = entry
        layer = _Layer(name, config, tensors)
        kind = str(config.get("format"))
        if kind not in _FORMATS:
            what = f"holds {name} as {kind}, which is not read"
            ways = ", ".join(_FORMATS)
            raise ValueError(
                f"{tensors['weight'].path} {what}: take a GGUF or bfloat16 file of the model, or one of {ways}"
            )
        found[f"{name}.weight"] = _FORMATS[kind](layer)
    return found


def _configs(rest: Mapping[str, Entry], metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The settings of every quantised layer."""
    configs: dict[str, dict[str, Any]] = {}
    for name in rest:
        layer, _, last = name.rpartition(".")
        if last in ("scale_weight", "weight_scale") and f"{layer}.weight" in rest:
            weight = rest[f"{layer}.weight"]
            if last == "scale_weight" or weight.dtype in scales.FLOAT8:
                configs.setdefault(layer, {"format": "float8_e4m3fn"})
    try:
        layers = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
        for layer, config in layers.items():
            configs[layer] = {"format": config} if isinstance(config, str) else dict(config)
        for name, entry in rest.items():
            if name.endswith(CONFIG):
                configs[name.removesuffix(CONFIG)] = dict(json.loads(read_entry(entry).numpy().tobytes()))
    except (ValueError, TypeError, AttributeError) as error:
        path = next(iter(rest.values())).path
        raise ValueError(f"{path} describes its quantisation in a way that is not json; download it again") from error
    return configs


def _matrix(layer: _Layer, *dtypes: torch.dtype) -> tuple[Part, int, int]:
    """The numbers as rows, and the size of the matrix."""
    weight = layer["weight"]
    if weight.dtype not in dtypes:
        raise layer.error(f"has {layer.name}.weight as {weight.kind} for the format {layer.config.get('format')}")
    rows = weight.shape[0] if weight.shape else 1
    columns = math.prod(weight.shape[1:])
    return Part(weight._replace(shape=(rows, columns)), 1), rows, columns


def _scale(layer: _Layer, rows: int, columns: int) -> Part:
    """The scales as a matrix, each of a block of the weight: all of it, a row, a part of a row, a rectangle."""
    entry = layer["weight_scale"]
    if not entry.dtype.is_floating_point:
        raise layer.error(f"has {layer.name}.weight_scale as {entry.kind}")
    if math.prod(entry.shape) == 1:
        return Part(entry._replace(shape=(1, 1)))
    shape = entry.shape
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    down, across = shape if len(shape) == 2 else (*shape, 1) if len(shape) == 1 else (0, 0)
    if not down or not across or rows % down or columns % across:
        raise layer.error(
            f"has {layer.name}.weight_scale of shape {list(entry.shape)}, expected one number, one for each of the "
            f"{rows} rows, or one for each of equal blocks of [{rows}, {columns}]"
        )
    return Part(entry._replace(shape=(down, across)), rows // down)


def _scaled(layer: _Layer) -> StoredWeight:
    """float8, and what the older form scales in other types."""
    stored = layer["weight"].dtype
    numbers, rows, columns = _matrix(layer, *scales.FLOAT8, torch.float32, torch.float16, torch.bfloat16)
    scale = _scale(layer, rows, columns)
    parts = {"weight": numbers, "scale": scale}
    if "weight_scale_tensor" in layer.tensors:
        parts["tensor_scale"] = Part(layer.wants("weight_scale_tensor", (1,), ()))
    name = str(stored).removeprefix("torch.")
    whole = scale.entry.shape == (1, 1) and len(parts) == 2
    blocks = "" if scale.rows == 0 else " rows" if scale.entry.shape == (rows, 1) else " blocks"
    decode = scales.per_tensor if whole else scales.per_block
    return StoredWeight(f"{name} scaled{blocks}", layer["weight"].shape, columns, parts, decode)


def _int8(layer: _Layer) -> StoredWeight:
    numbers, rows, columns = _matrix(layer, torch.int8)
    parts = {"weight": numbers, "scale": _scale(layer, rows, columns)}
    shape = layer["weight"].shape
    blocks = parts["scale"].entry.shape
    if not layer.setting("convrot", 0):
        kind = "int8" if blocks == (1, 1) else "int8 rows" if blocks == (rows, 1) else "int8 blocks"
        plain = 1 if kind != "int8 blocks" and len(shape) == 2 else None
        return StoredWeight(kind, shape, columns, parts, scales.per_block, plain)
    size = _rotation(layer, columns)
    by_row = size if blocks[1] == 1 and blocks[0] in (1, rows) and size <= 256 and len(shape) == 2 else None
    return StoredWeight(f"int8 rotated {size}", shape, columns, parts, scales.rotated(size), by_row)


def _rotation(layer: _Layer, columns: int) -> int:
    size = layer.setting("convrot_groupsize", 256)
    if not scales.is_rotation(size) or columns % size:
        raise layer.error(f"rotates {layer.name} by {size} values, which must be a power of 4 that divides {columns}")
    return size


def _int4(layer: _Layer) -> StoredWeight:
    numbers, rows, half = _matrix(layer, torch.int8)
    scale = Part(layer.wants("weight_scale", (rows, 1), (rows,)), 1)
    size = _rotation(layer, 2 * half)
    parts = {"weight": numbers, "scale": scale}
    return StoredWeight(f"int4 rotated {size}", (rows, 2 * half), 2 * half, parts, scales.rotated_pairs(size))


def _grouped(layer: _Layer) -> StoredWeight:
    numbers, rows, packed = _matrix(layer, torch.int8)
    group = layer.setting("group_size", 16)
    columns = layer["weight_s_rel"].shape[-1] * group
    bits = 8 * packed // columns if columns else 0
    if bits not in (4, 6) or 8 * packed != bits * columns:
        raise layer.error(f"has {packed} bytes in a row of {layer.name}.weight for {columns} values")
    size = _rotation(layer, columns)
    s_rel = layer.wants("weight_s_rel", (rows, columns // group))
    if s_rel.dtype == torch.uint8:
        s_rel = s_rel._replace(dtype=torch.float8_e4m3fn)
    parts = {"weight": numbers, "s_rel": Part(s_rel, 1), "s_channel": Part(layer.wants("weight_s_channel", (rows,)), 1)}
    if "weight_codebook" in layer.tensors:
        parts["codebook"] = Part(layer.wants("weight_codebook", (16,)))
    if "weight_correction" in layer.tensors:
        parts["correction"] = Part(layer.wants("weight_correction", (columns // group, rows)))
    kind = f"int{bits} groups of {group}, rotated {size}"
    plain = bits == 4 and group == 16 and "codebook" in parts and "correction" not in parts and size <= 256
    decode = scales.grouped(columns, bits, group, size)
    return StoredWeight(kind, (rows, columns), columns, parts, decode, rotation_of_4=size if plain else None)


_FORMATS: dict[str, Callable[[_Layer], StoredWeight]] = {
    **dict.fromkeys(["float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise", "float8_e4m3fn_blockwise"], _scaled),
    **dict.fromkeys(["int8_tensorwise", "int8_blockwise"], _int8),
    "convrot_w4a4": _int4,
    "asym_w4a8_int8": _grouped,
}


def cast_float8(entry: Entry) -> Entry | StoredWeight:
    """A plain float8 tensor as something to decode, other tensors as they are."""
    if entry.dtype not in scales.FLOAT8:
        return entry
    width = math.prod(entry.shape[1:])
    part = Part(entry._replace(shape=(math.prod(entry.shape) // max(width, 1), width)), 1)
    return StoredWeight(entry.kind, entry.shape, max(width, 1), {"weight": part}, scales.cast)
