"""What to synthesise: one frozen value, of plain types, that fits into a configuration file."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .canvas import SHAPES, TEXTURES
from .colours import COLOURS, TINY_GROUND_COLOURS, TINY_TEXT_COLOURS, readable_on
from .fonts import Face, faces_of_language, find_fonts
from .words import HAN_UNIQUE, SPLITS, TINY_HAN_CHARACTERS, WordSource, is_han, probe

STRATEGIES = ("shapes", "pure", "compositional", "complex", "scenes")
VISION = ("depth", "segment", "view", "edges", "colourise")
EDITS = ("text", "colour", "ground", "add", "remove", "move", "reconstruct")
_LEAST_SIDE = {"shapes": 16, "pure": 16, "compositional": 96, "complex": 128, "scenes": 32}
# Smallest font size in pixels at which a script is legible.
_LEGIBLE = {"en": 9, "zh": 12}


@dataclass(frozen=True)
class SynthesisRecipe:
    """A mix of text-rendering data, and of scenes for the tasks of vision.

    Attributes:
        shapes, pure, compositional, complex, scenes: weights of the strategies.
        sizes: canvases as (width, height) in pixels; drawn with equal chance, as are languages.
        languages: of `en`, `zh`; one named twice is drawn twice as often.
        edit_languages: of editing pairs; empty: the same.
        fonts: font files and folders; `system_fonts`: also those of matplotlib and the system.
        fonts_per_language: use only the first so many fonts of each language; 0: all.
        text_colours, ground_colours: colour names. Pairs that cannot be read are never drawn.
        textures: of the grounds of pure samples, names in `canvas.TEXTURES`.
        max_letters, max_han: longest single text.
        han: Chinese characters that texts are made of; empty: `words.HAN_CHARACTERS`. Fonts must have them all.
        han_weights: of characters in random strings, by character; 1 for others. `data characters` makes them.
        max_lines: texts of a pure sample, one above the other, each with its own colour at times.
        paragraph: share of pure samples that are paragraphs.
        paragraphs: paragraphs to draw, instead of random sentences.
        fill: smallest share of the canvas that the text may be fitted to, in (0, 1].
        largest_font: in pixels, of pure samples that are not paragraphs; 0: as large as fits.
        centred: put texts in the middle, and shapes in the middle of the canvas, of halves or of quarters in two sizes;
            else anywhere inside the canvas.
        rows: centres of the elements of editing pairs are multiples of so many pixels from the top; 0: anywhere.
        rotation: largest angle of single texts and paragraphs, in degrees.
        random_strings: share of random strings among single texts.
        natural: share of captions in free order; the others begin with the quoted text.
        kinds: of shapes, all of them, drawn with equal chance; a kind may occur several times.
        arranged: share of pictures of shapes in which two to four are alike, or a caption says which is where.
        other_captions: share of single texts and paragraphs whose caption is in the other language than they are.
        photos: folder of photographs for compositional samples; None: those in scikit-image's wheel.
        edits: kinds of editing pairs of shapes and pure, drawn with equal chance; a kind may occur several times.
        edits_of_pictures: share of editing pairs of shapes and pure whose source is laid out as a picture of the recipe
            is, and in which things go to nine places; the others have one or two things in rows.
        vision: the same of scenes: depth, segment, view, edges, colourise.
        split, held_out: side of the split of words (`train`, `held_out`), and share of held-out words.
    """

    shapes: float = 0.0
    pure: float = 1.0
    compositional: float = 0.0
    complex: float = 0.0
    scenes: float = 0.0
    sizes: tuple[tuple[int, int], ...] = ((256, 256),)
    languages: tuple[str, ...] = ("en",)
    edit_languages: tuple[str, ...] = ()
    fonts: tuple[str, ...] = ()
    system_fonts: bool = True
    fonts_per_language: int = 0
    text_colours: tuple[str, ...] = tuple(COLOURS)
    ground_colours: tuple[str, ...] = tuple(COLOURS)
    textures: tuple[str, ...] = tuple(TEXTURES)
    max_letters: int = 10
    max_han: int = 6
    han: str = ""
    han_weights: Mapping[str, float] | tuple[tuple[str, float], ...] = ()
    max_lines: int = 3
    paragraph: float = 0.5
    paragraphs: tuple[str, ...] = ()
    fill: float = 0.5
    largest_font: int = 0
    centred: bool = False
    rows: int = 0
    rotation: float = 15.0
    random_strings: float = 0.3
    natural: float = 0.5
    kinds: tuple[str, ...] = tuple(SHAPES)
    arranged: float = 0.0
    other_captions: float = 0.0
    photos: str | None = None
    edits: tuple[str, ...] = EDITS
    edits_of_pictures: float = 0.0
    vision: tuple[str, ...] = VISION
    split: str = "train"
    held_out: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(tuple(size) for size in self.sizes))
        lists = (
            "languages",
            "edit_languages",
            "fonts",
            "text_colours",
            "ground_colours",
            "textures",
            "paragraphs",
            "kinds",
            "edits",
            "vision",
        )
        for name in lists:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "han_weights", tuple(dict(self.han_weights).items()))  # a frozen value can be hashed
        _check(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SynthesisRecipe:
        """A recipe from a configuration file's content; lists may stand for tuples."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"recipe: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**values)

    def longest(self, language: str) -> int:
        """Most characters of a single text."""
        return self.max_han if language == "zh" else self.max_letters

    def legible(self, language: str) -> int:
        """Smallest font size in pixels."""
        return _LEGIBLE[language]

    def largest(self) -> int:
        """Largest font size in pixels."""
        return self.largest_font or 10_000

    def words(self) -> WordSource:
        """Where texts come from."""
        han, known = self.han or HAN_UNIQUE, dict(self.han_weights)
        weights = tuple(known.get(character, 1.0) for character in han) if known else ()
        return WordSource(self.split, self.held_out, self.random_strings, han, weights)

    def faces(self, language: str) -> tuple[Face, ...]:
        """Fonts for a language. Raises `fonts.FontError` where there is none."""
        return _faces(self.fonts, self.system_fonts, self.fonts_per_language, language, self.han)


