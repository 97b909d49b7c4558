"""Instructions with pictures to the hidden states of Qwen2.5-VL: the conditions of the editing models.

Source: Qwen2.5-VL (https://arxiv.org/abs/2502.13923): a picture is resized to multiples of 28 pixels, cut into 14-pixel
patches, 2 x 2 patches become one token, and its tokens stand at (frame, row, column) positions. diffusers with
transformers 5 gives them consecutive positions instead, which the released weights were not trained with
(https://github.com/huggingface/diffusers/issues/14194); `grid_positions=False` does that too.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..checkpoint import json_bytes, read_config
from ..files import atomic_write

IMAGE_TOKEN = "<|image_pad|>"


@dataclass(frozen=True)
class VisionProcessor:
    """Pictures to patches, with the fields of `preprocessor_config.json`; the numbers of Qwen2VLImageProcessor.

    min_pixels, max_pixels bound the area after resizing. patch_size, merge_size: a token covers their product, squared.
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> VisionProcessor:
        """Read `preprocessor_config.json`; both ways to write the bounds are read (`size`, `min_pixels`)."""
        return cls.from_config(read_config(folder, "preprocessor_config.json"))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VisionProcessor:
        size = config.get("size") or {}
        found: dict[str, Any] = {
            name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None
        }
        found.setdefault("min_pixels", size.get("shortest_edge", cls.min_pixels))
        found.setdefault("max_pixels", size.get("longest_edge", cls.max_pixels))
        found.update((name, tuple(v)) for name, v in found.items() if isinstance(v, list))
        return cls(**found)

    @classmethod
    def of(cls, processor: Any) -> VisionProcessor:
        """`processor` itself, or the settings of transformers' processor or image processor."""
        if isinstance(processor, cls):
            return processor
        return cls.from_config(getattr(processor, "image_processor", processor).to_dict())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `preprocessor_config.json`, which transformers reads too."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        content = json_bytes({"image_processor_type": "Qwen2VLImageProcessor", **asdict(self)})
        atomic_write(Path(folder) / "preprocessor_config.json", lambda file: file.write(content))

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width as multiples of a token's side, near the given ones and within the bounds of the area."""
        if max(height, width) > 200 * min(height, width):
            raise ValueError(
                f"VisionProcessor: image must have an aspect ratio of at most 200, got {width}x{height} pixels"
            )
        side = self.patch_size * self.merge_size
        new = [round(n / side) * side for n in (height, width)]
        if new[0] * new[1] > self.max_pixels:
            factor = math.sqrt(height * width / self.max_pixels)
            new = [max(side, math.floor(n / factor / side) * side) for n in (height, width)]
        elif new[0] * new[1] < self.min_pixels:
            factor = math.sqrt(self.min_pixels / (height * width))
            new = [math.ceil(n * factor / side) * side for n in (height, width)]
        return new[0], new[1]

    def __call__(self, image: Image.Image) -> tuple[Tensor, tuple[int, int, int]]:
        """An RGB picture -> float32 [patches, 3 * temporal_patch_size * patch_size^2], and its grid (1, rows, columns).

        Bicubic resize, (x / 255 - mean) / std; the patches of a token side by side.
        """
        height, width = self.resized(image.height, image.width)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 255
        pixels = (pixels - np.array(self.image_mean, np.float32)) / np.array(self.image_std, np.float32)
        rows, columns, merge = height // self.patch_size, width // self.patch_size, self.merge_size
        patches = torch.from_numpy(pixels).view(
            rows // merge, merge, self.patch_size, columns // merge, merge, self.patch_size, 3
        )
        # token row, token column, row and column in the token, channel, y, x; then one copy for each frame of a patch
        patches = patches.permute(0, 3, 1, 4, 6, 2, 5).unsqueeze(5)
        patches = patches.expand(*patches.shape[:5], self.temporal_patch_size, *patches.shape[6:])
        return patches.reshape(rows * columns, -1), (1, rows, columns)


class Seen(NamedTuple):
    """What Qwen2.5-VL's vision tower makes of a picture: [tokens, hidden], and its grid of patches."""

    tokens: Tensor
    grid: tuple[int, int, int]


