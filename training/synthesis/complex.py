"""Complex rendering: slides, posters, cards, forms and tables whose placeholders are filled by rule (the report's third
strategy). A template keeps its layout: slots of one group share a font size, an edge and, in a row, a baseline."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import ImageDraw

from .canvas import Ground, draw_line, fit_size, paint_ground
from .colours import COLOURS, contrast, readable_on
from .fonts import Face, load
from .recipe import SynthesisRecipe
from .sample import Box, Sample, article, quote

_LABELS = {
    "en": ("Name", "City", "Date", "Phone", "Room", "Email", "Team", "Color", "Total", "Time"),
    "zh": ("姓名", "城市", "日期", "电话", "房间", "邮箱", "小组", "颜色", "合计", "时间"),
}
_KINDS = {"slide": "幻灯片", "poster": "海报", "card": "名片", "form": "表单", "table": "表格"}


@dataclass(frozen=True)
class Slot:
    """A filled placeholder: a text in a box. `group`: slots of one font size; `role`: in the caption; `align`: `l`, `m`
    or `r`."""

    text: str
    box: Box
    group: str
    role: str
    colour: str
    align: str = "l"


@dataclass(frozen=True)
class Page:
    """A filled template. `bars`: (box, colour, filled) drawn under the text; `sizes`: group → font size."""

    kind: str
    size: tuple[int, int]
    ground: Ground
    accent: str
    face: Face
    bars: tuple[tuple[Box, str, bool], ...]
    slots: tuple[Slot, ...]
    sizes: tuple[tuple[str, int], ...]


@dataclass
class _Draft:
    """A page in the making. Boxes are given in thousandths of the canvas."""

    recipe: SynthesisRecipe
    rng: random.Random
    size: tuple[int, int]
    language: str
    ground: str
    accent: str
    ink: str
    on_accent: str
    bars: list[tuple[Box, str, bool]] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)

    def box(self, left: float, top: float, right: float, bottom: float) -> Box:
        w, h = self.size
        x, y = round(left * w / 1000), round(top * h / 1000)
        return x, y, max(x + 1, round(right * w / 1000)), max(y + 1, round(bottom * h / 1000))

    def bar(self, box: Box, colour: str, filled: bool = True) -> None:
        self.bars.append((box, colour, filled))

    def slot(self, role: str, box: Box, words: int | str, colour: str = "", align: str = "l", group: str = "") -> None:
        """Fill a placeholder with so many words at most, or with a given text. `group`: if not the role."""
        text = words if isinstance(words, str) else self.phrase(words, box[2] - box[0])
        self.slots.append(Slot(text, box, group or role, role, colour or self.ink, align))

    def phrase(self, words: int, width: int) -> str:
        """Listed words that can be legible in the width."""
        letter = self.recipe.legible(self.language) * (1.0 if self.language == "zh" else 0.66)
        longest = max(2, int(width / letter))
        source = self.recipe.words()
        for count in range(words, 0, -1):
            phrase = source.phrase(self.rng, self.language, count)
            if len(phrase) <= longest:
                return phrase
        return source.word(self.rng, self.language, longest).capitalize()

    def number(self) -> str:
        return self.recipe.words().number(self.rng, self.rng.randint(2, 3))

    def rows(self, most: int, height: int) -> int:
        """How many rows are legible in a height of thousandths."""
        fitting = int(height * self.size[1] / 1000 / (1.7 * self.recipe.legible(self.language)))
        return self.rng.randint(min(2, fitting), max(2, min(most, fitting)))


def plan(recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], language: str) -> Page | None:
    """A filled template, or None where a text does not fit at a legible size."""
    ground = Ground(rng.choice(recipe.ground_colours), rng.choice(("plain", "plain", "gradient", "paper")), 0)
    accents = [c for c in recipe.ground_colours if contrast(c, ground.colour) >= 1.5]
    if not accents:
        return None
    accent = rng.choice(accents)
    ink, on_accent = (rng.choice(readable_on(colour, recipe.text_colours)) for colour in (ground.colour, accent))
    draft = _Draft(recipe, rng, size, language, ground.colour, accent, ink, on_accent)
    kind = rng.choice(list(_TEMPLATES))
    _TEMPLATES[kind](draft)
    face = rng.choice(recipe.faces(language))
    page = Page(kind, size, ground, accent, face, tuple(draft.bars), tuple(draft.slots), ())
    return fitted(page, recipe.legible(language))


def fitted(page: Page, smallest: int) -> Page | None:
    """The page with the largest font size of each group at which all its texts fit, or None below `smallest`."""
    sizes: dict[str, int] = {}
    for slot in page.slots:
        width, height = slot.box[2] - slot.box[0], slot.box[3] - slot.box[1]
        # Ascent and descent together are up to 1.25 font sizes, and rows want some air.
        size = fit_size((slot.text,), page.face, (width, height), smallest=smallest, largest=int(height / 1.4))
        if size is None:
            return None
        sizes[slot.group] = min(size, sizes.get(slot.group, size))
    return dataclasses.replace(page, sizes=tuple(sizes.items()))


def make(recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], language: str) -> Sample | None:
    """A sample, or None where this draw has to be dropped."""
    page = plan(recipe, rng, size, language)
    if page is None:
        return None
    image, boxes = render(page)
    first, *others = _inks(page)
    colours = {"ground": page.ground.colour, "accent": page.accent, "text": first}
    colours |= {f"text {i}": colour for i, colour in enumerate(others, 1)}
    lines = tuple(slot.text for slot in page.slots)
    return Sample(image, _caption(page, language), lines, language, colours, boxes, "complex")


def render(page: Page) -> tuple[np.ndarray, tuple[Box, ...]]:
    """The picture, uint8 height x width x 3, and the area of each text."""
    image = paint_ground(page.ground.colour, page.ground.texture, page.ground.seed, page.size)
    draw = ImageDraw.Draw(image)
    for (left, top, right, bottom), colour, filled in page.bars:
        rgb = COLOURS[colour].rgb
        draw.rectangle((left, top, right - 1, bottom - 1), fill=rgb if filled else None, outline=rgb)
    sizes, boxes = dict(page.sizes), []
    for slot in page.slots:
        font, anchor = load(page.face, sizes[slot.group]), slot.align + "m"
        left, top, right, bottom = slot.box
        x = {"l": left, "m": (left + right) / 2, "r": right}[slot.align]
        y = (top + bottom) / 2
        draw_line(draw, (x, y), slot.text, font, COLOURS[slot.colour].rgb, anchor)
        ink = draw.textbbox((x, y), slot.text, font=font, anchor=anchor)
        boxes.append((int(ink[0]), int(ink[1]), int(ink[2] + 0.999), int(ink[3] + 0.999)))
    return np.asarray(image), tuple(boxes)


def page_name(page: Page, language: str) -> str:
    """`slide`, `poster`, … or its Chinese name."""
    return _KINDS[page.kind] if language == "zh" else page.kind


def _slide(draft: _Draft) -> None:
    draft.bar(draft.box(0, 0, 1000, 230), draft.accent)
    draft.slot("title", draft.box(60, 45, 940, 190), 3, draft.on_accent)
    count = draft.rows(4, 620)
    step = min(620 / count, 180)
    for row in range(count):
        top = 290 + row * step
        middle, half = top + step / 2, 0.02 * min(draft.size)
        left, y = draft.box(70, 0, 0, 0)[0], round(middle * draft.size[1] / 1000)
        draft.bar((left, round(y - half), left + round(2 * half), round(y + half)), draft.accent)
        draft.slot("points", draft.box(150, top, 950, top + 0.85 * step), draft.rng.randint(2, 5))


def _poster(draft: _Draft) -> None:
    draft.bar(draft.box(40, 40, 960, 960), draft.accent, filled=False)
    draft.slot("title", draft.box(90, 130, 910, 430), draft.rng.randint(1, 2), align="m")
    draft.bar(draft.box(300, 475, 700, 490), draft.accent)
    draft.slot("lines", draft.box(90, 530, 910, 650), draft.rng.randint(2, 4), align="m")
    draft.bar(draft.box(40, 780, 960, 960), draft.accent)
    draft.slot("footer", draft.box(90, 800, 910, 940), draft.rng.randint(2, 3), draft.on_accent, align="m")


def _card(draft: _Draft) -> None:
    right_handed = draft.rng.random() < 0.5
    align, left, right = ("r", 70, 880) if right_handed else ("l", 120, 930)
    draft.bar(draft.box(930, 0, 1000, 1000) if right_handed else draft.box(0, 0, 70, 1000), draft.accent)
    draft.slot("title", draft.box(left, 120, right, 340), 2, align=align)
    draft.slot("role", draft.box(left, 360, right, 490), draft.rng.randint(1, 2), align=align)
    draft.bar(draft.box(left, 545, right, 555), draft.accent)
    numbers = "-".join(draft.number() for _ in range(3))
    draft.slot("lines", draft.box(left, 610, right, 740), numbers, align=align)
    draft.slot("lines", draft.box(left, 770, right, 900), draft.rng.randint(1, 3), align=align)


def _form(draft: _Draft) -> None:
    draft.slot("title", draft.box(60, 50, 940, 200), draft.rng.randint(1, 2))
    draft.bar(draft.box(60, 215, 940, 228), draft.accent)
    count = draft.rows(5, 700)
    step = min(700 / count, 180)
    for row, label in enumerate(draft.rng.sample(_LABELS[draft.language], count)):
        top = 255 + row * step
        box = draft.box(390, top + 0.06 * step, 940, top + 0.94 * step)
        draft.bar(box, draft.accent, filled=False)
        draft.slot("label", draft.box(60, top + 0.06 * step, 355, top + 0.94 * step), label, group="fields")
        pad = max(3, draft.size[0] // 50)
        value = (box[0] + pad, box[1] + 1, box[2] - pad, box[3] - 1)
        draft.slot("value", value, draft.number() if draft.rng.random() < 0.3 else 2, group="fields")


def _table(draft: _Draft) -> None:
    columns = 3 if draft.size[0] >= 224 else 2
    rows = draft.rows(5, 760)
    step, wide = min(860 / (rows + 1), 190), 900 / columns
    draft.bar(draft.box(50, 70, 950, 70 + step), draft.accent)
    labels = draft.rng.sample(_LABELS[draft.language], columns)
    numeric = [column > 0 and draft.rng.random() < 0.5 for column in range(columns)]
    pad = 34
    for row in range(rows + 1):
        top = 70 + row * step
        draft.bar(draft.box(50, top + step, 950, top + step + 6), draft.accent)
        for column in range(columns):
            left, align = 50 + column * wide, "r" if numeric[column] else "l"
            box = draft.box(left + pad, top + 0.08 * step, left + wide - pad, top + 0.92 * step)
            if row == 0:
                draft.slot("header", box, labels[column], draft.on_accent, align, "cells")
            else:
                draft.slot(f"row {row}", box, draft.number() if numeric[column] else 1, "", align, "cells")


_TEMPLATES: dict[str, Callable[[_Draft], None]] = {
    "slide": _slide,
    "poster": _poster,
    "card": _card,
    "form": _form,
    "table": _table,
}


def _caption(page: Page, language: str) -> str:
    """Every text in reading order, by its role."""
    chinese = language == "zh"
    ground, accent = page.ground.called(language), COLOURS[page.accent].called(language)
    groups: dict[str, list[str]] = {}
    for slot in page.slots:
        groups.setdefault(slot.role, []).append(quote(slot.text, language))
    parts = []
    if page.kind == "form":
        (title,) = groups["title"]
        pairs = zip(groups["label"], groups["value"])
        fields = (f"{label}填写{value}" if chinese else f"{label} filled in with {value}" for label, value in pairs)
        parts = [f"标题是{title}" if chinese else f"titled {title}", *fields]
    else:
        for group, texts in groups.items():
            role = (_ROLES_ZH if chinese else _ROLES)[group.split()[0]]
            parts.append(role + ("、" if chinese else ", ").join(texts))
    kind = page_name(page, language)
    inks = [COLOURS[name].called(language) for name in _inks(page)]
    if chinese:
        return f"一张{ground}背景的{kind}，" + "，".join(parts) + f"，文字是{'和'.join(inks)}，装饰是{accent}"
    tail = f"; {' and '.join(inks)} text with {accent} decoration"
    return f"{article(ground).capitalize()} {ground} {kind}, " + "; ".join(parts) + tail


def _inks(page: Page) -> tuple[str, ...]:
    """Colours of the text, in order of appearance."""
    return tuple(dict.fromkeys(slot.colour for slot in page.slots))


_ROLES = {
    "title": "titled ",
    "points": "with the points ",
    "lines": "with the text ",
    "footer": "at the bottom ",
    "role": "below it ",
    "header": "with the header ",
    "row": "a row ",
}
_ROLES_ZH = {
    "title": "标题是",
    "points": "要点是",
    "lines": "文字是",
    "footer": "底部是",
    "role": "其下是",
    "header": "表头是",
    "row": "一行是",
}
