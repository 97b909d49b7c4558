"""How the calls of the lists are made: a picture, a model's pass, and the same after a change."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate_harness import inputs
from PIL import Image
from tests.pipelines.reference import AREA, name_picture_tokens, picture, take_mode

import qwen_image_fast

# The name of a call, the type that diffusers returns, and the call.
Row = tuple[str, str, Callable[[Any], Any]]

SIZE = (48, 32)
CPU = torch.device("cpu")


def is_diffusers(pipe: Any) -> bool:
    return isinstance(pipe, diffusers.DiffusionPipeline)


def class_name(pipe: Any) -> str:
    return type(pipe).__name__


def of_package(subject: Any, name: str) -> Any:
    """A class of the package that `subject` is of."""
    theirs = isinstance(subject, (diffusers.DiffusionPipeline, diffusers.ModelMixin))
    return getattr(diffusers if theirs else qwen_image_fast, name)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fresh(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """On a copy, for what changes the object."""
    return lambda subject: run(copy.deepcopy(subject))


def pixels_of(image: Image.Image) -> torch.Tensor:
    """[1, C, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image)).movedim(-1, 0)[None].float() / 255


def white_box() -> Image.Image:
    mask = Image.new("L", SIZE)
    mask.paste(255, (16, 8, 40, 24))
    return mask


# ---- pipelines -------------------------------------------------------------------------------------------------------


def call_of(name: str) -> dict[str, Any]:
    """The arguments of two steps with a pipeline of this class."""
    call: dict[str, Any] = {"prompt": '"HI" in red', "num_inference_steps": 2}
    if name != "QwenImagePipeline":
        call["control_image" if "Control" in name else "image"] = picture(*SIZE)
    if "Inpaint" in name:
        call["control_mask" if "Control" in name else "mask_image"] = white_box()
    if "Layered" in name:
        return call | {"image": call["image"].convert("RGBA"), "layers": 2, "output_type": "pt"}
    if name in ("QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline", "QwenImageEditInpaintPipeline"):
        call |= {"strength": 0.9, "num_inference_steps": 3}
    return call | {"width": SIZE[0], "height": SIZE[1], "output_type": "latent"}


def own_sizes(pipe: Any) -> dict[str, Any]:
    """What makes a stand-alone pipeline take diffusers' sizes of pictures, as docs/differences.md says."""
    name = class_name(pipe)
    if is_diffusers(pipe) or name == "QwenImagePipeline" or "Control" in name:
        return {}
    given: dict[str, Any] = {"preserve_size": False}
    if "Edit" in name:
        given["condition_area"] = 48 * 48 if "Plus" in name else AREA
    return given


def drawn(pipe: Any, **given: Any) -> Any:
    if class_name(pipe) == "QwenImageControlNetInpaintPipeline" and "encode" not in vars(pipe.vae):
        take_mode(pipe)  # which diffusers draws from the global generator
    return pipe(**{**call_of(class_name(pipe)), "generator": seeded(), **own_sizes(pipe), **given})


def twice(pipe: Any, **given: Any) -> Any:
    """Two prompts, with a picture each."""
    call = call_of(class_name(pipe))
    two = {name: [call[name]] * 2 for name in call if name.endswith(("image", "mask"))}
    return drawn(pipe, **{"prompt": [call["prompt"], "a cat"], "generator": [seeded(0), seeded(1)], **two, **given})


def last_zeroed(pipe: Any) -> Any:
    """A callback is given every tensor it may ask for, and makes the last latents zero."""

    def callback(pipe, step, timestep, given):
        assert sorted(given) == sorted(pipe._callback_tensor_inputs)
        return {"latents": given["latents"] * (step < pipe.num_timesteps - 1)}

    names = pipe._callback_tensor_inputs
    return drawn(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names).images


