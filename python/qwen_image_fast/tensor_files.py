"""One safetensors file: its header, its tensors, and writing it.

A large tensor that stays on the CPU in its stored type is mapped, each by itself, so that parts of a model can be given
back; whatever is converted, or goes to an accelerator, is read in pieces, as mapped pages would count on top of the
copies. Format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "U8": torch.uint8}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
DTYPES |= {"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PICKLES = (b"PK\x03\x04", b"\x80\x02\x8a")  # how files of torch.save begin, the new and the old
# How files begin that are taken for weights by mistake.
OTHERS = {
    b"\x89PNG": "a PNG picture", b"\xff\xd8\xff": "a JPEG picture", b"RIFF": "a WebP picture", b"GIF8": "a GIF picture",
    b"GGUF": "a GGUF file", b"%PDF": "a PDF", b"\x1f\x8b": "a gzip archive", b"7z\xbc\xaf": "a 7z archive",
}  # fmt: skip
TEXT = b"\t\n\r" + bytes(range(32, 127))  # a header's length, of 8 bytes, has zeros among them
CONVERT = "where you trust it, convert it: safetensors.torch.save_file(torch.load(file, weights_only=True), new_file)"
READERS = 4  # threads; one alone is bound by the copy out of the page cache
SMALLEST_MAPPED = 1 << 18  # bytes; a mapping takes whole pages, and its first access a fault
STAGING_BYTES = 4 << 20  # what each holds on the host besides the result, to convert or to copy to an accelerator


class Entry(NamedTuple):
    """Where one tensor lies in a safetensors file; `start` counts bytes from the beginning of the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def kind(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def read_header(path: str | os.PathLike) -> dict[str, Entry]:
    """The tensors of a safetensors file, in file order, without reading them; ValueError where the file is damaged."""
    path = Path(path)
    with open(path, "rb") as file:
        try:
            safe_open(path, framework="pt")  # checks offsets, shapes, types and the length of the file
        except SafetensorError as error:
            what = f"is truncated or not safetensors ({error})"
            start = file.read(64)
            if start.startswith(b"version https://git"):
                what = "is a Git LFS pointer, not the file itself"
            elif start.lstrip().lower().startswith((b"<!doctype", b"<html")):
                what = "is a web page, not the file itself, as of a download that asks to log in"
            elif start.startswith(PICKLES):
                raise ValueError(f"{path} is a pickle, which can run code, and is not read: {CONVERT}") from error
            elif kind := next((kind for mark, kind in OTHERS.items() if start.startswith(mark)), None):
                raise ValueError(f"{path} is {kind}, not a safetensors file") from error
            elif start and all(byte in TEXT for byte in start):
                raise ValueError(f"{path} is a text, not a safetensors file") from error
            raise ValueError(f"read_header: {path} ({path.stat().st_size} bytes) {what}; download it again") from error
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    entries = {}
    for name, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
        if item["dtype"] not in DTYPES:
            raise ValueError(f"read_header: {name} in {path} has the type {item['dtype']}, which is not supported")
        entries[name] = Entry(path, DTYPES[item["dtype"]], tuple(item["shape"]), 8 + length + item["data_offsets"][0])
    return entries


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The texts that a safetensors file holds beside its tensors."""
    with open(path, "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__") or {}


def is_mapped(entry: Entry, dtype: torch.dtype | None, device: torch.device) -> bool:
    """Whether `read_tensors` maps it: a large tensor that stays as it is stored, on the CPU."""
    kept = dtype in (None, entry.dtype) or not entry.dtype.is_floating_point
    aligned = entry.start % entry.dtype.itemsize == 0
    return device.type == "cpu" and kept and aligned and entry.nbytes >= SMALLEST_MAPPED


def read_tensors(
    entries: Mapping[str, Entry], dtype: torch.dtype | None, device: torch.device, mapped: bool = False
) -> dict[str, Tensor]:
    """The tensors on `device`, floating-point ones as `dtype` (None: as stored); `mapped`: those of `is_mapped` are."""
    tensors: dict[str, Tensor] = {}
    places = {name: entry for name, entry in entries.items() if mapped and is_mapped(entry, dtype, device)}
    entries = {name: entry for name, entry in entries.items() if name not in places}
    # Few buffers for all: allocated for each tensor, they would leave holes between the tensors that stay.
    free: SimpleQueue[Tensor] = SimpleQueue()
    for _ in range(READERS):
        free.put(torch.empty(STAGING_BYTES, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda"))
    with ThreadPoolExecutor(READERS) as pool:
        reads = []
        for name, entry in entries.items():
            kind = dtype if dtype is not None and entry.dtype.is_floating_point else entry.dtype
            with torch.inference_mode(False):  # the threads are not in inference mode and could not write
                tensors[name] = torch.empty(entry.shape, dtype=kind, device=device)
            staged = device.type != "cpu" or kind != entry.dtype
            reads.append(pool.submit(_read, entry, tensors[name], free if staged else None))
        for read in reads:
            read.result()
    return tensors | {name: map_tensor(entry) for name, entry in places.items()}


def _system() -> ctypes.CDLL:
    """The C library: Python's own `mmap` keeps a file open for each mapping, of which a process may have a thousand."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library


def map_tensor(entry: Entry) -> Tensor:
    """The tensor as pages of its file, read when they are first used; what is written to it stays in this process.

    The pages are given back with the tensor. The system may take them while memory is short and reads them again. A
    file that is cut off while it is mapped ends the process; replaced as a whole, as our writers do, it is harmless.
    """
    before = entry.start % mmap.ALLOCATIONGRANULARITY
    system, length = _system(), entry.nbytes + before
    with open(entry.path, "rb") as file:
        if os.fstat(file.fileno()).st_size < entry.start + entry.nbytes:
            raise OSError(f"read_tensors: {file.name} became shorter while it was read; load it again")
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        area = system.mmap(None, length, protection, mmap.MAP_PRIVATE, file.fileno(), entry.start - before)
    if area == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), f"{entry.path} could not be mapped: {os.strerror(ctypes.get_errno())}")
    buffer = (ctypes.c_uint8 * entry.nbytes).from_address(area + before)
    weakref.finalize(buffer, system.munmap, area, length)
    with torch.inference_mode(False):
        return torch.frombuffer(buffer, dtype=entry.dtype).view(entry.shape)


