"""Folders of the released sizes with random weights, in bfloat16, 8 or 4 bits or NF4, written a block at a time.

The values of one block are drawn once; each block has them rolled by its number, so that no two are alike. Every byte
is written: nothing is sparse, linked or shared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

WIDTH, BLOCKS, TEXT = 3072, 60, 3584
LAYERS, TEXT_INNER, KEYS, WORDS = 28, 18944, 512, 152064
CONFIG = {
    "_class_name": "QwenImageTransformer2DModel", "patch_size": 2, "in_channels": 64, "out_channels": 16,
    "num_layers": BLOCKS, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": TEXT,
    "guidance_embeds": False, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
TEXT_CONFIG = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "hidden_size": TEXT,
    "intermediate_size": TEXT_INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 28, "num_key_value_heads": 4,
    "vocab_size": WORDS, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "max_position_embeddings": 128000,
    "max_window_layers": 28, "use_sliding_window": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}  # fmt: skip
Shapes = dict[str, tuple[int, ...]]
TEXT_REST: Shapes = {"model.embed_tokens.weight": (WORDS, TEXT), "model.norm.weight": (TEXT,)}
KINDS = {"uint16": "BF16", "int8": "I8", "uint8": "U8", "float32": "F32"}
NOT_ROLLED = ("weight_codebook", "comfy_quant", "quant_map", "nf4")  # what all numbers of a weight share
NF4 = np.array([
    -1, -0.6961928, -0.5250731, -0.39491748, -0.28444138, -0.18477343, -0.09105003, 0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1,
], np.float32)  # fmt: skip
NF4_BLOCK = 64  # numbers with one scale


def block_shapes() -> Shapes:
    linear: dict[str, tuple[int, int]] = {f"{s}_mod.1": (6 * WIDTH, WIDTH) for s in ("img", "txt")}
    names = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_out.0")
    linear |= {f"attn.{name}": (WIDTH, WIDTH) for name in names}
    for s in ("img", "txt"):
        linear |= {f"{s}_mlp.net.0.proj": (4 * WIDTH, WIDTH), f"{s}_mlp.net.2": (WIDTH, 4 * WIDTH)}
    shapes: Shapes = {f"attn.{n}.weight": (128,) for n in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}
    return shapes | with_bias(linear)


def rest_shapes() -> Shapes:
    linear = {
        "img_in": (WIDTH, 64), "txt_in": (WIDTH, TEXT), "norm_out.linear": (2 * WIDTH, WIDTH), "proj_out": (64, WIDTH),
        "time_text_embed.timestep_embedder.linear_1": (WIDTH, 256),
        "time_text_embed.timestep_embedder.linear_2": (WIDTH, WIDTH),
    }  # fmt: skip
    return {"txt_norm.weight": (TEXT,)} | with_bias(linear)


def layer_shapes() -> Shapes:
    found: Shapes = {f"{name}_layernorm.weight": (TEXT,) for name in ("input", "post_attention")}
    found |= with_bias({f"self_attn.{n}_proj": (TEXT if n == "q" else KEYS, TEXT) for n in "qkv"})
    mlp = {"gate_proj": (TEXT_INNER, TEXT), "up_proj": (TEXT_INNER, TEXT), "down_proj": (TEXT, TEXT_INNER)}
    return found | {"self_attn.o_proj.weight": (TEXT, TEXT)} | {f"mlp.{n}.weight": s for n, s in mlp.items()}


def with_bias(linear: Mapping[str, tuple[int, int]]) -> Shapes:
    found: Shapes = {}
    for name, shape in linear.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def drawn(shapes: Shapes, seed: int) -> dict[str, np.ndarray]:
    """bfloat16 as uint16: N(0, 1 / inputs), biases N(0, 0.0004), norms 1."""
    generator = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes.items():
        if len(shape) == 1 and "norm" in name and name.endswith("weight"):
            values = np.ones(shape, np.float32)
        else:
            values = generator.standard_normal(shape, np.float32)
            values *= shape[1] ** -0.5 if len(shape) == 2 else 0.02
        found[name] = (values.view(np.uint32) >> 16).astype(np.uint16)
    return found


def in_few_bits(tensors: Mapping[str, np.ndarray], precision: str) -> dict[str, np.ndarray]:
    """The matrices that compute in 8 or 4 bits as ComfyUI's files have them."""
    import torch

    from qwen_image_fast.models.int8_linear import comfy_tensors, quantised
    from qwen_image_fast.models.precision import LAYERS

    found: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or not LAYERS.fullmatch(f"transformer_blocks.0.{layer}"):
            found[name] = tensor
            continue
        weight = torch.from_numpy(tensor.view(np.int16)).view(torch.bfloat16)
        made = comfy_tensors(quantised(weight, precision=precision))
        found |= {f"{layer}.{suffix}": value.contiguous().numpy() for suffix, value in made.items()}
    return found