def halved(pipe: Any) -> Any:
    def callback(pipe, step, timestep, given):
        return {"latents": given["latents"] * 0.5}

    return drawn(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents"]).images


def guided_more(pipe: Any) -> float:
    def callback(pipe, step, timestep, given):
        pipe._guidance_scale += 1.0
        return given

    drawn(pipe, guidance_scale=2.0, callback_on_step_end=callback)
    return pipe.guidance_scale


def interrupted(pipe: Any) -> Any:
    def callback(pipe, step, timestep, given):
        pipe._interrupt = True
        return given

    return drawn(pipe, num_inference_steps=4, callback_on_step_end=callback).images


def embeddings(pipe: Any, **given: Any) -> Any:
    """Of `encode_prompt`, with the picture where the pipeline's prompts have one."""
    call = call_of(class_name(pipe))
    seen = {"image": call["image"]} if "Edit" in class_name(pipe) else {}
    if "Plus" in class_name(pipe):
        seen["image"] = [seen["image"]]
    return pipe.encode_prompt(**{"prompt": call["prompt"], "device": CPU, "num_images_per_prompt": 1, **seen, **given})


def by_embeddings(pipe: Any, negative: bool = False) -> Any:
    embeds, mask = pipe.encode_prompt(prompt='"HI" in red', device=CPU, num_images_per_prompt=1)
    given = {"negative_prompt_embeds": embeds, "true_cfg_scale": 2.0} if negative else {}
    return drawn(pipe, prompt=None, prompt_embeds=embeds, prompt_embeds_mask=mask, **given).images


def without_encoder(pipe: Any) -> Any:
    """Another pipeline around the rest of the parts."""
    bare = type(pipe)(**{**pipe.components, "text_encoder": None, "tokenizer": None})
    bare.set_progress_bar_config(disable=True)
    return bare


def by_drawn_embeddings(pipe: Any) -> Any:
    torch.manual_seed(0)
    embeds = torch.randn(1, 6, pipe.transformer.config.joint_attention_dim)
    return drawn(pipe, prompt=None, prompt_embeds=embeds).images


def saved(pipe: Any, then: Callable[[str], Any], **saving: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder, **saving)
        return then(folder)


def reloaded(pipe: Any, loading: dict[str, Any] | None = None, **saving: Any) -> Any:
    """The picture of a pipeline that was saved and loaded."""
    given: dict[str, Any] = {"torch_dtype": torch.float32, **(loading or {})}
    given |= {"variant": saving["variant"]} if "variant" in saving else {}
    if "processor" in pipe.components and is_diffusers(pipe):  # whose class in transformers needs torchvision
        given["processor"] = pipe.processor
        pipe = type(pipe)(**{**pipe.components, "processor": None})

    def draw(folder: str) -> Any:
        again = type(pipe).from_pretrained(folder, **given)
        again.set_progress_bar_config(disable=True)
        if "processor" in given:
            again.text_encoder.register_forward_pre_hook(name_picture_tokens, with_kwargs=True)
        return drawn(again).images

    return saved(pipe, draw, **saving)


def sibling(pipe: Any, name: str, **given: Any) -> Any:
    """The call of another pipeline around the same parts."""
    again = of_package(pipe, name).from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    return drawn(again, **given).images


def named_types(parts: dict[str, Any]) -> list[str]:
    return sorted(f"{name} {part.dtype}" for name, part in parts.items() if isinstance(part, torch.nn.Module))


def signature(pipe: Any) -> list[str]:
    """The arguments that diffusers' class of this name has, of those that the pipeline's call takes."""
    from inspect import signature

    wanted = signature(getattr(diffusers, class_name(pipe)).__call__).parameters
    return [name for name in wanted if name in signature(type(pipe).__call__).parameters]


def raised(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The class of the error that a call ends in."""

    def call(subject: Any) -> Any:
        try:
            return run(subject)
        except (ValueError, OSError) as error:
            return next(kind.__name__ for kind in (ValueError, OSError) if isinstance(error, kind))

    return call


# ---- LoRAs -----------------------------------------------------------------------------------------------------------

TARGETS = ["to_q", "to_out.0"]


def lora(pipe: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    width = pipe.transformer.config.num_attention_heads * pipe.transformer.config.attention_head_dim
    names = [f"transformer.transformer_blocks.{i}.attn.{n}" for i in (0, 1) for n in TARGETS]
    return {
        f"{name}.lora_{part}.weight": torch.randn(shape) / 4
        for name in names
        for part, shape in (("A", (4, width)), ("B", (width, 4)))
    }


def with_lora(run: Callable[[Any], Any], **loading: Any) -> Callable[[Any], Any]:
    def call(pipe: Any) -> Any:
        pipe.load_lora_weights(lora(pipe), adapter_name="a", **loading)
        try:
            return run(pipe)
        finally:
            pipe.unload_lora_weights()

    return call


def from_lora_file(pipe: Any) -> Any:
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in lora(pipe).items()}
    with tempfile.TemporaryDirectory() as folder:
        type(pipe).save_lora_weights(save_directory=folder, transformer_lora_layers=tensors, safe_serialization=True)
        pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    try:
        return drawn(pipe).images
    finally:
        pipe.unload_lora_weights()


def after(method: str, *args: Any, then: str | None = None, draw: Callable = drawn, **given: Any) -> Callable:
    """Results behind a call that returns nothing; `then` undoes it."""

    def call(subject: Any) -> Any:
        getattr(subject, method)(*args, **given)
        result = draw(subject)
        if then is not None:
            getattr(subject, then)()
        return result

    return call


# ---- models ----------------------------------------------------------------------------------------------------------


def forward(model: Any, **given: Any) -> Any:
    with torch.no_grad():
        return model(**inputs(), **given)


def gradient(model: Any) -> torch.Tensor:
    given = inputs()
    given["hidden_states"].requires_grad_()
    model(**given).sample.square().mean().backward()
    model.zero_grad()
    return given["hidden_states"].grad


def reloaded_model(model: Any, draw: Callable = forward, loading: dict[str, Any] | None = None, **saving: Any) -> Any:
    given = {**(loading or {}), **({"variant": saving["variant"]} if "variant" in saving else {})}
    return saved(model, lambda folder: draw(type(model).from_pretrained(folder, **given)), **saving)


def pixels(size: int = 32) -> torch.Tensor:
    return torch.linspace(-9, 9, 3 * size * size).sin().reshape(1, 3, 1, size, size)


def latents(size: int = 4) -> torch.Tensor:
    return torch.linspace(-9, 9, 16 * size * size).sin().reshape(1, 16, 1, size, size)


@torch.no_grad()
def decoded(vae: Any, **given: Any) -> Any:
    return vae.decode(latents(), **given)


@torch.no_grad()
def encoded(vae: Any, **given: Any) -> Any:
    return vae.encode(pixels(), **given)


def tiled(vae: Any) -> Any:
    vae.enable_tiling(32, 32, 16, 16)
    try:
        with torch.no_grad():
            return vae.decode(latents(8)).sample, vae.encode(pixels(64)).latent_dist.mean
    finally:
        vae.disable_tiling()
