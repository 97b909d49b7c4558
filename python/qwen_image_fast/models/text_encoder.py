"""Condition encoder of Qwen-Image: prompts to the last hidden states of Qwen2.5-VL, without its language-model head.

Source: Qwen-Image technical report, section 2.2 (a frozen Qwen2.5-VL, last layer as condition), and the prompt
templates of diffusers' Qwen-Image pipelines. The templates belong to the trained weights: a changed byte or drop count
changes every image. Needs transformers 4.52 or later.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import find_weights, load_state_into, read_config, read_header

logger = logging.getLogger(__name__)

_TURNS = "<|im_start|>system\n%s<|im_end|>\n<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n"
_EDIT_SYSTEM = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how"
    " the user's text instruction should alter or modify the image. Generate a new image that meets the user's"
    " requirements while maintaining consistency with the original input where appropriate."
)

# `*_DROP` is the number of tokens up to and with "<|im_start|>user\n"; their hidden states are no condition.
T2I_TEMPLATE = _TURNS % (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the"
    " objects and background:",
    "{}",
)
T2I_DROP = 34
EDIT_TEMPLATE = _TURNS % (_EDIT_SYSTEM, "<|vision_start|><|image_pad|><|vision_end|>{}")
EDIT_DROP = 64
EDIT_PLUS_TEMPLATE = _TURNS % (_EDIT_SYSTEM, "{}")
EDIT_PLUS_DROP = 64
# One per input image, n = 1, 2, …; the prompt follows the last one directly.
EDIT_PLUS_PICTURE = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"


def encode_prompts(
    text_encoder: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    *,
    max_sequence_length: int,
    template: str = T2I_TEMPLATE,
    drop: int = T2I_DROP,
    tokenizer_max_length: int = 1024,
) -> list[Tensor]:
    """Hidden states after the final norm of `template.format(prompt)`, without its first `drop` tokens and padding.

    Row i equals row i of diffusers' `encode_prompt` up to rounding. A prompt shares a batch only with prompts of equal
    token length, hence no attention mask and no influence of longer neighbours or of the tokenizer's padding side.
    Tokens past the limit are cut before the model runs, not after: attention is causal, so the kept rows are the same.
    A warning says how many were cut. Gradients flow if they are enabled.

    Args:
        text_encoder: transformers' `Qwen2_5_VLForConditionalGeneration`, whose `.model` is called and whose head is
            not, or the `Qwen2_5_VLModel` of `load_text_encoder`. It runs where its token embedding lies.
        tokenizer: the folder's tokenizer, `Qwen2Tokenizer`.
        prompts: at least one string.
        max_sequence_length: most tokens kept of a prompt after the dropped ones, 1 … `tokenizer_max_length`.
        template, drop: one of the pairs above.
        tokenizer_max_length: most tokens that the model was made for, without the dropped ones.

    Returns:
        One tensor [L_i, hidden] for each prompt, in the encoder's dtype, each with memory of its own.

    Raises:
        TypeError: `prompts` is a bare string or holds something else than strings.
        ValueError: no prompts, or `max_sequence_length` out of range.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise TypeError(f"encode_prompts: prompts must be a list of str, got {type(prompts).__name__}")
    if not prompts:
        raise ValueError("encode_prompts: prompts must hold at least one prompt, got an empty list")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"encode_prompts: prompts[{i}] must be a str, got {type(prompt).__name__}")
    if not 1 <= max_sequence_length <= tokenizer_max_length:
        raise ValueError(
            f"encode_prompts: max_sequence_length must be in 1..{tokenizer_max_length}, got {max_sequence_length}"
        )

    sequences = tokenizer([template.format(prompt) for prompt in prompts])["input_ids"]
    limit = drop + max_sequence_length
    by_length: dict[int, dict[tuple[int, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, ids in enumerate(sequences):
        if len(ids) > limit:
            logger.warning(
                "prompt %d has %d tokens with the template's end, but max_sequence_length is %d: the last %d were cut",
                *(i, len(ids) - drop, max_sequence_length, len(ids) - limit),
            )
        kept = tuple(ids[:limit])
        by_length[len(kept)][kept].append(i)  # equal prompts are encoded once

    model: Any = text_encoder.model if hasattr(text_encoder, "lm_head") else text_encoder
    device = model.get_input_embeddings().weight.device
    embeds: dict[int, Tensor] = {}
    for group in by_length.values():
        hidden = model(input_ids=torch.tensor(list(group), device=device), use_cache=False).last_hidden_state
        for row, owners in zip(hidden, group.values(), strict=True):
            embeds.update((i, row[drop:].clone()) for i in owners)
    return [embeds[i] for i in range(len(prompts))]


def pad_prompt_embeds(embeds: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Batch of prompts of different length: zeros on the right, and the mask of what is not padding.

    Args:
        embeds: tensors [L_i, J] of one dtype and device, as `encode_prompts` returns them; at least one.

    Returns:
        embeds [B, max L_i, J], and mask [B, max L_i], int64, 1 for a token, 0 for padding; None if nothing was padded.
    """
    if not embeds:
        raise ValueError("pad_prompt_embeds: embeds must hold at least one tensor, got an empty list")
    padded = nn.utils.rnn.pad_sequence(list(embeds), batch_first=True)
    lengths = torch.tensor([len(e) for e in embeds], device=padded.device)
    mask = (torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]).long()
    return padded, None if mask.all() else mask


def load_text_encoder(
    folder: str | Path,
    *,
    torch_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    vision: bool = True,
):
    """transformers' `Qwen2_5_VLModel` with the weights of a `text_encoder/` folder; without the language-model head.

    The weights go from the files to `device` one tensor at a time. Both key layouts that transformers has written are
    read (`model.layers`, `visual` and `model.language_model.layers`, `model.visual`). The model is in eval mode.

    Args:
        folder: holds `config.json` of a `Qwen2_5_VLForConditionalGeneration` and `model.safetensors`, whole or sharded.
        torch_dtype: dtype of the weights; None keeps the files' own.
        device: where the weights go.
        vision: False leaves out the vision tower (`model.visual` is None), which text-to-image does not use.

    Raises:
        FileNotFoundError: no config, no weights, or a missing shard.
        ValueError: another model family, only pickled weights, or weights that do not match the config.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    folder = Path(folder)
    family = read_config(folder).get("model_type")
    if family != "qwen2_5_vl":
        raise ValueError(f"load_text_encoder: model_type in {folder} must be 'qwen2_5_vl', got {family!r}")
    files = find_weights(folder, base_name="model")

    config = Qwen2_5_VLConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = Qwen2_5_VLModel(config)
    with torch.random.fork_rng(devices=[]):  # the twin draws random weights
        twin = Qwen2_5_VLModel(_without_layers(config))
    # The RoPE frequencies, which no file holds; transformers before 5 has such a module in every layer too.
    rope = {type(module): module for module in twin.modules() if module._buffers}
    for name, module in list(model.named_modules()):
        if module._buffers:
            model.set_submodule(name, rope[type(module)])
    if not vision:
        model.visual = None

    keys = [key for file in files for key in read_header(file)]
    if any(key.startswith("model.language_model.") for key in keys):
        holder = nn.ModuleDict({"model": model})
    else:
        holder = nn.ModuleDict({"model": model.language_model} | ({"visual": model.visual} if vision else {}))
    load_state_into(holder, files, dtype=torch_dtype, device=device, strict=False)  # passes over the head
    return model.eval()


def _without_layers(config):
    """The same configuration without layers and with one word: the same RoPE modules and next to no weights."""
    config = copy.deepcopy(config)
    config.vision_config.depth = 0
    config.vision_config.spatial_merge_size = 1
    config.text_config.num_hidden_layers = 0
    config.text_config.layer_types = []
    config.text_config.vocab_size = 1
    config.text_config.pad_token_id = None  # it must lie inside the vocabulary
    return config
