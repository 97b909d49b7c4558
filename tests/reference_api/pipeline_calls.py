"""The calls that diffusers' tests make of its Qwen-Image pipelines: of all nine, of some, and of text to image."""

from __future__ import annotations

from typing import Any

import torch
from tests.pipelines.reference import picture
from tests.reference_api.ways import (
    CPU,
    SIZE,
    Row,
    after,
    by_drawn_embeddings,
    by_embeddings,
    call_of,
    class_name,
    drawn,
    embeddings,
    fresh,
    from_lora_file,
    guided_more,
    halved,
    interrupted,
    last_zeroed,
    named_types,
    of_package,
    pixels_of,
    raised,
    reloaded,
    saved,
    seeded,
    sibling,
    signature,
    twice,
    with_lora,
    without_encoder,
)

TEXT = "QwenImagePipeline"
OTHERS = (
    "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline",
    "QwenImageEditInpaintPipeline", "QwenImageControlNetPipeline", "QwenImageControlNetInpaintPipeline",
    "QwenImageLayeredPipeline",
)  # fmt: skip


def offloaded(pipe: Any, method: str, **given: Any) -> Any:
    """A picture of embeddings with a kind of offloading, here from the CPU to the CPU, and once more without.

    The text encoder stays out, which is not what is compared.
    """
    bare = without_encoder(pipe)
    getattr(bare, method)(**given)
    image = by_drawn_embeddings(bare)
    if method != "enable_group_offload":
        bare.maybe_free_model_hooks()
        bare.remove_all_hooks()
    return [image, by_drawn_embeddings(bare)]


def sequentially(pipe: Any) -> str:
    """What is said without an accelerator: on the CPU accelerate takes no device with an index, as this gives."""
    try:
        pipe.enable_sequential_cpu_offload()
    except RuntimeError as error:
        return str(error)
    return "offloaded"


EVERY: list[Row] = [
    ('pipe(output_type="pil").images', "list", lambda p: drawn(p, output_type="pil").images),
    ('pipe(output_type="np").images', "ndarray", lambda p: drawn(p, output_type="np").images),
    ('pipe(output_type="pt").images', "Tensor", lambda p: drawn(p, output_type="pt").images),
    ("pipe()[0]", "Tensor", lambda p: drawn(p)[0]),
    ("pipe(return_dict=False)", "tuple", lambda p: drawn(p, return_dict=False)),
    ("inspect.signature(Pipeline.__call__)", "list", signature),
    ("pipe(prompt=[...], image=[...], generator=[...])", "Tensor", lambda p: twice(p).images),
    ("pipe(num_images_per_prompt=2, generator=[...])", "Tensor", lambda p: drawn(
        p, num_images_per_prompt=2, generator=[seeded(i) for i in (0, 1)]).images),
    ("pipe(prompt=[...], num_images_per_prompt=2)", "int", lambda p: len(twice(
        p, num_images_per_prompt=2, generator=[seeded(i) for i in range(4)]).images)),
    ("pipe(negative_prompt=, true_cfg_scale=)", "Tensor",
     lambda p: drawn(p, negative_prompt="bad", true_cfg_scale=2.0).images),
    ("pipe(guidance_scale=)", "Tensor", lambda p: drawn(p, guidance_scale=7.5).images),
    ("pipe(sigmas=)", "Tensor", lambda p: drawn(p, sigmas=[1.0, 0.6, 0.3]).images),
    ("pipe(callback_on_step_end=, callback_on_step_end_tensor_inputs=)", "Tensor", halved),
    ("pipe._callback_tensor_inputs, pipe.num_timesteps", "Tensor", last_zeroed),
    ("pipe._guidance_scale += 1, pipe.guidance_scale", "float", guided_more),
    ("pipe._interrupt = True", "Tensor", interrupted),
    ("pipe.encode_prompt(prompt=, device=, num_images_per_prompt=)", "tuple", embeddings),
    ("Pipeline(text_encoder=None)(prompt_embeds=)", "Tensor", lambda p: by_drawn_embeddings(without_encoder(p))),
    ("pipe.components", "list", lambda p: sorted(p.components)),
    ("Pipeline._optional_components", "list", lambda p: list(p._optional_components)),
    ("Pipeline.from_pipe(pipe)", "Tensor", lambda p: sibling(p, class_name(p))),
    ("pipe.save_pretrained(), from_pretrained()", "Tensor", reloaded),
    ("pipe.save_pretrained(variant=), from_pretrained(variant=)", "Tensor", lambda p: reloaded(p, variant="fp16")),
    ("pipe.to(dtype=)", "list", fresh(lambda p: named_types(p.to(dtype=torch.float16).components))),
    ("pipe.vae.enable_tiling(tile_sample_...=)", "Tensor", lambda p: after(
        "enable_tiling", draw=lambda v: drawn(p, output_type="pt").images, then="disable_tiling",
        tile_sample_min_height=32, tile_sample_min_width=32, tile_sample_stride_height=24,
        tile_sample_stride_width=24)(p.vae)),
    ("pipe.enable_attention_slicing(slice_size=)", "Tensor", lambda p: after(
        "enable_attention_slicing", slice_size=1, then="disable_attention_slicing")(p).images),
    ("pipe.load_lora_weights(tensors, adapter_name=)", "Tensor", with_lora(lambda p: drawn(p).images)),
    ("pipe.enable_group_offload(onload_device=, offload_type=)", "list", fresh(lambda p: offloaded(
        p, "enable_group_offload", onload_device=CPU, offload_type="leaf_level"))),
]  # fmt: skip

