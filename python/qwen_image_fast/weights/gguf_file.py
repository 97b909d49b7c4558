"""The container of GGUF: its description and where its tensors lie. Only the header is read, through a mapping.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_image_fast.tensor_files import Entry
from qwen_image_fast.weights.gguf_types import BLOCK_TYPES, OTHER_TYPES, PLAIN_TYPES, BlockType
from qwen_image_fast.weights.stored import Decode, Part, StoredWeight

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Types of the values of the description.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, LIST = 8, 9
# ComfyUI-GGUF's note of the shape of a tensor that ggml could not hold as it is, in torch's order.
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."


class _Cursor:
    """Reads forward through a mapped file; ValueError at its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def _advance(self, size: int) -> int:
        if self.at + size > len(self.data):
            raise ValueError(f"{self.path} ({len(self.data)} bytes) is cut off inside its header; download it again")
        self.at += size
        return self.at - size

    def take(self, kind: str, count: int = 1) -> tuple:
        start = self._advance(struct.calcsize(f"<{kind}") * count)
        return struct.unpack_from(f"<{count}{kind}", self.data, start)

    def one(self, kind: str) -> Any:
        return self.take(kind)[0]

    def text(self) -> str:
        length = self.one("Q")
        start = self._advance(length)
        return self.data[start : start + length].decode(errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == LIST:
            inner, count = self.one("I"), self.one("Q")
            if inner == LIST:
                raise damaged(self.path, "its description holds a list of lists")
            return self.take(SCALARS[inner], count) if inner in SCALARS else [self.value(inner) for _ in range(count)]
        if kind not in SCALARS:
            raise damaged(self.path, f"its description holds a value of the unknown type {kind}")
        return self.one(SCALARS[kind])


def damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is damaged: {why}; download it again")


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Entry | StoredWeight]]:
    """The description of a GGUF file and its tensors, in file order and with their dimensions in torch's order.

    Raises:
        ValueError: the file is cut off, damaged, of another version, or holds a type that is not read.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, path)
        cursor.take("B", len(MAGIC))
        version = cursor.one("I")
        if version not in VERSIONS:
            kind = "a big-endian GGUF" if version & 0xFFFF == 0 else f"a GGUF of version {version}"
            raise ValueError(f"{path} is {kind}; versions 2 and 3, little-endian, are read: convert it again")
        tensors, values = cursor.take("Q", 2)
        description = {}
        for _ in range(values):
            key = cursor.text()
            description[key] = cursor.value(cursor.one("I"))
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensors):
            name = cursor.text()
            if name in found:
                raise damaged(path, f"it holds {name} twice")
            if (axes := cursor.one("I")) > 8:
                raise damaged(path, f"{name} has {axes} dimensions")
            shape = tuple(reversed(cursor.take("Q", axes)))
            found[name] = (shape, *cursor.take("I"), *cursor.take("Q"))
        alignment = description.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise damaged(path, f"its alignment is {alignment}")
        start = -(-cursor.at // alignment) * alignment
        size = len(data)
    return description, {
        name: _tensor(path, size, name, _original(path, description, name, shape), kind, start + offset)
        for name, (shape, kind, offset) in found.items()
    }


def _original(path: Path, description: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    original = tuple(description.get(ORIGINAL_SHAPE + name, shape))
    if math.prod(original) != math.prod(shape):
        raise damaged(path, f"{name} has the shape {list(shape)} and was {list(original)} before")
    return original


def _tensor(path: Path, size: int, name: str, shape: tuple[int, ...], kind: int, start: int) -> Entry | StoredWeight:
    count = math.prod(shape)
    if kind in PLAIN_TYPES:
        tensor: Entry | StoredWeight = Entry(path, PLAIN_TYPES[kind], shape, start)
    elif kind in BLOCK_TYPES:
        block = BLOCK_TYPES[kind]
        if count % block.values:
            raise damaged(path, f"{name} has {count} values, not a multiple of the {block.values} of {block.name}")
        entry = Entry(path, torch.uint8, (count // block.values, block.size), start)
        tensor = StoredWeight(f"GGUF {block.name}", shape, block.values, {"weight": Part(entry, 1)}, _decoder(block))
    else:
        raise ValueError(
            f"{path} holds {name} as {OTHER_TYPES.get(kind, f'type {kind}')}, which is not read: take a file of the "
            f"types F32, F16, BF16, {', '.join(block.name for block in BLOCK_TYPES.values())}"
        )
    if start + tensor.nbytes > size:
        end = start + tensor.nbytes
        raise ValueError(f"{path} ({size} bytes) is cut off: {name} ends at byte {end}; download it again")
    return tensor


def _decoder(block: BlockType) -> Decode:
    def decode(parts: Mapping[str, Tensor], first: int, dtype: torch.dtype) -> Tensor:
        return block.decode(parts["weight"]).to(dtype)

    return decode
