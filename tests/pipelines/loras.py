"""Adapters for the tiny model, and files of them in the styles that tools write."""

import torch

LAYERS = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_out.0", "transformer_blocks.4.img_mlp.net.2"]
MODULATION = [*LAYERS, "transformer_blocks.2.img_mod.1", "norm_out.linear"]
TIME_STEP = ["time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2"]
CALL = {"prompt": "a cat", "height": 32, "width": 48, "num_inference_steps": 2, "output_type": "latent"}

# Keys of A, B and alpha. Those without alpha have a scale of 1.
STYLES = {
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", None),
    "diffusers, alpha": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", "transformer.{}.alpha"),
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", None),
    "peft in memory": ("{}.lora_A.default.weight", "{}.lora_B.default.weight", None),
    "diffsynth": ("pipe.dit.{}.lora_A.default.weight", "pipe.dit.{}.lora_B.default.weight", None),
    "comfy": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight", "diffusion_model.{}.alpha"),
    "comfy, A and B": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight", None),
    "comfy, model": ("model.diffusion_model.{}.lora_A.weight", "model.diffusion_model.{}.lora_B.weight", None),
    "lightning": ("{}.lora_down.weight", "{}.lora_up.weight", "{}.alpha"),
    "onetrainer": ("transformer.{}.lora_down.weight", "transformer.{}.lora_up.weight", "transformer.{}.alpha"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha"),
    "kohya, two _": ("lora_unet__{}.lora_down.weight", "lora_unet__{}.lora_up.weight", "lora_unet__{}.alpha"),
    "lycoris": ("lycoris_{}.lora_down.weight", "lycoris_{}.lora_up.weight", "lycoris_{}.alpha"),
    "old onetrainer": (
        "lora_transformer_{}.lora_down.weight", "lora_transformer_{}.lora_up.weight", "lora_transformer_{}.alpha"
    ),
    "old diffusers": ("transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight", None),
}  # fmt: skip
FLAT = ("kohya", "kohya, two _", "lycoris", "old onetrainer")  # these have _ for the dots of a name


def draw(pipe, **call):
    return pipe(**{**CALL, **call}, seed=0, progress=False).images


def pairs(pipe, layers=LAYERS, rank=4, seed=0):
    """{layer: (A, B)} of an adapter that changes the image."""
    torch.manual_seed(seed)
    found = {name: pipe.transformer.get_submodule(name) for name in layers}
    return {
        name: (torch.randn(rank, m.in_features) / m.in_features**0.5, torch.randn(m.out_features, rank) / 2)
        for name, m in found.items()
    }


def state(adapter, style="diffusers", alpha=2.0):
    down, up, scale = STYLES[style]
    out = {}
    for name, (a, b) in adapter.items():
        flat = name.replace(".", "_") if style in FLAT else name
        out |= {down.format(flat): a, up.format(flat): b}
        if scale is not None:
            out[scale.format(flat)] = torch.as_tensor(alpha)
    return {k: v.contiguous() for k, v in out.items()}
