"""Words that are nearly right, devices that are not there, files in other encodings: one sentence, with what to do."""

import pytest
import torch

import qwen_image_fast
from qwen_image_fast import keywords
from qwen_image_fast.folders import read_json, read_text
from qwen_image_fast.pictures import to_rgb
from qwen_image_fast.tiny import tiny_configs

PIPELINES = [name for name in dir(qwen_image_fast) if name.endswith("Pipeline")]


@pytest.mark.parametrize("name", PIPELINES)
def test_a_misspelt_argument_of_a_call(name):
    """Nothing of the pipeline is touched."""
    pipe = object.__new__(getattr(qwen_image_fast, name))
    with pytest.raises(TypeError, match=f"^{name}: promt is not an argument; did you mean prompt\\?$"):
        pipe(promt="a cat")
    with pytest.raises(TypeError, match="num_steps is not an argument; did you mean num_inference_steps\\?"):
        pipe("a cat", num_steps=3)


def test_a_misspelt_argument_of_accelerate():
    with pytest.raises(TypeError, match="^accelerate: convoluton is not an argument; did you mean convolution\\?$"):
        qwen_image_fast.accelerate(None, convoluton="exact")


@pytest.mark.parametrize("built", [None, "12.8"])
def test_a_gpu_that_is_not_there(built, monkeypatch, tiny_folder):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    why = "torch was built without CUDA" if built is None else "torch sees no GPU here"
    sentence = f"device must be one that is there, got cuda.*: {why}; `qwen-image-fast doctor` says more"
    pipe = qwen_image_fast.QwenImagePipeline(None, None, None, None, None)
    model = qwen_image_fast.AutoencoderKLQwenImage.empty(tiny_configs()["vae"])
    for call in (
        lambda: pipe.to("cuda"),
        lambda: pipe.to(device=torch.device("cuda", 1)),
        lambda: model.to("cuda:1", torch.bfloat16),
        lambda: qwen_image_fast.QwenImagePipeline.from_pretrained(tiny_folder, device="cuda"),
        lambda: qwen_image_fast.QwenImagePipeline.from_pretrained(tiny_folder, device_map="cuda"),
        lambda: qwen_image_fast.AutoencoderKLQwenImage.from_pretrained(tiny_folder, subfolder="vae", device="cuda"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
    assert pipe.to(torch.bfloat16) is pipe and model.to(torch.float64) is model


def test_text_in_another_encoding(tmp_path):
    (tmp_path / "x.json").write_bytes('{"a": 1,\n"b": "中文"}'.encode("gbk"))
    for read in (read_text, read_json):
        with pytest.raises(
            ValueError, match="x.json is not text in UTF-8, as line 2 shows; save it as UTF-8"
        ) as caught:
            read(tmp_path / "x.json")
        assert "codec" not in str(caught.value)
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "x.json") == {"a": 1}


def test_a_picture_that_is_not_there(tmp_path):
    (tmp_path / "house.png").touch()
    with pytest.raises(FileNotFoundError) as caught:
        to_rgb("image", tmp_path / "hose.png")
    there, near = tmp_path / "hose.png", tmp_path / "house.png"
    assert str(caught.value) == f"image: there is no picture {there}; did you mean {near}?"
    with pytest.raises(ValueError, match="image could not be read as a picture: it is a folder"):
        to_rgb("image", tmp_path)


def test_a_hint_leaves_the_function_as_it_is():
    def add(a, *, b=1):
        """Sum."""
        return a + b

    wrapped = keywords.hinted(add)
    assert wrapped(1, b=2) == 3 and wrapped.__doc__ == "Sum." and wrapped.__name__ == "add"
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'a'"):
        wrapped(b=2)
