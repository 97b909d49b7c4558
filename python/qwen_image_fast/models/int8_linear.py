"""Linear layers that compute in 8 bits (W8A8, rotated): which they are, how they come from weights, how they are saved.

A weight W becomes W H, rounded to integers with one scale for a row; so do activations, at every call
(`ops.int8_rows`). On GPUs of a build without CUDA kernels activations are rotated but not rounded: x H times integers
that become the type of x for the call, with the scales on the result.
Gradients go to x alone, as those of the dequantised weight: g s W H for g of the result and scales s. The weight
becomes floating point for that product and is not kept, nor is x.
On GPUs that prefer float8 (`ops.eight_bits`) the integers become e4m3 with a scale for each row when they come there,
and so do activations; from there on the layer is in float8, and has no state dict.
In 4 bits (`precision="int4"`) a weight is kept as codes with a scale for every 16 of them, which become such integers
for the product (`ops._int4`); the last block, whose errors no block behind it makes smaller, stays in 8.
The state dict is ComfyUI's: `weight` int8 [out, in] of W H, `weight_scale` float32 [out, 1], and `comfy_quant`, the
bytes of a json of the format (`int8_tensorwise` with `convrot`); in 4 bits `asym_w4a8_int8`. Files of that format are
used as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from qwen_image_fast.models.precision import PLACES, bits_of, file_of, layers_in
from qwen_image_fast.ops import Int8Weight, _int4, _int8, int8_rows, linear_int8
from qwen_image_fast.ops._library import has_kernels
from qwen_image_fast.tensor_files import Entry
from qwen_image_fast.weights.reading import read_entry
from qwen_image_fast.weights.stored import Weight

_PARTS = ("weight", "weight_scale", "comfy_quant")
_PARTS_OF_4 = ("weight", "weight_s_rel", "weight_s_channel", "weight_codebook", "comfy_quant")
NEAR = 5e-4  # of a step: what a number may lose on its way to floating point and back
SHARED = ("weight_codebook", "comfy_quant")  # of what a file holds of a weight, what has no rows


class _NoWeight(Tensor):
    """In the place of a weight: its values are not there, and what would change them is not lost in silence."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if getattr(function, "__self__", None) in _ASKED or function in (
            Tensor.is_floating_point,
            Tensor.size,
            Tensor.dim,
        ):
            return super().__torch_function__(function, types, args, kwargs or {})
        raise RuntimeError(
            "a layer in 8 bits has no weight to be read or changed: load the model without precision, or put LoRAs in "
            "with `qwen-image-fast quantize --lora`"
        )


_ASKED = tuple(getattr(Tensor, name) for name in ("dtype", "device", "shape", "ndim", "is_meta", "requires_grad"))


