"""Offloading under diffusers' names, with the CPU in the place of a GPU: the same pictures, and all as it was after."""

import pytest
import torch
from loras import pairs, state
from PIL import Image

import qwen_image_fast
from qwen_image_fast.models.streamed_parts import plan_of

CPU = torch.device("cpu")
CALL = {"prompt": '"HI" in red', "height": 48, "width": 32, "num_inference_steps": 2, "seed": 0, "progress": False}
METHODS = ("enable_model_cpu_offload", "enable_sequential_cpu_offload")


@pytest.fixture
def pipe(tiny_folder):
    return qwen_image_fast.QwenImagePipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)


def picture(pipe):
    return pipe(**CALL, output_type="pt").images


def offload(pipe, more=None):
    """As the methods do, where so many bytes are free beyond the least; None: the least. The number of meta weights."""
    parts = pipe._offloadable()
    pipe._stream(parts, None if more is None else plan_of(parts, None, base=0).limit + more, CPU)
    return sum(p.is_meta for part in parts.values() for p in part.parameters())


def test_pictures_are_the_same_and_all_is_as_it_was(pipe):
    expected, places = picture(pipe), {n: p.data_ptr() for n, p in pipe.transformer.named_parameters()}
    block = sum(p.nbytes for p in pipe.transformer.transformer_blocks[0].parameters() if p.dim() == 2)
    away = []
    for more in (None, 3 * block):
        away.append(offload(pipe, more))
        for _ in range(2):
            assert torch.equal(picture(pipe), expected)
        assert pipe.vae.memory_limit is not None and pipe.device == CPU
        with pytest.raises(
            ValueError, match="enable_model_cpu_offload: weights must be in memory, and are streamed al"
        ):
            pipe._check_offload("enable_model_cpu_offload", pipe._offloadable())
        with pytest.raises(ValueError, match="whose weights are streamed stays where and as it is"):
            pipe.transformer.half()
        pipe.remove_all_hooks()
        assert {n: p.data_ptr() for n, p in pipe.transformer.named_parameters()} == places
        assert pipe.vae.memory_limit is None
        assert torch.equal(picture(pipe), expected)
    assert away[0] > away[1] > 0


def test_what_fits_stays(pipe):
    assert offload(pipe, 10**12) == 0
    pipe.remove_all_hooks()
    assert torch.equal(picture(pipe), picture(pipe))


def test_adapters_and_released_modulation(tiny_folder):
    pipe = qwen_image_fast.QwenImagePipeline.from_pretrained(
        tiny_folder, torch_dtype=torch.float32, free_modulation_weights=True
    )
    pipe.load_lora_weights(state(pairs(pipe)), adapter_name="a")
    expected = picture(pipe)
    assert pipe.transformer.modulation_tables.freed
    offload(pipe)
    assert torch.equal(picture(pipe), expected) and pipe.get_active_adapters() == ["a"]
    pipe.disable_lora()
    pipe.remove_all_hooks()
    assert not torch.equal(picture(pipe), expected)
    pipe.enable_lora()
    assert torch.equal(picture(pipe), expected)


def test_editing(edit_folder, small):
    pipe = qwen_image_fast.QwenImageEditPlusPipeline.from_pretrained(edit_folder)

    def edited():
        call = {"num_inference_steps": 1, "seed": 0, "progress": False, "output_type": "np"}
        return pipe(image=image, prompt="make it red", **call).images[0]

    image = Image.new("RGB", (48, 32), "blue")
    expected = edited()
    assert offload(pipe) > 0
    assert abs(edited() - expected).max() < 2 / 255  # the VAE computes in strips now


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_groups(pipe, kind, tmp_path):
    pytest.importorskip("diffusers")
    expected = picture(pipe)
    with pytest.raises(ValueError, match="exclude_modules must be of transformer, text_encoder, vae, got scheduler"):
        pipe.enable_group_offload(CPU, exclude_modules="scheduler")
    with pytest.raises(TypeError, match="use_streams is not an argument; did you mean use_stream"):
        pipe.enable_group_offload(CPU, use_streams=True)
    pipe.enable_group_offload(CPU, CPU, kind, num_blocks_per_group=1, offload_to_disk_path=tmp_path)
    for part in (pipe.transformer, pipe.text_encoder):
        assert any(hasattr(module, "_diffusers_hook") for module in part.modules())
    assert len(list(tmp_path.glob("*.safetensors"))) >= 7  # five blocks, and the rest of either
    torch.testing.assert_close(picture(pipe), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_refused(pipe, tiny_folder, method, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for given in ({}, {"gpu_id": 1}, {"device": "cuda"}):
        with pytest.raises(ValueError, match=f"{method}: device must be one that is there, got cuda"):
            getattr(pipe, method)(**given)
    with pytest.raises(ValueError, match=f"{method}: gpu_id and device must name one GPU, got 1 and cuda:0"):
        getattr(pipe, method)(1, "cuda:0")
    getattr(pipe, method)(device="cpu")
    assert f"{method} has no effect on the CPU" in caplog.text and not pipe._offloaded
    pipe.remove_all_hooks(), pipe.maybe_free_model_hooks()
    eight = qwen_image_fast.QwenImagePipeline.from_pretrained(tiny_folder, precision="int8")
    with pytest.raises(
        ValueError, match=f"{method}: layers must be floating point, got some in 8 bits; give precision"
    ):
        eight._check_offload(method, eight._offloadable())
    with pytest.raises(ValueError, match="was made with transformer=None; use to"):
        none = qwen_image_fast.QwenImagePipeline.from_pretrained(tiny_folder, transformer=None)
        none._check_offload(method, none._offloadable())
    monkeypatch.setattr(pipe.transformer, "ranks", object())
    with pytest.raises(ValueError, match="must compute alone, call disable_parallel"):
        pipe._check_offload(method, pipe._offloadable())
