"""The calls that diffusers' tests make of its transformer, ControlNet and VAE."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from accelerate_harness import inputs
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from tests.reference_api.ways import (
    CPU,
    TARGETS,
    Row,
    after,
    decoded,
    encoded,
    forward,
    fresh,
    gradient,
    latents,
    of_package,
    pixels,
    raised,
    reloaded_model,
    saved,
    tiled,
)


class Weaker(QwenDoubleStreamAttnProcessor2_0):
    """A user's own attention."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(0.5 * stream for stream in super().__call__(*args, **kwargs))


def with_processor(model: Any, one: bool) -> Any:
    plain = model.attn_processors
    model.set_attn_processor(Weaker() if one else {name: Weaker() for name in plain})
    return [sorted(plain), forward(model).sample]


def with_backend(model: Any) -> Any:
    """`set_attention_backend` also sets a default of the process, which is put back."""
    before = registry.get_active_backend()[0]
    try:
        model.set_attention_backend("_native_math")
        chosen = forward(model).sample
        model.reset_attention_backend()
        return [chosen, forward(model).sample]
    finally:
        registry.set_active_backend(before)


def cached(model: Any, config: Callable[[], Any]) -> Any:
    """Two passes with a step cache, the second of other tokens, and one without it."""
    model.enable_cache(config())
    given = inputs()
    with torch.no_grad(), model.cache_context("cond"):
        first = model(**given).sample
        given["hidden_states"] = given["hidden_states"] * 1.01
        second = model(**given).sample
    assert model.is_cache_enabled
    model.disable_cache()
    return [first, second, forward(model).sample]


def in_context(model: Any) -> Any:
    with model.cache_context("cond"):
        return forward(model).sample


def cast(model: Any) -> Any:
    """In 8-bit floating point, computed in float32."""
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return forward(model).sample


def adapted(model: Any, name: str = "default", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False)
    model.add_adapter(config, adapter_name=name)
    return model


def with_adapter(model: Any) -> Any:
    return forward(adapted(model)).sample


def adapter_file(model: Any) -> Any:
    """A LoRA that was saved, unloaded and loaded."""
    adapted(model)
    before = forward(model).sample
    with tempfile.TemporaryDirectory() as folder:
        model.save_lora_adapter(folder)
        model.unload_lora()
        without = forward(model).sample
        model.load_lora_adapter(folder, prefix=None, use_safetensors=True)
    return [before, without, forward(model).sample]


def adapters(model: Any) -> Any:
    """Two LoRAs: one, both weighted, none, merged, and after one was deleted."""
    adapted(adapted(model, "a"), "b", 1)
    found = []
    for step in (
        lambda: model.set_adapter("a"), lambda: model.set_adapters(["a", "b"], [0.5, 2.0]),
        lambda: model.disable_adapters(), lambda: model.enable_adapters(), lambda: model.fuse_lora(lora_scale=0.5),
        lambda: model.unfuse_lora(), lambda: model.delete_adapters("b"),
    ):  # fmt: skip
        step()
        found.append(forward(model).sample)
    return [*found, model.active_adapters()]


def averaged(model: Any) -> Any:
    """An exponential moving average of the weights beside training."""
    ema = EMAModel(model.parameters(), decay=0.5)
    model.train()
    model(**inputs()).sample.square().mean().backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0 if p.grad is None else 0.1 * p.grad
    ema.step(model.parameters())
    ema.copy_to(model.parameters())
    return forward(model.eval()).sample


def fused(model: Any) -> Any:
    model.fuse_qkv_projections()
    both = [forward(model).sample]
    model.unfuse_qkv_projections()
    return [*both, forward(model).sample]


def compiled(model: Any) -> Any:
    """Without a graph break."""
    torch.compiler.reset()
    whole = torch.compile(model, fullgraph=True, backend="eager")
    return whole(**inputs(encoder_hidden_states_mask=None)).sample.detach()


