"""Compositional rendering: text on signs, paper and boards, seen in perspective and light, in front of photographs
(the report's second strategy)."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .canvas import fit_size, paint_ground, text_mask
from .colours import COLOURS, readable_on
from .fonts import Face, faces_for
from .photos import UnreadablePhoto, find_photos, open_photo
from .recipe import SynthesisRecipe
from .sample import Box, Sample, article, quote

Quad = tuple[tuple[float, float], ...]  # corners: top left, top right, bottom right, bottom left

# Medium → its Chinese name, texture, share of its height that is the corner's radius, colours it comes in.
MEDIA = {
    "sign": ("牌子", "plain", 0.12, ("white", "yellow", "blue", "dark green", "red", "dark blue")),
    "sheet of paper": ("纸", "paper", 0.0, ("white", "beige", "pink", "light blue", "yellow")),
    "board": ("板子", "gradient", 0.03, ("dark green", "black", "white", "brown", "beige")),
    "poster": ("海报", "gradient", 0.0, ("red", "orange", "purple", "light blue", "white", "dark blue")),
}
_NATURAL = {
    "en": (
        "A photo of {subject}, with {a} {medium} in front that reads {texts} in {colour} letters",
        "{A} {medium} with the {colour} text {texts}, {subject} in the background",
        "In front of {subject} stands {a} {medium}; {texts} is written on it in {colour}",
    ),
    "zh": (
        "{subject}前面有一块{medium}，上面用{colour}写着{texts}",
        "照片里是{subject}，前面的{medium}上写着{colour}的{texts}",
    ),
}


@dataclass(frozen=True)
class Composite:
    """All that is drawn, as a value. `flat`: width, height of the medium before perspective; `text_colour`, `colour`:
    of the text and the medium; `light`: brightness at the medium's left, right, top and bottom; `size`: the canvas."""

    size: tuple[int, int]
    photo: tuple[str, str, str]
    crop: tuple[float, float, float, float]
    medium: str
    colour: str
    text_colour: str
    texts: tuple[str, ...]
    face: Face
    font_size: int
    flat: tuple[int, int]
    quad: Quad
    light: tuple[float, float, float, float]
    seed: int


def plan(recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], language: str) -> Composite | None:
    """A picture to compose, or None where this draw has to be dropped; UnreadablePhoto where its file is damaged."""
    photo = rng.choice(find_photos(recipe.photos))
    if not photo[1]:
        raise UnreadablePhoto(photo[0], "its text file is empty or not UTF-8")
    medium = rng.choice(list(MEDIA))
    offered = [c for c in MEDIA[medium][3] if c in recipe.ground_colours] or list(recipe.ground_colours)
    colour = rng.choice(offered)
    text_colour = rng.choice(readable_on(colour, recipe.text_colours))
    face = rng.choice(recipe.faces(language))
    words, longest = recipe.words(), recipe.longest(language)
    texts = tuple(words.text(rng, language, longest) for _ in range(rng.randint(1, min(2, recipe.max_lines))))
    if len(set(texts)) < len(texts) or not faces_for((face,), "".join(texts)):
        return None

    width, height = size
    wide = round(width * rng.uniform(0.55, 0.85))
    tall = min(round(wide * rng.uniform(0.45, 0.8) * (1.0 if len(texts) > 1 else 0.8)), round(0.8 * height))
    flat = (wide, tall)
    font_size = fitted_size(texts, face, flat, recipe.legible(language))
    if font_size is None:
        return None
    quad = _perspective(rng, size, flat)
    left, right, top, bottom = (rng.uniform(0.78, 1.06) for _ in range(4))
    crop = _crop(rng, photo[0], size)
    return Composite(
        size,
        photo,
        crop,
        medium,
        colour,
        text_colour,
        texts,
        face,
        font_size,
        flat,
        quad,
        (left, right, top, bottom),
        rng.getrandbits(32),
    )


def fitted_size(texts: tuple[str, ...], face: Face, flat: tuple[int, int], smallest: int) -> int | None:
    """The largest font size at which the texts fit on the medium inside a margin, or None."""
    room = round(0.82 * flat[0]), round(0.74 * flat[1])
    return fit_size(texts, face, room, smallest=smallest + 2, spacing=1.25)  # perspective makes part of it smaller


