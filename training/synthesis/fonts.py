"""Finding open fonts, and which characters each one can draw.

Fonts come from three places, in this order: files and folders the user gives; DejaVu inside matplotlib's wheel; a fixed
list of open fonts in the system's font folders. A fixed list, because "every font of the machine" includes symbol fonts
and would make a recipe mean something else on each machine.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageFont

from qwen_image_fast.extras import needed_for

SUFFIXES = (".ttf", ".otf", ".ttc")
SYSTEM_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/Library/Fonts",
    "/System/Library/Fonts",
    "C:/Windows/Fonts",
)
# File name and face number inside the file, in order of preference: recipes that use few fonts take the first ones.
KNOWN_FONTS = (
    ("DejaVuSansMono-Bold.ttf", 0),
    ("DejaVuSans-Bold.ttf", 0),
    ("DejaVuSerif-Bold.ttf", 0),
    ("DejaVuSans.ttf", 0),
    ("DejaVuSerif.ttf", 0),
    ("DejaVuSansMono.ttf", 0),
    ("DejaVuSans-Oblique.ttf", 0),
    ("LiberationSans-Bold.ttf", 0),
    ("LiberationSerif-Bold.ttf", 0),
    ("LiberationSans-Regular.ttf", 0),
    ("LiberationSerif-Regular.ttf", 0),
    ("LiberationSerif-Italic.ttf", 0),
    ("LiberationMono-Regular.ttf", 0),
    ("wqy-microhei.ttc", 0),
    ("gkai00mp.ttf", 0),
    ("NotoSansCJK-Bold.ttc", 2),  # 2 is simplified Chinese
    ("NotoSerifCJK-Regular.ttc", 2),
    ("gbsn00lp.ttf", 0),
    ("wqy-zenhei.ttc", 0),
    ("DroidSansFallbackFull.ttf", 0),
)
_HAN_PROBE = ord("的")


class FontError(ValueError):
    """No font can draw what was asked for; the message says what is missing and where to get it."""


class FontDecides(Exception):
    """What a sample says cannot be told without the font that it is drawn with."""


@dataclass(frozen=True, order=True)
class Face:
    """One face of a font file. `index` is its number inside a collection (.ttc), else 0."""

    path: str
    index: int = 0

    @property
    def name(self) -> str:
        """Family and style, such as `DejaVu Sans Bold`."""
        return " ".join(part for part in load(self, 16).getname() if part)

    @property
    def is_chinese(self) -> bool:
        return _HAN_PROBE in coverage(self)


def find_fonts(user: Sequence[str] = (), *, system: bool = True) -> tuple[Face, ...]:
    """All usable faces: the user's first, then DejaVu of matplotlib, then known system fonts, without repeated names.

    Args:
        user: font files, or folders searched in depth in order of name. Of a collection its first face is taken.
        system: also matplotlib's and the system's fonts.

    Raises:
        FontError: a path does not exist, is not a font, a folder has none, or nothing was found at all.
    """
    faces = [Face(str(path)) for given in user for path in _user_files(Path(given).expanduser())]
    if system:
        installed = _installed()
        faces += [Face(installed[name], index) for name, index in KNOWN_FONTS if name in installed]
    if not faces:
        raise FontError(
            "no font was found: pip install matplotlib (its wheel has DejaVu), install Debian's fonts-dejavu-core, "
            "or give --fonts a font file or folder"
        )
    unique: dict[str, Face] = {}
    for face in faces:
        try:
            unique.setdefault(face.name, face)
        except OSError as error:
            raise FontError(f"the font {face.path} cannot be read: {error}") from error
    return tuple(unique.values())


def _user_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FontError(f"the font file or folder {path} does not exist")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise FontError(f"the folder {path} has no font: files must end in {', '.join(SUFFIXES)}")
    return files


@functools.cache
def _installed() -> dict[str, str]:
    """File name → path. matplotlib's come first: the same bytes on every machine."""
    folders = [Path(folder).expanduser() for folder in SYSTEM_FOLDERS]
    matplotlib = importlib.util.find_spec("matplotlib")  # looks, does not import
    if matplotlib is not None and matplotlib.origin is not None:
        folders.insert(0, Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf")
    found: dict[str, str] = {}
    for folder in folders:
        for parent, folders_below, names in os.walk(folder):
            folders_below.sort()
            for name in sorted(names):
                found.setdefault(name, os.path.join(parent, name))
    return found


@functools.cache
def coverage(face: Face) -> frozenset[int]:
    """Code points that the face has a glyph for, by its character map."""
    with needed_for("reading which glyphs a font has"):
        from fontTools.ttLib import TTFont

    with TTFont(face.path, fontNumber=face.index, lazy=True) as font:
        characters = font.getBestCmap() or {}
        return frozenset(code for code, glyph in characters.items() if glyph != ".notdef")


def missing_glyphs(face: Face, text: str) -> str:
    """Characters of the text that the face cannot draw, each once, in order. White space never counts."""
    covered = coverage(face)
    return "".join(dict.fromkeys(c for c in text if ord(c) not in covered and not c.isspace()))


def faces_for(faces: Iterable[Face], text: str) -> tuple[Face, ...]:
    """Faces that can draw all of the text."""
    return tuple(face for face in faces if not missing_glyphs(face, text))


def faces_of_language(faces: Sequence[Face], language: str, probe: str) -> tuple[Face, ...]:
    """Faces for a language: Chinese fonts for `zh`; for `en` fonts made for Latin, or any where there is no such.

    Args:
        faces: to choose from.
        language: `en` or `zh`.
        probe: characters that a face must have.

    Raises:
        FontError: none has them.
    """
    fitting = faces_for(faces, probe)
    if not fitting:
        least = min((missing_glyphs(face, probe) for face in faces), key=len, default=probe)
        shown = least if len(least) <= 12 else f"{least[:12]}… ({len(least)} characters)"
        kind, package = ("Chinese", "fonts-wqy-microhei") if language == "zh" else ("Latin", "fonts-dejavu-core")
        raise FontError(
            f"no font has the glyphs {shown}: install a {kind} font, such as Debian's {package}, or give --fonts a "
            "folder with one"
        )
    if language == "en":
        return tuple(face for face in fitting if not face.is_chinese) or fitting
    return fitting


@functools.lru_cache(maxsize=512)
def load(face: Face, size: int) -> ImageFont.FreeTypeFont:
    """The face at a size in pixels. Basic layout: the same picture whether or not Pillow was built with Raqm."""
    return ImageFont.truetype(face.path, size, index=face.index, layout_engine=ImageFont.Layout.BASIC)
