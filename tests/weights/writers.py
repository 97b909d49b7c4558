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


# ---- nunchaku -------------------------------------------------------------------------------------------------------


def nunchaku_lanes(values):
    """Values of rows, [n, groups], in the order of the lanes of tiles of 128 rows."""
    return values.view(-1, 8, 2, 4, 2, values.shape[1]).permute(0, 5, 1, 3, 2, 4).reshape(values.shape[1], -1)


def nunchaku_linear(weight, bias=None, rank=16, shift=None):
    """A layer in int4 with a branch, and what it is read as; `shift` of its input is in the bias."""
    n, k = weight.shape
    smooth = 2.0 ** torch.randint(-1, 2, (k,))
    down, up = torch.randn(rank, k).bfloat16() / 16, torch.randn(n, rank).bfloat16() / 64
    groups = ((weight - up.float() @ down.float()) * smooth).view(n, -1, 64)
    scale = (groups.abs().amax(2) / 7).bfloat16()
    q = (groups / scale.float()[..., None]).round().clamp(-8, 7)
    main = (q * scale.float()[..., None]).view(n, k) / smooth
    nibbles = q.int().view(n // 128, 8, 2, 8, k // 64, 2, 4, 8).permute(0, 4, 1, 3, 6, 2, 5, 7) & 15
    pairs = nibbles.reshape(n, -1, 2)
    tiles = [matrix.reshape(-1, 2, 8, matrix.shape[1] // 16, 2, 4, 2) for matrix in (down, up)]
    layer = {
        "qweight": (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8).view(torch.int8),
        "wscales": nunchaku_lanes(scale),
        "smooth_factor": nunchaku_lanes(smooth.bfloat16()[:, None]).view(-1),
        "smooth_factor_orig": torch.ones(k).bfloat16(),
        "proj_down": tiles[0].permute(3, 0, 2, 5, 1, 4, 6).reshape(k, rank),
        "proj_up": tiles[1].permute(0, 3, 2, 5, 1, 4, 6).reshape(n, rank),
    }
    expected = {"weight": torch.addmm(main, up.float(), down.float())}
    if bias is not None:
        stored = (bias - (main.sum(1) * shift if shift else 0)).bfloat16()
        layer["bias"] = nunchaku_lanes(stored[:, None]).view(-1)
        expected["bias"] = stored.float() + (main.sum(1) * shift if shift else 0)
    return {name: tensor.contiguous() for name, tensor in layer.items()}, expected


def nunchaku_modulation(weight, bias):
    """A modulation in int4 with zeros, its six vectors in turns, and what it is read as."""
    n, k = weight.shape
    rows = weight.view(6, -1, k).transpose(0, 1).reshape(n, -1, 64)
    low, high = rows.amin(2), rows.amax(2)
    scale, zero = ((high - low) / 15).bfloat16(), low.bfloat16()
    q = ((rows - zero.float()[..., None]) / scale.float()[..., None]).round().clamp(0, 15).int()
    expected = (q * scale.float()[..., None] + zero.float()[..., None]).view(-1, 6, k).transpose(0, 1).reshape(n, k)
    quads = q.view(n, k // 32, 4, 8)
    numbers = quads[:, :, 0] | quads[:, :, 1] << 4 | quads[:, :, 2] << 8 | quads[:, :, 3] << 12
    numbers = numbers.view(n // 4, 4, k // 64, 16).transpose(1, 2).reshape(n // 4, k)
    ones = torch.tensor([0.0, 1, 0, 0, 1, 0])
    stored = (bias.view(6, -1).T + ones).bfloat16()
    layer = {"qweight": torch.from_numpy(numbers.numpy().astype("uint16").view("int32")), "bias": stored.reshape(-1)}
    layer |= {"wscales": scale.T.contiguous(), "wzeros": zero.T.contiguous()}
    return layer, {"weight": expected, "bias": (stored.float() - ones).T.reshape(-1)}


def as_nunchaku(state):
    """A transformer whose width is a multiple of 128 as nunchaku's file of it, and what it is read as."""
    left, tensors, expected = dict(state), {}, {}
    blocks = sorted({name.split(".attn.")[0] for name in state if ".attn." in name})
    for block in blocks:
        layers = {"attn.to_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"]}
        layers["attn.add_qkv_proj"] = ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]
        others = ["attn.to_out.0", "attn.to_add_out"]
        others += [f"{stream}.{layer}" for stream in ("img_mlp", "txt_mlp") for layer in ("net.0.proj", "net.2")]
        layers |= {name: [name] for name in [*others, "img_mod.1", "txt_mod.1"]}
        for name, targets in layers.items():
            weight, bias = (
                torch.cat([left.pop(f"{block}.{target}.{kind}").float() for target in targets])
                for kind in ("weight", "bias")
            )
            if "_mod" in name:
                layer, read = nunchaku_modulation(weight, bias)
            else:
                layer, read = nunchaku_linear(weight, bias, shift=11 / 64 if name.endswith("net.2") else None)
            tensors |= {f"{block}.{name}.{role}": tensor for role, tensor in layer.items()}
            for kind, value in read.items():
                pieces = value.chunk(len(targets))
                expected |= {f"{block}.{target}.{kind}": piece for target, piece in zip(targets, pieces, strict=True)}
    return tensors | left, expected | left