def tiny(size: int = 64, languages: tuple[str, ...] = ("en",), **changes: Any) -> SynthesisRecipe:
    """The data of the tiny model: one or two short texts in 8 colours on 6 plain grounds, one font, all upright.

    The letters are of one size, as long as they fit: what a model learns of a letter in a small image holds in a large
    one, which shows more of them.

    Args:
        size: 32, 64 or 128 pixels. It sets how many letters and lines there is room for: 1 letter or Han character at
            32; 3 or 2 in one line at 64; 8 or 4 in two lines at 128, where more than 6 letters are drawn smaller.
        languages: of `en`, `zh`.
        changes: other fields of the recipe, such as `max_letters=1`, `split="held_out"` or `shapes=1, pure=0`.
    """
    limits = {32: (1, 1, 1), 64: (3, 2, 1), 128: (8, 3, 2)}
    if size not in limits:
        raise ValueError(f"tiny: size must be one of {', '.join(map(str, limits))}, got {size}")
    letters, han, lines = limits[size]
    values: dict[str, Any] = {
        "sizes": ((size, size),),
        "languages": languages,
        "fonts_per_language": 1,
        "text_colours": TINY_TEXT_COLOURS,
        "ground_colours": TINY_GROUND_COLOURS,
        "textures": ("plain",),
        "max_letters": letters,
        "max_han": han,
        "han": TINY_HAN_CHARACTERS,
        "max_lines": lines,
        "paragraph": 0.0,
        "fill": 1.0,
        "largest_font": 32,
        "centred": True,
        "rows": size // 8,
        "rotation": 0.0,
        "random_strings": 0.5,
        "natural": 0.2,
    }
    return SynthesisRecipe(**(values | changes))


@functools.lru_cache(maxsize=64)
def _faces(fonts: tuple[str, ...], system: bool, most: int, language: str, han: str) -> tuple[Face, ...]:
    needed = probe(language) + ("".join(sorted(set(han) - set(HAN_UNIQUE))) if language == "zh" else "")
    found = faces_of_language(find_fonts(fonts, system=system), language, needed)
    return found[:most] if most else found