def in_nf4(tensors: Mapping[str, np.ndarray], of: str) -> dict[str, np.ndarray]:
    """The matrices whose names have `of` in them as bitsandbytes' files have them, without nested scales."""
    found: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or of not in name:
            found[name] = tensor
            continue
        blocks = (tensor.astype(np.uint32) << 16).view(np.float32).reshape(-1, NF4_BLOCK)
        scales = np.abs(blocks).max(1)
        codes = np.searchsorted((NF4[1:] + NF4[:-1]) / 2, blocks / scales[:, None]).astype(np.uint8)
        state = json.dumps({"quant_type": "nf4", "blocksize": NF4_BLOCK, "dtype": "bfloat16", "shape": tensor.shape})
        found |= {
            name: (codes[:, ::2] << 4 | codes[:, 1::2]).reshape(-1, 1), f"{name}.absmax": scales,
            f"{name}.quant_map": NF4, f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(state.encode(), np.uint8),
        }  # fmt: skip
    return found


def write_shard(path: Path, prefix: str, tensors: Mapping[str, np.ndarray], roll: int) -> dict[str, str]:
    """One safetensors file; the names in it and the file's name."""
    header: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        kind = KINDS[str(tensor.dtype)]
        header[prefix + name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            flat, by = tensor.reshape(-1), 0 if name.endswith(NOT_ROLLED) else roll
            file.write(flat[by:].data)
            file.write(flat[:by].data)
    return {name: path.name for name in header}


def write_folder(
    folder: Path, base: str, config: Mapping[str, object], rest: Shapes, values: Mapping[str, np.ndarray], prefix: str,
    count: int, last: Mapping[str, np.ndarray] | None = None,
) -> int:  # fmt: skip
    """A component's folder; returns the bytes of its weights. last: the values of the last block, where they differ."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = write_shard(folder / f"{base}-rest.safetensors", "", drawn(rest, 1), 0)
    for i in range(count):
        shard = folder / f"{base}-{i:02d}.safetensors"
        names |= write_shard(shard, f"{prefix}.{i}.", last if last and i == count - 1 else values, i)
    (folder / f"{base}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_transformer(folder: Path) -> int:
    base = "diffusion_pytorch_model"
    values = drawn(block_shapes(), 2)
    return write_folder(folder, base, CONFIG, rest_shapes(), values, "transformer_blocks", BLOCKS)


def write_quantised(folder: Path, precision: str) -> int:
    drawn_values, base = drawn(block_shapes(), 2), "diffusion_pytorch_model"
    values, last = (in_few_bits(drawn_values, kind) for kind in (precision, "int8"))
    return write_folder(folder, base, CONFIG, rest_shapes(), values, "transformer_blocks", BLOCKS, last)


def write_text_encoder(folder: Path) -> int:
    return write_folder(folder, "model", TEXT_CONFIG, TEXT_REST, drawn(layer_shapes(), 2), "model.layers", LAYERS)


def write_whole(folder: Path) -> int:
    """A pipeline but for scheduler and tokenizer: the blocks' large layers in 4 bits, modulation and text encoder in
    NF4, the VAE in bfloat16."""
    import torch

    from qwen_image_fast.models.vae import AutoencoderKLQwenImage

    of_block, base = in_nf4(drawn(block_shapes(), 2), "_mod."), "diffusion_pytorch_model"
    values, last = (in_few_bits(of_block, precision) for precision in ("int4", "int8"))
    size = write_folder(folder / "transformer", base, CONFIG, rest_shapes(), values, "transformer_blocks", BLOCKS, last)
    values = in_nf4(drawn(layer_shapes(), 3), "proj.")
    size += write_folder(folder / "text_encoder", "model", TEXT_CONFIG, TEXT_REST, values, "model.layers", LAYERS)
    vae = AutoencoderKLQwenImage().to(torch.bfloat16)
    vae.save_pretrained(folder / "vae")
    return size + sum(path.stat().st_size for path in (folder / "vae").glob("*.safetensors"))


WRITERS: Mapping[str, Callable[[Path], int]] = {
    "transformer": write_transformer, "text_encoder": write_text_encoder,
    "int8": partial(write_quantised, precision="int8"), "int4": partial(write_quantised, precision="int4"),
    "whole": write_whole,
}  # fmt: skip


def slice_of(folder: Path, small: Path, blocks: int) -> None:
    """A folder with the first blocks of a transformer, whose shards are the same files."""
    small.mkdir(parents=True, exist_ok=True)
    base = "diffusion_pytorch_model"
    (small / "config.json").write_text(json.dumps({**CONFIG, "num_layers": blocks}))
    weight_map = json.loads((folder / f"{base}.safetensors.index.json").read_text())["weight_map"]
    kept = {name: file for name, file in weight_map.items() if file in _first(base, blocks)}
    for file in _first(base, blocks):
        (small / file).unlink(missing_ok=True)
        (small / file).hardlink_to(folder / file)
    (small / f"{base}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": kept}))


def _first(base: str, blocks: int) -> list[str]:
    return [f"{base}-rest.safetensors", *(f"{base}-{i:02d}.safetensors" for i in range(blocks))]