class _Product(torch.autograd.Function):
    """`Int8Linear.computed` with gradients of x and the bias; of x nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Int8Linear) -> Tensor:
        ctx.layer = layer
        return layer.computed(x, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        x = ctx.layer.gradient(grad) if ctx.needs_input_grad[0] else None
        return x, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None


class Int8Linear(nn.Linear):
    """x W^T + b with W, and x row by row, in 8 bits.

    Its `weight` cannot be read or changed: `int8` has the packed one, `dequantised` makes floats of it.
    """

    bias: Any
    packed: Tensor
    sums: Tensor
    scale_bits: Tensor

    def __init__(self, weight: Int8Weight, bias: nn.Parameter | None):
        nn.Module.__init__(self)
        self.register_parameter("bias", bias)
        self._hold(weight)

    def _hold(self, weight: Int8Weight) -> None:
        self.out_features, self.in_features, self.group = len(weight.sums), weight.depth, weight.group
        # Float8 as integers too, like the scales, which no change of the model's dtype rounds.
        self.float8 = weight.float8
        packed = weight.packed.view(torch.int8) if self.float8 else weight.packed
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("sums", weight.sums, persistent=False)
        self.register_buffer("scale_bits", weight.scales.view(torch.int32), persistent=False)

    @property
    def int8(self) -> Int8Weight:
        packed = self.packed.view(_int8.FLOAT8) if self.float8 else self.packed
        return Int8Weight(packed, self.sums, self.scale_bits.view(torch.float32), self.in_features, self.group)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The dtype, the device and the shape of a weight, for those who ask for no more (PEFT)."""
        like = torch.empty(0) if self.bias is None else self.bias
        return like.new_empty(1).expand(self.out_features, self.in_features).as_subclass(_NoWeight)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        wanted = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        return _Product.apply(x, bias, self) if wanted else self.computed(x, bias)

    def computed(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, without gradients."""
        if not has_kernels(x):
            return self.in_floats(x, bias)
        rows = int8_rows(x.reshape(-1, self.in_features), self.group, float8=self.float8)
        bias = None if bias is None else bias.to(x.dtype)
        (y,) = linear_int8([rows], [self.int8], [bias], x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def in_floats(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same with x in its own type."""
        weight = self.int8
        rotated = _int8.rotated(x.float(), self.group).to(x.dtype)
        y = F.linear(rotated, weight.values().to(x.dtype)).float() * weight.scales
        return (y if bias is None else y + bias.float()).to(x.dtype)

    def gradient(self, grad: Tensor) -> Tensor:
        """grad W, in its type; [..., out] -> [..., in]."""
        weight = self.int8
        scaled = (grad.float() * weight.scales).to(grad.dtype)
        return _int8.rotated((scaled @ weight.values().to(grad.dtype)).float(), self.group).to(grad.dtype)

    def dequantised(self) -> Tensor:
        """W in float32, [out, in]."""
        weight = self.int8
        return _int8.rotated(weight.values().float() * weight.scales[:, None], self.group)

    def replace(self, weight: Tensor, drawn: torch.Generator) -> None:
        """Take another W, [out, in], rounded to one of the two neighbours, the nearer one the more often, so that the
        mean is the value: a change smaller than a step is there in some numbers. A row that the range does not hold
        gets a larger scale; where nothing changes, the numbers stay. `drawn`: on the CPU."""
        held = self.int8
        rotated, scales = _int8.rotated(weight.float(), self.group), held.scales[:, None]
        largest = rotated.abs().amax(1, keepdim=True)
        scales = torch.where(largest > (127 + NEAR) * scales, largest / 127, scales)
        steps = rotated / scales.clamp(min=_int8.SMALLEST)
        chance = torch.rand(steps.shape, generator=drawn, device="cpu").to(steps.device)
        near = steps.round()
        values = torch.where((steps - near).abs() < NEAR, near, (steps + chance).floor()).clamp_(-127, 127)
        read = Int8Weight.of(values.to(torch.int8).cpu(), scales.cpu(), self.group)
        self._hold(read.to(self.packed.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        there = fn(torch.empty(0)).device
        check_place(self, there)
        super()._apply(fn, recurse)
        self._hold(self.int8.laid_out())
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.float8:
            raise ValueError(
                f"state_dict: {prefix}weight must be in int8 or int4 to be saved, got float8, which the GPU has: "
                'load the model on the CPU, or under ops.eight_bits("int8"), and save that'
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination |= {prefix + name: tensor for name, tensor in comfy_tensors(self.int8).items()}

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        names = _PARTS_OF_4 if self.int8.four else _PARTS
        given = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        if len(given) == len(names) and given["weight"].dtype == torch.int8:
            config = json.loads(given["comfy_quant"].numpy().tobytes())
            group = int(config.get("convrot_groupsize", 256)) if config.get("convrot") else 1
            if self.int8.four:
                codes, times, scales, levels = (given[name] for name in _PARTS_OF_4[:4])
                read = of_file(prefix, codes, times, scales, levels, group)
            else:
                read = Int8Weight.of(given["weight"], given["weight_scale"], group)
            self._hold(read.to(self.packed.device))
        elif given:
            bits = 4 if self.int8.four else 8
            error_msgs.append(f"{prefix}weight must be in {bits} bits, with {' and '.join(names[1:])}")
        elif strict:
            missing_keys.append(f"{prefix}weight")
        rest = {key: tensor for key, tensor in state_dict.items() if key.removeprefix(prefix) not in given}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


def comfy_tensors(weight: Int8Weight) -> dict[str, Tensor]:
    """What a file holds of a weight, by suffix."""
    config = comfy_config(weight.group, weight.four)
    if not weight.four:
        return {"weight": weight.values(), "weight_scale": weight.scales[:, None].contiguous(), "comfy_quant": config}
    codes, times = _int4.to_rows(weight.packed, len(weight.sums), weight.depth)
    levels = torch.tensor(_int4.LEVELS, dtype=torch.float32) / (1 << _int4.SHIFT)
    made = codes.view(torch.int8), times.float(), weight.scales.contiguous(), levels, config
    return dict(zip(_PARTS_OF_4, made))


def comfy_config(group: int, four: bool = False) -> Tensor:
    """The bytes of the json that describes a weight."""
    config: dict[str, Any] = (
        {"format": "asym_w4a8_int8", "group_size": _int4.GROUP} if four else {"format": "int8_tensorwise"}
    )
    if group > 1:
        config |= {"convrot": True, "convrot_groupsize": group}
    return torch.frombuffer(bytearray(json.dumps(config).encode()), dtype=torch.uint8)


def of_file(
    where: str, codes: Tensor, times: Tensor, scales: Tensor, codebook: Tensor, group: int,
    place: Int8Weight | None = None,
) -> Int8Weight:  # fmt: skip
    """A weight in 4 bits from a file's tensors; ValueError where they are damaged or of another tool's codebook."""
    levels, whole = (codebook.float() * (1 << _int4.SHIFT)).tolist(), times.float()
    if not bool(whole.isfinite().all()):
        raise ValueError(f"{where.rstrip('.')}.weight must hold finite numbers, got NaN or infinity: download it again")
    if levels != [float(level) for level in _int4.LEVELS] or bool((whole != whole.round().clamp(0, 120)).any()):
        raise ValueError(
            f"{where.rstrip('.')} is in 4 bits of another codebook: load it without precision, which decodes it"
        )
    return Int8Weight.of_codes(codes.view(torch.uint8), whole.to(torch.uint8), scales, group, place)


def quantised(weight: Tensor, place: Int8Weight | None = None, precision: str = "int8") -> Int8Weight:
    """A weight of floating-point numbers in 8 or 4 bits, rotated in the largest groups that divide its columns.
    `place`: of the result, on the CPU."""
    group = _int8.group_of(weight.shape[1])
    if precision == "int4":
        if weight.shape[1] % _int4.GROUP:
            raise ValueError(f"int4: the inputs of a layer must be a multiple of {_int4.GROUP}, got {weight.shape[1]}")
        rotated = _int8.rotated(weight.detach().cpu().float(), group)
        return Int8Weight.of_floats(rotated, group, place).to(weight.device)
    values, scales = int8_rows(weight.detach().cpu(), group)
    return Int8Weight.of(_int8.from_tiles(values, *weight.shape), scales, group, place).to(weight.device)


def check_place(model: nn.Module, device: torch.device) -> None:
    """ValueError where a model with layers in 8 bits would be moved to a device that they do not compute on."""
    if device.type not in (*PLACES, "meta") and any(isinstance(module, Int8Linear) for module in model.modules()):
        raise ValueError(
            f"to: a model in 8 bits computes on {' and '.join(PLACES)}, got {device}: load it without precision"
        )


def read_int8_layers(
    model: nn.Module, weights: Mapping[str, Weight], device: torch.device | None = None, precision: str = "int8"
) -> dict[str, Weight]:
    """Put layers in 8 or 4 bits into a model on the meta device, weight by weight from its files; returns what is left.

    Of a file that has some of these layers in these bits already, those are taken as they are, and no others are made.

    Raises:
        ValueError: the file has a quantisation of its own that is another, or numbers that are not finite.
    """
    own = layers_in(precision, weights)
    bits = bits_of(precision, own)
    # All places first: made between what is read and given back, they would leave holes, a third of them all.
    places = {path: _place_of(weight, bits[path]) for path, weight in own.items()}
    said = f"read in {precision[3:]} bits"
    for path, weight in tqdm(own.items(), desc=said, leave=False, disable=None, delay=1):  # none where it is short
        parent, _, name = path.rpartition(".")
        layer: Any = model.get_submodule(path)
        read = _read(path, weight, places.pop(path), bits[path]).to(device or torch.device("cpu"))
        setattr(model.get_submodule(parent), name, Int8Linear(read, layer.bias))
    return {name: weight for name, weight in weights.items() if name.removesuffix(".weight") not in own}


def _place_of(weight: Weight, precision: str) -> Int8Weight:
    rows, width = weight.shape
    return Int8Weight.empty(rows, width, precision == "int4")


def _read(path: str, weight: Any, place: Int8Weight, precision: str) -> Int8Weight:
    if isinstance(weight, Entry):
        value = read_entry(weight)
        found = quantised(value.float() if value.dtype == torch.float64 else value, place, precision)
        _check_finite(path, weight, found.scales)
    elif precision == "int4":
        codes, times, scales, levels = (
            read_entry(weight.parts[part].entry) for part in ("weight", "s_rel", "s_channel", "codebook")
        )
        _check_finite(path, weight, times.float(), scales, levels)
        found = of_file(path, codes, times, scales, levels, weight.rotation_of_4, place)
    else:
        values, scales = (read_entry(weight.parts[part].entry) for part in ("weight", "scale"))
        _check_finite(path, weight, scales)
        found = Int8Weight.of(values, scales, weight.rotation, place)
    return found


def _check_finite(path: str, weight: Weight, *scales: Tensor) -> None:
    if not all(bool(torch.isfinite(scale).all()) for scale in scales):
        raise ValueError(
            f"{path}.weight must hold finite numbers, got NaN or infinity: {file_of(weight)} is damaged, download or "
            "convert it again"
        )
