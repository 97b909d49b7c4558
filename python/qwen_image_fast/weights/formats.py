"""Open the files of a model: which weights they hold, by content and not by name, under our names.

    GGUF         magic at the start                                         gguf_file.py
    safetensors  ComfyUI's descriptions and scales, also musubi-tuner's     comfy.py
                 bitsandbytes' states                                       bitsandbytes.py
                 nunchaku's SVDQuant                                        nunchaku.py
                 float8 without scales, float32, float16, bfloat16

Pickles are never opened. What is known and not read is refused by name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qwen_image_fast.tensor_files import Entry, read_header, read_metadata
from qwen_image_fast.weights import names
from qwen_image_fast.weights.bitsandbytes import take_bitsandbytes
from qwen_image_fast.weights.comfy import cast_float8, take_scaled
from qwen_image_fast.weights.gguf_file import MAGIC, read_gguf
from qwen_image_fast.weights.nunchaku import take_nunchaku
from qwen_image_fast.weights.stored import Weight, is_quantised

# A tensor without use but its name: the model was trained with reference images modulated at t = 0.
ZERO_COND_T = "__index_timestep_zero__"
# What `general.architecture` of a GGUF says of a part. Makers of VAEs agree on nothing.
ARCHITECTURES = {"transformer": {"qwen_image"}, "text_encoder": {"qwen2vl", "clip"}}
CALLED = {"transformer": "a Qwen-Image transformer", "text_encoder": "Qwen2.5-VL", "vae": "the Qwen-Image VAE"}
# Layouts that are known and not read: an ending of names, whose it is.
REFUSED = {
    ".wscales": "SVDQuant of Nunchaku Lite, or of another model than Qwen-Image",
    ".qzeros": "GPTQ or AWQ",
    ".weight_scale_inv": "float8 blocks of transformers",
    ".weight._data": "optimum-quanto",
    ".weight_qdata": "torchao",
    "._weight_qdata": "torchao",
    ".svd_up": "SDNQ",
    ".zero_point": "SDNQ",
    ".scales": "MLX or another tool",
    ".weight_scale": "integers with scales and no word whether they are rotated",
}
_ADAPTER = re.compile(r"\.(lora[._](A|B|down|up)\.|hada_w1|lokr_w[12])")
INSTEAD = "take a GGUF, a ComfyUI or a bfloat16 file of the model"


@dataclass
class Opened:
    """The weights of a model under our names, and what its files say beside them."""

    weights: dict[str, Weight] = field(default_factory=dict)
    stored: set[str] = field(default_factory=set)  # names of all tensors in the files, as they are there
    zero_cond_t: bool = False

    @property
    def quantised(self) -> bool:
        return any(is_quantised(weight) for weight in self.weights.values())

    def dtype(self, wanted: torch.dtype | None) -> torch.dtype | None:
        """What floating-point weights become: as stored if all are plain, else of one dtype, by default bfloat16."""
        return torch.bfloat16 if wanted is None and self.quantised else wanted


def open_weights(files: Iterable[str | os.PathLike], part: str | None = None) -> Opened:
    """The weights in `files`, without reading them.

    Args:
        part: "transformer", "vae" or "text_encoder": other tools' names of its tensors become ours, and of a file
            that holds several parts only its tensors are taken. None: names stay.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a pickle, a file that is damaged or of another model, a format that is not read, or a name twice.
    """
    opened = Opened()
    places: dict[str, Path] = {}
    for path in map(Path, files):
        found, stored, config = _open(path, part)
        opened.stored |= stored
        opened.zero_cond_t |= found.pop(ZERO_COND_T, None) is not None or config.get("zero_cond_t") is True
        for name, weight in found.items():
            if name in places:
                raise ValueError(f"{name} is both in {places[name]} and in {path}; remove one")
            places[name] = path
            opened.weights[name] = weight
    return opened


def check_part(opened: Opened, files: Sequence[Path], part: str) -> None:
    """ValueError where the files hold something else than this part of a model."""
    if not any(names.KNOWN[part].fullmatch(name) for name in opened.weights):
        some = ", ".join(list(opened.weights)[:3]) or "no tensor"
        own = whose(opened.stored)
        if any(_ADAPTER.search(name) for name in opened.weights):
            own = "a LoRA, which load_lora_weights (--lora) adds to a model"
        they = f"those of {own}" if own else f"{some}, ..."
        raise ValueError(f"{' and '.join(map(str, files))}: these are not the weights of {CALLED[part]}: {they}")


def parts_in(path: Path) -> list[str]:
    """Which parts of a model a file holds, by the names of its tensors; ValueError where it holds none."""
    tensors, _, architecture = contents(path)
    found = parts_of_names(tensors)
    if not found:
        what = f"is a GGUF of the architecture {architecture}" if architecture else f"holds {', '.join([*tensors][:3])}"
        raise ValueError(f"{path} {what}: these are the weights of no part of Qwen-Image")
    return found


def whose(tensors: Iterable[str]) -> str:
    """What tensors of these names are the weights of, and where they are given; empty where they are of no part."""
    parts = parts_of_names(tensors)
    return f"{CALLED[parts[0]]}, which {parts[0]}= (--{parts[0].replace('_', '-')}) takes" if parts else ""


def parts_of_names(tensors: Iterable[str]) -> list[str]:
    """Which parts of a model tensors of these names are of."""
    names_ = list(tensors)
    return [part for part in CALLED if any(names.KNOWN[part].fullmatch(n) for n in our_names(names_, part))]


def _open(path: Path, part: str | None) -> tuple[dict[str, Weight], set[str], dict[str, Any]]:
    """The weights of a part, the names of all tensors, and the configuration that nunchaku's files carry."""
    tensors, metadata, architecture = contents(path)
    wanted = ARCHITECTURES.get(part or "", set())
    if architecture and wanted and architecture not in wanted:
        raise ValueError(
            f"{path} is a GGUF of the architecture {architecture}, not of {CALLED[part or '']} "
            f"({' or '.join(sorted(wanted))}); take another file"
        )
    try:
        config = dict(json.loads(metadata.get("config", "{}")))
    except (ValueError, TypeError):  # of a tool that means something else by this word
        config = {}
    return _decodable(path, tensors, part, metadata), set(tensors), config