def _check(recipe: SynthesisRecipe) -> None:
    def must(holds: bool, field: str, rule: str) -> None:
        if not holds:
            raise ValueError(f"recipe: {field} must {rule}, got {getattr(recipe, field)!r}")

    weights = {name: getattr(recipe, name) for name in STRATEGIES}
    for name, weight in weights.items():
        must(isinstance(weight, (int, float)) and math.isfinite(weight) and weight >= 0, name, "be 0 or more")
    if not any(weights.values()):
        raise ValueError(f"recipe: one weight of {', '.join(STRATEGIES)} must be positive, got none")
    must(bool(recipe.sizes), "sizes", "not be empty")
    least = max(_LEAST_SIDE[name] for name, weight in weights.items() if weight)
    for size in recipe.sizes:
        what = " and ".join(name for name, weight in weights.items() if weight)
        must(len(size) == 2 and min(size) >= least, "sizes", f"be (width, height) of {least} pixels or more for {what}")
    must(bool(recipe.languages) and set(recipe.languages) <= {"en", "zh"}, "languages", "be en, zh or both")
    must(set(recipe.edit_languages) <= {"en", "zh"}, "edit_languages", "be en, zh, both or empty")
    for name in ("text_colours", "ground_colours"):
        must(bool(getattr(recipe, name)) and set(getattr(recipe, name)) <= set(COLOURS), name, f"be of {list(COLOURS)}")
    must(bool(recipe.textures) and set(recipe.textures) <= set(TEXTURES), "textures", f"be of {list(TEXTURES)}")
    must(not recipe.scenes or len(set(recipe.ground_colours)) > 1, "ground_colours", "be two or more for scenes")
    for ground in recipe.ground_colours:
        must(bool(readable_on(ground, recipe.text_colours)), "text_colours", f"have one that can be read on {ground}")
    must(bool(recipe.edits) and set(recipe.edits) <= set(EDITS), "edits", f"be of {list(EDITS)}")
    must(bool(recipe.vision) and set(recipe.vision) <= set(VISION), "vision", f"be of {list(VISION)}")
    must(set(recipe.kinds) == set(SHAPES), "kinds", f"be each of {list(SHAPES)}, once or more often")
    must(not (recipe.shapes and set(recipe.edits) == {"text"}), "edits", "not be text alone where there are shapes")
    must(recipe.split in SPLITS, "split", f"be of {', '.join(SPLITS)}")
    must(0 < recipe.held_out < 0.5, "held_out", "be between 0 and 0.5")
    shortest = 2 if recipe.split == "held_out" else 1
    for name in ("max_letters", "max_han"):
        must(getattr(recipe, name) >= shortest, name, f"be {shortest} or more for the {recipe.split} split")
    must(
        all(map(is_han, recipe.han)) and len(set(recipe.han)) == len(recipe.han),
        "han",
        "be Chinese characters, each once",
    )
    weighed = dict(recipe.han_weights)
    fine = all(isinstance(one, (int, float)) and 0 <= one < math.inf for one in weighed.values())
    must(fine and (not weighed or any(recipe.words().weights)), "han_weights", "be 0 or more, one above 0")
    used = not weighed or ("zh" in (*recipe.languages, *recipe.edit_languages) and recipe.random_strings > 0)
    must(used, "han_weights", "be empty without zh and random_strings, whose they are")
    must(set(weighed) <= set(recipe.han or HAN_UNIQUE), "han_weights", "be of the characters of han")
    must(recipe.max_lines >= 1, "max_lines", "be 1 or more")
    must(0 < recipe.fill <= 1, "fill", "be in (0, 1]")
    must(recipe.largest_font >= 0, "largest_font", "be 0 or more")
    must(recipe.rows >= 0, "rows", "be 0 or more")
    must(0 <= recipe.rotation <= 45, "rotation", "be from 0 to 45 degrees")
    for name in ("paragraph", "random_strings", "natural", "arranged", "other_captions", "edits_of_pictures"):
        must(0 <= getattr(recipe, name) <= 1, name, "be from 0 to 1")
    must(recipe.fonts_per_language >= 0, "fonts_per_language", "be 0 or more")