# ---- of some pipelines -----------------------------------------------------------------------------------------------


def given_as(kind: str) -> Any:
    """The picture as a tensor, a list of tensors, or an array."""

    def call(pipe: Any) -> Any:
        name = "control_image" if "Control" in class_name(pipe) else "image"
        x = pixels_of(call_of(class_name(pipe))[name])
        if kind == "tensor" and name == "control_image":
            x = 2 * x - 1  # diffusers takes this one as it is
        return drawn(pipe, **{name: {"tensor": x, "list": [x[0]], "array": x.movedim(1, -1).numpy()}[kind]}).images

    return call


def several_nets(pipe: Any) -> Any:
    multi = of_package(pipe, "QwenImageMultiControlNetModel")([pipe.controlnet])
    again = type(pipe)(**{**pipe.components, "controlnet": multi})
    again.set_progress_bar_config(disable=True)
    two = [picture(*SIZE), picture(*SIZE, 1)]
    return drawn(again, control_image=two, controlnet_conditioning_scale=[0.5, 0.5]).images


def latents_of(pipe: Any) -> Any:
    """A picture's own latents as the noise, where all steps are taken."""
    torch.manual_seed(3)
    return drawn(pipe, latents=torch.randn(drawn(pipe).images.shape)).images


PICTURE: list[Row] = [
    ("pipe(image=tensor)", "Tensor", given_as("tensor")),
    ("pipe(image=[tensor])", "Tensor", given_as("list")),
    ("pipe(image=array)", "Tensor", given_as("array")),
]
PROMPT: list[Row] = [
    ("pipe(prompt_embeds=, prompt_embeds_mask=)", "Tensor", by_embeddings),
    ("pipe(negative_prompt_embeds=), no negative_prompt_embeds_mask", "Tensor",
     lambda p: by_embeddings(p, negative=True)),
]  # fmt: skip
STRENGTH: list[Row] = [("pipe(strength=)", "Tensor", lambda p: drawn(p, strength=0.5).images)]
MASKED: list[Row] = [
    ("pipe(mask_image=ones)", "Tensor", lambda p: drawn(p, mask_image=torch.ones(1, 1, *SIZE[::-1])).images),
    ("pipe(padding_mask_crop=)", "list", lambda p: drawn(p, padding_mask_crop=4, output_type="pil").images),
]
CONTROLLED: list[Row] = [
    ("pipe(controlnet_conditioning_scale=)", "Tensor",
     lambda p: drawn(p, controlnet_conditioning_scale=0.5).images),
    ("pipe(control_guidance_start=, control_guidance_end=)", "Tensor",
     lambda p: drawn(p, num_inference_steps=4, control_guidance_start=0.3, control_guidance_end=0.7).images),
]  # fmt: skip
SOME: dict[str, list[Row]] = {
    "QwenImageImg2ImgPipeline": [*PICTURE, *PROMPT, *STRENGTH],
    "QwenImageInpaintPipeline": [*PICTURE, *PROMPT, *STRENGTH, *MASKED],
    "QwenImageEditPipeline": [],
    "QwenImageEditPlusPipeline": [
        ("pipe(image=[picture, picture])", "Tensor",
         lambda p: drawn(p, image=[picture(*SIZE), picture(32, 32)]).images),
    ],
    "QwenImageEditInpaintPipeline": [*STRENGTH, MASKED[0]],
    "QwenImageControlNetPipeline": [
        *PICTURE, *PROMPT, *CONTROLLED,
        ("QwenImageMultiControlNetModel([controlnet])", "Tensor", several_nets),
    ],
    "QwenImageControlNetInpaintPipeline": [*PROMPT, *CONTROLLED],
    "QwenImageLayeredPipeline": [
        ("pipe(layers=)", "Tensor", lambda p: drawn(p, layers=1).images),
        ("pipe(resolution=)", "Tensor", lambda p: drawn(p, resolution=1024).images),
        ("pipe(cfg_normalize=)", "Tensor",
         lambda p: drawn(p, cfg_normalize=True, negative_prompt="bad", true_cfg_scale=3.0).images),
    ],
}  # fmt: skip

