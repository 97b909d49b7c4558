"""Folders of weights: what diffusers and this package write for each other, memory, damage, full disks."""

import errno
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from torch import nn

from qwen_image_fast import checkpoint, tensor_files
from qwen_image_fast.checkpoint import (
    atomic_write,
    check_config,
    find_weights,
    load_state_into,
    read_config,
    read_json,
    resolve_folder,
    save_state,
)
from qwen_image_fast.models.base import PretrainedModel, record_config
from qwen_image_fast.tensor_files import read_header, read_tensors

BASE = "diffusion_pytorch_model"


def build(self, width, layers, with_bias):
    self.blocks = nn.ModuleList(nn.Linear(width, width, bias=with_bias) for _ in range(layers))
    self.norm = nn.LayerNorm(width)
    self.register_buffer("steps", torch.arange(3))
    self.register_buffer("table", torch.arange(width, device="cpu") * 0.5, persistent=False)


class Toy(PretrainedModel):
    @record_config
    def __init__(self, width: int = 8, layers: int = 3, sizes: tuple = (1, 2), with_bias: bool = True):
        super().__init__()
        build(self, width, layers, with_bias)


class Reference:
    """Diffusers' own reading and writing of the same model."""

    class Toy(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, width: int = 8, layers: int = 3, sizes: tuple = (1, 2), with_bias: bool = True):
            super().__init__()
            build(self, width, layers, with_bias)


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return Toy(width=16, layers=5)


