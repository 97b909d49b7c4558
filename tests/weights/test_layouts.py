"""The quantised layouts of safetensors files, against what their makers read from the same bytes (make_fixtures.py)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from weights.writers import float8, text_bytes, write_safetensors

from qwen_image_fast.weights import reading
from qwen_image_fast.weights.formats import open_weights
from qwen_image_fast.weights.reading import read_weights

HERE = Path(__file__).parent
CPU = torch.device("cpu")
FILES = {name: HERE / f"{name}.safetensors" for name in ("comfy", "bitsandbytes", "nunchaku")}
BLOCK = "transformer_blocks.0"


def decoded(file):
    """The names of what the makers of a file read."""
    names = load_file(FILES[file])
    return sorted({name.split(".", 1)[1].rpartition(".")[0] for name in names if name.startswith("expected.")})


def read(path, dtype=torch.float32, part=None):
    weights = open_weights([path], part).weights
    wanted = {name: weight for name, weight in weights.items() if not name.startswith("expected.")}
    return read_weights(wanted, dtype, CPU)


@pytest.mark.parametrize("file,name", [(file, name) for file in FILES for name in decoded(file)])
def test_the_same_bits(file, name, monkeypatch):
    stored = load_file(FILES[file])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = stored.get(f"expected.{name}.{str(dtype).removeprefix('torch.')}")
        if file == "nunchaku":  # whose kernels compute in other types; what they mean is rounded once
            expected = stored[f"expected.{name}.float32"].to(dtype)
        if expected is None:
            continue
        for chunk in (reading.CHUNK, 256):  # all rows at once, and one by one
            monkeypatch.setattr(reading, "CHUNK", chunk)
            found = read(FILES[file], dtype)[name]
            last = found[tuple(slice(-size, None) for size in expected.shape)]
            assert found.dtype == dtype and torch.equal(last, expected) and expected.abs().max() > 0.4


def test_the_fixtures_hold_what_they_should():
    kinds = {name: w.kind for name, w in open_weights([FILES["comfy"]]).weights.items() if not name.startswith("exp")}
    assert kinds == {
        "float8_e4m3fn.weight": "float8_e4m3fn scaled",
        "float8_e5m2.weight": "float8_e5m2 scaled",
        "int4.weight": "int4 rotated 256",
        "int8.weight": "int8",
        "int8_rows.weight": "int8 rows",
        "int8_rotated_64.weight": "int8 rotated 64",
        "int8_rotated_256.weight": "int8 rotated 256",
        "w4a8.weight": "int4 groups of 16, rotated 256",
        "w4a8_plain.weight": "int4 groups of 32, rotated 256",
        "w4a8_shifted.weight": "int4 groups of 16, rotated 256",
        "w6a8.weight": "int6 groups of 16, rotated 256",
    }


def test_nunchaku_counts_every_byte_once():
    """Queries, keys and values share a branch; a bias that its input's shift is taken out of needs the weight too."""
    weights = open_weights([FILES["nunchaku"]]).weights
    found = {name: weight for name, weight in weights.items() if not name.startswith("expected.")}
    kinds = {"nunchaku int4", "nunchaku nvfp4", "nunchaku int4 with zeros"}
    assert {weight.kind for weight in found.values()} == kinds and len(found) == 12
    stored = load_file(FILES["nunchaku"]).items()
    used = [
        t.nbytes for name, t in stored if not name.startswith("expected.") and not name.endswith("smooth_factor_orig")
    ]
    assert sum(weight.nbytes for weight in found.values()) == sum(used)


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return torch.randn(128, 192)


