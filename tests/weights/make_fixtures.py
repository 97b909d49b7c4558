"""Makes the fixtures of this folder: bytes that comfy-kitchen and bitsandbytes wrote, and what they read from them.

    pip install comfy-kitchen==0.2.40 bitsandbytes==0.50.2 && python make_fixtures.py

Each file is one that these tools' users have, and holds what every `L.weight` must become as `expected.L.weight.DTYPE`.
Of the doubly quantised, which need many blocks, the last values are kept. Scales of what is rotated are powers of two:
then every sum is exact, and no order of addition on another machine gives other bits.
"""

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import comfy_kitchen as ck
import torch
from comfy_kitchen.tensor import AsymW4A8Int8Layout, TensorCoreFP8Layout, TensorWiseINT8Layout
from comfy_kitchen.tensor.convrot_w4a4 import TensorCoreConvRotW4A4Layout
from safetensors.torch import save_file

HERE = Path(__file__).parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def text(value):
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def comfy():
    made = {}

    def add(name, layout, params, q, config, tensors):
        for dtype, kind in DTYPES.items():
            typed = layout.Params(**{**vars(params), "orig_dtype": kind})
            made[f"expected.{name}.weight.{dtype}"] = layout.dequantize(q, typed)
        made[f"{name}.weight"] = q
        made.update({f"{name}.weight{suffix}": tensor for suffix, tensor in tensors.items()})
        made[f"{name}.comfy_quant"] = text(config)

    w = torch.randn(2, 256)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        q, params = TensorCoreFP8Layout.quantize(w, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        add(name, TensorCoreFP8Layout, params, q, {"format": name}, {"_scale": params.scale})
    for name, rows in (("int8", False), ("int8_rows", True)):
        q, params = TensorWiseINT8Layout.quantize(w, per_channel=rows)
        add(name, TensorWiseINT8Layout, params, q, {"format": "int8_tensorwise"}, {"_scale": params.scale})
    for size in (64, 256):
        q, params = TensorWiseINT8Layout.quantize(w, per_channel=True, convrot=True, convrot_groupsize=size)
        params = TensorWiseINT8Layout.Params(**{**vars(params), "scale": torch.tensor([[2.0**-9], [2.0**-7]])})
        config = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": size}
        add(f"int8_rotated_{size}", TensorWiseINT8Layout, params, q, config, {"_scale": params.scale})
    q, params = TensorCoreConvRotW4A4Layout.quantize(w)
    params = TensorCoreConvRotW4A4Layout.Params(**{**vars(params), "scale": torch.tensor([2.0**-3, 2.0**-4])})
    config = {"format": "convrot_w4a4", "convrot_groupsize": 256, "linear_dtype": "int8"}
    add("int4", TensorCoreConvRotW4A4Layout, params, q, config, {"_scale": params.scale})
    for name, options in {
        "w4a8": {},
        "w4a8_plain": {"codebook": False, "scale_dtype": torch.float32, "group_size": 32},
        "w4a8_shifted": {"codebook": False, "symmetric": False},
        "w6a8": {"bits": 6},
    }.items():
        q, params = AsymW4A8Int8Layout.quantize(w, **options)
        exact = {"s_channel": torch.tensor([2.0**-5, 2.0**-6])}
        if params.correction is not None:
            exact["correction"] = torch.round(params.correction * 64) / 64
        params = AsymW4A8Int8Layout.Params(**{**vars(params), **exact})
        config = {"format": "asym_w4a8_int8", "group_size": params.group_size, "convrot_groupsize": 256}
        tensors = {"_s_rel": params.scale, "_s_channel": params.s_channel}
        tensors |= {"_correction": params.correction} if params.correction is not None else {}
        tensors |= {"_codebook": params.codebook} if params.codebook is not None else {}
        add(name, AsymW4A8Int8Layout, params, q, config, tensors)
    return made


def bitsandbytes():
    made = {}
    w = torch.randn(8, 64 * 33)
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            name = f"{kind}_nested" if nested else kind
            value = w if nested else w[:2, :64]
            packed, state = bnb.quantize_4bit(value.contiguous(), quant_type=kind, compress_statistics=nested)
            made[f"{name}.weight"] = packed
            made |= {f"{name}.weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
            for dtype, other in DTYPES.items():
                state.dtype = other
                expected = bnb.dequantize_4bit(packed, state)
                made[f"expected.{name}.weight.{dtype}"] = expected[-1:, -512:].contiguous() if nested else expected
    q, scale, _ = bnb.int8_vectorwise_quant(w[:2, :64].half().contiguous())
    made |= {"int8.weight": q, "int8.SCB": scale}
    made["expected.int8.weight.float32"] = bnb.int8_vectorwise_dequant(q, scale)
    return made


if __name__ == "__main__":
    torch.manual_seed(0)
    with ck.registry.use_backend("eager"):
        save_file(comfy(), HERE / "comfy.safetensors")
    save_file(bitsandbytes(), HERE / "bitsandbytes.safetensors")
