"""The quantised weights of nunchaku's files of a Qwen-Image transformer: SVDQuant (arXiv 2411.05007), in 4 bits.

Of a linear layer L with k inputs, n outputs and a low-rank branch of r, everything in the order in which its kernels'
tiles of 128 rows read it:

    L.qweight        int8 [n, k / 2]: two numbers of 4 bits, int4 or e2m1 (nvfp4)
    L.wscales        16 bit [k / 64, n] with int4; float8 e4m3 [k / 16, n] with e2m1
    L.wcscales [n], L.wtscale [1]    with e2m1: a scale of a row, and one of all
    L.smooth_factor [k]              the input is divided by it; `smooth_factor_orig` is not used
    L.proj_down [k, r], L.proj_up [n, r]    of the input as it comes
    L.bias [n]

    w = q wscales wcscales wtscale / smooth_factor + proj_up proj_down^T

Queries, keys and values are one layer, whose rows are split. The input of the second layer of an int4 MLP is
GELU + 11 / 64, which makes it unsigned; the branch and the bias already know, so that the bias without it is
`bias + 11 / 64 sum_k(q wscales / smooth_factor)`.

Modulation has weights alone in 4 bits (AWQ): qweight int32 [n / 4, k / 2], wscales and wzeros [k / 64, n],
w = q wscales + wzeros. Its rows are the six vectors in turns, and the 1 of `1 + scale` is in the bias.

Source: https://github.com/nunchaku-tech/nunchaku and https://github.com/nunchaku-tech/deepcompressor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from qwen_image_fast.tensor_files import Entry
from qwen_image_fast.weights.scales import floats
from qwen_image_fast.weights.stored import Part, StoredWeight, look_up

TILE = 128  # rows whose numbers lie together, of 16 bit in fours of lanes
SHIFT = 11 / 64
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VECTORS = 6  # of a modulation: shift, scale and gate of attention, then of the MLP
FUSED = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
ROLES = ("qweight", "wscales", "wcscales", "wtscale", "smooth_factor", "proj_down", "proj_up", "bias", "wzeros")
UNUSED = ("smooth_factor_orig",)
_BLOCKS = re.compile(r"(transformer_blocks\.\d+)\.attn\.to_qkv\.qweight")
_MLP_OUT = re.compile(r"(img|txt)_mlp\.net\.2$")


def take_nunchaku(rest: dict[str, Entry]) -> dict[str, StoredWeight]:
    """Take nunchaku's layers out of `rest`: those of blocks whose queries, keys and values are one layer.

    Raises:
        ValueError: parts that are missing, or of sizes that do not go together.
    """
    blocks = {match[1] for name in rest if (match := _BLOCKS.fullmatch(name))}
    found: dict[str, StoredWeight] = {}
    for name in [name.removesuffix(".qweight") for name in rest if name.endswith(".qweight")]:
        if (block := ".".join(name.split(".")[:2])) in blocks:
            layer = _Layer(name, rest)
            inside = name.removeprefix(block + ".")
            found |= _modulation(layer) if layer.has("wzeros") else _linear(layer, FUSED.get(inside, (inside,)), block)
    return found


class _Layer:
    """The tensors of a layer, taken out of the rest."""

    def __init__(self, name: str, rest: dict[str, Entry]) -> None:
        self.name, self.path = name, rest[f"{name}.qweight"].path
        self.tensors = {role: rest.pop(f"{name}.{role}") for role in ROLES if f"{name}.{role}" in rest}
        for role in UNUSED:
            rest.pop(f"{name}.{role}", None)

    def has(self, role: str) -> bool:
        return role in self.tensors

    def error(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is damaged or of another nunchaku: it {what}; download it again")

    def take(self, role: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Entry:
        """The tensor of this role, of so many values, seen as `shape`."""
        if role not in self.tensors:
            raise self.error(f"lacks {self.name}.{role}")
        entry = self.tensors[role]
        seen = entry._replace(shape=shape)
        if seen.nbytes != entry.nbytes or entry.dtype not in dtypes:
            raise self.error(
                f"has {self.name}.{role} as {entry.kind} {list(entry.shape)}, expected {_shape_text(shape, dtypes)}"
            )
        return seen


def _shape_text(shape: Iterable[int], dtypes: Iterable[torch.dtype]) -> str:
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{kinds} of {' x '.join(map(str, shape))} values"


_HALF = (torch.bfloat16, torch.float16)


def _linear(layer: _Layer, targets: tuple[str, ...], block: str) -> dict[str, StoredWeight]:
    stored = layer.tensors["qweight"].shape
    n, k = (stored[0], 2 * stored[1]) if len(stored) == 2 else (0, 0)
    if not n or n % (TILE * len(targets)) or k % TILE:
        raise layer.error(f"has {layer.name}.qweight of shape {list(stored)}, which tiles of {TILE} do not fill")
    if not layer.has("wscales"):
        raise layer.error(f"lacks {layer.name}.wscales")
    tiles, e2m1 = n // TILE, layer.tensors["wscales"].dtype == torch.float8_e4m3fn
    scales = ((tiles, TILE * k // 16), (torch.float8_e4m3fn,)) if e2m1 else ((tiles, TILE * k // 64), _HALF)
    numbers = {
        "weight": Part(layer.take("qweight", (tiles, TILE * k // 2), torch.int8), TILE),
        "scale": Part(layer.take("wscales", scales[0], *scales[1]), TILE),
        "smooth": Part(layer.take("smooth_factor", (k,), *_HALF)),
    }
    if layer.has("wcscales"):
        numbers["row_scale"] = Part(layer.take("wcscales", (tiles, TILE), *_HALF), TILE)
    if layer.has("wtscale"):
        numbers["whole_scale"] = Part(layer.take("wtscale", (1,), *_HALF, torch.float32))
    branch = {}
    if layer.has("proj_up") or layer.has("proj_down"):
        if not layer.has("proj_up"):
            raise layer.error(f"lacks {layer.name}.proj_up")
        rank = (0, *layer.tensors["proj_up"].shape)[-1]
        if not rank or rank % 16:
            raise layer.error(f"has a branch of rank {rank} beside {layer.name}, not a multiple of 16")
        branch = {
            "up": Part(layer.take("proj_up", (n // 16, 16 * rank), *_HALF), 16),
            "down": Part(layer.take("proj_down", (k, rank), *_HALF)),
        }
    kind = f"nunchaku {'nvfp4' if e2m1 else 'int4'}"
    rows = n // len(targets)
    found = {}
    for i, target in enumerate(targets):
        own = {role: _rows(part, i * rows, rows, shared=i > 0) for role, part in (numbers | branch).items()}
        found[f"{block}.{target}.weight"] = StoredWeight(kind, (rows, k), k, own, decode)
        if layer.has("bias"):
            bias = _rows(Part(layer.take("bias", (tiles, TILE), *_HALF), TILE), i * rows, rows)
            parts, shifted = {"weight": bias}, not e2m1 and bool(_MLP_OUT.search(target))
            if shifted:
                parts = {"bias": bias, **{role: part._replace(shared=True) for role, part in numbers.items()}}
            decode_bias = _decode_shifted_bias if shifted else _decode_bias
            found[f"{block}.{target}.bias"] = StoredWeight(kind, (rows,), 1, parts, decode_bias)
    return found


def _rows(part: Part, first: int, count: int, shared: bool = False) -> Part:
    """The part of some rows of a weight; one that belongs to all stays, and is counted once."""
    if not part.rows:
        return part._replace(shared=shared)
    entry, start = part.entry, first // part.rows
    bytes_of_row = entry.nbytes // entry.shape[0]
    shape = (count // part.rows, *entry.shape[1:])
    return part._replace(entry=entry._replace(start=entry.start + start * bytes_of_row, shape=shape))


# ---- stored rows to numbers; the shapes are the lanes and packs of the kernels' tiles ------------------------------


def _numbers(parts: Mapping[str, Tensor]) -> Tensor:
    """[rows, k] float32: the 4-bit numbers times their scales, over the smoothing factor."""
    packed, scale = parts["weight"], parts["scale"]
    packed = packed.view(torch.uint8)
    nibbles = torch.stack([packed & 15, packed >> 4], -1)
    nibbles = nibbles.view(len(packed), -1, 8, 8, 4, 2, 2, 8)  # tile, tile of 64 inputs, 8 x 16 rows, 4 x 8 inputs
    q = nibbles.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(len(packed) * TILE, -1)
    if scale.dtype == torch.float8_e4m3fn:
        q = look_up(torch.tensor([*E2M1, *(-value for value in E2M1)], device=q.device), q)
        scale = floats(scale).view(len(packed), -1, 8, 4, 4, 4).permute(0, 4, 3, 2, 1, 5)
    else:
        q = ((q ^ 8).to(torch.int8) - 8).float()
        scale = _lanes(scale.float())
    scale = scale.reshape(len(q), -1)
    if "row_scale" in parts:
        scale = scale * _lanes(parts["row_scale"].float())
    if "whole_scale" in parts:
        scale = scale * parts["whole_scale"].float()
    q = q.view(*scale.shape, -1).mul_(scale[..., None]).view(len(q), -1)
    return q.div_(_smooth(parts))


def _lanes(values: Tensor) -> Tensor:
    """[tiles, groups x 128] in the order of the lanes, as [rows, groups]."""
    return values.view(len(values), -1, 8, 4, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(len(values) * TILE, -1)


def _smooth(parts: Mapping[str, Tensor]) -> Tensor:
    return _lanes(parts["smooth"].float().view(-1, TILE)).view(-1)


def _fragments(values: Tensor, rank: int) -> Tensor:
    """[rows / 16, rank / 16, 16, 16] of a matrix of the branch."""
    lanes = values.float().view(-1, rank // 16, 8, 4, 2, 2, 2)
    return lanes.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, rank // 16, 16, 16)


def decode(parts: Mapping[str, Tensor], first: int, dtype: torch.dtype) -> Tensor:
    """The rows of a linear layer, of whole tiles."""
    values = _numbers(parts)
    if "up" in parts:
        rank = parts["down"].shape[1]
        up = _fragments(parts["up"], rank).transpose(1, 2).reshape(len(values), rank)
        down = _fragments(parts["down"], rank).permute(1, 2, 0, 3).reshape(rank, -1)
        values.addmm_(up, down)
    return values.to(dtype)


def _decode_bias(parts: Mapping[str, Tensor], first: int, dtype: torch.dtype) -> Tensor:
    return _lanes(parts["weight"]).to(dtype)


def _decode_shifted_bias(parts: Mapping[str, Tensor], first: int, dtype: torch.dtype) -> Tensor:
    tiles = []
    for i in range(len(parts["bias"])):  # the sums of a tile at a time: a bias is small, its weight is not
        tile = {role: part if role in ("smooth", "whole_scale") else part[i : i + 1] for role, part in parts.items()}
        tiles.append(_lanes(tile["bias"].float()) + SHIFT * _numbers(tile).sum(1, keepdim=True))
    return torch.cat(tiles).to(dtype)


# ---- modulation -----------------------------------------------------------------------------------------------------


def _modulation(layer: _Layer) -> dict[str, StoredWeight]:
    stored = layer.tensors["qweight"].shape
    n, k = (4 * stored[0], 2 * stored[1]) if len(stored) == 2 else (0, 0)
    if not n or n % (4 * VECTORS) or k % 64:
        raise layer.error(f"has {layer.name}.qweight of shape {list(stored)}, which is no modulation's")
    parts = {
        "weight": Part(layer.take("qweight", (1, n // 4, k // 2), torch.int32), 1),
        "scale": Part(layer.take("wscales", (1, k // 64, n), *_HALF), 1),
        "zero": Part(layer.take("wzeros", (1, k // 64, n), *_HALF), 1),
    }
    bias = {"weight": Part(layer.take("bias", (1, n), *_HALF), 1)}
    kind = "nunchaku int4 with zeros"
    return {
        f"{layer.name}.weight": StoredWeight(kind, (n, k), n * k, parts, _decode_modulation),
        f"{layer.name}.bias": StoredWeight(kind, (n,), n, bias, _decode_modulation_bias),
    }


def _decode_modulation(parts: Mapping[str, Tensor], first: int, dtype: torch.dtype) -> Tensor:
    scale, zero = parts["scale"][0].float(), parts["zero"][0].float()
    n, groups = scale.shape[1], scale.shape[0]
    packed = parts["weight"][0].view(torch.int16).view(n // 4, groups, 4, 16)
    out = torch.empty(VECTORS, n // VECTORS, groups * 64, dtype=dtype, device=packed.device)
    step = 4 * VECTORS * 16  # rows of the file at a time
    for start in range(0, n, step):
        quads = packed[start // 4 : (start + step) // 4].transpose(1, 2).reshape(-1, groups * 2, 1, 8)
        q = torch.cat([quads >> bits & 15 for bits in (0, 4, 8, 12)], 2).view(-1, groups, 64).float()
        rows = slice(start, start + len(q))
        q.mul_(scale[:, rows].T[..., None]).add_(zero[:, rows].T[..., None])
        vectors = q.view(-1, VECTORS, groups * 64).transpose(0, 1)
        out[:, start // VECTORS : start // VECTORS + vectors.shape[1]] = vectors.to(dtype)
    return out


def _decode_modulation_bias(parts: Mapping[str, Tensor], first: int, dtype: torch.dtype) -> Tensor:
    vectors = parts["weight"].float().view(-1, VECTORS).T.contiguous()
    vectors[[1, 4]] -= 1  # the scales
    return vectors.to(dtype)
