"""Quantise a transformer once: read tensor by tensor, merge LoRAs, write ComfyUI's layout; go on where it stopped.

One weight is held at a time. The output is a file of its final size from the start, into which every weight is written
at its place; a journal beside it names those that are there. At the end the file gets its name and the journal goes, so
that a file under its final name is whole.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_image_fast.models.int8_linear import SHARED, comfy_tensors, quantised
from qwen_image_fast.models.lora_kinds import Adapter
from qwen_image_fast.models.precision import LAYERS, precisions, refuse_quantised
from qwen_image_fast.models.stored_modulation import SCHEDULES, StoredSchedule, named, schedule_bytes
from qwen_image_fast.ops import _int8
from qwen_image_fast.quantize_modulation import Vectors
from qwen_image_fast.tensor_files import DTYPE_NAMES, read_metadata
from qwen_image_fast.weights.formats import Opened
from qwen_image_fast.weights.reading import read_weights
from qwen_image_fast.weights.scales import floats, to_float8
from qwen_image_fast.weights.stored import Weight

FP8 = "fp8"  # float8 e4m3 with one scale a weight: a smaller file, which is computed with in floating point
METADATA = "qwen_image_fast"  # in the file's header, a json: precision, rotation, and what is said of it
ROWS = 64  # of a weight, evenly spread, of which its error is measured

Said = Callable[[int, int], None]  # weights done, of how many
Loras = Sequence[tuple[Mapping[str, Adapter], float]]


class Output:
    """The file: where each tensor lies, and the header."""

    def __init__(self, like: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        self.places: dict[str, int] = {}
        end = 0
        # Widest types first keeps every tensor aligned to its own type.
        for name in sorted(like, key=lambda name: (-like[name][0].itemsize, name)):
            dtype, shape = like[name]
            begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            self.places[name] = begin
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.size = len(self.header) + end

    def write(self, file: Any, name: str, tensor: Tensor) -> None:
        file.seek(len(self.header) + self.places[name])
        file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def quantize(
    opened: Opened, out: Path, loras: Loras = (), about: Mapping[str, Any] | None = None, said: Said | None = None,
    precision: str = "int8", schedules: Sequence[StoredSchedule] = (),
) -> dict[str, float]:  # fmt: skip
    """Write the transformer in `opened` to the file `out` in 8 bits, in 4, or in float8.

    Args:
        opened: floating-point weights under our names.
        loras: adapters by layer with their weight, which are merged in float32 before anything is rounded.
        about: what the metadata say besides, of the model and the LoRAs; they, and sizes and times of the model's
            files, tell whether a file that was left unfinished is of the same work.
        said: told how many weights are done.
        schedules: leave the modulation weights out, and write the vectors that they make for these.

    Returns:
        The relative root mean square error of each such weight, on some of its rows.

    Raises:
        ValueError: weights with a quantisation of their own, or that are not finite.
    """
    weights: Mapping[str, Weight] = opened.weights
    layers = {name.removesuffix(".weight"): w for name, w in weights.items() if _in_8_bits(name)}
    refuse_quantised(layers, "quantise the file in floating point that it was made of")
    vectors, said_of_them = None, b""
    if schedules:
        vectors = Vectors(weights, schedules, functools.partial(_read, opened.weights, loras))
        weights = {name: weight for name, weight in weights.items() if name not in vectors.left_out()}
        said_of_them = schedule_bytes(schedules).numpy().tobytes()
    paths = [name.removesuffix(".weight") for name in weights if _in_8_bits(name)]
    bits = dict.fromkeys(paths, precision) if precision == FP8 else precisions(paths, precision)
    like = dict(_like(weights, bits)) | dict(vectors.like() if vectors else ())
    like |= {SCHEDULES: (torch.uint8, (len(said_of_them),))} if schedules else {}
    output = Output(like, {"format": "pt", METADATA: json.dumps(notes_of(precision, about, schedules))})
    part, journal = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.journal")
    errors = _continue(part, journal, output, _fingerprint(output, opened.weights, said_of_them))
    done = set(errors)
    made = [name for name, _ in vectors.like()] if vectors else []
    with open(part, "r+b") as file, open(journal, "a", encoding="utf-8") as notes:
        if schedules:
            output.write(file, SCHEDULES, schedule_bytes(schedules))
        for name in [*weights, *made]:
            if name not in done:
                error = None
                if vectors is not None and name not in weights:
                    output.write(file, name, vectors.make(name))
                else:
                    error = _convert(name, opened.weights, file, output, loras, bits)
                file.flush()
                os.fsync(file.fileno())
                notes.write(json.dumps([name, error]) + "\n")
                notes.flush()
                errors[name] = error
            if said is not None:
                said(len(errors), len(weights) + len(made))
    os.replace(part, out)
    journal.unlink()
    return {name.removesuffix(".weight"): error for name, error in errors.items() if error is not None}


def notes_of(
    precision: str, about: Mapping[str, Any] | None = None, schedules: Sequence[StoredSchedule] = ()
) -> dict[str, Any]:
    """What the header says of the file, for `quantize` of these arguments."""
    of_modulation = {"modulation": named(schedules)} if schedules else {}
    rotation = {} if precision == FP8 else {"rotation": "ConvRot"}
    return {"precision": precision, **rotation, **(about or {}), **of_modulation}


def notes_in(file: Path) -> dict[str, Any]:
    """What the header of a file says."""
    return json.loads(read_metadata(file).get(METADATA, "{}"))


def _in_8_bits(name: str) -> bool:
    return name.endswith(".weight") and LAYERS.fullmatch(name.removesuffix(".weight")) is not None


def _like(
    weights: Mapping[str, Weight], bits: Mapping[str, str]
) -> Iterable[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Type and shape of everything that is written."""
    for name, weight in weights.items():
        if _in_8_bits(name):
            rows, width = weight.shape
            path = name.removesuffix(".weight")
            for suffix, tensor in _rounded(torch.zeros(1, width), bits[path])[0].items():  # one row says the others
                whole = suffix in SHARED or not tensor.dim()
                shape = tuple(tensor.shape) if whole else (rows, *tensor.shape[1:])
                yield f"{path}.{suffix}", (tensor.dtype, shape)
        else:
            yield name, (getattr(weight, "dtype", torch.bfloat16), weight.shape)


