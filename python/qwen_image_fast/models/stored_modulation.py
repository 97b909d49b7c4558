"""Modulation vectors in the place of the weights that make them: of files that were written for some schedules.

    transformer_blocks.{i}.img_mod.vectors, .txt_mod.vectors    bfloat16 [rows, 6 * width]
    norm_out.vectors                                            bfloat16 [rows, 2 * width]
    modulation_schedules                                        uint8, the bytes of a json: a list of
                                                                {"for": what it is for, "timesteps": [...]}

A row is of a timestep, which is sigma as a model in bfloat16 is given it: round(1000 sigma) / 1000 with both results in
bfloat16. Rows of all schedules stand one behind another; `quantize` makes them. A model that is loaded from such a
file has these tensors as buffers, and no modulation weights: its state dict is that of the file.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen_image_fast.models.modulation import Modulation, modulation_layers, table_layers, unwatched
from qwen_image_fast.weights.reading import read_entry
from qwen_image_fast.weights.stored import Weight

SCHEDULES, VECTORS = "modulation_schedules", "vectors"
DTYPE = torch.bfloat16
AGAIN = "`qwen-image-fast quantize MODEL --out FOLDER --drop-modulation --steps N --size WxH`"


class StoredSchedule(NamedTuple):
    """what: such as "20 steps of 1024x1024", for people; "": nothing that is drawn with. timesteps: in bfloat16."""

    what: str
    timesteps: tuple[float, ...]


def schedule_bytes(schedules: Sequence[StoredSchedule]) -> Tensor:
    """As files hold them."""
    text = json.dumps([{"for": s.what, "timesteps": s.timesteps} for s in schedules])
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def schedules_in(stored: Tensor) -> list[StoredSchedule]:
    """ValueError where the bytes are something else."""
    try:
        found = json.loads(stored.cpu().numpy().tobytes())
        return [StoredSchedule(str(one["for"]), tuple(map(float, one["timesteps"]))) for one in found]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{SCHEDULES} must be the bytes of a json of schedules ({error}); make the file again, by {AGAIN}"
        ) from error


def schedules_of_file(weights: Mapping[str, Weight]) -> list[StoredSchedule]:
    """Those of an opened file; none where it has the weights."""
    return schedules_in(read_entry(weights[SCHEDULES])) if SCHEDULES in weights else []  # type: ignore[arg-type]


def named(schedules: Sequence[StoredSchedule]) -> str:
    """For a sentence."""
    return "; ".join(s.what for s in schedules if s.what)


def holders(model: Any) -> dict[str, tuple[Any, Any]]:
    """By name the modules that hold vectors, each with the layer that would make them."""
    layers = {name.rpartition(".")[0]: layer for name, layer in modulation_layers(model).items()}
    return {name: (model.get_submodule(name), layer) for name, layer in layers.items()}


def hold_vectors(model: Any, weights: Mapping[str, Weight], dtype: torch.dtype | None) -> None:
    """Make `model`, on the meta device, one of vectors, where the opened file has these.

    Raises:
        ValueError: it would not be in bfloat16.
    """
    schedules = schedules_of_file(weights)
    if not schedules:
        return
    stored: torch.dtype = getattr(weights.get("proj_out.weight"), "dtype", DTYPE)
    check_dtype(dtype or stored)
    rows = sum(len(s.timesteps) for s in schedules)
    for module, layer in holders(model).values():
        module.register_buffer(VECTORS, torch.empty(rows, layer.out_features, dtype=DTYPE, device="meta"))
        layer.register_parameter("weight", None)
        layer.register_parameter("bias", None)
    model.register_buffer(SCHEDULES, torch.empty(weights[SCHEDULES].shape, dtype=torch.uint8, device="meta"))


def check_dtype(dtype: torch.dtype) -> None:
    """ValueError for a transformer of vectors in another type than theirs."""
    if dtype != DTYPE:
        raise ValueError(
            f"the transformer's dtype must be bfloat16, in which its modulation vectors are stored, got {dtype}: "
            "load it with torch_dtype=torch.bfloat16 (--dtype bfloat16), or a file with modulation weights"
        )


def is_stored(model: Any) -> bool:
    """Whether a transformer has vectors instead of weights."""
    return SCHEDULES in model._buffers


def stored_modulation(model: Any, timestep: Tensor) -> Modulation:
    """The vectors at `timestep`, [conditions] in [0, 1].

    Those of one schedule, one after another, come from its rows and have the bits that the weights would give; others
    are taken row by row.

    Raises:
        ValueError: a timestep that is not stored, a model that was cast, or a hook on what is not called.
    """
    vectors = {name: module.vectors for name, (module, _) in holders(model).items()}
    check_dtype(vectors["norm_out"].dtype)
    if not unwatched(model):
        raise ValueError(
            "a hook on the modulation layers would see no call: their weights were left out of this transformer; take "
            "the hook off, or load a file with modulation weights"
        )
    rows = _rows(schedules_in(getattr(model, SCHEDULES)), timestep.to(DTYPE).tolist())
    chosen = {name: t[rows] for name, t in vectors.items()}
    blocks = range(len(model.transformer_blocks))
    img, txt = ([chosen[f"transformer_blocks.{i}.{kind}_mod"] for i in blocks] for kind in ("img", "txt"))
    return Modulation(img, txt, chosen["norm_out"])


def _rows(schedules: Sequence[StoredSchedule], wanted: Sequence[float]) -> slice | list[int]:
    first, places = 0, dict[float, int]()
    for schedule in schedules:
        own = list(schedule.timesteps)
        for i in range(len(own) - len(wanted) + 1):
            if own[i : i + len(wanted)] == list(wanted):
                return slice(first + i, first + i + len(wanted))
        for i, t in enumerate(own):
            places.setdefault(t, first + i)
        first += len(own)
    if missing := [t for t in wanted if t not in places]:
        raise ValueError(
            f"the modulation weights were left out of this transformer, and its vectors are for {named(schedules)}; "
            f"{len(missing)} of {len(wanted)} noise levels are not among them: take such a schedule, or make a file "
            f"for this one, by {AGAIN}"
        )
    return [places[t] for t in wanted]


def refuse_changes(model: Any, paths: Collection[str], where: str) -> None:
    """ValueError for an adapter on layers that are not there, or of which what they made is stored."""
    if is_stored(model) and (found := sorted(table_layers(model).keys() & set(paths))):
        raise ValueError(
            f"{where}: {found[0]} cannot be changed, since the modulation weights were left out of this transformer: "
            "quantise the model with the LoRA (`qwen-image-fast quantize --lora`), or load a file with these weights"
        )


def refuse_training(weights: Mapping[str, Weight], where: str) -> None:
    """ValueError for an opened file of vectors, which has nothing for the noise levels that training draws."""
    if SCHEDULES in weights:
        raise ValueError(
            f"{where}: the modulation weights must be there, which training needs at every noise level, and were left "
            "out of this transformer: start from the file that it was made of"
        )
