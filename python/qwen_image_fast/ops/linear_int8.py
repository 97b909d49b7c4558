"""Linear layers in 8 bits, integers or float8: products of `int8_rows` with weights that were packed once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qwen_image_fast.ops import _eight_bits, _int4, _int8
from qwen_image_fast.ops import _library as lib
from qwen_image_fast.ops._choices import Choice
from qwen_image_fast.ops._library import _C, DTYPE_CODES, pointer

_OP = "linear_int8"
# Names of the units that multiply, of this build and this CPU, the best last; "plain" is C++ without any.
UNITS: tuple[str, ...] = tuple(_C.build_info()["int8_units"])
_unit: Choice[str] = Choice("int8_unit", UNITS[-1])
GPU_KERNELS = ("best", "mma.sync", "wgmma")
_kernels: Choice[str] = Choice("int8_kernels", "best")
WGMMA = hasattr(_C, "linear_int8_sm90_cuda")  # whether this build has the kernels for Hopper
FEW = 256  # rows of the largest product of a call, below which wide tiles leave most of a GPU idle; an estimate


class Int8Weight(NamedTuple):
    """A weight [columns, depth] as `linear_int8` reads it. The rows of x go to `int8_rows` with `group`.

    packed: int8 [columns / 16, depth / 64, 16, 16, 4], on GPUs [columns, depth filled up with zeros to a multiple of
    64]; of a weight in 4 bits, which become 8 for the product, uint8 [columns / 16, depth / 64, 576] (_int4.py).
    sums: int32 [columns], of its rows. scales: float32 [columns].
    In float8 `packed` is float8_e4m3fn [columns, depth filled up], everywhere, and `sums` are zeros.
    """

    packed: Tensor
    sums: Tensor
    scales: Tensor
    depth: int
    group: int

    @classmethod
    def of(cls, values: Tensor, scales: Tensor, group: int, place: Int8Weight | None = None) -> Int8Weight:
        """From int8 [columns, depth], rotated by `group` along the depth, and a scale for each row, or one for all; on
        the CPU, in `place`, of `empty`, if it is given."""
        scales = scales.to(torch.float32).reshape(-1).expand(len(values)).contiguous()
        if place is not None:
            _int8.pack(values, (place.packed, place.sums))
            place.scales.copy_(scales)
            return place._replace(group=group)
        return cls(*_int8.pack(values), scales, values.shape[1], group).laid_out()

    @classmethod
    def of_floats(cls, rotated: Tensor, group: int, place: Int8Weight | None = None) -> Int8Weight:
        """In 4 bits, from float32 [columns, depth] on the CPU, rotated by `group`; the depth is a multiple of 16."""
        place = place or cls.empty(rotated.shape[0], rotated.shape[1], four=True)
        _int4.quantise(rotated, place.packed, place.scales, place.sums)
        return place._replace(group=group)

    @classmethod
    def of_codes(
        cls, codes: Tensor, times: Tensor, scales: Tensor, group: int, place: Int8Weight | None = None
    ) -> Int8Weight:
        """In 4 bits, from the rows of a file: `_int4.to_rows`, and a scale for each row."""
        depth = codes.shape[1] * 2
        place = place or cls.empty(len(codes), depth, four=True)
        place.packed.copy_(_int4.from_rows(codes, times))
        place.scales.copy_(scales.reshape(-1))
        place.sums.copy_(place.values().sum(1, dtype=torch.int32))
        return place._replace(group=group)

    @property
    def four(self) -> bool:
        """Whether it is in 4 bits."""
        return self.packed.dtype == torch.uint8

    @property
    def float8(self) -> bool:
        """Whether it is in float8."""
        return self.packed.dtype == _int8.FLOAT8

    def in_float8(self) -> Int8Weight:
        """Rounded once more, to e4m3 with a scale for each row, where it is; of one in 8 bits."""
        packed, scales = _int8.to_float8(self.values().float())
        return self._replace(packed=packed, sums=torch.zeros_like(self.sums), scales=scales * self.scales)

    @classmethod
    def empty(cls, columns: int, depth: int, four: bool = False) -> Int8Weight:
        """The place of one, on the CPU."""
        packed, sums = (_int4 if four else _int8).empty_packed(columns, depth)
        return cls(packed, sums, torch.empty(columns, device="cpu"), depth, 1)

    def values(self) -> Tensor:
        """int8 [columns, depth], as before it was packed; or float8."""
        if self.packed.dim() == 2:
            return self.packed[:, : self.depth].contiguous()
        return _int8.unpack(_int4.in_8_bits(self.packed) if self.four else self.packed, len(self.sums), self.depth)

    def to(self, device: torch.device) -> Int8Weight:
        """On a device, as it is laid out there."""
        packed, sums, scales = self.packed.to(device), self.sums.to(device), self.scales.to(device)
        return self._replace(packed=packed, sums=sums, scales=scales).laid_out()

    def laid_out(self) -> Int8Weight:
        """Packed on the CPU, rows of numbers on GPUs, in float8 where `eight_bits` has it so; in 4 bits, and once in
        float8, alike everywhere."""
        gpu = _int8.on_gpu(self.packed)
        if self.four or self.float8 or self.packed.is_meta:
            return self
        if gpu and _eight_bits.numbers_on(self.packed.device) == "float8":
            return self.in_float8()
        if gpu == (self.packed.dim() == 2):
            return self
        packed = _int8.in_rows(self.packed, len(self.sums)) if gpu else _int8.pack(self.values())[0]
        return self._replace(packed=packed)


def int8_unit(name: str) -> contextlib.AbstractContextManager[None]:
    """Choose the unit of the CPU that multiplies, in this thread or asyncio task, as `reference` does: one of `UNITS`,
    by default the last. All give the same bits, as do GPUs; for tests and measurements."""
    if name not in UNITS:
        raise ValueError(f"int8_unit: name must be one of {', '.join(UNITS)}, which this CPU has, got {name!r}")
    return _unit.of(name)


def multiplied_by(device: int) -> str:
    """What large products run on a GPU by default: "wgmma" or "mma.sync"."""
    return "wgmma" if WGMMA and _eight_bits.capability_of(device) == (9, 0) else "mma.sync"


def int8_kernels(choice: str) -> contextlib.AbstractContextManager[None]:
    """Choose the kernels of a GPU that multiply, in this thread or asyncio task, as `reference` does; all give the same
    bits. For tests and measurements.

    Args:
        choice: "best" is the default: "wgmma" on GPUs of compute capability 9.0 where the build has it, for products
            that it takes, unless all have few rows; else "mma.sync", which takes everything. "wgmma": what it cannot
            take, results in float32, weights in 4 bits, and columns that are no multiple of 8, is an error.
    """
    if choice not in GPU_KERNELS:
        raise ValueError(f"int8_kernels: choice must be one of {', '.join(GPU_KERNELS)}, got {choice!r}")
    return _kernels.of(choice)


def linear_int8(
    rows: Sequence[tuple[Tensor, Tensor]],
    weight: Sequence[Int8Weight],
    bias: Sequence[Tensor | None],
    dtype: torch.dtype,
    residual: Sequence[Tensor] | None = None,
    gate: Sequence[Tensor] | None = None,
    offsets: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """out_i = y_i, or residual_i + gate_i[segment of the row] * y_i, with y_i = x_i weight_i^T + bias_i.

    The sums of products of integers are exact, those of float8 are float32, in any order and as exact as tensor cores
    keep them, on a CPU by PyTorch. Then (sum * (scale of the row * scale of the column)) + bias in float32, and one
    rounding to `dtype` after gate and residual, which in float16 saturate at +-65504. Rows that several products share
    are given several times.

    Args:
        rows: of each x, values and scales as `int8_rows` returns them with the group of its weight, and float8 like it.
        weight: as many. bias: as many, [columns_i] of `dtype`, or None.
        dtype: float32, float16 or bfloat16, of the result.
        residual: None, or as many, [rows_i, columns_i], contiguous, of `dtype`. gate: with it, [segments_i, columns_i];
            rows may be strided or expanded. offsets: as many, int32 [segments_i + 1], first row of each segment; None:
            segments of equal length.

    Returns:
        As many tensors [rows_i, columns_i].

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.
    """
    count = len(rows)
    residual, gate = residual or [], gate or []
    values, scales = [v for v, _ in rows], [s for _, s in rows]
    empty = values[0].new_empty(0, dtype=torch.int32) if rows else None
    given: list = [o if o is not None else empty for o in offsets or [None] * count]
    none = values[0].new_empty(0, dtype=dtype) if rows else None
    biases: list = [b if b is not None else none for b in bias]
    packed, sums, columns = [w.packed for w in weight], [w.sums for w in weight], [w.scales for w in weight]
    unit = _kernels.now() if rows and lib.on_cuda(values[0]) else _unit.now()
    arguments = (values, scales, packed, columns, sums, biases, list(residual), list(gate), given, dtype, unit)
    if lib.use_reference():
        return _reference(*arguments)
    direct = lib.call_directly(*values, *scales, *packed, *columns, *sums, *biases, *residual, *gate)
    return (_forward if direct else _op)(*arguments)


def linear_int8_reference(rows, weight, bias, dtype, residual=None, gate=None, offsets=None) -> list[Tensor]:
    """The formula in plain PyTorch, of integers the same bits: products in float64, which holds them."""
    out = []
    for i, ((values, scales), w, b) in enumerate(zip(rows, weight, bias)):
        x = values[:, : w.depth] if w.float8 else _int8.from_tiles(values, len(scales), w.depth)
        sums = (x.double() @ w.values().double().T).float()
        y = sums * (w.scales[None] * scales[:, None]) + (0 if b is None else b.float())
        if residual:
            r, g = residual[i], gate[i]
            y = r.float() + lib.segment_rows(offsets[i] if offsets else None, len(g), len(r), g).float() * y
            y = y.clip(-65504, 65504) if dtype == torch.float16 else y
        out.append(y.to(dtype))
    return out


def _reference(values, scales, packed, columns, sums, bias, residual, gate, offsets, dtype, unit) -> list[Tensor]:
    weights = [Int8Weight(p, t, c, _steps(p) * _int8.DEPTH, 1) for p, t, c in zip(packed, sums, columns)]
    biases, offsets = [b if len(b) else None for b in bias], [o if len(o) else None for o in offsets]
    return linear_int8_reference(list(zip(values, scales)), weights, biases, dtype, residual, gate, offsets)


def _steps(packed: Tensor) -> int:
    """Tiles of the depth."""
    return packed.shape[1] // _int8.DEPTH if packed.dim() == 2 else packed.shape[1]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(values, scales, packed, columns, sums, bias, residual, gate, offsets, dtype, unit) -> None:
    if not values:
        lib.fail(_OP, "rows", "hold at least one pair", 0)
    if dtype not in DTYPE_CODES or dtype == torch.float64:
        lib.fail(_OP, "dtype", "be float32, float16 or bfloat16", dtype, TypeError)
    others = {"weight": packed, "bias": bias, "offsets": offsets}
    if residual or gate:
        others |= {"residual": residual, "gate": gate}
    for name, tensors in others.items():
        if len(tensors) != len(values):
            lib.fail(_OP, name, f"hold {len(values)} tensors like rows", len(tensors))
    for i, (v, s, w, c, t, b) in enumerate(zip(values, scales, packed, columns, sums, bias)):
        lib.check_device(_OP, v)
        place = v.get_device()
        if any(tensor.get_device() != place for tensor in (s, w, c, t, *([b] if len(b) else []))):
            lib.fail(_OP, "weight", f"be with its bias and the rows' scales on {v.device} like the rows", w.device)
        rows, width, gpu = len(s), len(t), _int8.on_gpu(v)
        float8 = w.dtype == _int8.FLOAT8
        gpu = gpu or float8
        panels = width if gpu and w.dtype != torch.uint8 else _int8.up(width, _int8.COLUMNS)
        if w.dtype not in (torch.int8, torch.uint8, _int8.FLOAT8) or len(w) != panels or len(c) != width:
            rule = f"be an Int8Weight of {width} columns, as it is laid out on {v.device}"
            lib.fail(_OP, "weight", rule, f"{w.dtype} {tuple(w.shape)}")
        wanted = _int8.FLOAT8 if float8 else torch.uint8
        if v.dtype != wanted or tuple(v.shape) != _int8.shape_of_rows(rows, _steps(w), gpu):
            rule = f"be the {_short(wanted)} tiles of {rows} rows with the depth of the weight, {_steps(w)} tiles"
            lib.fail(_OP, "rows", rule, f"{v.dtype} {tuple(v.shape)}")
        if len(b) and (b.dtype != dtype or tuple(b.shape) != (width,)):
            lib.fail(_OP, "bias", f"be {dtype} ({width},)", f"{b.dtype} {tuple(b.shape)}")
        if residual:
            r, g = residual[i], gate[i]
            if r.dtype != dtype or tuple(r.shape) != (rows, width) or not r.is_contiguous() or r.get_device() != place:
                rule = f"be contiguous, {dtype} {(rows, width)} on {v.device}"
                lib.fail(_OP, "residual", rule, f"{r.dtype} {tuple(r.shape)} on {r.device}, strides {r.stride()}")
            lib.check_vectors(_OP, r, offsets[i] if len(offsets[i]) else None, gate=g)


def _forward(values, scales, packed, columns, sums, bias, residual, gate, offsets, dtype, unit) -> list[Tensor]:
    out = _fake(values, scales, packed, columns, sums, bias, residual, gate, offsets, dtype, unit)
    cuda = lib.on_cuda(values[0])
    if cuda:
        values, packed = list(map(lib.aligned, values)), list(map(lib.aligned, packed))
    arguments, dtypes, obstacles = [], [], []
    for i, (v, s, w, c, t, b, y) in enumerate(zip(values, scales, packed, columns, sums, bias, out)):
        gated = (0, 0, 0, 0, 0)
        if residual:
            g, o = gate[i], offsets[i] if len(offsets[i]) else None
            gated = (residual[i].data_ptr(), g.data_ptr(), g.stride(0), pointer(o), len(g))
        if w.dtype == _int8.FLOAT8 and not cuda:
            more = residual[i : i + 1], gate[i : i + 1], offsets[i : i + 1]
            y.copy_(_reference([v], [s], [w], [c], [t], [b], *more, dtype, unit)[0])
        elif len(s):
            x = (v.data_ptr(), s.data_ptr(), len(s), _steps(w) * _int8.DEPTH)
            by = (w.data_ptr(), c.data_ptr(), t.data_ptr(), b.data_ptr() if len(b) else 0, len(t))
            arguments.append((x, by, y.data_ptr(), gated))
            dtypes.append(w.dtype)
            obstacles.append(_obstacle(dtype, *arguments[-1], w.dtype) if cuda else None)
    four = [d == torch.uint8 for d in dtypes]
    if arguments and cuda:
        kernels = _kernels_of(values[0], arguments, obstacles, dtypes, unit)
        for name in sorted(set(kernels), reverse=True):
            mine = [i for i, kernel in enumerate(kernels) if kernel == name]
            bits = [] if name.endswith("_sm90") else [[four[i] for i in mine]]
            lib.launch(name, values[0], [arguments[i] for i in mine], DTYPE_CODES[dtype], *bits)
    elif arguments:
        _C.linear_int8(arguments, DTYPE_CODES[dtype], unit, *([four] if any(four) else []))
    return out


def _obstacle(dtype: torch.dtype, x, by, out: int, gated, bits: torch.dtype) -> tuple[str, str, object] | None:
    """What keeps wgmma from a product: an argument, a rule and a value."""
    if dtype not in (torch.float16, torch.bfloat16):
        return "dtype", "be float16 or bfloat16 for wgmma", dtype
    if bits != torch.int8 or by[4] % 8:
        found = {torch.int8: "8 bits", torch.uint8: "4 bits"}.get(bits, "float8")
        return "weight", "be in 8 bits, with a multiple of 8 columns, for wgmma", f"{found}, {by[4]}"
    # Of 16 bytes what tensor maps read and write; else a pair.
    whole, pairs = (x[0], by[0], out, gated[0]), (by[1] // 2, by[2] // 2, by[3], gated[1], gated[2] * 2)
    if any(a % 16 for a in whole) or any(a % 4 for a in pairs):
        return "data", "be aligned to 16 bytes, and to pairs of numbers, for wgmma", [hex(a) for a in (*whole, *pairs)]
    return None


def _kernels_of(on: Tensor, arguments: list, obstacles: list, dtypes: list, choice: str) -> list[str]:
    """The launch that each product goes to."""
    if choice == "wgmma":
        for found in obstacles:
            if found is not None:
                lib.fail(_OP, *found)
        return [f"{_OP}_sm90"] * len(arguments)
    many = max(x[2] for x, *_ in arguments) >= FEW
    hopper = many and choice == "best" and multiplied_by(on.get_device()) == "wgmma"
    rest = ["linear_fp8" if bits == _int8.FLOAT8 else _OP for bits in dtypes]
    return [f"{_OP}_sm90" if hopper and found is None else name for name, found in zip(rest, obstacles)]


def _fake(values, scales, packed, columns, sums, bias, residual, gate, offsets, dtype, unit) -> list[Tensor]:
    _check(values, scales, packed, columns, sums, bias, residual, gate, offsets, dtype, unit)
    return [v.new_empty(len(s), len(t), dtype=dtype) for v, s, t in zip(values, scales, sums)]


_op = lib.register(
    _OP,
    "(Tensor[] values, Tensor[] scales, Tensor[] packed, Tensor[] columns, Tensor[] sums, Tensor[] bias, "
    "Tensor[] residual, Tensor[] gate, Tensor[] offsets, ScalarType dtype, str unit) -> Tensor[]",
    _forward,
    _fake,
)
