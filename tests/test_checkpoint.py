"""Folders of weights: what diffusers and this package write for each other, types, devices, memory."""

import json
import struct
import subprocess
import sys

import diffusers
import pytest
import torch
from checkpoint_harness import BASE, Reference, Toy, assert_same, names, new_toy
from safetensors.torch import load_file, save_file

from qwen_image_fast import tensor_files
from qwen_image_fast.checkpoint import (
    find_weights,
    load_state_into,
    read_json,
    save_state,
)
from qwen_image_fast.models.base import PretrainedModel, record_config
from qwen_image_fast.tensor_files import read_header


@pytest.fixture
def toy():
    return new_toy()


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
    mapped = ratios.pop(next(line for line in ratios if line.startswith("bfloat16 bfloat16")))
    assert mapped < 0.1  # its pages are read when they are used
    assert all(0.95 < ratio < 1.2 for ratio in ratios.values()), ratios