def _read(entry: Entry, out: Tensor, free: SimpleQueue[Tensor] | None) -> None:
    """Read a tensor, in parts through one of the `free` buffers where they are given."""
    with open(entry.path, "rb", buffering=0) as file:
        file.seek(entry.start)
        if free is None:
            read_into(file, out)
            return
        staging = free.get()
        try:
            typed = staging.view(entry.dtype)
            for part in out.view(-1).split(typed.numel()):
                read_into(file, typed[: part.numel()])
                part.copy_(typed[: part.numel()])
        finally:
            free.put(staging)


def _byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def read_into(file: Any, tensor: Tensor) -> None:
    """The next bytes of an unbuffered file into a contiguous CPU tensor."""
    view = _byte_view(tensor)
    while view:  # one read returns at most 2 GiB
        count = file.readinto(view)
        if not count:
            raise OSError(f"read_tensors: {file.name} became shorter while it was read; load it again")
        view = view[count:]


def tensor_writer(tensors: Mapping[str, Tensor]) -> Callable[[BinaryIO], None]:
    """What writes a safetensors file of these tensors into an open file."""
    # Widest types first keeps every tensor aligned to its own type, which readers that map the file rely on.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))

    def write(file: BinaryIO) -> None:
        write_in_order(file, {name: tensors[name] for name in order}, (tensors[name] for name in order))

    return write


def write_in_order(file: BinaryIO, like: Mapping[str, Tensor], tensors: Iterable[Tensor]) -> None:
    """Write a safetensors file into an open one: `tensors`, one held at a time, have the names and types of `like`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in like.items():
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        kind = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**kind, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        file.write(_byte_view(tensor.cpu().contiguous()))
