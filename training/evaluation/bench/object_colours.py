"""GenEval's colours of objects: a CLIP that has learnt nothing of them chooses among ten.

After evaluation/evaluate_images.py of github.com/djghosh13/geneval, which classifies with github.com/LAION-AI/
CLIP_benchmark: the ten colours, three texts for each, the mean of whose directions stands for the colour; an object on
grey #999 where it has a mask, cut out by its box; the colour with the largest cosine. There the model is open_clip's
ViT-L-14 of OpenAI in mixed precision; here it is the same model of transformers in float32, so that a colour may differ
where two are nearly alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from qwen_image_fast.training.evaluation.bench.clip import Clip

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
_GROUND = 0x99  # of all three channels


@dataclass(frozen=True)
class Found:
    """An object in a picture. name: of `coco.CLASSES`; box: left, top, right, bottom in pixels, right and bottom
    outside; mask: bool [H, W] of the picture, None where the detector makes none."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


def cut_out(picture: Image.Image, found: Found) -> Image.Image:
    """The object in its box, on grey where it has a mask, else with what is behind it."""
    left, top, right, bottom = (round(v) for v in found.box)
    if found.mask is not None:
        pixels = np.where(found.mask[..., None], np.asarray(picture.convert("RGB")), np.uint8(_GROUND))
        picture = Image.fromarray(pixels)
    return picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


class ObjectColours:
    """The colours of objects, by a CLIP."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self._directions: dict[str, torch.Tensor] = {}

    def __call__(self, picture: Image.Image, objects: Sequence[Found]) -> list[str]:
        """Of each object one of `COLOURS`."""
        if not objects:
            return []
        pictures = self.clip.pictures([cut_out(picture, one) for one in objects])
        return [COLOURS[int((self.directions(one.name) @ seen).argmax())] for one, seen in zip(objects, pictures)]

    def directions(self, name: str) -> torch.Tensor:
        """float32 [colours, width], of length 1 each: of every colour for objects of this class."""
        if name not in self._directions:
            texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in _TEMPLATES]
            each = self.clip.texts(texts).unflatten(0, (len(COLOURS), len(_TEMPLATES)))
            self._directions[name] = torch.nn.functional.normalize(each.mean(1), dim=-1)
        return self._directions[name]
