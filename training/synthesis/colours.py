"""Named colours, and which two can be told apart when one is written on the other."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Colour:
    """A colour with its names in captions; the Chinese one ends in 色."""

    name: str
    chinese: str
    rgb: RGB

    def called(self, language: str) -> str:
        return self.chinese if language == "zh" else self.name


COLOURS = {
    colour.name: colour
    for colour in (
        Colour("red", "红色", (222, 32, 36)),
        Colour("orange", "橙色", (232, 110, 0)),
        Colour("yellow", "黄色", (250, 218, 40)),
        Colour("green", "绿色", (18, 130, 55)),
        Colour("blue", "蓝色", (30, 75, 215)),
        Colour("purple", "紫色", (140, 50, 180)),
        Colour("black", "黑色", (18, 18, 20)),
        Colour("white", "白色", (250, 250, 250)),
        Colour("grey", "灰色", (185, 187, 190)),
        Colour("pink", "粉色", (255, 190, 205)),
        Colour("light blue", "浅蓝色", (175, 215, 245)),
        Colour("brown", "棕色", (115, 65, 30)),
        Colour("dark green", "深绿色", (15, 75, 50)),
        Colour("dark blue", "深蓝色", (26, 42, 108)),
        Colour("beige", "米色", (240, 228, 200)),
    )
}
TINY_TEXT_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
TINY_GROUND_COLOURS = ("white", "black", "yellow", "pink", "light blue", "dark blue")
# What WCAG 2 asks of large text. At 2.4, small purple on black was hard to read.
LEAST_CONTRAST = 3.0


def luminance(rgb: RGB) -> float:
    """Relative luminance of WCAG 2 in [0, 1]."""
    linear = [((v / 255 + 0.055) / 1.055) ** 2.4 if v > 10 else v / 255 / 12.92 for v in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    """Contrast ratio of WCAG 2 of two colour names, from 1 (none) to 21."""
    light, dark = sorted((luminance(COLOURS[first].rgb), luminance(COLOURS[second].rgb)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@functools.lru_cache(maxsize=1024)
def readable_on(ground: str, candidates: Sequence[str]) -> tuple[str, ...]:
    """Those of the candidates that can be read on the ground."""
    return tuple(name for name in candidates if contrast(name, ground) >= LEAST_CONTRAST)