def blocks_of(weight, down, across):
    rows, columns = weight.shape
    blocks = weight.view(rows // down, down, columns // across, across)
    scale = blocks.abs().amax((1, 3)) / 448
    q = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return q.view(weight.shape), scale, (q.float() * scale[:, None, :, None]).view(weight.shape)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("shape", [(1, 192), (64, 64), (128, 192), (1, 64)])
@pytest.mark.parametrize("told", ["layer", "file", "file without prefix", "old", "not"])
def test_scales_of_rows_and_blocks(tmp_path, weight, prefix, shape, told):
    """However the layout is told: by layer, by file, in the older form, by its names alone."""
    q, scale, expected = blocks_of(weight, *shape)
    kind = {(1, 192): "_rowwise", (128, 192): ""}.get(shape, "_blockwise")
    name, config = "transformer_blocks.0.attn.to_q", {"format": f"float8_e4m3fn{kind}"}
    tensors = {f"{prefix}{name}.weight": q, f"{prefix}{name}.bias": torch.zeros(128)}
    tensors[f"{prefix}{name}.input_scale"] = torch.tensor(0.5)
    tensors[f"{prefix}{name}.{'scale_weight' if told == 'old' else 'weight_scale'}"] = scale
    metadata = None
    if told == "layer":
        tensors[f"{prefix}{name}.comfy_quant"] = text_bytes(config)
    elif told == "old":
        tensors[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    elif told.startswith("file"):
        inside = prefix if told == "file" else ""
        metadata = {"_quantization_metadata": json.dumps({"layers": {f"{inside}{name}": config}})}
    path = write_safetensors(tmp_path / "a.safetensors", tensors, metadata)
    found = read(path, part="transformer")
    assert sorted(found) == [f"{name}.bias", f"{name}.weight"]
    assert torch.equal(found[f"{name}.weight"], expected)


@pytest.mark.parametrize("levels", [1, 2])
def test_blocks_of_musubi(tmp_path, weight, levels):
    q, scale, expected = blocks_of(weight, 1, 64)
    tensors = {"a.weight": q, "a.scale_weight": scale[..., None], "a.bias": torch.zeros(128)}
    if levels == 2:  # powers of two, so that the product of the levels is exact
        tensors |= {"a.scale_weight": scale[..., None] / 4, "a.scale_weight_tensor": torch.tensor([4.0])}
    found = read(write_safetensors(tmp_path / "a.safetensors", tensors))
    assert torch.equal(found["a.weight"], expected) and sorted(found) == ["a.bias", "a.weight"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_float8_becomes_bfloat16(tmp_path, weight, dtype):
    tensors = {
        "a.weight": weight.to(dtype),
        "a.bias": torch.zeros(128),
        "one": weight[0].to(dtype),
        "n": torch.arange(3),
    }
    opened = open_weights([write_safetensors(tmp_path / "a.safetensors", tensors)])
    assert opened.quantised and opened.dtype(None) == torch.bfloat16 and opened.dtype(torch.float16) == torch.float16
    found = read_weights(opened.weights, opened.dtype(None), CPU)
    assert torch.equal(found["a.weight"], weight.to(dtype).to(torch.bfloat16)) and found["one"].shape == (192,)
    assert found["a.bias"].dtype == torch.bfloat16 and found["n"].dtype == torch.int64


def test_plain_tensors_stay_as_stored(tmp_path, weight):
    path = write_safetensors(tmp_path / "a.safetensors", {"a.weight": weight.half(), "a.bias": torch.zeros(128)})
    opened = open_weights([path])
    assert not opened.quantised and opened.dtype(None) is None
    found = read_weights(opened.weights, None, CPU)
    assert found["a.weight"].dtype == torch.float16 and found["a.bias"].dtype == torch.float32


# ---- what does not fit --------------------------------------------------------------------------------------------


def int8_layer(**changes):
    q = torch.ones(4, 64, dtype=torch.int8)
    config = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
    return {"a.weight": q, "a.weight_scale": torch.ones(4, 1), "a.comfy_quant": text_bytes(config)} | changes


def w4a8_layer(**changes):
    config = {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 64}
    layer = {"a.weight": torch.ones(4, 32, dtype=torch.int8), "a.weight_s_rel": torch.ones(4, 4)}
    layer |= {"a.weight_s_channel": torch.ones(4), "a.comfy_quant": text_bytes(config)}
    return {name: tensor for name, tensor in (layer | changes).items() if tensor is not None}


def nf4_layer(**changes):
    layer = {name: tensor for name, tensor in load_file(FILES["bitsandbytes"]).items() if name.startswith("nf4.")}
    return {name: tensor for name, tensor in (layer | changes).items() if tensor is not None}


def nunchaku_layers(**changes):
    layers = {name: t for name, t in load_file(FILES["nunchaku"]).items() if not name.startswith("expected.")}
    layers |= {f"{BLOCK}.{name.replace('__', '.')}": tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in layers.items() if tensor is not None}


BAD = {
    r"a.weight_scale of shape \[3\], expected one number, one for each of the 4 rows": int8_layer(
        **{"a.weight_scale": torch.ones(3)}
    ),
    r"a.weight_scale of shape \[4, 5\]": int8_layer(**{"a.weight_scale": torch.ones(4, 5)}),
    "a.weight_scale as int32": int8_layer(**{"a.weight_scale": torch.ones(4, dtype=torch.int32)}),
    "a.weight as float32 for the format int8_tensorwise": int8_layer(**{"a.weight": torch.ones(4, 64)}),
    "rotates a by 128 values, which must be a power of 4 that divides 64": int8_layer(
        **{"a.comfy_quant": text_bytes({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 128})}
    ),
    "describes its quantisation in a way that is not json": int8_layer(**{"a.comfy_quant": text_bytes(1)[:0]}),
    "holds a as nvfp4, which is not read: take a GGUF or bfloat16 file": int8_layer(
        **{"a.comfy_quant": text_bytes({"format": "nvfp4"})}
    ),
    r"lacks a.weight_s_channel": w4a8_layer(**{"a.weight_s_channel": None}),
    r"a.weight_s_rel of shape \[2, 4\], expected \[4, 4\]": w4a8_layer(**{"a.weight_s_rel": torch.ones(2, 4)}),
    r"a.weight_codebook of shape \[8\]": w4a8_layer(**{"a.weight_codebook": torch.ones(8)}),
    r"30 bytes in a row of a.weight for 64 values": w4a8_layer(**{"a.weight": torch.ones(4, 30, dtype=torch.int8)}),
    r"nf4.weight do not go with its shape \[2, 64\] .*absmax 12": nf4_layer(**{"nf4.weight.absmax": torch.ones(3)}),
    "absmax missing": nf4_layer(**{"nf4.weight.absmax": None}),
    "state of nf4.weight is not what": nf4_layer(**{"nf4.weight.quant_state.bitsandbytes__nf4": text_bytes({})}),
    "those of SVDQuant of Nunchaku Lite, or of another model": {
        "a.qweight": torch.ones(4, 8, dtype=torch.int8),
        "a.wscales": torch.ones(1, 4),
    },
    "lacks transformer_blocks.0.attn.to_qkv.wscales": nunchaku_layers(attn__to_qkv__wscales=None),
    r"attn.to_qkv.qweight of shape \[192, 64\], which tiles of 128 do not fill": nunchaku_layers(
        attn__to_qkv__qweight=torch.ones(192, 64, dtype=torch.int8)
    ),
    r"attn.to_qkv.wscales as bfloat16 \[3, 384\], expected bfloat16 or float16 of 3 x 256 values": nunchaku_layers(
        attn__to_qkv__wscales=torch.ones(3, 384).bfloat16()
    ),
    "a branch of rank 8 beside transformer_blocks.0.attn.to_qkv, not a multiple of 16": nunchaku_layers(
        attn__to_qkv__proj_up=torch.ones(384, 8).bfloat16()
    ),
    "lacks transformer_blocks.0.attn.to_qkv.proj_up": nunchaku_layers(attn__to_qkv__proj_up=None),
    "lacks transformer_blocks.0.img_mod.1.wscales": nunchaku_layers(img_mod__1__wscales=None),
    r"img_mod.1.qweight of shape \[4, 64\], which is no modulation's": nunchaku_layers(
        img_mod__1__qweight=torch.ones(4, 64).int()
    ),
    "those of MLX or another tool": {"a.weight": torch.ones(2, 2).int(), "a.scales": torch.ones(2, 1)},
    "integers with scales and no word": {"a.weight": torch.ones(2, 2).char(), "a.weight_scale": torch.ones(2, 1)},
    "those of optimum-quanto": {"a.weight._data": torch.ones(2, 2).char(), "a.weight._scale": torch.ones(2, 1)},
}


@pytest.mark.parametrize("text", BAD)
def test_what_does_not_fit_is_named(tmp_path, text):
    path = write_safetensors(tmp_path / "some.safetensors", BAD[text])
    with pytest.raises(ValueError, match=text) as error:
        open_weights([path])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 3])
def test_scales_that_are_not_finite(tmp_path, value, row):
    scale = torch.ones(4, 1)
    scale[row] = value
    path = write_safetensors(tmp_path / "some.safetensors", int8_layer(**{"a.weight_scale": scale}))
    with pytest.raises(ValueError, match=r"a.weight in .*some.safetensors \(int8 rotated 64\) is not finite"):
        read(path)


def test_too_large_for_float16(tmp_path):
    tensors = {"a.weight": float8(torch.full((4, 64), 448.0), 1.0), "a.weight_scale": torch.tensor(1e3)}
    path = write_safetensors(tmp_path / "some.safetensors", tensors)
    with pytest.raises(ValueError, match="not finite in torch.float16.* try bfloat16"):
        read(path, torch.float16)
    assert read(path, torch.bfloat16)["a.weight"].isfinite().all()


@pytest.mark.parametrize("start", [b"PK\x03\x04rest", b"\x80\x02}q\x00."])
def test_pickles_are_not_opened(tmp_path, start):
    (tmp_path / "model.safetensors").write_bytes(start)
    with pytest.raises(ValueError, match="model.safetensors is a pickle, which can run code"):
        open_weights([tmp_path / "model.safetensors"])
