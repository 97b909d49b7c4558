"""The names that other tools give to the tensors of a part, and ours, which are those of the released folders.

ComfyUI: prefixes, one for each part where a file holds several; the VAE under the names of Wan's. llama.cpp: names of
its own for the text encoder, whose vision tower is a second file (`mmproj`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from qwen_image_fast.weights.stored import Entry, JoinedWeight, StoredWeight, Weight

PREFIXES = {
    "transformer": re.compile(r"(model\.)?diffusion_model\.|transformer\."),
    "vae": re.compile(r"(first_stage_model|vae)\."),
    "text_encoder": re.compile(r"(text_encoders?|cond_stage_model)\.([\w.]+?\.transformer\.)?"),
}
# What some tensor of a part is called, once names are ours.
KNOWN = {
    "transformer": re.compile(r"transformer_blocks\.0\.img_mod\.(1\.q?weight|vectors)"),
    "vae": re.compile(r"decoder\.mid_block\.resnets\.0\.norm1\.gamma"),
    "text_encoder": re.compile(
        r"(model\.)?(language_model\.)?layers\.0\.self_attn\.q_proj\.weight|(model\.)?visual\..*"
    ),
}


def parts_of(names: Iterable[str]) -> set[str]:
    """The parts that a file holds under a prefix of their own."""
    return {part for name in names for part, prefix in PREFIXES.items() if prefix.match(name)}


def without_prefix(names: Iterable[str], part: str) -> dict[str, str]:
    """The names of one part's tensors, and what they are called without their prefix; all, where none has one."""
    names = list(names)
    prefix = PREFIXES[part]
    own = {name: prefix.sub("", name, count=1) for name in names if prefix.match(name)}
    return own or {name: name for name in names if not any(p.match(name) for p in PREFIXES.values())}


# ---- the VAE ------------------------------------------------------------------------------------------------------

_VAE_ENDS = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_VAE_STARTS = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    "encoder.conv1": "encoder.conv_in",
    "decoder.conv1": "decoder.conv_in",
    "encoder.head.0": "encoder.norm_out",
    "decoder.head.0": "decoder.norm_out",
    "encoder.head.2": "encoder.conv_out",
    "decoder.head.2": "decoder.conv_out",
    "encoder.middle.0": "encoder.mid_block.resnets.0",
    "decoder.middle.0": "decoder.mid_block.resnets.0",
    "encoder.middle.1": "encoder.mid_block.attentions.0",
    "decoder.middle.1": "decoder.mid_block.attentions.0",
    "encoder.middle.2": "encoder.mid_block.resnets.1",
    "decoder.middle.2": "decoder.mid_block.resnets.1",
}


def of_wan_vae(names: Iterable[str]) -> dict[str, str]:
    """Names of a VAE in Wan's form, and ours; those of another form stay."""
    names = list(names)
    if "decoder.middle.0.residual.0.gamma" not in names:
        return {name: name for name in names}
    ups = _up_blocks(names)
    return {name: _of_wan(name, ups) for name in names}


def _up_blocks(names: Iterable[str]) -> dict[str, str]:
    """Wan's decoder numbers all its layers in one row; a resampling layer ends a block."""
    layers: dict[int, bool] = {}
    for name in names:
        if match := re.match(r"decoder\.upsamples\.(\d+)\.(\w+)", name):
            number = int(match[1])
            layers[number] = layers.get(number, False) or match[2] in ("resample", "time_conv")
    places, block, layer = {}, 0, 0
    for number in sorted(layers):
        if layers[number]:
            places[f"decoder.upsamples.{number}"] = f"decoder.up_blocks.{block}.upsamplers.0"
            block, layer = block + 1, 0
        else:
            places[f"decoder.upsamples.{number}"] = f"decoder.up_blocks.{block}.resnets.{layer}"
            layer += 1
    return places


def _of_wan(name: str, ups: Mapping[str, str]) -> str:
    name = re.sub(r"^encoder\.downsamples\.", "encoder.down_blocks.", name)
    name = re.sub(r"^decoder\.upsamples\.\d+", lambda match: ups[match[0]], name)
    for theirs, ours in _VAE_STARTS.items():
        if name.startswith(theirs + "."):
            name = ours + name.removeprefix(theirs)
            break
    for theirs, ours in _VAE_ENDS.items():
        name = name.replace(f".{theirs}.", f".{ours}.")
    return name


# ---- the text encoder ---------------------------------------------------------------------------------------------

_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "v.patch_embd": "visual.patch_embed.proj",
    "v.post_ln": "visual.merger.ln_q",
    "mm.0": "visual.merger.mlp.0",
    "mm.2": "visual.merger.mlp.2",
}
_LLAMA_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_LLAMA_VISION = {
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_qkv": "attn.qkv",
    "attn_out": "attn.proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ln1": "norm1",
    "ln2": "norm2",
}


def of_llama(name: str) -> str:
    """llama.cpp's name of a tensor of Qwen2.5-VL, in ours; another name stays."""
    if match := re.fullmatch(r"(v\.)?blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        tower, number, layer, kind = match.groups()
        table, place = (_LLAMA_VISION, "visual.blocks") if tower else (_LLAMA_LAYER, "model.layers")
        return f"{place}.{number}.{table[layer]}.{kind}" if layer in table else name
    match = re.fullmatch(r"([\w.]+?)(\.(weight|bias)(\.1)?)", name)
    return _LLAMA[match[1]] + match[2] if match and match[1] in _LLAMA else name


def join_vision(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """llama.cpp's vision tower has queries, keys and values apart, and the two moments of the patch embedding."""
    joined: dict[str, Weight] = {}
    for name, weight in weights.items():
        if match := re.fullmatch(r"(visual\.blocks\.\d+\.attn)\.([qkv])\.(weight|bias)", name):
            if match[2] == "q":
                pieces = [weights.get(f"{match[1]}.{which}.{match[3]}") for which in "qkv"]
                joined[f"{match[1]}.qkv.{match[3]}"] = _join(name, pieces, 0)
        elif name == "visual.patch_embed.proj.weight" and len(weight.shape) == 4:
            joined[name] = _join(name, [weight, weights.get(f"{name}.1")], 2, stacked=True)
        elif name != "visual.patch_embed.proj.weight.1":
            joined[name] = weight
    return joined


def _join(name: str, pieces: Iterable[Weight | None], axis: int, stacked: bool = False) -> JoinedWeight:
    there = [piece for piece in pieces if isinstance(piece, (Entry, StoredWeight))]
    if len(there) != len(list(pieces)) or len({piece.shape[1:] for piece in there}) > 1:
        raise ValueError(f"{name} lacks what belongs to it (keys, values, second moment); download the file again")
    return JoinedWeight(tuple(there), axis, stacked)
