"""Makes the fixtures of this folder: bytes that other tools wrote, and what they are to be read as.

    pip install comfy-kitchen==0.2.40 bitsandbytes==0.50.2 && pip install --no-deps deepcompressor-toolkit==0.1.0
    python make_fixtures.py [comfy] [bitsandbytes] [nunchaku]

Each file is one that these tools' users have, and holds what every `L.weight` must become as `expected.L.weight.DTYPE`.
Of the doubly quantised, which need many blocks, the last values are kept. Scales of what is rotated are powers of two:
then every sum is exact, and no order of addition on another machine gives other bits. nunchaku's files are read by its
kernels alone: the converter of SVDQuant's authors packs numbers that are known.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def text(value):
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def comfy():
    import comfy_kitchen as ck

    with ck.registry.use_backend("eager"):
        return comfy_eager()


def comfy_eager():
    from comfy_kitchen.tensor import AsymW4A8Int8Layout, TensorCoreFP8Layout, TensorWiseINT8Layout
    from comfy_kitchen.tensor.convrot_w4a4 import TensorCoreConvRotW4A4Layout

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
    import bitsandbytes.functional as bnb

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


def nunchaku():
    """Layers of a block of width 128, as the converter of SVDQuant's authors packs them for nunchaku."""
    from deepcompressor.backend.nunchaku.convert import (
        convert_to_nunchaku_w4x4y16_linear_state_dict as pack,
    )
    from deepcompressor.backend.nunchaku.convert import (
        convert_to_nunchaku_w4x16_adanorm_zero_state_dict as pack_modulation,
    )

    names = {"lora_down": "proj_down", "lora_up": "proj_up", "smooth": "smooth_factor"}
    names["smooth_orig"] = "smooth_factor_orig"
    block, rank, made = "transformer_blocks.0", 16, {}

    def powers(*shape, low):
        return 2.0 ** torch.randint(low, low + 3, shape)

    def linear(layer, targets, k, n, e2m1=False, shift=None):
        group = 16 if e2m1 else 64
        scale, smooth, rows = powers(n, 1, k // group, 1, low=-6), powers(k, low=-1), powers(n, 1, 1, 1, low=-1)
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) if e2m1 else torch.arange(8.0)
        q = values[torch.randint(0, 8, (n, k))] * (2 * torch.randint(0, 2, (n, k)) - 1)
        smoothed = (q.view(n, 1, k // group, group) * scale * (rows if e2m1 else 1)).view(n, k)
        down, up = torch.randint(-4, 5, (rank, k)) / 64.0, torch.randint(-4, 5, (n, rank)) / 64.0
        bias = torch.randint(-64, 65, (n,)) / 64.0
        scales = {"scale": rows, "subscale": scale} if e2m1 else {"scale": scale}
        scales = {kind: s.bfloat16() for kind, s in scales.items()}
        branch = ((down * smooth).bfloat16(), up.bfloat16())
        packed = pack(
            smoothed.bfloat16(), bias=bias.bfloat16(), smooth=smooth.bfloat16(), lora=branch, float_point=e2m1,
            shift=None if shift is None else torch.tensor([shift]).bfloat16(), **scales,
        )  # fmt: skip
        made.update({f"{block}.{layer}.{names.get(role, role)}": t.contiguous() for role, t in packed.items()})
        weight = smoothed / smooth + up @ down
        if shift is not None:  # the converter adds the branch of the shift, and leaves out the rest, which is W's
            bias = (bias.double() + up.double() @ down.double() @ torch.full((k,), shift).double()).bfloat16().float()
            bias = bias + (smoothed / smooth).double().sum(1).float() * shift
        for i, target in enumerate(targets):
            end = (i + 1) * n // len(targets)
            made[f"expected.{block}.{target}.weight.float32"] = weight[end - 40 : end].clone()
            made[f"expected.{block}.{target}.bias.float32"] = bias[end - 128 : end].clone()

    linear("attn.to_qkv", [f"attn.to_{which}" for which in "qkv"], 128, 384)
    linear("img_mlp.net.2", ["img_mlp.net.2"], 256, 128, shift=11 / 64)
    linear("txt_mlp.net.2", ["txt_mlp.net.2"], 256, 128, e2m1=True)
    n, k = 6 * 16, 128
    scale, q = powers(n, 1, k // 64, 1, low=-6), torch.randint(-7, 9, (n, k)).float()
    weight, bias = (q.view(n, 1, -1, 64) * scale).view(n, k), torch.randint(-64, 65, (n,)) / 64.0
    packed = pack_modulation(weight.bfloat16(), scale=scale.bfloat16(), bias=bias.bfloat16())
    groups = {role: packed[role][: k // 64] for role in ("wscales", "wzeros")}  # the rest, at small k, is zeros
    packed = packed | groups
    made.update({f"{block}.img_mod.1.{role}": tensor.contiguous() for role, tensor in packed.items()})
    made |= {f"expected.{block}.img_mod.1.weight.float32": weight, f"expected.{block}.img_mod.1.bias.float32": bias}
    return made


if __name__ == "__main__":
    makers = {maker.__name__: maker for maker in (comfy, bitsandbytes, nunchaku)}
    for name in sys.argv[1:] or makers:
        torch.manual_seed(0)
        save_file(makers[name](), HERE / f"{name}.safetensors")