def names(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def assert_same(a, b):
    a, b = (m.state_dict() if isinstance(m, nn.Module) else m for m in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


# --- round trips ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", ["10GB", 1500, "0.6KB"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_round_trip_and_diffusers_reads_it(tmp_path, toy, dtype, size, variant):
    toy.to(dtype).save_pretrained(tmp_path, max_shard_size=size, variant=variant)
    shards = [n for n in names(tmp_path) if n.endswith(".safetensors")]
    middle = f".{variant}" if variant else ""
    if size == "10GB":
        assert names(tmp_path) == ["config.json", f"{BASE}{middle}.safetensors"]
    else:
        assert len(shards) > 1 and shards[0] == f"{BASE}{middle}-00001-of-{len(shards):05d}.safetensors"
        assert f"{BASE}.safetensors.index{middle}.json" in names(tmp_path)
    back = Toy.from_pretrained(tmp_path, variant=variant)
    assert_same(back, toy)
    assert back.config == toy.config and not back.training and back.dtype == dtype
    assert torch.equal(back.table, toy.table.float()) and not back.table.is_meta
    theirs = Reference.Toy.from_pretrained(tmp_path, variant=variant, torch_dtype=dtype)
    assert_same(theirs, toy)
    assert theirs.config.width == 16 and theirs.config.sizes == [1, 2]


@pytest.mark.parametrize("size", ["10GB", "1KB"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_reads_what_diffusers_writes(tmp_path, size, variant):
    torch.manual_seed(0)
    theirs = Reference.Toy(width=16, layers=5)
    theirs.save_pretrained(tmp_path / "toy", max_shard_size=size, variant=variant)
    ours = Toy.from_pretrained(tmp_path, subfolder="toy", variant=variant)
    assert_same(ours, theirs)
    assert ours.config.layers == 5 and ours.config.sizes == [1, 2]
    assert ours.num_parameters() == theirs.num_parameters() == 5 * (16 * 16 + 16) + 32


def test_real_models_are_exchanged_with_diffusers(tmp_path):
    torch.manual_seed(0)
    small = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]}
    vae = diffusers.AutoencoderKLQwenImage(**small, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    transformer = diffusers.QwenImageTransformer2DModel(
        num_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=8, axes_dims_rope=(4, 6, 6)
    )
    for model in (vae, transformer.bfloat16()):
        model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
        with torch.device("meta"):
            empty = type(model).from_config(model.config)
        for name in ("pos_embed", "time_text_embed"):  # hold plain tensors, which are not part of the state
            if hasattr(model, name):
                setattr(empty, name, getattr(model, name))
        load_state_into(empty, find_weights(tmp_path / "theirs"))
        assert_same(empty, model)
        save_state(model.state_dict(), tmp_path / "ours", max_shard_size="20KB")
        model.save_config(tmp_path / "ours")
        assert len(find_weights(tmp_path / "ours")) > 1
        assert_same(type(model).from_pretrained(tmp_path / "ours", torch_dtype=model.dtype), model)
        assert names(tmp_path / "ours") == names(tmp_path / "theirs")


def test_file_is_plain_safetensors(tmp_path):
    state = {
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "half": torch.arange(6).bfloat16().view(2, 3).t(),  # not contiguous
        "wide": torch.arange(3, dtype=torch.float64),
        "count": torch.tensor([1, 2]),
    }
    save_state(state, tmp_path)
    assert_same(load_file(tmp_path / f"{BASE}.safetensors"), state)
    header = read_header(tmp_path / f"{BASE}.safetensors")
    assert all(entry.start % entry.dtype.itemsize == 0 for entry in header.values())
    raw = (tmp_path / f"{BASE}.safetensors").read_bytes()
    assert json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])["__metadata__"] == {"format": "pt"}


def test_index_is_what_diffusers_writes(tmp_path, toy):
    toy.save_pretrained(tmp_path / "a", max_shard_size="1KB")
    theirs = Reference.Toy(width=16, layers=5)
    theirs.save_pretrained(tmp_path / "b", max_shard_size="1KB")
    a, b = (read_json(tmp_path / x / f"{BASE}.safetensors.index.json") for x in "ab")
    assert a == b
    assert a["metadata"]["total_size"] == sum(t.nbytes for t in toy.state_dict().values())


def test_other_base_name(tmp_path, toy):
    save_state(toy.state_dict(), tmp_path, base_name="model", max_shard_size="1KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert len(find_weights(tmp_path, "model")) > 1
    save_state(toy.state_dict(), tmp_path, base_name="model")
    assert find_weights(tmp_path, "model") == [tmp_path / "model.safetensors"]


def test_stale_files_of_the_same_save_are_removed_and_others_kept(tmp_path, toy):
    toy.save_pretrained(tmp_path, variant="fp16")
    toy.save_pretrained(tmp_path, max_shard_size="1KB")
    many = [n for n in names(tmp_path) if "-of-" in n]
    toy.save_pretrained(tmp_path, max_shard_size=3000)
    few = [n for n in names(tmp_path) if "-of-" in n]
    assert 1 < len(few) < len(many) and not set(few) & set(many)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / f"{BASE}-copy.safetensors").write_bytes(b"mine")
    toy.save_pretrained(tmp_path)
    kept = [f"{BASE}-copy.safetensors", f"{BASE}.fp16.safetensors", f"{BASE}.safetensors"]
    assert names(tmp_path) == ["config.json", *kept, "notes.txt"]
    toy.save_pretrained(tmp_path, max_shard_size="1KB")
    assert f"{BASE}.safetensors" not in names(tmp_path)


def test_saved_files_have_the_usual_permissions(tmp_path, toy):
    toy.save_pretrained(tmp_path)
    (tmp_path / "plain").write_text("")
    assert len({p.stat().st_mode for p in tmp_path.iterdir()}) == 1


# --- loading: types, devices, fit ---


@pytest.mark.parametrize("keyword", ["torch_dtype", "dtype"])
def test_conversion_rounds_once_and_spares_integers(tmp_path, toy, keyword, monkeypatch):
    monkeypatch.setattr(tensor_files, "STAGING_BYTES", 40)  # several rounds per tensor, the last one short
    toy.save_pretrained(tmp_path)
    back = Toy.from_pretrained(tmp_path, **{keyword: torch.bfloat16})
    assert back.dtype == torch.bfloat16 and back.steps.dtype == torch.int64
    for name, p in toy.named_parameters():
        assert torch.equal(back.get_parameter(name), p.bfloat16())
    assert all(p.requires_grad for p in back.parameters())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_in_inference_mode(tmp_path, toy, dtype):
    """As released modulation weights are read again, in the middle of a pipeline's call."""
    toy.save_pretrained(tmp_path)
    with torch.inference_mode():
        back = Toy.from_pretrained(tmp_path, torch_dtype=dtype)
    for name, p in toy.named_parameters():
        assert torch.equal(back.get_parameter(name), p if dtype is None else p.to(dtype))


def test_weights_own_their_memory(tmp_path, toy):
    toy.save_pretrained(tmp_path)
    back = Toy.from_pretrained(tmp_path)
    for tensor in back.state_dict().values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    toy.save_pretrained(tmp_path)  # over the files that it was read from
    (tmp_path / f"{BASE}.safetensors").write_bytes(b"")
    assert_same(back, toy)


def test_frozen_parameters_stay_frozen_and_default_device_does_not_matter(tmp_path, toy):
    toy.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = Toy.from_config(toy.config)
        model.norm.requires_grad_(False)
        load_state_into(model, find_weights(tmp_path), dtype=torch.float16)
    assert model.norm.weight.requires_grad is False and model.blocks[0].weight.requires_grad
    assert torch.equal(model.norm.weight, toy.norm.weight.half())


def test_weights_that_do_not_fit_are_listed(tmp_path, toy):
    state = toy.state_dict()
    state["extra"] = state.pop("norm.weight")
    state["norm.bias"] = torch.zeros(3)
    state["steps"] = torch.zeros(3)
    save_state(state, tmp_path)
    with torch.device("meta"):
        model = Toy.from_config(toy.config)
    with pytest.raises(ValueError, match="not the weights of this Toy") as error:
        load_state_into(model, find_weights(tmp_path))
    text = str(error.value)
    assert "1 missing: norm.weight [16]" in text and "1 unexpected: extra [16]" in text
    assert "norm.bias [16] is [3] in the file" in text
    assert "steps [3] is torch.int64 in the model, torch.float32 in the file" in text
    assert model.blocks[0].weight.is_meta, "nothing was read"


def test_long_lists_are_cut(tmp_path, toy):
    save_state({"a": torch.zeros(1)}, tmp_path)
    with torch.device("meta"):
        model = Toy.from_config(toy.config)
    with pytest.raises(ValueError, match=r"13 missing: (\S+ \[[\d, ]+\](, )?){8} and 5 more; 1 unexpected: a \[1\]"):
        load_state_into(model, find_weights(tmp_path))


def test_not_strict_takes_what_fits(tmp_path, toy):
    save_state({"norm.weight": torch.full((16,), 2.0), "extra": torch.zeros(1)}, tmp_path)
    model = Toy.from_config(toy.config)
    before = model.blocks[0].weight.clone()
    load_state_into(model, find_weights(tmp_path), strict=False)
    assert torch.equal(model.norm.weight, torch.full((16,), 2.0)) and torch.equal(model.blocks[0].weight, before)
    with torch.device("meta"):
        model = Toy.from_config(toy.config)
    with pytest.raises(ValueError, match="12 missing"):
        load_state_into(model, find_weights(tmp_path), strict=False)


def test_buffer_left_on_meta_is_an_error(tmp_path):
    class Forgetful(PretrainedModel):
        @record_config
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.ones(2))
            self.register_buffer("freqs", torch.arange(4.0), persistent=False)

    Forgetful().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Forgetful still has no values for freqs: .* explicit device"):
        Forgetful.from_pretrained(tmp_path)


