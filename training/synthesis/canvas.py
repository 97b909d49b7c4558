"""Drawing: grounds, text fitted to a box, and scenes of text and shapes on a ground.

A scene is a value. Editing pairs are two scenes that differ in one thing, rendered by the same code.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .colours import COLOURS, RGB
from .fonts import Face, load
from .sample import Box

# Texture → its name in English and Chinese captions. All change the ground's colour by little: its name stays true.
TEXTURES = {
    "plain": ("", ""),
    "paper": ("grainy", "纸纹"),
    "gradient": ("shaded", "渐变"),
    "stripes": ("striped", "条纹"),
    "dots": ("dotted", "圆点"),
    "checks": ("checked", "格子"),
}
SHAPES = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "五角星"}
_MEASURING_SIZE = 64
_NO_LINE_START = "，。！？、；：,.!?;:)）”"


@dataclass(frozen=True)
class Ground:
    """A named colour with a texture; `seed` draws the texture's grain and direction."""

    colour: str
    texture: str = "plain"
    seed: int = 0

    def called(self, language: str) -> str:
        """`striped white`, or `白色条纹`."""
        english, chinese = TEXTURES[self.texture]
        name = COLOURS[self.colour].called(language)
        return name + chinese if language == "zh" else f"{english} {name}".strip()


@dataclass(frozen=True)
class TextElement:
    """A text in one colour. `x`, `y`: the centre of its ink; `angle` in degrees, anticlockwise.

    `text` is what captions quote; `lines` is how it is broken.
    """

    text: str
    lines: tuple[str, ...]
    face: Face
    size: int
    colour: str
    x: int
    y: int
    angle: float = 0.0
    spacing: float = 1.2
    align: str = "center"

    def mask(self) -> Image.Image:
        return _turned_mask(self.lines, self.face, self.size, self.spacing, self.align, self.angle)


@dataclass(frozen=True)
class ShapeElement:
    """A filled shape. `x`, `y`: its centre; `size`: its width and height."""

    shape: str
    colour: str
    x: int
    y: int
    size: int

    def mask(self) -> Image.Image:
        return shape_mask(self.shape, self.size)


@dataclass(frozen=True)
class Scene:
    """Elements on a ground, drawn in order. `size`: width, height."""

    size: tuple[int, int]
    ground: Ground
    elements: tuple[TextElement | ShapeElement, ...]


def render_scene(scene: Scene) -> np.ndarray:
    """The picture of the scene: uint8, height x width x 3."""
    image = paint_ground(scene.ground.colour, scene.ground.texture, scene.ground.seed, scene.size)
    for element in scene.elements:
        image.paste(COLOURS[element.colour].rgb, element_box(element), element.mask())
    return np.asarray(image)


def element_box(element: TextElement | ShapeElement) -> Box:
    """Where the element's ink is."""
    width, height = element.mask().size
    left, top = element.x - width // 2, element.y - height // 2
    return left, top, left + width, top + height


def inside(box: Box, size: tuple[int, int], margin: int = 0) -> bool:
    """Whether the box lies in the canvas, with a margin."""
    return box[0] >= margin and box[1] >= margin and box[2] <= size[0] - margin and box[3] <= size[1] - margin


def paint_ground(colour: str, texture: str, seed: int, size: tuple[int, int]) -> Image.Image:
    """A canvas of a colour; textures move each value by at most 16 of 255."""
    rgb = COLOURS[colour].rgb
    if texture == "plain":
        return Image.new("RGB", size, rgb)
    pattern = Image.fromarray(_pattern(texture, random.Random(seed), *size))
    # Dark grounds become lighter and light ones darker, else half of the pattern would be lost to clipping.
    sign = 1 if sum(rgb) < 384 else -1
    return Image.merge("RGB", [pattern.point([min(max(v + sign * step, 0), 255) for step in range(256)]) for v in rgb])


