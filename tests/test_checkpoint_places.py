"""Where folders of weights come from, the hub included, and how they are written without losing the last one."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from checkpoint_harness import BASE, Toy, assert_same, names, new_toy
from huggingface_hub import errors

from qwen_image_fast.checkpoint import save_state
from qwen_image_fast.files import atomic_write
from qwen_image_fast.folders import SHIPPED, nearest, nearest_file, resolve_folder


@pytest.fixture
def toy():
    return new_toy()


# --- where folders come from ---


def test_local_folders(tmp_path):
    assert resolve_folder(tmp_path) == resolve_folder(str(tmp_path)) == tmp_path
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="model.safetensors is a file; name the folder that holds it"):
        resolve_folder(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "~/nothing-here", "../no-such-folder"])
def test_paths_never_reach_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=f"no folder {re.escape(name)}, and it is not a hub name"):
        resolve_folder(name)


def test_the_model_of_the_package(tmp_path, monkeypatch):
    """By its name, unless a folder is called so; `~` is the home folder."""
    monkeypatch.chdir(tmp_path)
    assert resolve_folder("tiny") == SHIPPED and resolve_folder("tiny-vision") == SHIPPED.parent / "tiny-vision"
    (tmp_path / "tiny").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_folder("tiny") == Path("tiny") and resolve_folder("~/tiny") == tmp_path / "tiny"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("tinny", "tiny"),
        ("Tiny", "tiny"),
        ("my-modl", "my-model"),
        ("./my-modl", "my-model"),
        ("a/b/modl", "a/b/model"),
    ],
)
def test_the_nearest_name_is_offered(tmp_path, monkeypatch, name, meant):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    (tmp_path / "a" / "b" / "model").mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=rf"^there is no folder {name}, .*; did you mean {meant}\?$"):
        resolve_folder(name)


def test_what_was_named_is_not_offered(tmp_path, monkeypatch):
    """A folder that is there, where another one is wanted."""
    monkeypatch.chdir(tmp_path)
    for name in ("pictures", "pictures2"):
        (tmp_path / name).mkdir()
    assert nearest_file("pictures") == nearest_file("pictures/") == "; did you mean pictures2?"
    assert nearest_file(tmp_path / "pictures2") == f"; did you mean {tmp_path}/pictures?"
    (tmp_path / "pictures2").rmdir()
    assert nearest_file("pictures") == nearest("tiny", ["tiny"]) == ""


def test_the_nearest_name_of_a_hub_repository_that_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"^runs/modl is neither .*; did you mean runs/model\?$"):
        resolve_folder("runs/modl", cache_dir=tmp_path, local_files_only=True)


def test_hub_name_that_is_not_cached(tmp_path):
    with pytest.raises(FileNotFoundError, match="owner/model is neither a local folder nor cached, .* name a folder"):
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

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(kind, match=message):
        resolve_folder("owner/model", revision="v9")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_only_the_files_of_one_variant_are_downloaded(tmp_path, toy, variant, monkeypatch):
    def download(name, **arguments):
        asked.update(arguments, name=name)
        return str(tmp_path)

    asked = {}
    toy.save_pretrained(tmp_path / "transformer", variant=variant)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
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
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **k: asked.append(k["allow_patterns"]) or "/"
    )
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