def exported(model: Any) -> Any:
    given = {**inputs(encoder_hidden_states_mask=None), "return_dict": False}
    with torch.no_grad():
        return torch.export.export(model, (), given, strict=False).module()(**given)[0]


def blocks_compiled(model: Any) -> Any:
    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    return forward(model).sample


def configured(model: Any) -> Any:
    model.register_to_config(test_attribute=5)
    return model.config.test_attribute


def missing(model: Any) -> str:
    """What is said of an attribute that there is not."""
    try:
        return model.does_not_exist
    except AttributeError as error:
        return str(error)


def typed(**loading: Any) -> Callable[[Any], Any]:
    return lambda m: reloaded_model(m, lambda again: again.dtype, {"torch_dtype": torch.bfloat16, **loading})


TRANSFORMER: list[Row] = [
    ("model(...)", "Transformer2DModelOutput", forward),
    ("model(...).sample", "Tensor", lambda m: forward(m).sample),
    ("model(...)[0]", "Tensor", lambda m: forward(m)[0]),
    ("model(...).values()", "list", lambda m: list(forward(m).values())),
    ("model(..., return_dict=False)", "tuple", lambda m: forward(m, return_dict=False)),
    ("model(..., attention_kwargs={})", "Tensor", lambda m: forward(m, attention_kwargs={}).sample),
    ("model(img_shapes=[(1, h, w)])", "Tensor", lambda m: m(**inputs(img_shapes=[(1, 4, 3)] * 2)).sample.detach()),
    ("model(encoder_hidden_states_mask=bool)", "Tensor", lambda m: m(**{
        **inputs(), "encoder_hidden_states_mask": torch.tensor([[1, 0, 1, 0, 0], [1, 0, 1, 1, 0]]).bool()
    }).sample.detach()),
    ("model(...).sample.backward()", "Tensor", gradient),
    ("model.enable_gradient_checkpointing()", "Tensor", after(
        "enable_gradient_checkpointing", then="disable_gradient_checkpointing", draw=gradient)),
    ("Model._supports_gradient_checkpointing, _keep_in_fp32_modules", "list",
     lambda m: [type(m)._supports_gradient_checkpointing, type(m)._keep_in_fp32_modules]),
    ("model.is_gradient_checkpointing", "bool", lambda m: m.is_gradient_checkpointing),
    ("model.train(), eval()", "Tensor", lambda m: (m.train(), m.eval(), forward(m).sample)[2]),
    ("EMAModel(model.parameters())", "Tensor", fresh(averaged)),
    ("model.config", "list", lambda m: [m.config.num_layers, m.config["in_channels"], *m.config.axes_dims_rope]),
    ("Model.from_config(model.config)", "int", lambda m: len(type(m).from_config(m.config).transformer_blocks)),
    ("model.save_pretrained(), from_pretrained()", "Tensor", lambda m: reloaded_model(m).sample),
    ("model.save_pretrained(variant=), from_pretrained(variant=)", "Tensor",
     lambda m: reloaded_model(m, variant="fp16").sample),
    ("from_pretrained() of a variant alone", "str", raised(
        lambda m: saved(m, lambda folder: type(m).from_pretrained(folder), variant="fp16"))),
    ("model.save_pretrained(max_shard_size=)", "Tensor", lambda m: reloaded_model(m, max_shard_size="20KB").sample),
    ("from_pretrained(torch_dtype=)", "dtype", typed()),
    ("from_pretrained(low_cpu_mem_usage=)", "dtype", typed(low_cpu_mem_usage=False)),
    ("model.dtype", "dtype", lambda m: m.dtype),
    ("model.device", "device", lambda m: m.device),
    ("model.to(torch.float32)", "Tensor", lambda m: forward(m.to(torch.float32)).sample),
    ("model.num_parameters(only_trainable=)", "int", lambda m: m.num_parameters(only_trainable=True)),
    ("model.get_memory_footprint()", "int", lambda m: m.get_memory_footprint()),
    ("model.state_dict()", "list", lambda m: sorted(m.state_dict())),
    ("model.does_not_exist", "str", missing),
    ("copy.deepcopy(model)", "Tensor", lambda m: forward(copy.deepcopy(m)).sample),
    ("torch.compile(model, fullgraph=True)", "Tensor", fresh(compiled)),
    ("torch.export.export(model)", "Tensor", fresh(exported)),
    ("model.attn_processors, set_attn_processor(processor)", "list", fresh(lambda m: with_processor(m, True))),
    ("model.set_attn_processor({...})", "list", fresh(lambda m: with_processor(m, False))),
    ("model.set_attention_backend(name), reset_attention_backend()", "list", fresh(with_backend)),
    ("model.enable_cache(FirstBlockCacheConfig), disable_cache()", "list", fresh(lambda m: cached(
        m, lambda: FirstBlockCacheConfig(threshold=1.0)))),
    ("model.enable_cache(PyramidAttentionBroadcastConfig), disable_cache()", "list", fresh(lambda m: cached(
        m, lambda: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500)))),
    ("model.is_cache_enabled", "bool", lambda m: m.is_cache_enabled),
    ("model.cache_context(name)", "Tensor", in_context),
    ("model.enable_layerwise_casting(storage_dtype=, compute_dtype=)", "Tensor", fresh(cast)),
    ("model.enable_group_offload(onload_device, offload_type=, num_blocks_per_group=)", "Tensor", fresh(after(
        "enable_group_offload", CPU, offload_type="block_level", num_blocks_per_group=1,
        draw=lambda m: forward(m).sample))),
    ("model.add_adapter(config)", "Tensor", fresh(with_adapter)),
    ("model.save_lora_adapter(), unload_lora(), load_lora_adapter()", "list", fresh(adapter_file)),
    ("model.set_adapter(), set_adapters(), disable_adapters(), fuse_lora(), delete_adapters()", "list",
     fresh(adapters)),
    ("model.fuse_qkv_projections(), unfuse_qkv_projections()", "list", fresh(fused)),
    ("model.compile_repeated_blocks(fullgraph=)", "Tensor", fresh(blocks_compiled)),
    ("model.register_to_config(...)", "int", fresh(configured)),
]  # fmt: skip

