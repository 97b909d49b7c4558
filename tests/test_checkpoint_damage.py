"""Folders of weights that are damaged or incomplete, and configurations that do not fit."""

import json
import struct

import diffusers
import pytest
import torch
from checkpoint_harness import BASE, Toy, new_toy
from torch import nn

from qwen_image_fast.checkpoint import (
    check_config,
    find_weights,
    read_config,
)
from qwen_image_fast.tensor_files import read_header, read_tensors


@pytest.fixture
def toy():
    return new_toy()


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
    what = "a web page, not the file itself, .*" if damage is damage_html else "truncated or not safetensors .*"
    message = rf"{path.name} \({path.stat().st_size} bytes\) is {what}; download it again"
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
    with pytest.raises(FileNotFoundError, match="name one of its folders, or pass it as subfolder=: transformer"):
        Toy.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no subfolder 'vae'; subfolders there: transformer"):
        Toy.from_pretrained(tmp_path, subfolder="vae")


@pytest.mark.parametrize("content, message", [
    (b'{"a": 1', "config.json is not valid json"),
    (b"\xff\xfe\x00", "config.json is not text in UTF-8, as line 1 shows"),
    (b"[1]", "config.json must hold a json object, got list"),
])  # fmt: skip
def test_bad_json(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_saved_configuration(tmp_path, toy):
    toy.save_pretrained(tmp_path)
    assert read_config(tmp_path) == {"_class_name": "Toy", "width": 16, "layers": 5, "sizes": [1, 2], "with_bias": True}