def _pattern(texture: str, rng: random.Random, width: int, height: int) -> np.ndarray:
    """Distance from the ground's colour, 0 to 16, as uint8 of height x width."""
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    period = max(4.0, rng.uniform(0.05, 0.16) * min(width, height))
    if texture == "paper":
        noise = np.random.default_rng(rng.getrandbits(64))
        fine = noise.standard_normal((height, width), dtype=np.float32)
        coarse = noise.standard_normal((height // 8 + 2, width // 8 + 2), dtype=np.float32)
        coarse = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        return np.clip(6.5 + 2.5 * fine + 3 * coarse, 0, 16).astype(np.uint8)
    if texture == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
        along = (x / width - 0.5) * math.cos(angle) + (y / height - 0.5) * math.sin(angle)
        return (8.5 + 11 * along).astype(np.uint8)
    if texture == "stripes":
        angle = rng.choice((0, 45, 90, 135)) * math.pi / 180
        lit = ((x * math.cos(angle) + y * math.sin(angle)) / period) % 1 < 0.5
    elif texture == "dots":
        lit = (x % period - period / 2) ** 2 + (y % period - period / 2) ** 2 < (0.3 * period) ** 2
    else:
        lit = (x // period % 2) != (y // period % 2)
    return np.where(lit, np.uint8(16), np.uint8(0))


def draw_line(
    draw: ImageDraw.ImageDraw,
    xy: tuple[float, float],
    line: str,
    font: ImageFont.FreeTypeFont,
    fill: int | RGB,
    anchor: str = "ls",
) -> None:
    """Draw one line. All text goes through here."""
    draw.text(xy, line, font=font, fill=fill, anchor=anchor)


@functools.lru_cache(maxsize=64)
def text_mask(lines: tuple[str, ...], face: Face, size: int, spacing: float, align: str) -> Image.Image:
    """Ink of the lines in mode L, cropped to the ink. `spacing`: distance of baselines in font sizes."""
    font, pitch = load(face, size), round(size * spacing)
    width = round(max(font.getlength(line) for line in lines))
    # Ink may reach beyond the advance and the ascent: half a font size on each side holds it.
    pad = size // 2 + 2
    mask = Image.new("L", (width + 2 * pad, round(1.5 * size) + pitch * (len(lines) - 1) + 2 * pad))
    draw = ImageDraw.Draw(mask)
    anchor, x = {"left": ("ls", pad), "center": ("ms", pad + width / 2), "right": ("rs", pad + width)}[align]
    for number, line in enumerate(lines):
        draw_line(draw, (x, pad + size + number * pitch), line, font, 255, anchor)
    return mask.crop(mask.getbbox())


@functools.lru_cache(maxsize=64)
def _turned_mask(
    lines: tuple[str, ...], face: Face, size: int, spacing: float, align: str, angle: float
) -> Image.Image:
    mask = text_mask(lines, face, size, spacing, align)
    if angle == 0:
        return mask
    turned = mask.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    return turned.crop(turned.getbbox())


@functools.lru_cache(maxsize=64)
def shape_mask(shape: str, size: int) -> Image.Image:
    """A shape in mode L, size x size, smoothed by drawing it four times as large."""
    big = 4 * size
    mask = Image.new("L", (big, big))
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((0, 0, big - 1, big - 1), fill=255)
    elif shape == "square":
        margin = big // 16
        draw.rectangle((margin, margin, big - 1 - margin, big - 1 - margin), fill=255)
    else:
        radii = (1.0,) * 3 if shape == "triangle" else (1.0, 0.42) * 5
        turn = 2 * math.pi / len(radii)
        points = [(r * math.sin(i * turn), -r * math.cos(i * turn)) for i, r in enumerate(radii)]
        left, top = min(x for x, _ in points), min(y for _, y in points)
        extent = max(max(x for x, _ in points) - left, max(y for _, y in points) - top)
        shift = (extent - (max(x for x, _ in points) - left)) / 2
        scale = (big - 1) / extent
        draw.polygon([((x - left + shift) * scale, (y - top) * scale) for x, y in points], fill=255)
    return mask.reduce(4)


def fit_size(
    lines: tuple[str, ...],
    face: Face,
    box: tuple[int, int],
    *,
    smallest: int,
    largest: int = 10_000,
    spacing: float = 1.2,
    angle: float = 0.0,
) -> int | None:
    """The largest font size at which the turned ink of the lines fits into a box (width, height), or None."""
    reference = _ink(lines, face, _MEASURING_SIZE, spacing, angle)
    size = min(largest, int(_MEASURING_SIZE * min(box[0] / reference[0], box[1] / reference[1])) + 1)
    while size >= smallest:
        width, height = _ink(lines, face, size, spacing, angle)
        if width <= box[0] and height <= box[1]:
            return size
        size -= 1
    return None


def _ink(lines: tuple[str, ...], face: Face, size: int, spacing: float, angle: float) -> tuple[int, int]:
    return _turned_mask(lines, face, size, spacing, "left", angle).size


def wrap(text: str, face: Face, size: int, width: float) -> tuple[str, ...] | None:
    """Break a text into lines of at most `width` pixels: at spaces, or between Han characters, which never begin a
    line with a closing mark. None where a single word is wider."""
    font, scale = load(face, _MEASURING_SIZE), size / _MEASURING_SIZE
    chinese = " " not in text and any(ord(c) >= 0x2E80 for c in text)
    glue, words = ("", _han_units(text)) if chinese else (" ", text.split())
    gap = 0.0 if chinese else font.getlength(" ") * scale
    lines: list[list[str]] = []
    used = width + 1
    for word in words:
        length = _advance(word, face) * scale
        if length > width:
            return None
        if used + gap + length > width:
            lines.append([])
            used = -gap
        lines[-1].append(word)
        used += gap + length
    return tuple(glue.join(line) for line in lines)


@functools.lru_cache(maxsize=8192)
def _advance(word: str, face: Face) -> float:
    return load(face, _MEASURING_SIZE).getlength(word)


def _han_units(text: str) -> list[str]:
    units: list[str] = []
    for character in text:
        if units and character in _NO_LINE_START:
            units[-1] += character
        else:
            units.append(character)
    return units


def fit_paragraph(
    text: str, face: Face, box: tuple[int, int], *, smallest: int, largest: int, spacing: float
) -> tuple[int, tuple[str, ...]] | None:
    """The largest font size, and the lines, with which the paragraph fills a box without leaving it, or None."""
    low, high, found = smallest, largest, None
    while low <= high:
        size = (low + high) // 2
        lines = wrap(text, face, size, box[0])
        if lines is not None and (len(lines) - 1) * spacing * size + size <= box[1]:
            low, found = size + 1, size
        else:
            high = size - 1
    for size in range(found or 0, smallest - 1, -1):  # hinting makes ink a little wider than the estimate
        lines = wrap(text, face, size, box[0])
        if lines is None:
            return None
        width, height = _ink(lines, face, size, spacing, 0.0)
        if width <= box[0] and height <= box[1]:
            return size, lines
    return None
