"""Names of tensors in LoRA files: which layer of a model they are for, and which part of its adapter."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..weights.formats import whose
from .int8_linear import Int8Linear
from .lora import LoraInt8Linear, LoraLinear

# The tensors of one layer by part: lora_A, lora_B, lora_B.bias, hada_w1_a, ..., lokr_w1, ..., diff, diff_b, alpha and
# dora_scale.
Parts = dict[str, Tensor]

_DOWN, _UP = r"(?P<lora_A>lora_A|lora_down|lora\.down)", r"(?P<lora_B>lora_B|lora_up|lora\.up)"
_MAGNITUDE = r"(?P<dora_scale>dora_scale|lora_magnitude_vector|magnitude_vector)"
_OTHERS = r"(?P<other>hada_w[12]_[ab]|lokr_w[12](?:_[ab])?)"
_DIFFERENCES = r"(?P<diff>diff|w_norm)|(?P<diff_b>diff_b|b_norm)|(?P<alpha>alpha)"
# PEFT puts the name of an adapter in memory ("default") behind the part.
_KEY = re.compile(
    rf"(?P<layer>.+?)[._](?:(?P<bias>lora_B(?:\.[\w-]+)?\.bias)"
    rf"|(?:{_DOWN}|{_UP}|{_MAGNITUDE}|{_OTHERS})(?:\.[\w-]+)?(?:\.weight)?|{_DIFFERENCES})"
)
# What comes before a layer's name: the wrappers of PEFT, the component in diffusers and DiffSynth, the model in
# ComfyUI, and what the trainers of kohya, OneTrainer and LyCORIS put before names with _ for dots; in any order.
_PREFIXES = (
    "base_model.model.", "diffusion_model.", "transformer.", "unet.", "pipe.", "dit.", "module.", "model.",
    "language_model.", "text_model.", "qwen25_7b.", "lora_unet_", "lora_transformer_", "lycoris_transformer_",
    "lycoris_", "lora_", "model_", "language_model_", "text_model_", "_",
)  # fmt: skip
_TEXT_ENCODER = re.compile(
    r"(?:base_model\.model\.)?(?:text_encoders?|(?:lora_|lycoris_)?te\d?|(?:lora_|lycoris_)text_encoder)(?P<rest>[._].+)"
)
_OTHER_KINDS = {
    "Tucker decompositions, for convolutions": ("lora_mid", "hada_t1", "hada_t2", "lokr_t2"), "OFT": ("oft_",),
    "GLoRA": (".a1.", ".b1."), "IA3": ("ia3", "on_input"), "whole layers": (".modules_to_save", ".set_weight"),
}  # fmt: skip


def split_components(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors for the transformer, and those for the text encoder without what names it."""
    transformer, text_encoder = {}, {}
    for key, tensor in state.items():
        if match := _TEXT_ENCODER.fullmatch(key):
            text_encoder[match["rest"].lstrip("._")] = tensor
        else:
            transformer[key] = tensor
    return transformer, text_encoder


def without_absent(text: Mapping[str, Tensor], encoder: nn.Module) -> dict[str, Tensor]:
    """The text encoder's tensors without those for parts that were not loaded: vision tower, language-model head."""
    there = {part for name, _ in encoder.named_modules() for part in name.split(".")}
    absent = [part for part in ("visual", "lm_head") if part not in there]
    return {key: t for key, t in text.items() if not any(re.search(rf"(?:^|[._]){part}[._]", key) for part in absent)}


def by_layer(state: Mapping[str, Tensor], model: nn.Module, left: list[str] | None = None) -> dict[str, Parts]:
    """The tensors of a file by layer of `model` and part.

    `left`: gets the keys that name nothing in the model, where others do; None: they are an error.

    Raises:
        ValueError: no tensors of this model, keys that name nothing in it, or two tensors of one part.
    """
    names = {}
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, LoraLinear, Int8Linear, LoraInt8Linear) or _is_norm(module):
            for spelling in (name, name.replace(".", "_")):
                names[_bare(spelling)] = names[spelling] = name
    found: dict[str, Parts] = defaultdict(dict)
    unknown = []
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        name = None if match is None else _layer_name(match["layer"], names)
        if match is None or name is None:
            unknown.append(key)
            continue
        part = match["other"] or ("lora_B.bias" if match["bias"] else None)
        part = part or next(k for k, v in match.groupdict().items() if v is not None and k != "layer")
        if part == "alpha" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            tensor = torch.tensor(tensor)
        if part in found[name]:
            raise ValueError(f"load_lora_weights: {name} must have one adapter, got a second one with {key}")
        found[name][part] = tensor
    if unknown and (own := whose(unknown)):
        raise ValueError(f"load_lora_weights: this is no LoRA: it holds the weights of {own}")
    if found and left is not None:
        left += unknown
    elif unknown or not found:
        raise ValueError(
            f"load_lora_weights: keys must be LoRA pairs of layers of {type(model).__name__}, got {shown(unknown)}"
        )
    return found


def is_lora(keys: Iterable[str]) -> bool:
    """Whether any of a file's keys is an adapter's."""
    matches = (_KEY.fullmatch(key) for key in keys)
    return any(m and (m["lora_A"] or m["lora_B"] or m["other"] or m["diff"] or m["diff_b"]) for m in matches)


def _is_norm(module: Any) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1


def _bare(name: str) -> str:
    """The name without prefixes of Qwen2.5-VL's own, which differ from release to release of transformers."""
    return re.sub(r"^(?:(?:model|language_model)[._])+", "", name)


def _layer_name(key: str, names: Mapping[str, str]) -> str | None:
    if key in names:
        return names[key]
    rests = (key[len(prefix) :] for prefix in _PREFIXES if key.startswith(prefix))
    return next((name for rest in rests if (name := _layer_name(rest, names)) is not None), None)


def shown(unknown: list[str]) -> str:
    """Keys that name nothing here, the first five of them, and what kind of adapter they are of."""
    kinds = [kind for kind, marks in _OTHER_KINDS.items() if any(m in key for m in marks for key in unknown)]
    first = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
    return (first or "none at all") + (f" ({', '.join(kinds)}: not supported)" if kinds else "")


def component_config(config: Mapping[str, Any], component: str) -> dict[str, Any]:
    """PEFT's configuration of a component: "component.field" in diffusers' metadata; one without dots is for all."""
    if not any("." in key for key in config):
        return dict(config)
    return {k.removeprefix(f"{component}."): v for k, v in config.items() if k.startswith(f"{component}.")}
