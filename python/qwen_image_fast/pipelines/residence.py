"""Which weights of a pipeline stay in memory and which are streamed: the plan, and loading by it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qwen_image_fast.checkpoint import find_weights, read_config
from qwen_image_fast.models.precision import bits_of, bytes_of, layers_in
from qwen_image_fast.models.streaming import StreamingLoader, units_of
from qwen_image_fast.models.text_encoder import load_text_encoder
from qwen_image_fast.models.vae_conv import packed_bytes_of
from qwen_image_fast.pipelines.parts import MODELS, WEIGHTS, settings_of
from qwen_image_fast.sizes import parse_bytes
from qwen_image_fast.tensor_files import Entry, is_mapped
from qwen_image_fast.weights.cuda_lane import CudaLane, CudaStreams
from qwen_image_fast.weights.formats import Opened, open_weights
from qwen_image_fast.weights.memory import CONTEXT, Need, check_fits, free_bytes, need_of, resident_bytes, weight_bytes
from qwen_image_fast.weights.plan import PartSize, Plan, make_plan, working_bytes
from qwen_image_fast.weights.ring import Ring
from qwen_image_fast.weights.stored import Weight

CPU = torch.device("cpu")


@dataclass
class Stored:
    """The weights of a part: its files, and those tensors of them that a pipeline uses."""

    files: Sequence[Path]
    opened: Opened
    used: Mapping[str, Weight]


def stored_weights(
    cls: Any, folder: Path, read: Iterable[str], given: Mapping[str, list[Path]], variants: Mapping[str, str]
) -> dict[str, Stored]:
    """Of each part of a pipeline class: of its folder, or of the files that are given instead."""
    found = {}
    for name in [*[n for n in read if n in WEIGHTS], *given]:
        part = name if name != "controlnet" else None
        files = given.get(name) or find_weights(folder / name, WEIGHTS[name], variants.get(name))
        opened = open_weights(files, part)
        found[name] = Stored(files, opened, used_weights(opened.weights, name, cls.uses_vision, cls.writes_captions))
    return found


def used_weights(weights: Mapping[str, Weight], part: str, vision: bool, captions: bool) -> dict[str, Weight]:
    """What is loaded of a part: a text encoder without its head, and without its vision tower where none looks."""

    def is_used(name: str) -> bool:
        return part != "text_encoder" or captions or not ("lm_head." in name or (not vision and "visual." in name))

    return {name: weight for name, weight in weights.items() if is_used(name)}


def part_size(
    name: str, weights: Mapping[str, Weight], dtype: torch.dtype | None, device: torch.device, streams: bool,
    precision: str | None,
) -> PartSize:  # fmt: skip
    """For the plan; what is mapped without being a unit, such as an embedding of which a few rows are used, is free.

    Layers in 8 bits are packed for the processor when they are read, and always stay.
    """
    eight = in_8_bits(weights, precision) if name == "transformer" and precision is not None else {}
    weights = {n: weight for n, weight in weights.items() if n not in eight}
    own = units_of({n: weight.shape for n, weight in weights.items()}) if streams else {}
    if eight:
        own.pop("blocks", None)  # what a file has in floating point of them stays with the others
    sizes = {t: [sum(weight_bytes(weights[n], dtype) for n in names) for names in us] for t, us in own.items()}
    streamed = {n for us in own.values() for names in us for n in names}
    kept = [weight for n, weight in weights.items() if n not in streamed]
    mapped = [w for w in kept if name == "text_encoder" and isinstance(w, Entry) and is_mapped(w, dtype, device)]
    always = sum(weight_bytes(w, dtype) for w in kept) - sum(w.nbytes for w in mapped) + sum(eight.values())
    return PartSize(name, always, sizes)


def in_8_bits(weights: Mapping[str, Weight], precision: str) -> dict[str, int]:
    """The matrices that layers in 8 bits or 4 are made of, and what they take then."""
    found = layers_in(precision, weights)
    bits = bits_of(precision, found)
    return {
        f"{path}.weight": int(bytes_of(bits[path]) * math.prod(weight.shape)) + 8 * weight.shape[0]
        for path, weight in found.items()
    }


class Residence:
    """The plan of a pipeline under `memory_limit`, None: without one everything stays, if it fits.

    Raises:
        ValueError: it does not fit, or `memory_limit` is too small; in one sentence, before anything is loaded.
    """

    def __init__(
        self, cls: Any, stored: Mapping[str, Stored], dtypes: Mapping[str, torch.dtype | None], device: torch.device,
        memory_limit: int | str | None, precision: str | None = None,
    ) -> None:  # fmt: skip
        self.precision = precision
        self.stored, self.dtypes, self.device, self.uses_vision = stored, dtypes, device, cls.uses_vision
        self.plan: Plan | None = None
        self.ring: Ring | None = None
        kinds = {name: part.opened.dtype(dtypes[name]) for name, part in stored.items()}
        if memory_limit is None:
            needs = {n: need_of(p.used.values(), kinds[n], device) for n, p in stored.items()}
            if precision is not None and "transformer" in needs:
                of_blocks = in_8_bits(stored["transformer"].used, precision)
                left = {n: w for n, w in stored["transformer"].used.items() if n not in of_blocks}
                need = need_of(left.values(), kinds["transformer"], device)
                needs["transformer"] = Need(need.own + sum(of_blocks.values()), need.mapped)
            check_fits(needs, device)
            return
        used = {name: part.used for name, part in stored.items()}
        limit = parse_bytes(memory_limit)
        pictures = cls.encodes_pictures
        self.plan = plan_for(used, kinds, device, limit, cls.writes_captions, precision, pictures)
        if self.plan.streams:
            lane = CudaLane(CudaStreams(device)) if device.type == "cuda" else None
            self.ring = Ring(self.plan.buffer, self.plan.buffers, lane)
            streamed = sum(map(self.plan.streamed, ("blocks", "layers", "modulation")))
            self.pinned = device.type == "cuda" and streamed < 0.8 * (free_bytes(CPU) or 0)

    def load(self, folder: Path, name: str) -> Any:
        """The part with its streamed units; None: all of it stays."""
        own = self.plan.parts if self.plan is not None else ()
        if self.plan is None or self.ring is None or not any(p.units for p in own if p.name == name):
            return None
        stays = {track: units for (part, track), units in self.plan.stays.items() if part == name}
        loader = StreamingLoader(self.ring, stays, self.pinned)
        part, dtype = self.stored[name], self.dtypes[name]
        if name == "text_encoder":
            return load_text_encoder(
                folder / name, vision=self.uses_vision, files=part.files, torch_dtype=dtype, device=self.device,
                loader=loader,
            )  # fmt: skip
        model: Any = MODELS[name]
        place = settings_of(folder, name)
        config = model._config_of(None, part.opened, {}) if place is None else read_config(place)
        return model._load(config, part.files, dtype, self.device, part.opened, self.precision, loader)

    def bound(self, pipe: Any) -> None:
        """Have the VAE keep to what the plan counts for activations."""
        if self.plan is not None and pipe.vae is not None:
            pipe.vae.set_memory_limit(self.plan.working)


def plan_for(
    used: Mapping[str, Mapping[str, Weight]], dtypes: Mapping[str, torch.dtype | None], device: torch.device,
    limit: int, captions: bool = False, precision: str | None = None, pictures: bool = True,
) -> Plan:  # fmt: skip
    """The plan for the weights of each part; `captions`: the text encoder writes some, and is transformers' own;
    `pictures`: the VAE encodes some.

    Raises:
        ValueError: the limit is too small, or `precision` cannot be had of the transformer's file.
    """
    streams = {"transformer"} if captions else {"transformer", "text_encoder"}
    sizes = [part_size(name, own, dtypes[name], device, name in streams, precision) for name, own in used.items()]
    if "vae" in used:
        packed = packed_of(used["vae"], dtypes["vae"] or torch.bfloat16, device, pictures)
        sizes = [s if s.name != "vae" else replace(s, kept=s.kept + packed) for s in sizes]
    base = resident_bytes() if device.type == "cpu" else CONTEXT
    return make_plan(sizes, limit, base, working_of(used.get("transformer", {}), dtypes.get("transformer")))


def packed_of(vae: Mapping[str, Any], dtype: torch.dtype, device: torch.device, pictures: bool) -> int:
    """What a VAE of these weights keeps of transformed ones after its first picture; `pictures`: it encodes some."""
    shapes = {name: weight.shape for name, weight in vae.items()}
    return packed_bytes_of(shapes, dtype.itemsize, device.type == "cuda", pictures)


def working_of(weights: Mapping[str, Weight], dtype: torch.dtype | None) -> int:
    """`working_bytes` of a transformer."""
    if "img_in.weight" not in weights:
        return 1
    first = weights["img_in.weight"]
    blocks = len(units_of({n: w.shape for n, w in weights.items()}).get("blocks", ()))
    return working_bytes(first.shape[0], blocks, weight_bytes(first, dtype) // math.prod(first.shape))