def test_tensor_in_two_shards_is_an_error(tmp_path, toy):
    for name in "ab":
        save_file({"norm.weight": torch.zeros(16)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="norm.weight is both in .*a.safetensors and in .*b.safetensors"):
        load_state_into(toy, [tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


@pytest.mark.parametrize("arguments, message", [
    ({"dtype": torch.float16, "torch_dtype": torch.float32}, "dtype must equal torch_dtype"),
    ({"dtype": torch.int8}, "must be a floating-point torch dtype or None, got torch.int8"),
    ({"torch_dtype": "bfloat16"}, "must be a floating-point torch dtype or None, got 'bfloat16'"),
])  # fmt: skip
def test_bad_dtype(tmp_path, toy, arguments, message):
    toy.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        Toy.from_pretrained(tmp_path, **arguments)


MEMORY = """
import os, sys, torch
from qwen_image_fast.models.base import PretrainedModel, record_config
from qwen_image_fast.tensor_files import read_header, read_tensors

class Big(PretrainedModel):
    @record_config
    def __init__(self, sizes):
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.empty(n, 1024, dtype=torch.float32) for n in sizes)

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

torch.set_num_threads(1)
for stored, wanted in (("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")):
    child = os.fork()  # a fresh heap for each
    if child:
        assert os.waitpid(child, 0)[1] == 0
        continue
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from what is resident now
    before = status("VmRSS")
    model = Big.from_pretrained(f"{sys.argv[1]}/{stored}", dtype=getattr(torch, wanted))
    grown = status("VmHWM") - before
    assert all(p.dtype == getattr(torch, wanted) and p.amin() == p.amax() == 1 for p in model.parameters())
    print(stored, wanted, grown / sum(p.nbytes for p in model.parameters()), flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_memory_peak_while_loading(tmp_path):
    sizes = [48 * 1024, *[6 * 1024] * 8]  # 192 MiB in bfloat16, 384 in float32; half of it is one tensor
    config = json.dumps({"_class_name": "Big", "sizes": sizes}).encode()
    for dtype in (torch.bfloat16, torch.float32):
        state = {f"weights.{i}": torch.ones(n, 1024, dtype=dtype) for i, n in enumerate(sizes)}
        folder = tmp_path / str(dtype).removeprefix("torch.")
        save_state(state, folder, max_shard_size="150MB", extra_files={"config.json": config})
    run = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    ratios = {line: float(line.split()[-1]) for line in run.stdout.splitlines()}
    assert len(ratios) == 3
    assert all(0.95 < ratio < 1.2 for ratio in ratios.values()), ratios


# --- damaged and missing files ---


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def damage_empty(path):
    path.write_bytes(b"")


def damage_header(path):
    path.write_bytes(path.read_bytes()[:20])


def damage_noise(path):
    path.write_bytes(bytes(range(256)) * 4)


def damage_html(path):
    path.write_bytes(b"<!DOCTYPE html><html>not found</html>")


@pytest.mark.parametrize("damage", [damage_truncate, damage_empty, damage_header, damage_noise, damage_html])
@pytest.mark.parametrize("size", ["10GB", "1KB"])
def test_damaged_weights(tmp_path, toy, damage, size):
    toy.save_pretrained(tmp_path, max_shard_size=size)
    path = find_weights(tmp_path)[-1]
    damage(path)
    message = rf"{path.name} \({path.stat().st_size} bytes\) is truncated or not safetensors .*; download it again"
    with pytest.raises(ValueError, match=message):
        Toy.from_pretrained(tmp_path)


def test_git_lfs_pointer(tmp_path, toy):
    toy.save_pretrained(tmp_path)
    (tmp_path / f"{BASE}.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="is a Git LFS pointer, not the file itself; download it again"):
        Toy.from_pretrained(tmp_path)


def test_file_that_shrinks_while_it_is_read(tmp_path, toy):
    toy.save_pretrained(tmp_path)
    entry = list(read_header(tmp_path / f"{BASE}.safetensors").values())[-1]
    damage_truncate(entry.path)
    with pytest.raises(OSError, match="became shorter while it was read"):
        read_tensors({"x": entry}, None, torch.device("cpu"))


def test_type_that_is_not_supported(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match="a in .*x.safetensors has the type F8_E8M0, which is not supported"):
        read_header(tmp_path / "x.safetensors")


def test_missing_shard(tmp_path, toy):
    toy.save_pretrained(tmp_path, max_shard_size="1KB")
    shards = find_weights(tmp_path)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks 1 of the {len(shards)} shards .*{shards[1].name}.*again"):
        Toy.from_pretrained(tmp_path)


@pytest.mark.parametrize("index, message", [
    ("{", "is not valid json"),
    ("[]", "must hold a json object, got list"),
    ("{}", "has no weight_map"),
    ('{"weight_map": {"a": 3}}', "has no weight_map of tensor names to files"),
    ('{"weight_map": {"a": "../x.safetensors"}}', "must name files of its own folder, got ../x.safetensors"),
    ('{"weight_map": {"a": "/etc/x.safetensors"}}', "must name files of its own folder"),
    ('{"weight_map": {"a": ".."}}', "must name files of its own folder|lacks 1 of the 1 shards"),
])  # fmt: skip
def test_bad_index(tmp_path, index, message):
    (tmp_path / f"{BASE}.safetensors.index.json").write_text(index)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_weights(tmp_path)


def test_pickled_weights_are_refused(tmp_path, toy):
    toy.save_pretrained(tmp_path)
    (tmp_path / f"{BASE}.safetensors").unlink()
    torch.save(toy.state_dict(), tmp_path / f"{BASE}.bin")
    with pytest.raises(ValueError, match=rf"holds only pickled weights \({BASE}.bin\).*save them as safetensors"):
        Toy.from_pretrained(tmp_path)


def test_missing_variant_names_what_is_there(tmp_path, toy):
    toy.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"no {BASE}.fp16.safetensors .*the folder has: {BASE}.safetensors"):
        Toy.from_pretrained(tmp_path, variant="fp16")
    (tmp_path / f"{BASE}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="the folder has no safetensors file"):
        Toy.from_pretrained(tmp_path)


# --- configurations ---


def test_configuration_of_another_class(tmp_path, toy):
    toy.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(ValueError, match="this is the configuration of a FluxTransformer2DModel, expected Toy"):
        Toy.from_pretrained(tmp_path)


def test_fields_are_checked():
    with pytest.raises(
        ValueError, match=r"of Toy: unknown field 'layer' \(nearest known: 'layers'\), unknown field 'q'$"
    ):
        Toy.from_config({"layer": 3, "q": 1})

    class Needs(nn.Module):
        def __init__(self, width, depth=1):
            super().__init__()

    with pytest.raises(ValueError, match="of Needs: missing field 'width'"):
        check_config({"depth": 2}, Needs)
    assert check_config({"width": 2, "_diffusers_version": "0.35", "_name_or_path": "x"}, Needs) == {"width": 2}
    assert Toy.from_config({"layers": 2}, layers=1).config.layers == 1


def test_released_transformer_configuration_is_accepted():
    config = {
        "_class_name": "QwenImageTransformer2DModel",
        "_diffusers_version": "0.34.0.dev0",
        "attention_head_dim": 128,
        "axes_dims_rope": [16, 56, 56],
        "guidance_embeds": False,
        "in_channels": 64,
        "joint_attention_dim": 3584,
        "num_attention_heads": 24,
        "num_layers": 60,
        "out_channels": 16,
        "patch_size": 2,
        "pooled_projection_dim": 768,
    }
    fields = check_config(config, diffusers.QwenImageTransformer2DModel)
    assert fields.keys() == {k for k in config if k[0] != "_"} - {"pooled_projection_dim"}
    with pytest.raises(ValueError, match="unknown field 'pooled_projection_dim'"):
        check_config({"pooled_projection_dim": 768}, Toy)


def test_missing_configuration_names_subfolders(tmp_path, toy):
    toy.save_pretrained(tmp_path / "transformer")
    with pytest.raises(FileNotFoundError, match="has no config.json; pass subfolder= one of: transformer"):
        Toy.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no subfolder 'vae'; subfolders there: transformer"):
        Toy.from_pretrained(tmp_path, subfolder="vae")


@pytest.mark.parametrize("content, message", [
    (b'{"a": 1', "config.json is not valid json"),
    (b"\xff\xfe\x00", "config.json is not valid json"),
    (b"[1]", "config.json must hold a json object, got list"),
])  # fmt: skip
def test_bad_json(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_saved_configuration(tmp_path, toy):
    toy.save_pretrained(tmp_path)
    assert read_config(tmp_path) == {"_class_name": "Toy", "width": 16, "layers": 5, "sizes": [1, 2], "with_bias": True}


# --- where folders come from ---


def test_local_folders(tmp_path):
    assert resolve_folder(tmp_path) == resolve_folder(str(tmp_path)) == tmp_path
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="model.safetensors is a file; pass the folder that holds it"):
        resolve_folder(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "~/nothing-here", "../no-such-folder"])
def test_paths_never_reach_the_hub(name, monkeypatch):
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=f"no folder {re.escape(name)}, and it is not a hub name"):
        resolve_folder(name)


def test_hub_name_that_is_not_cached(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="owner/model is neither a local folder nor cached, .* pass a local path"
    ):
        resolve_folder("owner/model", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(FileNotFoundError, match="a--b/model is neither a local folder nor a valid hub name"):
        resolve_folder("a--b/model", cache_dir=tmp_path, local_files_only=True)


def test_offline_switch_of_the_hub_is_honoured(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="owner/model is neither a local folder nor cached"):
        resolve_folder("owner/model", cache_dir=tmp_path)


def test_cached_repository_is_found(tmp_path, toy):
    repo = tmp_path / "models--owner--model"
    toy.save_pretrained(repo / "snapshots" / ("0" * 40) / "transformer")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    back = Toy.from_pretrained("owner/model", subfolder="transformer", cache_dir=tmp_path, local_files_only=True)
    assert_same(back, toy)


@pytest.mark.parametrize("error, kind, message", [
    (errors.GatedRepoError, PermissionError, "owner/model asks to accept its terms"),
    (errors.RepositoryNotFoundError, FileNotFoundError, "owner/model is neither a local folder nor a readable hub"),
    (errors.RevisionNotFoundError, FileNotFoundError, "owner/model has no revision v9 on the hub"),
    (errors.HfHubHTTPError, ConnectionError, "owner/model could not be downloaded from the hub"),
])  # fmt: skip
def test_errors_of_the_hub(monkeypatch, error, kind, message):
    def fail(*args, **kwargs):
        raise error.__new__(error)

    monkeypatch.setattr(checkpoint, "snapshot_download", fail)
    with pytest.raises(kind, match=message):
        resolve_folder("owner/model", revision="v9")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_only_the_files_of_one_variant_are_downloaded(tmp_path, toy, variant, monkeypatch):
    def download(name, **arguments):
        asked.update(arguments, name=name)
        return str(tmp_path)

    asked = {}
    toy.save_pretrained(tmp_path / "transformer", variant=variant)
    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    Toy.from_pretrained("owner/model", subfolder="transformer", variant=variant, revision="v1", token="t")
    assert (asked["name"], asked["revision"], asked["token"]) == ("owner/model", "v1", "t")
    dot = f".{variant}" if variant else ""
    wanted = ["config.json", f"{BASE}{dot}.safetensors", f"{BASE}{dot}-00001-of-00002.safetensors"]
    wanted = {f"transformer/{n}" for n in [*wanted, f"{BASE}.safetensors.index{dot}.json"]}
    other = ".bf16" if variant else ".fp16"
    unwanted = {f"transformer/{BASE}{other}.safetensors", f"transformer/{BASE}.bin", f"vae/{BASE}{dot}.safetensors"}
    filtered = huggingface_hub.utils.filter_repo_objects(
        sorted(wanted | unwanted), allow_patterns=asked["allow_patterns"]
    )
    assert set(filtered) == wanted


def test_pickles_are_never_downloaded(monkeypatch):
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda name, **k: asked.append(k["allow_patterns"]) or "/")
    asked = []
    resolve_folder("owner/model")
    files = ["model.bin", "a/model.pt", "x.ckpt", "code.py", "vae/d.safetensors", "tokenizer/merges.txt", "a/c.jinja"]
    assert list(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=asked[0])) == files[4:]


# --- writing safely ---


def snapshot(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


@pytest.mark.parametrize("size", ["10GB", "1KB"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), OSError(errno.EIO, "I/O"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("call", [1, 2])
def test_interrupted_save_leaves_the_previous_one(tmp_path, toy, size, error, call, monkeypatch):
    toy.save_pretrained(tmp_path)
    before = snapshot(tmp_path)
    calls = []

    def fail(descriptor):
        calls.append(descriptor)
        if len(calls) == call:
            raise error

    monkeypatch.setattr(os, "fsync", fail)
    message = "disk is full: .* could not be written and is unchanged; free space" if "space" in str(error) else None
    with pytest.raises(type(error), match=message) as caught:
        Toy(width=16, layers=2).save_pretrained(tmp_path, max_shard_size=size)
    if isinstance(error, OSError):
        assert caught.value.errno == error.errno
    assert snapshot(tmp_path) == before
    monkeypatch.undo()
    assert_same(Toy.from_pretrained(tmp_path), toy)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts a small tmpfs")
def test_disk_that_is_really_full(tmp_path):
    code = f"""
import torch
from pathlib import Path
from qwen_image_fast.checkpoint import save_state
folder = Path({str(tmp_path)!r})
save_state({{"a": torch.ones(1000)}}, folder)
before = {{p.name: p.read_bytes() for p in folder.iterdir()}}
for size in ("10GB", "300KB"):
    try:
        save_state({{f"w{{i}}": torch.ones(50_000) for i in range(20)}}, folder, max_shard_size=size)
    except OSError as error:
        print(error.errno, error)
    assert {{p.name: p.read_bytes() for p in folder.iterdir()}} == before
"""
    mount = f'mount -t tmpfs -o size=1m tmpfs {tmp_path} && exec {sys.executable} -c "$CODE"'
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    env = {**os.environ, "CODE": code}
    run = subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("the disk is full") == 2 and run.stdout.startswith(str(errno.ENOSPC))


def test_atomic_write(tmp_path):
    path = tmp_path / "a.txt"
    atomic_write(path, lambda file: file.write(b"one"))

    def half(file):
        file.write(b"tw")
        assert path.read_bytes() == b"one"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(str(path), half)
    assert snapshot(tmp_path) == {"a.txt": b"one"}
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "none" / "a.txt", lambda file: file.write(b""))


@pytest.mark.parametrize(
    "tensor", [torch.empty(2, device="meta"), torch.eye(2).to_sparse(), torch.zeros(2, dtype=torch.complex64)]
)
def test_tensors_that_cannot_be_written(tmp_path, tensor):
    with pytest.raises(
        ValueError, match="save_state: w must be dense, with data, of a type safetensors knows, got torch"
    ):
        save_state({"v": torch.zeros(1), "w": tensor}, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("size", ["5", "x", "5PB", ""])
def test_bad_shard_size(tmp_path, toy, size):
    with pytest.raises(ValueError, match="Unit|size"):
        toy.save_pretrained(tmp_path, max_shard_size=size)
    assert names(tmp_path) == []


def test_saving_over_a_file(tmp_path, toy):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        toy.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