def look(text_encoder: nn.Module, pictures: Sequence[Image.Image], processor: VisionProcessor) -> list[Seen]:
    """Run the vision tower once on all distinct objects of `pictures`, RGB; no picture sees another.

    Raises:
        ValueError: the encoder was loaded without its vision tower.
    """
    model: Any = text_encoder.model if hasattr(text_encoder, "lm_head") else text_encoder
    if not pictures:
        return []
    if model.visual is None:
        raise ValueError("look: text_encoder must have its vision tower, got one loaded without it")
    distinct = {id(picture): processor(picture) for picture in pictures}
    grids = [grid for _, grid in distinct.values()]
    weight = next(model.visual.parameters())
    patches = torch.cat([patches for patches, _ in distinct.values()]).to(weight.device, weight.dtype)
    out = model.visual(patches, grid_thw=torch.tensor(grids, device=weight.device))
    tokens = out if isinstance(out, Tensor) else out.pooler_output  # transformers before 5, and since
    parts = tokens.split([h * w // processor.merge_size**2 for _, h, w in grids])
    seen = dict(zip(distinct, map(Seen, parts, grids)))
    return [seen[id(picture)] for picture in pictures]


def encode_pictures(
    text_encoder: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    pictures: Sequence[Sequence[Seen]],
    *,
    drop: int,
    grid_positions: bool = True,
    one_batch: bool = False,
) -> list[Tensor]:
    """Hidden states after the final norm of prompts with pictures, without the first `drop` tokens.

    Prompts of one token length share a batch; sequences are not padded, so no prompt sees another. Gradients flow if
    they are enabled, into the vision tower too.

    Args:
        text_encoder: transformers' Qwen2.5-VL. tokenizer: the folder's tokenizer.
        prompts: complete texts, with one `<|image_pad|>` for each picture, in order.
        pictures: of each prompt, from `look`.
        grid_positions: as the model was trained; False: consecutive positions.
        one_batch: run all prompts at once, short ones filled up behind their end, which causal attention never shows
            them; equal up to rounding, and faster where prompts are short and lengths many, as in training.

    Returns:
        One tensor [L_i, hidden] for each prompt, in the encoder's dtype.

    Raises:
        ValueError: a prompt and its pictures do not fit together.
    """
    model: Any = text_encoder.model if hasattr(text_encoder, "lm_head") else text_encoder
    embedding = model.get_input_embeddings()
    device, merge = embedding.weight.device, model.config.vision_config.spatial_merge_size
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    by_length: dict[int, dict[tuple, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, (prompt, own) in enumerate(zip(prompts, pictures, strict=True)):
        pieces = prompt.split(IMAGE_TOKEN)
        if len(pieces) != len(own) + 1:
            raise ValueError(
                f"encode_pictures: prompt must hold one {IMAGE_TOKEN} for each of its {len(own)} pictures, "
                f"got {len(pieces) - 1} in prompt {i}"
            )
        text = pieces[0] + "".join(IMAGE_TOKEN * len(seen.tokens) + piece for seen, piece in zip(own, pieces[1:]))
        ids = tuple(tokenizer([text])["input_ids"][0])
        # equal prompts are encoded once
        by_length[0 if one_batch else len(ids)][ids, tuple(map(id, own))].append(i)

    states: dict[int, Tensor] = {}
    for group in by_length.values():
        longest = max(len(tokens) for tokens, _ in group)
        batch = torch.tensor([tokens + (0,) * (longest - len(tokens)) for tokens, _ in group], device=device)
        shown = [pictures[owners[0]] for owners in group.values()]
        embeds = embedding(batch)
        if any(shown):
            tokens = torch.cat([seen.tokens for each in shown for seen in each]).to(embeds)
            embeds = embeds.masked_scatter((batch == image_id)[..., None], tokens)
        positions = [
            picture_positions(row, [seen.grid for seen in each] if grid_positions else [], image_id, merge)
            for row, each in zip(batch.tolist(), shown)
        ]
        hidden = model.language_model(
            inputs_embeds=embeds,
            position_ids=torch.stack(positions, 1).to(device),
            attention_mask=torch.ones_like(batch),
            use_cache=False,
        ).last_hidden_state
        for row, (tokens, _), owners in zip(hidden, group, group.values(), strict=True):
            states.update((i, row[drop : len(tokens)].clone()) for i in owners)
    return [states[i] for i in range(len(prompts))]


def write_caption(
    text_encoder: Any,
    tokenizer: Any,
    picture: Image.Image,
    processor: VisionProcessor,
    prompt: str,
    length: int = 512,
    **options: Any,
) -> str:
    """What Qwen2.5-VL answers to a prompt with one `<|image_pad|>`, at most `length` tokens.

    Args:
        text_encoder: with its head, `load_captioner`; sampled as its generation_config says.
        options: of `generate`, instead of what the generation_config says.
    """
    if not hasattr(text_encoder, "lm_head"):
        raise ValueError("write_caption: text_encoder must have its language-model head, got one loaded without it")
    patches, grid = processor(picture)
    tokens = grid[1] * grid[2] // processor.merge_size**2
    inputs = tokenizer([prompt.replace(IMAGE_TOKEN, IMAGE_TOKEN * tokens)], return_tensors="pt")
    ids = inputs["input_ids"]
    given = {**inputs, "pixel_values": patches, "image_grid_thw": torch.tensor([grid])}
    if "mm_token_type_ids" in inspect.signature(text_encoder.forward).parameters:  # transformers since 5
        given["mm_token_type_ids"] = (ids == tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)).int()
    device = text_encoder.get_input_embeddings().weight.device
    options = {"max_new_tokens": length, **options}
    answer = text_encoder.generate(**{k: v.to(device) for k, v in given.items()}, **options)
    return tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True).strip()


def picture_positions(
    tokens: Sequence[int], grids: Sequence[tuple[int, int, int]], image_id: int, merge: int
) -> Tensor:
    """Positions of Qwen2.5-VL's three axes, int64 [3, len(tokens)].

    Text counts up on all axes. The tokens of a picture stand at (p, p + row, p + column), p the next position, and the
    text behind it starts at p + max(rows, columns). Without `grids` every token counts up.
    """
    pieces, at, start = [], 0, 0
    for _, height, width in grids:
        first = tokens.index(image_id, at)
        rows, columns = height // merge, width // merge
        pieces.append(torch.arange(start, start + first - at).expand(3, -1))
        start += first - at
        pieces.append(torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).T + start)
        at, start = first + rows * columns, start + max(rows, columns)
    pieces.append(torch.arange(start, start + len(tokens) - at).expand(3, -1))
    return torch.cat(pieces, 1)