def make(recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], language: str) -> Sample | None:
    """A sample, or None where this draw has to be dropped."""
    composite = plan(recipe, rng, size, language)
    if composite is None:
        return None
    image, boxes = render(composite)
    caption = _caption(composite, rng.choice(_NATURAL[language]) if rng.random() < recipe.natural else None, language)
    colours = {"text": composite.text_colour, "ground": composite.colour}
    return Sample(image, caption, composite.texts, language, colours, boxes, "compositional")


def render(composite: Composite) -> tuple[np.ndarray, tuple[Box, ...]]:
    """The picture, uint8 height x width x 3, and the area of each text."""
    photo = open_photo(composite.photo[0])
    canvas = photo.resize(composite.size, Image.Resampling.LANCZOS, box=composite.crop, reducing_gap=2.0)
    board, alpha, areas = _flat_medium(composite)
    brightness = np.asarray(canvas.convert("L")).mean() / 255
    board = _lit(board, composite.light, 0.8 + 0.25 * min(brightness / 0.5, 1.0))

    # A rim of the medium's own colour around it, else the edge would be interpolated with black.
    rim = 2
    board = Image.fromarray(np.pad(np.asarray(board), ((rim, rim), (rim, rim), (0, 0)), mode="edge"))
    alpha = Image.fromarray(np.pad(np.asarray(alpha), rim))
    wide, tall = composite.flat
    corners = ((rim, rim), (rim + wide, rim), (rim + wide, rim + tall), (rim, rim + tall))
    to_flat = _homography(composite.quad, corners)
    coefficients = tuple((to_flat / to_flat[2, 2]).reshape(-1)[:8])
    warp = (composite.size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC)
    shape = alpha.transform(*warp)
    depth = max(1, min(composite.size) // 60)
    shadow = Image.new("L", composite.size)
    shadow.paste(shape, (depth, 2 * depth))
    shadow = shadow.filter(ImageFilter.GaussianBlur(1.5 * depth)).point(lambda v: v * 0.55)
    canvas.paste((10, 10, 14), (0, 0), shadow)
    canvas.paste(board.transform(*warp), (0, 0), shape)

    to_canvas = _homography(corners, composite.quad)
    boxes = tuple(_mapped(to_canvas, tuple(side + rim for side in area), composite.size) for area in areas)
    return np.asarray(canvas), boxes


def medium_box(composite: Composite) -> Box:
    """The area that the medium, its shadow not counted, covers on the canvas."""
    xs, ys = [x for x, _ in composite.quad], [y for _, y in composite.quad]
    left, top = math.floor(min(xs)) - 2, math.floor(min(ys)) - 2
    right, bottom = math.ceil(max(xs)) + 2, math.ceil(max(ys)) + 2
    return max(0, left), max(0, top), min(composite.size[0], right), min(composite.size[1], bottom)


def medium_name(composite: Composite, language: str) -> str:
    """`white sign`, or `白色牌子`."""
    colour = COLOURS[composite.colour].called(language)
    return f"{colour}{MEDIA[composite.medium][0]}" if language == "zh" else f"{colour} {composite.medium}"


def _caption(composite: Composite, natural: str | None, language: str) -> str:
    colour, medium = COLOURS[composite.text_colour].called(language), medium_name(composite, language)
    subject = composite.photo[2 if language == "zh" else 1]
    quotes = [quote(text, language) for text in composite.texts]
    texts = "和".join(quotes) if language == "zh" else " above ".join(quotes)
    if natural:
        a = article(medium)
        return natural.format(subject=subject, medium=medium, texts=texts, colour=colour, a=a, A=a.capitalize())
    if language == "zh":
        return f"{texts}{colour}，写在{medium}上，背景是{subject}"
    return f"{texts} in {colour} on {article(medium)} {medium} in front of {subject}"


def _flat_medium(composite: Composite) -> tuple[Image.Image, Image.Image, tuple[Box, ...]]:
    """The medium seen from the front: its picture, its outline, and where each text is on it."""
    wide, tall = composite.flat
    _, texture, rounding, _ = MEDIA[composite.medium]
    ink = COLOURS[composite.text_colour].rgb
    board = paint_ground(composite.colour, texture, composite.seed, composite.flat)
    draw = ImageDraw.Draw(board)
    radius, border = round(rounding * tall), max(1, tall // 40)
    if composite.medium == "sign":
        edge = (2 * border, 2 * border, wide - 1 - 2 * border, tall - 1 - 2 * border)
        draw.rounded_rectangle(edge, max(0, radius - border), outline=ink, width=border)
    elif composite.medium == "board":
        draw.rounded_rectangle((0, 0, wide - 1, tall - 1), radius, outline=(120, 85, 50), width=2 * border)
    elif composite.medium == "poster":
        draw.rectangle((0, tall - 3 * border, wide, tall), fill=ink)
    alpha = Image.new("L", composite.flat)
    ImageDraw.Draw(alpha).rounded_rectangle((0, 0, wide - 1, tall - 1), radius, fill=255)

    masks = [text_mask((text,), composite.face, composite.font_size, 1.25, "left") for text in composite.texts]
    gap = round(0.3 * composite.font_size)
    top = (tall - sum(mask.height for mask in masks) - gap * (len(masks) - 1)) // 2
    areas = []
    for mask in masks:
        left = (wide - mask.width) // 2
        board.paste(ink, (left, top), mask)
        areas.append((left, top, left + mask.width, top + mask.height))
        top += mask.height + gap
    return board, alpha, tuple(areas)


def _lit(board: Image.Image, light: tuple[float, float, float, float], ambient: float) -> Image.Image:
    """Multiply by brightness that changes linearly over the medium."""
    left, right, top, bottom = light
    x = np.linspace(left, right, board.width, dtype=np.float32)
    y = np.linspace(top, bottom, board.height, dtype=np.float32)[:, None]
    lit = np.asarray(board, np.float32) * (ambient * (x + y) / 2)[..., None]
    return Image.fromarray(np.clip(lit + 0.5, 0, 255).astype(np.uint8))


def _perspective(rng: random.Random, size: tuple[int, int], flat: tuple[int, int]) -> Quad:
    """The medium's corners on the canvas: turned by up to 10 degrees, one side up to 15 % shorter, all inside."""
    wide, tall = flat
    angle = math.radians(rng.uniform(-10, 10))
    shorter = rng.uniform(0.85, 1.0)
    left, right = (shorter, 1.0) if rng.random() < 0.5 else (1.0, shorter)
    narrow = rng.uniform(0.88, 1.0)
    corners = [(-wide / 2 * narrow, -tall / 2 * left), (wide / 2 * narrow, -tall / 2 * right)]
    corners += [(wide / 2, tall / 2 * right), (-wide / 2, tall / 2 * left)]
    turned = [
        (x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)) for x, y in corners
    ]
    half_x, half_y = max(abs(x) for x, _ in turned), max(abs(y) for _, y in turned)
    scale = min(1.0, 0.47 * size[0] / half_x, 0.47 * size[1] / half_y)
    free_x, free_y = 0.48 * size[0] - half_x * scale, 0.48 * size[1] - half_y * scale
    centre_x, centre_y = size[0] / 2 + rng.uniform(-free_x, free_x), size[1] / 2 + rng.uniform(-free_y, free_y)
    return tuple((centre_x + x * scale, centre_y + y * scale) for x, y in turned)


def _crop(rng: random.Random, path: str, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A random part of the photograph in the canvas's aspect ratio, at least 70 % of the largest."""
    width, height = open_photo(path).size
    scale = min(width / size[0], height / size[1]) * rng.uniform(0.7, 1.0)
    crop_width, crop_height = size[0] * scale, size[1] * scale
    left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
    return left, top, min(width, left + crop_width), min(height, top + crop_height)


def _homography(source: Quad, target: Quad) -> np.ndarray:
    """The 3 x 3 projective map that takes four points to four others."""
    rows, values = [], []
    for (x, y), (u, v) in zip(source, target):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.append(np.linalg.solve(np.asarray(rows, float), np.asarray(values, float)), 1.0).reshape(3, 3)


def _mapped(matrix: np.ndarray, area: tuple[float, ...], size: tuple[int, int]) -> Box:
    left, top, right, bottom = area
    points = np.array([[left, right, right, left], [top, top, bottom, bottom], [1, 1, 1, 1]], float)
    x, y, w = matrix @ points
    x, y = x / w, y / w
    low, high = (math.floor(x.min()), math.floor(y.min())), (math.ceil(x.max()), math.ceil(y.max()))
    return max(0, low[0]), max(0, low[1]), min(size[0], high[0]), min(size[1], high[1])