def _read(weights: Mapping[str, Weight], loras: Loras, name: str) -> Tensor:
    """One weight with the LoRAs merged. ValueError: it is not finite."""
    value = read_weights({name: weights[name]}, None, torch.device("cpu"))[name]
    path, _, kind = name.rpartition(".")
    value = _merged(value, kind, [(layers[path], share) for layers, share in loras if path in layers])
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} must hold finite numbers, got NaN or infinity: download the file again")
    return value


def _convert(
    name: str, weights: Mapping[str, Weight], file: Any, output: Output, loras: Loras, bits: Mapping[str, str]
) -> float | None:
    """Read, merge, round and write one weight; returns its error."""
    value = _read(weights, loras, name)
    if not _in_8_bits(name):
        output.write(file, name, value)
        return None
    path = name.removesuffix(".weight")
    tensors, error = _rounded(value, bits[path])
    for suffix, tensor in tensors.items():
        output.write(file, f"{path}.{suffix}", tensor)
    return error


def _rounded(value: Tensor, bits: str) -> tuple[dict[str, Tensor], float]:
    """What the file holds of a weight, and its relative root mean square error on some of its rows."""
    step = max(1, len(value) // ROWS)
    some = value[::step].float()
    if bits == FP8:
        tensors = to_float8(value)
        made = floats(tensors["weight"][::step].contiguous()) * tensors["weight_scale"]
    else:
        small = quantised(value, precision=bits)
        tensors, some = comfy_tensors(small), _int8.rotated(some, small.group)
        made = small.values()[::step].float() * small.scales[::step, None]
    return tensors, ((made - some).norm() / some.norm().clamp_min(1e-30)).item()


def _merged(value: Tensor, kind: str, adapters: Sequence[tuple[Adapter, float]]) -> Tensor:
    """A weight or a bias with what adapters change of it."""
    total = value.float()
    for adapter, share in adapters:
        if kind == "weight" and adapter.change is not None:
            total = total + adapter.delta(value.float(), adapter.rescaling(value.float())) * share
        elif kind == "bias" and adapter.bias is not None:
            total = total + adapter.bias.float() * share
    return total.to(value.dtype) if adapters else value


def _fingerprint(output: Output, weights: Mapping[str, Weight], more: bytes) -> str:
    """Of what is made of what: the same only for the same work."""
    files: set[Path] = set()
    for weight in weights.values():
        files |= {entry.path for entry in _entries(weight)}
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    return hashlib.sha256(output.header + json.dumps(stats).encode() + more).hexdigest()


def _entries(weight: Any) -> Iterable[Any]:
    if hasattr(weight, "pieces"):
        for piece in weight.pieces:
            yield from _entries(piece)
    elif hasattr(weight, "parts"):
        yield from (part.entry for part in weight.parts.values())
    else:
        yield weight


def _continue(part: Path, journal: Path, output: Output, fingerprint: str) -> dict[str, float | None]:
    """What an earlier, interrupted call of the same work has written; else a new file."""
    if part.exists() and journal.exists() and part.stat().st_size == output.size:
        first, *lines = journal.read_text(encoding="utf-8").split("\n")
        if first == fingerprint:
            whole = [line for line in lines[:-1] if line]  # what follows the last line's end was cut off
            journal.write_text("\n".join([first, *whole, ""]), encoding="utf-8")
            return dict(json.loads(line) for line in whole)
    part.unlink(missing_ok=True)
    with open(part, "xb") as file:
        file.write(output.header)
        file.truncate(output.size)
    journal.write_text(fingerprint + "\n", encoding="utf-8")
    return {}
