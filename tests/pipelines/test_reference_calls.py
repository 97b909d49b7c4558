"""The public calls of diffusers' pipelines, on every pipeline here; docs/differences.md says what differs."""

import json

import numpy as np
import pytest
import torch
from reference import picture
from test_controlnet import nets
from test_layered import models
from test_start import white_box

import qwen_image_fast

NAMES = [name for name in qwen_image_fast.__all__ if name.startswith("QwenImage") and name.endswith("Pipeline")]
SIZE = (48, 32)


class Case:
    """A pipeline, a call of it that takes two steps, and the name of its picture."""

    def __init__(self, name, folder):
        self.cls, self.folder, self.given = getattr(qwen_image_fast, name), folder, {}
        self.picture = {"QwenImagePipeline": None}.get(name, "control_image" if "Control" in name else "image")
        self.call = {"prompt": "a red cat", "num_inference_steps": 2, "seed": 3, "output_type": "latent"}
        self.call |= {"progress": False}
        if self.picture:
            self.call[self.picture] = picture(*SIZE)
        if "Layered" in name:
            self.call |= {"layers": 1, "preserve_size": True}
            self.given = {name: pair[0] for name, pair in models().items()}
        else:
            self.call |= {"width": SIZE[0], "height": SIZE[1]}
        if "Inpaint" in name:
            self.call["control_mask" if "Control" in name else "mask_image"] = white_box(*SIZE)
        if "Control" in name:
            self.given = {"controlnet": nets(extra=4 if "Inpaint" in name else 0)[0]}
        self.pipe = self.load()
        self.latents = self.pipe(**self.call).images

    def load(self, folder=None, **given):
        return self.cls.from_pretrained(folder or self.folder, **{**self.given, **given})

    def out(self, pipe=None, **change):
        return (pipe or self.pipe)(**{**self.call, **change})

    def run(self, pipe=None, **change):
        return self.out(pipe, **change).images


@pytest.fixture(scope="module", params=NAMES)
def case(request, edit_folder):
    return Case(request.param, edit_folder)


def reading(case, tmp_path):
    out = case.out()
    assert out[0] is out.images is out["images"] and torch.equal(case.out(return_dict=False)[0], out[0])


def stacking(case, tmp_path):
    for kind in ("np", "pt"):
        images = case.run(output_type=kind, num_images_per_prompt=2)
        layered = "Layered" in case.cls.__name__
        stack = images[0] if layered else images
        assert len(images) == 2 and stack.ndim == 4 and len(stack) == (1 if layered else 2)
        assert stack.max() <= 1 and stack.min() >= 0


def a_tensor_with_a_batch_axis(case, tmp_path):
    if case.picture:
        pixels = torch.from_numpy(np.array(case.call[case.picture])).movedim(-1, 0)[None]
        for given in (pixels, pixels.float() / 255, [pixels[0]], [pixels], pixels.numpy().transpose(0, 2, 3, 1)):
            assert torch.equal(case.run(**{case.picture: given}), case.latents)


def a_tensor_around_zero(case, tmp_path):
    if case.picture:
        pixels = torch.from_numpy(np.array(case.call[case.picture])).movedim(-1, 0)[None] / 127.5 - 1
        assert pixels.min() < 0
        assert torch.equal(case.run(**{case.picture: pixels}), case.latents)


def lists(case, tmp_path):
    given = {name: [case.call[name]] * 2 for name in case.call if name.endswith(("image", "mask"))}
    if case.cls is qwen_image_fast.QwenImageEditPlusPipeline:
        given = {"image": [[case.call["image"]]] * 2}
    latents = case.run(prompt=["a red cat", "a blue dog"], seed=[3, 4], **given)
    torch.testing.assert_close(latents[0], case.latents[0], rtol=0, atol=1e-4)
    assert len(latents) == 2 and not torch.equal(latents[0], latents[1])


def a_callback_changes_latents(case, tmp_path):
    seen = []

    def callback(pipe, step, timestep, kwargs):
        seen.append((step, float(pipe.current_timestep), float(timestep)))
        assert list(kwargs) == pipe._callback_tensor_inputs
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == pipe.num_timesteps - 1 else kwargs

    inputs = case.pipe._callback_tensor_inputs
    latents = case.run(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=inputs)
    assert not latents.any() and len(seen) == case.pipe.num_timesteps and all(a == b > 0 for _, a, b in seen)
    assert case.pipe.current_timestep is None


