"""Condition encoder of Qwen-Image: prompts to the last hidden states of Qwen2.5-VL, without its language-model head.

Source: Qwen-Image technical report, section 2.2 (a frozen Qwen2.5-VL, last layer as condition), and the prompt
templates of diffusers' Qwen-Image pipelines. The templates belong to the trained weights: a changed byte or drop count
changes every image. Needs transformers 4.52 or later.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import check_fit, find_weights, load_state_into, read_config
from ..once import warn_once
from ..weights.formats import Opened, check_part, open_weights
from .streaming import refuse_moves, stream_layers

logger = logging.getLogger(__name__)

TURNS = "<|im_start|>system\n%s<|im_end|>\n<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n"
_EDIT_SYSTEM = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how"
    " the user's text instruction should alter or modify the image. Generate a new image that meets the user's"
    " requirements while maintaining consistency with the original input where appropriate."
)

# `*_DROP` is the number of tokens up to and with "<|im_start|>user\n"; their hidden states are no condition.
T2I_TEMPLATE = TURNS % (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the"
    " objects and background:",
    "{}",
)
T2I_DROP = 34
EDIT_TEMPLATE = TURNS % (_EDIT_SYSTEM, "<|vision_start|><|image_pad|><|vision_end|>{}")
EDIT_DROP = 64
EDIT_PLUS_TEMPLATE = TURNS % (_EDIT_SYSTEM, "{}")
EDIT_PLUS_DROP = 64
# One per input image, n = 1, 2, …; the prompt follows the last one directly.
EDIT_PLUS_PICTURE = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"

# What the Layered pipeline asks Qwen2.5-VL for a caption; the line breaks are diffusers' own.
_CAPTION = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n%s"
    "<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n"
)
CAPTION_ENGLISH = _CAPTION % (
    "# Image Annotator\n"
    "You are a professional\n"
    "image annotator. Please write an image caption based on the input image:\n"
    "1. Write the caption using natural,\n"
    "descriptive language without structured formats or rich text.\n"
    "2. Enrich caption details by including: \n"
    " - Object\n"
    "attributes, such as quantity, color, shape, size, material, state, position, actions, and so on\n"
    " - Vision Relations\n"
    "between objects, such as spatial relations, functional relations, possessive relations, attachment relations, "
    "action\n"
    "relations, comparative relations, causal relations, and so on\n"
    " - Environmental details, such as weather, lighting,\n"
    "colors, textures, atmosphere, and so on\n"
    " - Identify the text clearly visible in the image, without translation or\n"
    "explanation, and highlight it in the caption with quotation marks\n"
    "3. Maintain authenticity and accuracy:\n"
    " - Avoid\n"
    "generalizations\n"
    " - Describe all visible information in the image, while do not add information not explicitly shown in\n"
    "the image\n"
)
CAPTION_CHINESE = _CAPTION % (
    "# 图像标注器\n"
    "你是一个专业的图像标注器。请基于输入图像，撰写图注:\n"
    "1.\n"
    "使用自然、描述性的语言撰写图注，不要使用结构化形式或富文本形式。\n"
    "2. 通过加入以下内容，丰富图注细节：\n"
    " - 对象的属性：如数量、颜色、形状、大小、位置、材质、状态、动作等\n"
    " -\n"
    "对象间的视觉关系：如空间关系、功能关系、动作关系、从属关系、比较关系、因果关系等\n"
    " - 环境细节：例如天气、光照、颜色、纹理、气氛等\n"
    " - 文字内容：识别图像中清晰可见的文字，不做翻译和解释，用引号在图注中强调\n"
    "3.\n"
    "保持真实性与准确性：\n"
    " - 不要使用笼统的描述\n"
    " -\n"
    "描述图像中所有可见的信息，但不要加入没有在图像中出现的内容\n"
)


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
            warn_once(
                logger,
                text_encoder,
                "prompt %d has %d tokens with the template's end, but max_sequence_length is %d: the last %d were cut "
                "of %.40r",
                *(i, len(ids) - drop, max_sequence_length, len(ids) - limit, prompts[i]),
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
    variant: str | None = None,
    files: Sequence[Path] | None = None,
    loader: Callable = load_state_into,
):
    """transformers' `Qwen2_5_VLModel` with the weights of a `text_encoder/` folder; without the language-model head.

    The weights go from the files to `device` one tensor at a time. Both key layouts that transformers has written are
    read (`model.layers`, `visual` and `model.language_model.layers`, `model.visual`). The model is in eval mode.

    Args:
        folder: holds `config.json` of a `Qwen2_5_VLForConditionalGeneration` and `model.safetensors`, whole or sharded.
        torch_dtype: dtype of the weights; None keeps the files' own, bfloat16 if they are quantised.
        device: where the weights go.
        vision: False leaves out the vision tower (`model.visual` is None), which text-to-image does not use.
        variant: "fp16" reads `model.fp16.safetensors`.
        files: of weights, in place of the folder's: ComfyUI's file, or llama.cpp's with its `mmproj` file.
        loader: what gives the model its weights; what it returns is the model's `streamed`.

    Raises:
        FileNotFoundError: no config, no weights, or a missing shard.
        ValueError: another model family, only pickled weights, or weights that do not match the config.
    """
    folder = Path(folder)
    files, opened = _open(folder, vision, variant, files)
    model = empty_text_encoder(folder, vision)
    holder = under_stored_names(model, opened.weights)
    where = torch.device(device)
    streamed = loader(holder, opened, dtype=torch_dtype, device=where, strict=False, part="text_encoder")  # no head
    if streamed is not None:
        stream_layers(streamed, model.language_model.layers)
        refuse_moves(model)
    model.streamed = streamed
    model.weight_files, model.settings_folder = files, folder
    return model.eval()


def check_text_encoder(folder: Path, vision: bool, variant: str | None, files: Sequence[Path] | None) -> None:
    """What `load_text_encoder` would refuse, from headers, without reading a weight; raises as it does."""
    opened = _open(folder, vision, variant, files)[1]
    check_fit(under_stored_names(empty_text_encoder(folder, vision), opened.weights), opened.weights, strict=False)


def _open(folder: Path, vision: bool, variant: str | None, files: Sequence[Path] | None) -> tuple[list[Path], Opened]:
    """The files of the weights, given or of the folder, opened."""
    family = read_config(folder).get("model_type")
    if family != "qwen2_5_vl":
        raise ValueError(f"load_text_encoder: model_type in {folder} must be 'qwen2_5_vl', got {family!r}")
    if files is None:
        own = find_weights(folder, base_name="model", variant=variant)
        return own, open_weights(own, "text_encoder")
    files = list(files)
    opened = open_weights(files, "text_encoder")
    check_part(opened, files, "text_encoder")
    if vision and not any("visual." in name for name in opened.weights):
        raise ValueError(
            f"load_text_encoder: {' and '.join(map(str, files))} must hold the vision tower, which pictures need; "
            "llama.cpp has it in a second file, named mmproj: name both"
        )
    return files, opened


def empty_text_encoder(folder: Path, vision: bool) -> Any:
    """The model of a folder's configuration on the meta device, but for what no file holds."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    config = Qwen2_5_VLConfig.from_pretrained(folder)
    with torch.device("meta"):
        model: Any = Qwen2_5_VLModel(config)
    with torch.random.fork_rng(devices=[]):  # the twin draws random weights
        twin = Qwen2_5_VLModel(_without_layers(config))
    # The RoPE frequencies, which no file holds; transformers before 5 has such a module in every layer too.
    rope = {type(module): module for module in twin.modules() if module._buffers}
    for name, module in list(model.named_modules()):
        if module._buffers:
            model.set_submodule(name, rope[type(module)])
    if not vision:
        model.visual = None
    return model


def under_stored_names(model: Any, keys: Iterable[str]) -> nn.ModuleDict:
    """The model's parts in a module whose state dict has the names of the files, of which `keys` are some."""
    if any(key.startswith("model.language_model.") for key in keys):
        return nn.ModuleDict({"model": model})
    visual = {} if model.visual is None else {"visual": model.visual}
    return nn.ModuleDict({"model": model.language_model} | visual)


def load_captioner(
    folder: str | Path,
    *,
    torch_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    variant: str | None = None,
):
    """transformers' whole `Qwen2_5_VLForConditionalGeneration`, head and all, which can write captions."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    read_config(folder, "config.json")  # without one, transformers builds its default, of 7 B random weights
    dtype = "auto" if torch_dtype is None else torch_dtype
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, torch_dtype=dtype, variant=variant, use_safetensors=True
    )
    return model.to(device).eval()


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
