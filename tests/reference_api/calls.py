"""The public calls that diffusers' tests make of the Qwen-Image pipelines and models, on its objects and both of ours.

Each call has the name under which a script writes it, what diffusers returns, and is run on an object of diffusers, on
one after `accelerate`, and on the stand-alone one of the same weights. It is the same where type, shape and values are.
Several processes, accelerators and the editing models' processor are not needed for any of them; of offloading, which
needs an accelerator, only the presence is looked at.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from accelerate_harness import CONFIG, inputs, small_transformer
from PIL import Image

import qwen_image_fast
from qwen_image_fast.folders import SHIPPED

KINDS = {"accelerated": "after `accelerate`", "stand-alone": "stand-alone"}


class Call(NamedTuple):
    """of: "pipeline", "transformer" or "vae". returns: the name of the type that diffusers returns."""

    of: str
    name: str
    returns: str
    run: Callable[[Any], Any]


# ---- what is called --------------------------------------------------------------------------------------------------


def drawn(pipe: Any, **given: Any) -> Any:
    call = {"prompt": '"HI" in red', "height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
    return pipe(**{**call, "generator": torch.Generator().manual_seed(0), **given})


def picture(colour: tuple[int, int, int] = (250, 40, 60)) -> Image.Image:
    return Image.new("RGB", (32, 32), colour)


def with_callback(pipe: Any) -> Any:
    def callback(pipe, step, timestep, given):
        return {"latents": given["latents"] * 0.5}

    return drawn(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents"]).images


def interrupted(pipe: Any) -> Any:
    def callback(pipe, step, timestep, given):
        pipe._interrupt = True
        return given

    return drawn(pipe, num_inference_steps=3, callback_on_step_end=callback).images


def by_embeddings(pipe: Any) -> Any:
    embeds, mask = pipe.encode_prompt(prompt='"HI" in red', device="cpu", num_images_per_prompt=1)
    return drawn(pipe, prompt=None, prompt_embeds=embeds, prompt_embeds_mask=mask).images


def reloaded(pipe: Any, **saving: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder, **saving)
        variant = {"variant": saving["variant"]} if "variant" in saving else {}
        again = type(pipe).from_pretrained(folder, torch_dtype=torch.float32, **variant)
        again.set_progress_bar_config(disable=True)
        return drawn(again).images


def sibling(pipe: Any, name: str, **given: Any) -> Any:
    """The call of another pipeline around the same parts."""
    package = diffusers if isinstance(pipe, diffusers.DiffusionPipeline) else qwen_image_fast
    again = getattr(package, name).from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    return drawn(again, **given).images


def lora() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    names = [f"transformer.transformer_blocks.{i}.attn.{n}" for i in (0, 1) for n in ("to_q", "to_out.0")]
    width = diffusers_pipeline().transformer.inner_dim
    return {
        f"{name}.lora_{part}.weight": torch.randn(shape) / 4
        for name in names
        for part, shape in (("A", (4, width)), ("B", (width, 4)))
    }


def with_lora(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def call(pipe: Any) -> Any:
        pipe.load_lora_weights(lora(), adapter_name="a")
        try:
            return run(pipe)
        finally:
            pipe.unload_lora_weights()

    return call


def after(method: str, *args: Any, then: str | None = None, draw: Callable = drawn) -> Callable[[Any], Any]:
    """Results behind a call that returns nothing; `then` undoes it."""

    def call(subject: Any) -> Any:
        getattr(subject, method)(*args)
        result = draw(subject)
        if then is not None:
            getattr(subject, then)()
        return result

    return call


def forward(model: Any, **given: Any) -> Any:
    with torch.no_grad():
        return model(**inputs(), **given)


def gradient(model: Any) -> torch.Tensor:
    given = inputs()
    given["hidden_states"].requires_grad_()
    model(**given).sample.square().mean().backward()
    model.zero_grad()
    return given["hidden_states"].grad


def reloaded_model(model: Any, draw: Callable = forward, **saving: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **saving)
        variant = {"variant": saving["variant"]} if "variant" in saving else {}
        return draw(type(model).from_pretrained(folder, **variant))


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


def has(name: str) -> Callable[[Any], bool]:
    return lambda subject: callable(getattr(subject, name))


PIPELINE: list[tuple[str, str, Callable[[Any], Any]]] = [
    ('pipe(output_type="pil")', "QwenImagePipelineOutput", lambda p: drawn(p, output_type="pil")),
    ('pipe(output_type="pil").images', "list", lambda p: drawn(p, output_type="pil").images),
    ('pipe(output_type="np").images', "ndarray", lambda p: drawn(p, output_type="np").images),
    ('pipe(output_type="pt").images', "Tensor", lambda p: drawn(p, output_type="pt").images),
    ('pipe(output_type="latent").images', "Tensor", lambda p: drawn(p).images),
    ("pipe()[0]", "Tensor", lambda p: drawn(p)[0]),
    ("pipe(return_dict=False)", "tuple", lambda p: drawn(p, return_dict=False)),
    ("pipe(prompt=[...])", "Tensor", lambda p: drawn(p, prompt=["a", "a"]).images),
    ("pipe(num_images_per_prompt=2)", "Tensor", lambda p: drawn(p, num_images_per_prompt=2).images),
    ("pipe(generator=[...])", "Tensor", lambda p: drawn(
        p, num_images_per_prompt=2, generator=[torch.Generator().manual_seed(i) for i in (0, 1)]).images),
    ("pipe(negative_prompt=, true_cfg_scale=)", "Tensor",
     lambda p: drawn(p, negative_prompt=" ", true_cfg_scale=2.0).images),
    ("pipe(sigmas=)", "Tensor", lambda p: drawn(p, sigmas=[1.0, 0.6]).images),
    ("pipe(latents=)", "Tensor", lambda p: drawn(p, latents=drawn(p).images).images),
    ("pipe(max_sequence_length=)", "Tensor", lambda p: drawn(p, max_sequence_length=16).images),
    ("pipe(prompt_embeds=, prompt_embeds_mask=)", "Tensor", by_embeddings),
    ("pipe(callback_on_step_end=, callback_on_step_end_tensor_inputs=)", "Tensor", with_callback),
    ("pipe._interrupt = True", "Tensor", interrupted),
    ("pipe(guidance_scale=)", "Tensor", lambda p: drawn(p, guidance_scale=2.0).images),
    ('pipe(attention_kwargs={"scale": ...})', "Tensor", with_lora(
        lambda p: drawn(p, attention_kwargs={"scale": 0.4}).images)),
    ("pipe.encode_prompt(prompt=, device=, num_images_per_prompt=, max_sequence_length=)", "tuple",
     lambda p: p.encode_prompt(prompt="a", device="cpu", num_images_per_prompt=2, max_sequence_length=64)),
    ("pipe.num_timesteps", "int", lambda p: (drawn(p), p.num_timesteps)[1]),
    ("pipe.guidance_scale", "float", lambda p: (drawn(p, guidance_scale=2.0), p.guidance_scale)[1]),
    ("pipe.attention_kwargs", "dict", lambda p: (drawn(p, attention_kwargs={}), p.attention_kwargs)[1]),
    ("pipe.interrupt", "bool", lambda p: (drawn(p), p.interrupt)[1]),
    ("pipe.components", "list", lambda p: sorted(p.components)),
    ("pipe.dtype", "dtype", lambda p: p.dtype),
    ("pipe.device", "device", lambda p: p.device),
    ("pipe.vae_scale_factor", "int", lambda p: p.vae_scale_factor),
    ('pipe.to("cpu", torch.float32)', "Tensor", lambda p: drawn(p.to("cpu", torch.float32)).images),
    ("pipe.set_progress_bar_config(disable=)", "NoneType", lambda p: p.set_progress_bar_config(disable=True)),
    ("pipe.progress_bar(total=)", "int", lambda p: p.progress_bar(total=3).total),
    ("pipe.save_pretrained(), from_pretrained()", "Tensor", reloaded),
    ("pipe.save_pretrained(safe_serialization=)", "Tensor", lambda p: reloaded(p, safe_serialization=True)),
    ("pipe.save_pretrained(variant=), from_pretrained(variant=)", "Tensor", lambda p: reloaded(p, variant="fp16")),
    ("pipe.save_pretrained(max_shard_size=)", "Tensor", lambda p: reloaded(p, max_shard_size="2MB")),
    ("QwenImageImg2ImgPipeline.from_pipe(pipe)(image=, strength=)", "Tensor",
     lambda p: sibling(p, "QwenImageImg2ImgPipeline", image=picture(), strength=0.9)),
    ("QwenImageInpaintPipeline.from_pipe(pipe)(image=, mask_image=)", "Tensor",
     lambda p: sibling(p, "QwenImageInpaintPipeline", image=picture(), mask_image=picture((255, 255, 255)),
                       strength=0.9)),
    ("pipe.load_lora_weights(tensors, adapter_name=)", "Tensor", with_lora(lambda p: drawn(p).images)),
    ("pipe.set_adapters(names, weights)", "Tensor", with_lora(lambda p: after("set_adapters", "a", 0.3)(p).images)),
    ("pipe.get_active_adapters()", "list", with_lora(lambda p: p.get_active_adapters())),
    ("pipe.get_list_adapters()", "dict", with_lora(lambda p: p.get_list_adapters())),
    ("pipe.disable_lora()", "Tensor", with_lora(lambda p: after("disable_lora", then="enable_lora")(p).images)),
    ("pipe.delete_adapters(names)", "Tensor", with_lora(lambda p: after("delete_adapters", "a")(p).images)),
    ("pipe.fuse_lora(), unfuse_lora()", "Tensor",
     with_lora(lambda p: after("fuse_lora", then="unfuse_lora")(p).images)),
    ("pipe.enable_attention_slicing()", "Tensor",
     lambda p: after("enable_attention_slicing", then="disable_attention_slicing")(p).images),
    ("pipe.enable_model_cpu_offload", "bool", has("enable_model_cpu_offload")),
    ("pipe.enable_sequential_cpu_offload", "bool", has("enable_sequential_cpu_offload")),
    ("pipe.enable_group_offload", "bool", has("enable_group_offload")),
    ("pipe.remove_all_hooks()", "NoneType", lambda p: p.remove_all_hooks()),
    ("pipe.maybe_free_model_hooks()", "NoneType", lambda p: p.maybe_free_model_hooks()),
    ("pipe.image_processor", "bool", lambda p: p.image_processor is not None),
    ("pipe.prepare_latents", "bool", has("prepare_latents")),
    ("pipe.check_inputs", "bool", has("check_inputs")),
]  # fmt: skip

TRANSFORMER: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("model(...)", "Transformer2DModelOutput", forward),
    ("model(...).sample", "Tensor", lambda m: forward(m).sample),
    ("model(...)[0]", "Tensor", lambda m: forward(m)[0]),
    ("model(..., return_dict=False)", "tuple", lambda m: forward(m, return_dict=False)),
    ("model(..., attention_kwargs={})", "Tensor", lambda m: forward(m, attention_kwargs={}).sample),
    ("model(...).sample.backward()", "Tensor", gradient),
    ("model.enable_gradient_checkpointing()", "Tensor", after(
        "enable_gradient_checkpointing", then="disable_gradient_checkpointing", draw=gradient)),
    ("model.is_gradient_checkpointing", "bool", lambda m: m.is_gradient_checkpointing),
    ("model.train(), eval()", "Tensor", lambda m: (m.train(), m.eval(), forward(m).sample)[2]),
    ("model.config", "list", lambda m: [m.config.num_layers, m.config["in_channels"], *m.config.axes_dims_rope]),
    ("Model.from_config(model.config)", "int", lambda m: len(type(m).from_config(m.config).transformer_blocks)),
    ("model.save_pretrained(), from_pretrained()", "Tensor", lambda m: reloaded_model(m).sample),
    ("model.save_pretrained(variant=), from_pretrained(variant=)", "Tensor",
     lambda m: reloaded_model(m, variant="fp16").sample),
    ("model.save_pretrained(max_shard_size=)", "Tensor", lambda m: reloaded_model(m, max_shard_size="20KB").sample),
    ("model.dtype", "dtype", lambda m: m.dtype),
    ("model.device", "device", lambda m: m.device),
    ("model.to(torch.float32)", "Tensor", lambda m: forward(m.to(torch.float32)).sample),
    ("model.num_parameters(only_trainable=)", "int", lambda m: m.num_parameters(only_trainable=True)),
    ("model.get_memory_footprint()", "int", lambda m: m.get_memory_footprint()),
    ("model.state_dict()", "list", lambda m: sorted(m.state_dict())),
    ("copy.deepcopy(model)", "Tensor", lambda m: forward(copy.deepcopy(m)).sample),
    ("model.attn_processors", "bool", lambda m: bool(m.attn_processors)),
    ("model.set_attn_processor", "bool", has("set_attn_processor")),
    ("model.set_attention_backend", "bool", has("set_attention_backend")),
    ("model.enable_cache", "bool", has("enable_cache")),
    ("model.is_cache_enabled", "bool", lambda m: m.is_cache_enabled),
    ("model.cache_context(name)", "bool", has("cache_context")),
    ("model.enable_layerwise_casting", "bool", has("enable_layerwise_casting")),
    ("model.enable_group_offload", "bool", has("enable_group_offload")),
    ("model.add_adapter", "bool", has("add_adapter")),
    ("model.fuse_qkv_projections", "bool", has("fuse_qkv_projections")),
    ("model.compile_repeated_blocks", "bool", has("compile_repeated_blocks")),
    ("model.register_to_config", "bool", has("register_to_config")),
]  # fmt: skip

VAE: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("vae.decode(z)", "DecoderOutput", decoded),
    ("vae.decode(z).sample", "Tensor", lambda v: decoded(v).sample),
    ("vae.decode(z, return_dict=False)", "tuple", lambda v: decoded(v, return_dict=False)),
    ("vae.encode(x).latent_dist.mode()", "Tensor", lambda v: encoded(v).latent_dist.mode()),
    ("vae.encode(x).latent_dist.sample(generator)", "Tensor",
     lambda v: encoded(v).latent_dist.sample(torch.Generator().manual_seed(0))),
    ("vae.encode(x, return_dict=False)[0].mean", "Tensor", lambda v: encoded(v, return_dict=False)[0].mean),
    ("vae(x, sample_posterior=, return_dict=)", "Tensor", torch.no_grad()(
        lambda v: v(pixels(), sample_posterior=False, return_dict=False)[0])),
    ("vae.enable_tiling(), disable_tiling()", "tuple", tiled),
    ("vae.tiled_decode(z)", "Tensor", torch.no_grad()(lambda v: v.tiled_decode(latents(8)).sample)),
    ("vae.tiled_encode(x)", "Tensor", torch.no_grad()(lambda v: v.tiled_encode(pixels(64)))),
    ("vae.enable_slicing(), disable_slicing()", "DecoderOutput", after(
        "enable_slicing", then="disable_slicing", draw=decoded)),
    ("vae.config", "list", lambda v: [v.config.z_dim, *v.config.latents_mean, *v.config["latents_std"]]),
    ("vae.save_pretrained(), from_pretrained()", "Tensor", lambda v: reloaded_model(v, decoded).sample),
    ("vae.dtype", "dtype", lambda v: v.dtype),
    ("vae.num_parameters()", "int", lambda v: v.num_parameters()),
]  # fmt: skip

CALLS = [Call(of, *row) for of, rows in (("pipeline", PIPELINE), ("transformer", TRANSFORMER), ("vae", VAE))
         for row in rows]  # fmt: skip

_ELSEWHERE = "not there; the AttributeError says what is"
# Calls of the stand-alone objects that differ on purpose. After `accelerate` none does.
DIFFERENT = dict.fromkeys((
        "pipe.enable_model_cpu_offload", "pipe.enable_sequential_cpu_offload", "pipe.enable_group_offload",
        "pipe.remove_all_hooks()", "pipe.maybe_free_model_hooks()", "pipe.image_processor", "pipe.prepare_latents",
        "pipe.check_inputs", "model.attn_processors", "model.set_attn_processor", "model.set_attention_backend",
        "model.enable_cache", "model.is_cache_enabled", "model.cache_context(name)", "model.enable_layerwise_casting",
        "model.enable_group_offload", "model.add_adapter", "model.fuse_qkv_projections",
        "model.compile_repeated_blocks", "model.register_to_config",
    ), _ELSEWHERE)  # fmt: skip


# ---- on whom ---------------------------------------------------------------------------------------------------------


@cache
def diffusers_pipeline() -> Any:
    diffusers.utils.logging.set_verbosity_error()
    pipe = diffusers.QwenImagePipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def subject(of: str, kind: str | None) -> Any:
    """What is called; kind None: diffusers' own."""
    if of == "transformer":
        theirs = small_transformer()
        if kind != "stand-alone":
            if kind is not None:
                qwen_image_fast.accelerate(theirs)
            return theirs
        model = qwen_image_fast.QwenImageTransformer2DModel(**CONFIG).eval()
        model.load_state_dict(theirs.state_dict())
        return model
    if kind == "stand-alone":
        pipe = qwen_image_fast.QwenImagePipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(disable=True)
    else:
        pipe = copy.deepcopy(diffusers_pipeline())
        if kind is not None:
            qwen_image_fast.accelerate(pipe)
    return pipe.vae if of == "vae" else pipe


