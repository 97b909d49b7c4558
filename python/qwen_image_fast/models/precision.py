"""`precision=`: which layers of a transformer are in 8 or 4 bits, on which devices, and which bits files have."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from qwen_image_fast.ops import _eight_bits, _int4, _int8
from qwen_image_fast.ops.linear_int8 import UNITS
from qwen_image_fast.tensor_files import Entry
from qwen_image_fast.weights.stored import StoredWeight, Weight, is_quantised

logger = logging.getLogger(__name__)

PRECISIONS = ("int8", "int4")
PLACES = ("cpu", "cuda")
# Which layers of a transformer compute in 8 bits: all large products of the blocks. What is left: modulation, which
# multiplies everything and is computed once for a schedule; the time step; embeddings; the output norm and projection.
LAYERS = re.compile(
    r"transformer_blocks\.\d+\."
    r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|(img|txt)_mlp\.net\.(0\.proj|2))"
)


def check_precision(where: str, precision: str | None, device: str | torch.device) -> None:
    """ValueError where a model cannot have this precision here, before anything is loaded."""
    if precision is None:
        return
    if precision not in PRECISIONS:
        raise ValueError(f"{where}: precision must be None or one of {', '.join(PRECISIONS)}, got {precision!r}")
    if torch.device(device).type not in PLACES:
        raise ValueError(
            f"{where}: precision must be None on {device}: layers in 8 bits compute on {' and '.join(PLACES)}"
        )
    if torch.device(device).type == "cpu" and len(UNITS) == 1:
        raise ValueError(
            f"{where}: precision must be None on this CPU, which has none of the instructions for 8-bit products "
            "(AVX2, VNNI, AMX): it would be slower than without"
        )
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        index = torch.device(device).index
        place = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        numbers, capability = _eight_bits.numbers_on(place), _eight_bits.capability_of(place.index)
        if _eight_bits.preferred(capability) == "float8" and (precision == "int4" or numbers == "float8"):
            means = "weights in 4 bits become integers: they save memory alone" if precision == "int4" else (
                'layers in 8 bits compute in float8, further from the model; ops.eight_bits("int8") keeps integers'
            )  # fmt: skip
            logger.warning("%s: precision=%r: %s: %s", where, precision, _eight_bits.describe(capability), means)


def precisions(paths: Iterable[str], precision: str) -> dict[str, str]:
    """Of each of these layers: with "int4" those of the last block are in 8 bits, if it is not the only one."""
    blocks = {path: int(path.split(".")[1]) for path in paths}
    last = max(blocks.values(), default=0)
    return {path: "int8" if block == last > 0 else precision for path, block in blocks.items()}


def bytes_of(precision: str) -> float:
    """Of a number of such a weight, in 4 bits with its share of the scale of 16."""
    return _int4.TILE / (_int8.COLUMNS * _int8.DEPTH) if precision == "int4" else 1.0


def mean_bytes(precision: str, blocks: int) -> float:
    """Of a number of all such weights of a transformer with so many blocks."""
    kinds = precisions((f"transformer_blocks.{i}" for i in range(blocks)), precision).values()
    return sum(map(bytes_of, kinds)) / blocks


def int8_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers of a transformer that `LAYERS` names, by name."""
    return {name: layer for name, layer in model.named_modules() if LAYERS.fullmatch(name)}  # type: ignore[misc]


def layers_in(precision: str, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The weights that `read_int8_layers` takes, by layer; ValueError where it would raise one for their formats."""
    of_layers = {name.removesuffix(".weight"): w for name, w in weights.items() if name.endswith(".weight")}
    stored = {path: weight for path, weight in of_layers.items() if LAYERS.fullmatch(path)}
    own = {path: weight for path, weight in stored.items() if is_in(precision, weight)}
    if precision == "int4" and own:
        own |= {path: weight for path, weight in stored.items() if is_in("int8", weight)}
    if not own or precision == "int8":
        refuse_quantised({path: weight for path, weight in stored.items() if not own or is_in("int4", weight)})
    return own or stored


def bits_of(precision: str, weights: Mapping[str, Weight]) -> dict[str, str]:
    """The precision of each of the layers of `layers_in`: that of the file, or of `precisions`."""
    made = precisions(weights, precision)
    stored = {path: [kind for kind in PRECISIONS if is_in(kind, weight)] for path, weight in weights.items()}
    return {path: stored[path][0] if stored[path] else made[path] for path in weights}


def precision_of(weights: Mapping[str, Weight]) -> str | None:
    """Of a file's weights, by name, the precision that they are in already; None: in none."""
    kept = {kind for weight in weights.values() for kind in PRECISIONS if is_in(kind, weight)}
    return "int4" if "int4" in kept else "int8" if kept else None


def refuse_quantised(stored: Mapping[str, Weight], instead: str = "") -> None:
    """ValueError where one of these weights, by layer, is quantised. instead: what to do; default: as it is loaded."""
    for path, weight in stored.items():
        if is_quantised(weight):
            own = next((kind for kind in PRECISIONS if is_in(kind, weight)), None)
            known = "" if own is None else f"with precision={own!r} (--precision {own}), or "
            instead = instead or f"load it {known}without precision, or take a file in floating point"
            raise ValueError(f"{file_of(weight)} is quantised already, {path} as {weight.kind}: {instead}")


def file_of(weight: Weight) -> str:
    """Its path, for messages."""
    entry = weight.parts["weight"].entry if isinstance(weight, StoredWeight) else weight
    return str(entry.path) if isinstance(entry, Entry) else "the file"


def is_in(precision: str, weight: Weight) -> bool:
    """Whether a file has it in these bits already, as this model computes with it."""
    if not isinstance(weight, StoredWeight):
        return False
    return (weight.rotation if precision == "int8" else weight.rotation_of_4) is not None