def contents(path: Path) -> tuple[Mapping[str, Weight], Mapping[str, str], str]:
    """The tensors of a file, the texts of a safetensors file, the architecture of a GGUF."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start.startswith(MAGIC):
        description, tensors = read_gguf(path)
        return tensors, {}, str(description.get("general.architecture", ""))
    if is_pickle(start):
        raise ValueError(
            f"{path} is a pickle, which can run code when it is opened, and is not read: load it where you trust it "
            "and save it as safetensors"
        )
    return read_header(path), read_metadata(path), ""


def is_pickle(start: bytes) -> bool:
    """Of the first 9 bytes of a file: torch's archives and bare pickles. The 9th of a safetensors file is a brace."""
    bare = start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5") and start[8:] != b"{"
    return start[:4] == b"PK\3\4" or bare


def _decodable(
    path: Path, tensors: Mapping[str, Weight], part: str | None, metadata: Mapping[str, str]
) -> dict[str, Weight]:
    """The weights of a part, quantised ones recognised, under our names."""
    ours = names.without_prefix(tensors, part) if part else {name: name for name in tensors}
    _check_once(path, ours)
    rest: dict[str, Any] = {our: tensors[name] for name, our in ours.items()}
    found: dict[str, Weight] = {}
    if all(isinstance(tensor, Entry) for tensor in rest.values()):
        found |= take_scaled(rest, _without_prefix(metadata, part))
        found |= take_bitsandbytes(rest)
        found |= take_nunchaku(rest)
        _refuse(path, rest)
        rest = {name: cast_float8(tensor) for name, tensor in rest.items()}
    found |= rest
    renamed = _renamed(found, part)
    _check_once(path, renamed)
    found = {our: found[name] for name, our in renamed.items()}
    return names.join_vision(found) if part == "text_encoder" else found


def _check_once(path: Path, ours: Mapping[str, str]) -> None:
    """ValueError where two tensors of a file would get one name, of which one would be lost."""
    theirs: dict[str, str] = {}
    for name, our in ours.items():
        if our in theirs:
            raise ValueError(f"{path} holds {our} twice, as {theirs[our]} and as {name}; remove one")
        theirs[our] = name


def our_names(tensors: Iterable[str], part: str) -> list[str]:
    """Our names of the tensors that are a part's, of the names in a file."""
    return list(_renamed(names.without_prefix(tensors, part).values(), part).values())


def _renamed(bare: Iterable[str], part: str | None) -> dict[str, str]:
    if part == "vae":
        return names.of_wan_vae(bare)
    return {name: names.of_llama(name) if part == "text_encoder" else name for name in bare}


def _without_prefix(metadata: Mapping[str, str], part: str | None) -> Mapping[str, str]:
    """ComfyUI's description of the layers names them as the file does, or without the prefix."""
    key = "_quantization_metadata"
    if part is None or key not in metadata:
        return metadata
    try:
        described = json.loads(metadata[key])
        layers = {names.PREFIXES[part].sub("", name, count=1): layer for name, layer in described["layers"].items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        return metadata  # whoever reads it says what is wrong
    return {**metadata, key: json.dumps({**described, "layers": layers})}


def _refuse(path: Path, rest: Mapping[str, Entry]) -> None:
    for ending, whose in REFUSED.items():
        if name := next((name for name in rest if name.endswith(ending)), None):
            raise ValueError(f"{path} holds {name}: its weights are those of {whose}, and are not read; {INSTEAD}")
