"""Writes GGUF and safetensors files as other tools do, from tensors."""

import json
import struct

import numpy as np
import torch
from safetensors.torch import save_file

PLAIN = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
SIZES = {"Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34)}
SIZES |= {"Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176)}
SIZES |= {"Q6_K": (14, 256, 210), "IQ4_NL": (20, 32, 18), "IQ4_XS": (23, 256, 136)}


def q8_0(tensor):
    """The blocks of a tensor: float16 scale, 32 int8."""
    values = tensor.float().reshape(-1, 32)
    scale = (values.abs().amax(1, keepdim=True) / 127).half()
    q = (values / scale.float().clamp(min=1e-8)).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([scale.view(torch.uint8), q.view(torch.uint8)], 1)


def from_q8_0(blocks, shape):
    return (blocks[:, 2:].view(torch.int8).float() * blocks[:, :2].contiguous().view(torch.float16).float()).view(shape)


def as_q8_0(state, prefix=""):
    """Matrices of whole blocks as Q8_0, the rest as it is; and what they are read as."""
    tensors, expected = {}, {}
    for name, tensor in state.items():
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            blocks = q8_0(tensor)
            tensors[prefix + name] = ("Q8_0", blocks, tuple(tensor.shape))
            expected[name] = from_q8_0(blocks, tensor.shape)
        else:
            tensors[prefix + name] = expected[name] = tensor
    return tensors, expected


def _text(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value):
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    kind = 8 if isinstance(value[0], str) else 5
    items = [_text(v) if kind == 8 else struct.pack("<i", v) for v in value]
    return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(items)


def write_gguf(path, tensors, description, alignment=32, version=3):
    """`tensors`: name to a plain tensor, or to (type, blocks, shape)."""
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(description))
    head += b"".join(_text(key) + _value(value) for key, value in description.items())
    data = b""
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor):
            kind, shape, raw = PLAIN[tensor.dtype], tensor.shape, tensor.contiguous().view(-1).view(torch.uint8)
        else:
            name_of_kind, raw, shape = tensor
            kind = SIZES[name_of_kind][0] if isinstance(name_of_kind, str) else name_of_kind
        head += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", kind, len(data))
        data += raw.numpy().tobytes()
        data += b"\0" * (-len(data) % alignment)
    head += b"\0" * (-len(head) % alignment)
    path.write_bytes(head + data)
    return path


def random_blocks(kind, count, seed=0):
    """Blocks of random bits whose scales are small numbers."""
    _, _, size = SIZES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
    places |= {"Q4_1": (0, 2), "Q5_1": (0, 2)}
    for start in places.get(kind, (0,)):
        scale = rng.standard_normal(count).astype(np.float16)
        blocks[:, start : start + 2] = scale.view(np.uint8).reshape(count, 2)
    return torch.from_numpy(blocks)


def text_bytes(value):
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def float8(tensor, scale):
    return (tensor / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def write_safetensors(path, tensors, metadata=None):
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata)
    return path