def a_callback_changes_embeddings(case, tmp_path):
    def run(factor):
        def callback(pipe, step, timestep, kwargs):
            return {"prompt_embeds": kwargs["prompt_embeds"] * factor}

        return case.run(
            num_inference_steps=4, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"]
        )  # fmt: skip

    plain = case.run(num_inference_steps=4)
    assert torch.equal(run(1), plain) and not torch.equal(run(0), plain)


def a_callback_is_told_what_it_may_return(case, tmp_path):
    for bad in ({"negative_prompt_embeds": 0}, torch.zeros(2), {"prompt_embeds": torch.zeros(1, 2, 3)}):
        with pytest.raises(ValueError, match="callback_on_step_end must return"):
            case.run(callback_on_step_end=lambda *a, bad=bad: bad)


def properties(case, tmp_path):
    def callback(pipe, step, timestep, kwargs):
        pipe._guidance_scale += 1
        return kwargs

    case.run(guidance_scale=2.0, callback_on_step_end=callback)
    assert case.pipe.guidance_scale == 2.0 + case.pipe.num_timesteps
    assert not case.pipe.attention_kwargs and case.pipe.interrupt is False


def encode_prompt_alone(case, tmp_path):
    pictures = {"image": case.call["image"]} if "Edit" in case.cls.__name__ else {}
    pipe = case.load(transformer=None, vae=None, **({"controlnet": None} if "controlnet" in case.given else {}))
    embeds, mask = pipe.encode_prompt(prompt="a red cat", device="cpu", num_images_per_prompt=1, **pictures)
    assert mask is None
    bare = case.load(text_encoder=None, tokenizer=None)
    for own in (bare, case.pipe):
        got = case.run(own, prompt=None, prompt_embeds=embeds, prompt_embeds_mask=mask)
        torch.testing.assert_close(got, case.latents, rtol=0, atol=1e-4)
    several = case.cls is qwen_image_fast.QwenImageEditPlusPipeline  # pictures of a prompt
    pair = {"image": [[case.call["image"]] if several else case.call["image"]] * 2} if pictures else {}
    many, mask = pipe.encode_prompt(["a red cat", "a much longer prompt"], num_images_per_prompt=2, **pair)
    assert len(many) == len(mask) == 4 and torch.equal(many[0], many[1]) and mask[0].sum() == embeds.shape[1]
    again, _ = pipe.encode_prompt(prompt_embeds=embeds, num_images_per_prompt=3)
    assert torch.equal(again, embeds.expand(3, -1, -1))


def save_and_load(case, tmp_path):
    case.pipe.save_pretrained(tmp_path, safe_serialization=True)
    assert torch.equal(case.run(case.cls.from_pretrained(tmp_path)), case.latents)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert {k: list(v) for k, v in case.pipe.config.items() if k != "_class_name"} == {
        k: v for k, v in index.items() if k[0] != "_"
    }


def save_and_load_variants(case, tmp_path):
    case.pipe.save_pretrained(tmp_path, variant="fp16")
    for file in tmp_path.glob("*/*.safetensors"):
        assert ".fp16" in file.name
    assert torch.equal(case.run(case.cls.from_pretrained(tmp_path, variant="fp16")), case.latents)


def types_of_parts(case, tmp_path):
    case.pipe.save_pretrained(tmp_path)
    pipe = case.cls.from_pretrained(tmp_path, torch_dtype={"transformer": torch.bfloat16, "default": torch.float16})
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            assert part.dtype == (torch.bfloat16 if name == "transformer" else torch.float16)
    pipe.to("cpu", torch.float64, silence_dtype_warnings=True)
    assert pipe.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float64


def another_pipeline_around_the_parts(case, tmp_path):
    again = case.cls.from_pipe(case.pipe)
    assert all(again.components[name] is part for name, part in case.pipe.components.items())
    assert set(case.pipe.components) == set(case.cls.parts) and torch.equal(case.run(again), case.latents)


def numbers_of_numpy(case, tmp_path):
    change = {"num_inference_steps": np.int64(2), "seed": np.uint32(3), "true_cfg_scale": np.float32(1.0)}
    change |= {name: np.int32(case.call[name]) for name in ("width", "height", "layers") if name in case.call}
    if "strength" in case.cls.__call__.__wrapped__.__annotations__:
        change["strength"] = np.float32(0.6)
    if "controlnet" in case.given:
        change["controlnet_conditioning_scale"] = np.float64(1)
    assert torch.equal(case.run(**change), case.latents)
    if "width" in case.call:
        assert torch.equal(case.run(width=float(SIZE[0]), height=torch.tensor(SIZE[1])), case.latents)
        with pytest.raises(ValueError, match=r"height must be .*, got 32\.5"):
            case.run(height=32.5, output_type="latent")


