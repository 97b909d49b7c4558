"""Room for results on the disk, and room in memory for pictures: what does not fit is said, and nothing is lost."""

import errno
import os
import time

import pytest
import torch
from http_harness import Running
from typer.testing import CliRunner

from qwen_image_fast.picture_memory import PictureMemory
from qwen_image_fast.serving import jobs

BODY = {"prompt": "a red circle", "size": "64x64", "num_inference_steps": 2, "seed": 0, "response_format": "url"}
# The released model's numbers, in bfloat16.
RELEASED = PictureMemory.of({"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 60}, {}, 2)


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def make(server):
    return server.http.post("/v1/images/generations", json=BODY).json()


def test_results_on_the_disk(models, tmp_path):
    """They are what was made, leave after their time and by the limit of bytes, and with the server."""
    left = tmp_path / "img_00-0.png"
    left.write_bytes(b"of a server that was killed")
    os.utime(left, (1, 1))
    (tmp_path / "mine.png").write_bytes(b"somebody else's")
    server = Running(models, limits={"store_seconds": 600, "store_bytes": 20_000}, store_folder=tmp_path)
    assert not left.exists()
    answers = [make(server) for _ in range(2)]
    files = sorted(tmp_path.glob("img_*"))
    assert [f.name for f in files] == sorted(f"{a['id']}-0.png" for a in answers)
    content = server.http.get(answers[0]["data"][0]["url"]).content
    assert content == (tmp_path / f"{answers[0]['id']}-0.png").read_bytes() and content.startswith(b"\x89PNG")
    (tmp_path / f"{answers[1]['id']}-0.png").unlink()
    gone = server.http.get(answers[1]["data"][0]["url"])
    assert gone.status_code == 410 and gone.json()["error"]["code"] == "expired"
    while server.http.get(answers[0]["data"][0]["url"]).status_code == 200:
        make(server)
    assert sum(f.stat().st_size for f in tmp_path.glob("img_*")) <= 20_000
    server.server.desk.store.seconds = 0.2
    until(lambda: not list(tmp_path.glob("img_*")))  # though nobody asks
    server.server.desk.store.seconds = 600
    make(server)
    server.end()
    assert [f.name for f in tmp_path.iterdir()] == ["mine.png"]


def test_a_full_disk_loses_nothing(models, tmp_path, monkeypatch, caplog):
    def full(path, writer):
        raise OSError(errno.ENOSPC, "No space left on device")

    server = Running(models, store_folder=tmp_path)
    monkeypatch.setattr(jobs, "atomic_write", full)
    answer = make(server)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    assert server.http.get(answer["data"][0]["url"]).content.startswith(b"\x89PNG")
    assert "a result could not be written and stays in memory" in caplog.text
    after = make(server)  # and the server lives
    assert server.http.get(after["data"][0]["url"]).status_code == 200 and len(list(tmp_path.iterdir())) == 1
    server.end()


def test_what_a_picture_takes():
    """1328 x 1328 with guidance in bfloat16: twelve tensors of 2 x (6889 + 256) rows; decoding 20 images of 96."""
    rows = 2 * (83 * 83 + 256)
    small = RELEASED.needed((1328, 1328), rows, 50)
    assert small == pytest.approx(20 * 96 * 1328 * 1328 * 2 + 1328 * 1328 * 2 * 4, rel=0.03)
    assert RELEASED._replace(strips=True).needed((1328, 1328), rows, 50) == 2 * 3072 * (12 * rows + 50 * 12 * 60)
    side = RELEASED.largest(small, (1328, 1328), rows, 50)
    assert side == 1328 and RELEASED.largest(small - 1, (1328, 1328), rows, 50) == 1312
    assert RELEASED.sentence(small, (1328, 1328), rows, 50, "x") is None
    assert RELEASED.sentence(10**6, (1328, 1328), rows, 50, "this machine").endswith("1.0 MB free: no size fits")


def test_tiles_take_what_one_of_them_and_the_picture_take():
    """A picture of one tile as much as without; of many, far less, but more with every pixel."""
    tiled = RELEASED._replace(tiles=True)
    assert tiled.needed((256, 256), 1, 1) - RELEASED.needed((256, 256), 1, 1) == 4 * 2 * 3 * 256 * 256
    assert tiled.needed((2048, 2048), 1, 1) < RELEASED.needed((2048, 2048), 1, 1) / 8
    assert tiled.needed((2048, 2048), 1, 1) - tiled.needed((1024, 1024), 1, 1) == 4 * 2 * 3 * 3 * 1024 * 1024


def test_a_request_that_does_not_fit_is_refused_with_what_would(models, monkeypatch):
    config, vae = models.pipe.transformer.config, models.pipe.vae.config
    memory = PictureMemory.of(config, vae, 4)
    needed = memory.needed((256, 256), 16 * 16 + 100, 2)
    monkeypatch.setattr(models, "about", {"memory": tuple(memory), "free": needed})
    server = Running(models)
    answer = server.http.post("/v1/images/generations", json={**BODY, "size": "1024x1024"})
    error = answer.json()["error"]
    assert answer.status_code == 400 and (error["code"], error["param"]) == ("out_of_memory", "size")
    assert error["message"].startswith("a picture of 1024x1024 takes about ") and "x256 would fit" in error["message"]
    assert 'qwen_image_rejected_total{reason="memory"} 1.0' in server.http.get("/metrics").text
    assert server.http.post("/v1/images/generations", json=BODY).status_code == 200
    server.end()


@pytest.mark.parametrize("words, free, more", [
    (("--size", "8192x8192"), 4, "; with --memory this one would too"),
    (("--size", "8192x8192"), 1, " would fit\n"),
    (("--size", "8192x8192", "--memory", "3GB"), 1, " would fit\n"),
])  # fmt: skip
def test_the_command_says_so_before_the_model_is_loaded(words, free, more, monkeypatch):
    from qwen_image_fast import QwenImagePipeline
    from qwen_image_fast.cli import app
    from qwen_image_fast.weights import memory

    def loaded(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(QwenImagePipeline, "from_pretrained", loaded)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free * 10**9)
    result = CliRunner().invoke(app, ["generate", "a fox", "--model", "tiny", "--device", "cpu", *words])
    assert result.exit_code == 1, result.stderr
    assert "a picture of 8192x8192 takes about" in result.stderr and f"{free}.0 GB free" in result.stderr
    assert more in result.stderr


@pytest.mark.parametrize("less", [0, 1])
def test_the_command_counts_what_the_vae_keeps_as_a_plan_does(less, monkeypatch):
    """The transformed weights of its decoder, on top of activations; a byte less and the picture is refused."""
    from qwen_image_fast import QwenImagePipeline
    from qwen_image_fast.checkpoint import find_weights, read_config
    from qwen_image_fast.cli import app
    from qwen_image_fast.folders import SHIPPED
    from qwen_image_fast.pipelines import residence
    from qwen_image_fast.weights import memory
    from qwen_image_fast.weights.formats import open_weights

    vae = open_weights(find_weights(SHIPPED / "vae"), "vae").weights
    device = torch.device("cpu")
    with monkeypatch.context() as patched:
        plans = []
        for packed in (None, 0):
            if packed is not None:
                patched.setattr(residence, "packed_bytes_of", lambda *_: 0)
            plans.append(residence.plan_for({"vae": vae}, {"vae": torch.bfloat16}, device, 10**12, pictures=False))
    kept = plans[0].parts[0].kept - plans[1].parts[0].kept
    assert kept > 0
    configs = [read_config(SHIPPED / part) for part in ("transformer", "vae")]
    tokens = 2 * (16 * 16 + 512)
    without = PictureMemory.of(*configs, 2).needed((256, 256), tokens, 2)
    monkeypatch.setattr(memory, "free_bytes", lambda _: without + kept - less)
    monkeypatch.setattr(QwenImagePipeline, "from_pretrained", lambda *_, **__: 1 / 0)
    words = ["generate", "a fox", "--model", "tiny", "--device", "cpu", "--dtype", "bfloat16", "--size", "256x256"]
    result = CliRunner().invoke(app, [*words, "--steps", "2"])
    refused = "a picture of 256x256 takes about" in result.stderr
    assert refused if less else isinstance(result.exception, ZeroDivisionError) or "division" in result.stderr