def results(kind: str | None) -> Iterable[tuple[Call, Any]]:
    """Every call with what it returned or raised; after an error the object is made anew."""
    subjects: dict[str, Any] = {}
    for call in CALLS:
        if call.of not in subjects:
            subjects[call.of] = subject(call.of, kind)
        try:
            result = call.run(subjects[call.of])
        except Exception as error:  # whatever a tree lacks
            result = error
            del subjects[call.of]
        yield call, result


@cache
def expected() -> dict[str, Any]:
    """What diffusers returns. AssertionError where it raises, or returns another type than the list says."""
    found = {}
    for call, result in results(None):
        assert type(result).__name__ == call.returns, (call.name, repr(result)[:300])
        found[call.name] = result
    return found


def numbers(value: Any) -> list[np.ndarray]:
    """All tensors, arrays and pictures in a result."""
    if isinstance(value, (torch.Tensor, np.ndarray, Image.Image)):
        return [np.asarray(value.detach() if isinstance(value, torch.Tensor) else value, dtype=float)]
    if isinstance(value, (list, tuple)):
        return [array for part in value for array in numbers(part)]
    parts = [getattr(value, name) for name in ("images", "sample") if hasattr(value, name)]
    return numbers(parts) if parts else []


def difference(got: Any, wanted: Any) -> str | None:
    """How a result differs from that of diffusers, in a few words."""
    if isinstance(got, Exception):
        return f"{type(got).__name__}: {str(got).splitlines()[0][:160]}" if str(got) else type(got).__name__
    if type(got).__name__ != type(wanted).__name__:
        return f"returns {type(got).__name__}, not {type(wanted).__name__}"
    arrays = numbers(wanted)
    if not arrays:
        return None if got == wanted else f"returns {got!r}, not {wanted!r}"
    ours = numbers(got)
    if [a.shape for a in ours] != [a.shape for a in arrays]:
        return f"shapes {[a.shape for a in ours]}, not {[a.shape for a in arrays]}"
    worst = max(float(abs(a - b).max() / max(b.std(), 1e-3)) for a, b in zip(ours, arrays))
    return None if worst < 2e-2 else f"differs by {worst:.1e} of the deviation"


def faults(kind: str) -> dict[str, str]:
    """What differs from diffusers, by call."""
    wanted = expected()
    found = {call.name: difference(result, wanted[call.name]) for call, result in results(kind)}
    return {name: fault for name, fault in found.items() if fault}
