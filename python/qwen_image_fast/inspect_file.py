"""What a file of weights is that holds no part of Qwen-Image: a LoRA, and for which model, or what else."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qwen_image_fast.folders import SHIPPED, read_json
from qwen_image_fast.models.lora_files import TASKS, describe_adapters, find_lora, lora_config
from qwen_image_fast.models.lora_keys import by_layer, component_config, is_lora, split_components
from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
from qwen_image_fast.tensor_files import read_header
from qwen_image_fast.weights.formats import contents, parts_of_names

SHOWN = 3  # names of tensors
# Of a first key, what kind of tool writes such ones.
STYLES = (
    (r"base_model\.model\.", "PEFT"), (r"lora_unet_", "kohya"), (r"lycoris_", "LyCORIS"),
    (r"lora_transformer_", "OneTrainer"), (r"pipe\.dit\.", "DiffSynth"), (r"(model\.)?diffusion_model\.", "ComfyUI"),
    (r"text_encoders?\.|transformer\..*(lora_[AB]|lora\.(down|up))\.weight", "diffusers"),
    (r"transformer\.", "OneTrainer or LyCORIS"), (r".*lora_[AB]\.\w+\.weight", "PEFT, of an adapter in memory"),
    (r".*lora_(down|up)", "bare names, as Lightning's"),
)  # fmt: skip


def other_file(name_or_path: str | os.PathLike) -> Path | None:
    """The file that `describe` is for: one that holds no part of Qwen-Image, or a folder's that is no model's.

    None: it is a model, on the hub, or not there.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if any((path / name).is_file() for name in ("model_index.json", "config.json")):
            return None
        return find_lora(path) if list(path.glob("*.safetensors")) else None
    if not path.is_file():
        return None
    tensors = contents(path)[0]
    return path if is_lora(tensors) or not parts_of_names(tensors) else None


def describe(path: Path) -> dict[str, Any]:
    """By what is said: values that are text, numbers, or lists of them."""
    tensors, metadata, architecture = contents(path)
    found: dict[str, Any] = {"file": str(path), "bytes": path.stat().st_size}
    if is_lora(tensors):
        return {**found, **_lora(path, metadata)}
    kinds: Counter[str] = Counter()
    for tensor in tensors.values():
        kinds[tensor.kind] += math.prod(tensor.shape)
    return {
        **found,
        "is": f"a GGUF of the architecture {architecture or 'that it does not say'}" if path_is_gguf(path)
        else "a safetensors file",
        "of": "no part of Qwen-Image, and no LoRA",
        "tensors": len(tensors),
        "values": {kind: count for kind, count in kinds.most_common()},
        "names": list(tensors)[:SHOWN],
        "metadata": {key: value if len(value) < 200 else f"{value[:200]} ..." for key, value in metadata.items()},
    }  # fmt: skip


def path_is_gguf(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def _lora(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    state = _headers(path)
    config = lora_config(path, metadata)
    own, text = split_components(state)
    keys = [key for key in state if not key.endswith("alpha")]
    found: dict[str, Any] = {
        "is": "an adapter",
        "keys": next((s for p, s in STYLES if re.match(p, keys[0])), "unknown"),
    }
    kinds: Counter[str] = Counter(str(t.dtype).removeprefix("torch.") for t in state.values() if t.is_meta)
    found |= {"type": ", ".join(kinds), "values": sum(t.numel() for t in state.values())}
    fits, problems = [], {}
    for name, model_config in models().items():
        model = QwenImageTransformer2DModel.empty(model_config)
        try:
            layers = by_layer(own, model)
            adapters = describe_adapters(layers, model, component_config(config, "transformer"))
        except ValueError as error:
            problems[name] = str(error).partition(": ")[2]
            continue
        fits.append(name)
        found |= {
            "is": " and ".join(sorted({a.kind for a in adapters.values()})),
            "layers": len(layers),
            "rank": sorted({a.rank for a in adapters.values() if a.rank is not None}),
            "alpha": sorted({a.alpha for a in adapters.values() if a.alpha is not None}),
        }
    if TASKS in metadata:
        found["trained on"] = metadata[TASKS].replace("ti2i", "edits").replace("t2i", "pictures")
    if text:
        found["text encoder"] = f"{len(text)} tensors"
    found["fits"] = fits
    if not fits and own:
        found["problems"] = problems
    return found


def _headers(path: Path) -> dict[str, Tensor]:
    """The tensors on the meta device; those of one number, as alphas are, with their values."""
    with safe_open(path, framework="pt") as content:
        return {
            name: content.get_tensor(name) if math.prod(entry.shape) == 1
            else torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            for name, entry in read_header(path).items()
        }  # fmt: skip


def models() -> dict[str, dict[str, Any]]:
    """Configurations of the transformers that an adapter may be for."""
    shipped = read_json(SHIPPED / "transformer" / "config.json")
    return {"the released Qwen-Image transformers": {}, "tiny, the model of the package": shipped}


def lines(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of what there is to show."""
    return [(name, _text(value)) for name, value in found.items() if value not in ([], {}, "", None)]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {one:,}" if isinstance(one, int) else f"{key}: {one}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