# ---- ControlNet and VAE ----------------------------------------------------------------------------------------------


def residuals(net: Any, **given: Any) -> Any:
    with torch.no_grad():
        return net(**inputs(), controlnet_cond=torch.linspace(-1, 1, 2 * 12 * 64).sin().reshape(2, 12, 64), **given)


CONTROLNET: list[Row] = [
    ("controlnet(...)", "QwenImageControlNetOutput", residuals),
    ("controlnet(..., return_dict=False)", "list", lambda n: residuals(n, return_dict=False)),
    ("controlnet(conditioning_scale=).controlnet_block_samples", "list",
     lambda n: list(residuals(n, conditioning_scale=0.5).controlnet_block_samples)),
    ("QwenImageMultiControlNetModel([controlnet])(...)", "list", lambda n: list(of_package(
        n, "QwenImageMultiControlNetModel")([n])(
            **inputs(), controlnet_cond=[torch.ones(2, 12, 64)] * 2, conditioning_scale=[0.5, 0.25],
            return_dict=False))),
    ("controlnet.save_pretrained(), from_pretrained()", "list", lambda n: reloaded_model(
        n, lambda again: list(residuals(again).controlnet_block_samples))),
    ("controlnet.config", "int", lambda n: n.config.extra_condition_channels),
]  # fmt: skip
VAE: list[Row] = [
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
    ("vae.use_tiling, use_slicing", "list", lambda v: [v.use_tiling, v.use_slicing]),
    ("vae.save_pretrained(), from_pretrained()", "Tensor", lambda v: reloaded_model(v, decoded).sample),
    ("vae.dtype", "dtype", lambda v: v.dtype),
    ("vae.num_parameters()", "int", lambda v: v.num_parameters()),
]  # fmt: skip
