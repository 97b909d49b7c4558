"""A folder of images with their captions beside them."""

from __future__ import annotations

from pathlib import Path

from qwen_image_fast.training.data.collect import read_picture
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.data.screen import Screen
from qwen_image_fast.training.randomness import epoch_position
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.sources.sample import Sample

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


class ImageFolder:
    """Images of a folder, captions in text files of the same name; each epoch has an order of its own.

    Args:
        screen: says which pictures are used.
    """

    def __init__(self, folder: str, screen: Screen | None = None):
        self.screen = screen or Screen({})
        root = Path(folder)
        self.files = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            raise RecipeError(f"recipe: data.source must be a folder of images, got {folder}, which has none")
        for path in self.files:
            if not path.with_suffix(".txt").is_file():
                raise RecipeError(f"recipe: every image needs its caption, there is no {path.with_suffix('.txt')}")

    def sample(self, seed: int, index: int) -> Sample:
        path = self.files[epoch_position(seed, index, len(self.files))]
        caption, fault = "", ""
        try:
            caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            fault = f"its caption cannot be read: {error}"
        content, unread = read_picture(path)
        record = Record(content, {"raw": caption}, origin=str(path), fault=fault or unread)
        return Sample(self.screen.pixels(record), caption, origin=str(path))