def the_progress_bar(case, tmp_path):
    pipe, text = case.cls.from_pipe(case.pipe), tmp_path / "bar"
    with open(text, "w") as file:
        pipe.set_progress_bar_config(file=file, desc="mine")
        case.run(pipe, progress=True)
        pipe.set_progress_bar_config(file=file, desc="yours", disable=True)
        case.run(pipe, progress=True)
        pipe.set_progress_bar_config(file=file, desc="theirs")
        case.run(pipe)
        list(pipe.progress_bar(range(3)))
    shown = text.read_text()
    assert "mine" in shown and ("2/2" in shown or "1/1" in shown)
    assert "yours" not in shown and shown.count("theirs") >= 1 and "3/3" in shown
    with pytest.raises(TypeError, match="dsable is not an argument; did you mean disable"):
        pipe.set_progress_bar_config(dsable=True)


def switches(case, tmp_path):
    pipe = case.pipe
    pipe.enable_vae_tiling(), pipe.enable_vae_slicing()
    assert pipe.vae.use_tiling and pipe.vae.use_slicing
    pipe.disable_vae_tiling(), pipe.disable_vae_slicing()
    assert not pipe.vae.use_tiling and not pipe.vae.use_slicing
    pipe.enable_attention_slicing("auto"), pipe.disable_attention_slicing()
    pipe.enable_xformers_memory_efficient_attention(), pipe.disable_xformers_memory_efficient_attention()


def what_is_not_there_says_what_is(case, tmp_path):
    for name, text in (
        ("prepare_latents", "the call draws noise from generator= or seed="),
        ("push_to_hub", "upload_folder"),
    ):
        assert not hasattr(case.pipe, name)
        with pytest.raises(AttributeError, match=f"{case.cls.__name__} has no {name}: .*{text}"):
            getattr(case.pipe, name)()
    for model, name, text in (
        (case.pipe.vae, "enable_cache", "step caches go on the transformer"),
        (case.pipe.vae, "enable_layerwise_casting", "layers are cast in the transformer alone"),
        (case.pipe.vae, "enable_group_offload", r"from_pretrained\(memory_limit=\)"),
    ):
        assert not hasattr(model, name)
        with pytest.raises(AttributeError, match=f"{type(model).__name__} has no {name}: .*{text}"):
            getattr(model, name)()
    with pytest.raises(AttributeError, match="has no attribute 'enable_cash'"):
        _ = case.pipe.transformer.enable_cash
    with pytest.raises(AttributeError, match=f"{case.cls.__name__} has no transformr$"):
        _ = case.pipe.transformr


CALLS = [
    reading, stacking, a_tensor_with_a_batch_axis, a_tensor_around_zero, lists, a_callback_changes_latents,
    a_callback_changes_embeddings, a_callback_is_told_what_it_may_return, properties, encode_prompt_alone,
    save_and_load, save_and_load_variants, types_of_parts, another_pipeline_around_the_parts, numbers_of_numpy,
    the_progress_bar, switches, what_is_not_there_says_what_is,
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_call(case, call, tmp_path):
    call(case, tmp_path)


def test_from_pipe_says_what_is_missing(edit_folder):
    drawing = qwen_image_fast.QwenImagePipeline.from_pretrained(edit_folder)
    assert drawing.name_or_path == str(edit_folder) == qwen_image_fast.QwenImagePipeline.download(edit_folder)
    edit, layered = qwen_image_fast.QwenImageEditPipeline, qwen_image_fast.QwenImageLayeredPipeline
    processor = edit.from_pretrained(edit_folder, transformer=None, vae=None).processor
    for cls, given, text in (
        (edit, {}, "from_pipe: processor= must be given, QwenImagePipeline has none"),
        (edit, {"processor": processor}, "text_encoder= must be given with its vision tower"),
        (layered, {"processor": processor}, "text_encoder= must be given with its head"),
    ):
        with pytest.raises(ValueError, match=text):
            cls.from_pipe(drawing, **given)
    with pytest.raises(TypeError, match="vea is not an argument; did you mean vae"):
        edit.from_pipe(drawing, vea=None)
    with pytest.raises(TypeError, match="from_pipe: pipeline must be one of this package, got builtins.dict"):
        edit.from_pipe({})
    again = qwen_image_fast.QwenImageImg2ImgPipeline.from_pipe(drawing, torch_dtype=torch.float64)
    assert again.vae is drawing.vae and drawing.dtype == torch.float64