# ---- of text to image, for whose parts the others do the same --------------------------------------------------------


def noise(pipe: Any) -> torch.Tensor:
    return pipe.prepare_latents(1, 16, *SIZE, torch.float32, CPU, seeded())


def refusal(pipe: Any) -> str:
    """Why a call without a prompt is refused."""
    try:
        pipe.check_inputs(None, *SIZE)
    except ValueError as error:
        return str(error)
    return "not refused"


TEXT_TO_IMAGE: list[Row] = [
    ("pipe()", "QwenImagePipelineOutput", drawn),
    ("pipe(max_sequence_length=)", "Tensor", lambda p: drawn(p, max_sequence_length=16).images),
    ("pipe(latents=)", "Tensor", latents_of),
    ('pipe(attention_kwargs={"scale": ...})', "Tensor", with_lora(
        lambda p: drawn(p, attention_kwargs={"scale": 0.4}).images)),
    ("pipe.attention_kwargs", "dict", lambda p: (drawn(p, attention_kwargs={}), p.attention_kwargs)[1]),
    ("pipe.interrupt", "bool", lambda p: (drawn(p), p.interrupt)[1]),
    ("pipe.dtype", "dtype", lambda p: p.dtype),
    ("pipe.device", "device", lambda p: p.device),
    ("pipe._execution_device", "device", lambda p: p._execution_device),
    ("pipe.vae_scale_factor", "int", lambda p: p.vae_scale_factor),
    ('pipe.to("cpu", torch.float32)', "Tensor", lambda p: drawn(p.to("cpu", torch.float32)).images),
    ("pipe.set_progress_bar_config(disable=)", "NoneType", lambda p: p.set_progress_bar_config(disable=True)),
    ("pipe.progress_bar(total=)", "int", lambda p: p.progress_bar(total=3).total),
    ("pipe.save_pretrained(safe_serialization=)", "Tensor", lambda p: reloaded(p, safe_serialization=True)),
    ("pipe.save_pretrained(max_shard_size=)", "Tensor", lambda p: reloaded(p, max_shard_size="2MB")),
    ('from_pretrained(device_map="cpu")', "Tensor", lambda p: reloaded(p, {"device_map": "cpu"})),
    ("from_pretrained(torch_dtype={...})", "list", lambda p: saved(p, lambda folder: named_types(
        type(p).from_pretrained(
            folder, torch_dtype={"transformer": torch.bfloat16, "default": torch.float16}).components))),
    ("from_pretrained(variant=) where there is none", "str", raised(
        lambda p: saved(p, lambda folder: type(p).from_pretrained(folder, variant="fp16")))),
    ("QwenImageImg2ImgPipeline.from_pipe(pipe)", "Tensor", lambda p: sibling(p, "QwenImageImg2ImgPipeline")),
    ("QwenImageInpaintPipeline.from_pipe(pipe)", "Tensor", lambda p: sibling(p, "QwenImageInpaintPipeline")),
    ("pipe.load_lora_weights(low_cpu_mem_usage=)", "Tensor", with_lora(
        lambda p: drawn(p).images, low_cpu_mem_usage=True)),
    ("Pipeline.save_lora_weights(), pipe.load_lora_weights(folder, weight_name=)", "Tensor", from_lora_file),
    ("pipe.set_adapters(names, weights)", "Tensor", with_lora(lambda p: after("set_adapters", "a", 0.3)(p).images)),
    ("pipe.get_active_adapters()", "list", with_lora(lambda p: p.get_active_adapters())),
    ("pipe.get_list_adapters()", "dict", with_lora(lambda p: p.get_list_adapters())),
    ("pipe.disable_lora()", "Tensor", with_lora(lambda p: after("disable_lora", then="enable_lora")(p).images)),
    ("pipe.delete_adapters(names)", "Tensor", with_lora(lambda p: after("delete_adapters", "a")(p).images)),
    ("pipe.fuse_lora(), unfuse_lora()", "Tensor",
     with_lora(lambda p: after("fuse_lora", then="unfuse_lora")(p).images)),
    ("pipe.fuse_lora(lora_scale=)", "Tensor",
     with_lora(lambda p: after("fuse_lora", lora_scale=0.4, then="unfuse_lora")(p).images)),
    ("pipe.fused_loras, num_fused_loras", "list", with_lora(lambda p: after(
        "fuse_lora", draw=lambda p: [p.num_fused_loras, *p.fused_loras], then="unfuse_lora")(p))),
    ("pipe.enable_model_cpu_offload(device=)", "list", fresh(lambda p: offloaded(
        p, "enable_model_cpu_offload", device="cpu"))),
    ("pipe.enable_sequential_cpu_offload()", "str", fresh(sequentially)),
    ("pipe.remove_all_hooks()", "NoneType", lambda p: p.remove_all_hooks()),
    ("pipe.maybe_free_model_hooks()", "NoneType", lambda p: p.maybe_free_model_hooks()),
    ("pipe.image_processor.postprocess(tensor, output_type=)", "ndarray",
     lambda p: p.image_processor.postprocess(torch.linspace(-1, 1, 48).reshape(1, 3, 4, 4), output_type="np")),
    ("pipe.prepare_latents(...)", "Tensor", noise),
    ("pipe.check_inputs(...)", "str", refusal),
]  # fmt: skip

# What diffusers' class cannot: Layered without its text encoder, or several images of several prompts; Edit-Plus with
# several prompts.
LEFT_OUT = {
    "QwenImageLayeredPipeline": (
        "pipe(prompt=[...], num_images_per_prompt=2)",
        "Pipeline(text_encoder=None)(prompt_embeds=)", "pipe.enable_group_offload(onload_device=, offload_type=)",
    ),
    "QwenImageEditPlusPipeline": (
        "pipe(prompt=[...], image=[...], generator=[...])", "pipe(prompt=[...], num_images_per_prompt=2)",
    ),
}  # fmt: skip
LISTS = {"Tensor": "list", "ndarray": "list"}  # Layered gives the layers of every picture


def rows_of(name: str) -> list[Row]:
    rows = [row for row in (*EVERY, *SOME[name]) if row[0] not in LEFT_OUT.get(name, ())]
    return [(row[0], LISTS.get(row[1], row[1]), row[2]) for row in rows] if "Layered" in name else rows


PIPELINES = {TEXT: [*EVERY, *PROMPT, *TEXT_TO_IMAGE], **{name: rows_of(name) for name in OTHERS}}
