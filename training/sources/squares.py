"""A toy: coloured squares, drawn."""

from __future__ import annotations

import numpy as np

from qwen_image_fast.training.randomness import generator
from qwen_image_fast.training.sources.sample import Sample

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "black": (20, 20, 20)}
PLACES = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}


class Squares:
    """A coloured square in one quarter of a white image: the smallest task with something to learn from the text.

    An edit shows the square in another colour first.
    """

    def __init__(self, size: int = 64):
        self.size = size

    def sample(self, seed: int, index: int) -> Sample:
        colour, _, place = self._choose(seed, index)
        return Sample(self.draw(colour, place), f"{colour} square, {place}")

    def edit(self, seed: int, index: int) -> Sample:
        colour, before, place = self._choose(seed, index)
        return Sample(self.draw(colour, place), f"make it {colour}", (self.draw(before, place),))

    def _choose(self, seed: int, index: int) -> tuple[str, str, str]:
        rng = generator(seed, "squares", sample=index)
        colour, before = rng.choice(list(COLOURS), 2, replace=False).tolist()
        return colour, before, str(rng.choice(list(PLACES)))

    def draw(self, colour: str, place: str) -> np.ndarray:
        half = self.size // 2
        y, x = (half * side for side in PLACES[place])
        image = np.full((self.size, self.size, 3), 255, dtype=np.uint8)
        image[y : y + half, x : x + half] = COLOURS[colour]
        return image
