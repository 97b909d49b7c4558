"""The parts of `benchmarks.cpu_peers` that need no peer."""

import json

import pytest
import torch

from benchmarks.cpu_peers import compared, in_turns, missing, turn, waiting
from benchmarks.cpu_peers_sd import vae_shapes, write_zeros
from qwen_image_fast import AutoencoderKLQwenImage
from qwen_image_fast.weights.names import of_wan_vae


def test_names_of_the_vae_lead_back():
    shapes = vae_shapes()
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in AutoencoderKLQwenImage().state_dict().items()}
    assert {ours: shapes[name] for name, ours in of_wan_vae(shapes).items()} == wanted


def test_a_file_of_zeros_is_a_safetensors_file(tmp_path):
    from safetensors.torch import load_file

    shapes = {"a": (3, 5), "b": (), "c": (2, 1, 7)}
    write_zeros(tmp_path / "a.safetensors", shapes)
    found = load_file(tmp_path / "a.safetensors")
    assert {name: tuple(t.shape) for name, t in found.items()} == shapes
    assert all(t.dtype == torch.float16 and not t.any() for t in found.values())


def test_real_rotation_is_diffusers():
    from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 6, 2, 8, generator=g)
    angles = torch.polar(torch.ones(6, 4), torch.randn(6, 4, generator=g))
    tables = tuple(t.repeat_interleave(2, -1)[:, None] for t in (angles.real, angles.imag))
    torch.testing.assert_close(turn(x, tables), apply_rotary_emb_qwen(x, angles, use_real=False))


@pytest.mark.parametrize(("four", "sd", "reached"), [(1.4, 7.0, [True, True]), (1.2, 6.9, [False, False])])
def test_the_fastest_int4_counts(four, sd, reached):
    seconds = {
        "ours int8": [1.0, 2.0], "OpenVINO int8": [0.5, 1.0], "OpenVINO int4": [3.0, 6.0],
        "OpenVINO int4 per row": [four, 2 * four], "stable-diffusion.cpp q8_0": [sd, 2 * sd],
    }  # fmt: skip
    found = compared(seconds)
    assert list(found["reached"].values()) == reached
    assert found["ours_int8_as_fast"]["OpenVINO int8"] == 0.5
    json.dumps(found)


def test_the_first_call_does_not_count():
    answers = iter([9.0, 9.5, 1.0, 2.0, 3.0, 4.0])
    calls = {name: lambda: (next(answers), 0.0) for name in "ab"}
    assert in_turns(calls, 2) == {"a": [1.0, 3.0], "b": [2.0, 4.0]}


def test_a_peer_that_is_not_installed_is_named_as_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing("stable-diffusion.cpp") == ["stable-diffusion-cpp-python", "gguf"]


def test_results_are_kept_by_how_threads_wait(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert waiting() == ""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert waiting() == ", OMP_WAIT_POLICY=passive"
