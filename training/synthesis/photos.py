"""Photographs to composite onto: those inside scikit-image's wheel, or a folder of the user."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from PIL import Image

from qwen_image_fast.pictures import to_rgb
from qwen_image_fast.training.text_files import beside, decoded

# Only files that the wheel holds: reading them needs no download. File → English and Chinese subject.
_WHEEL_PHOTOS = {
    "astronaut.png": ("an astronaut", "一位宇航员"),
    "brick.png": ("a brick wall", "一面砖墙"),
    "camera.png": ("a man with a camera", "一位拿相机的男人"),
    "chelsea.png": ("a cat", "一只猫"),
    "coffee.png": ("a cup of coffee", "一杯咖啡"),
    "grass.png": ("grass", "草地"),
    "gravel.png": ("gravel", "碎石地"),
    "motorcycle_left.png": ("a motorcycle", "一辆摩托车"),
    "rocket.jpg": ("a rocket", "一枚火箭"),
}
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_LONGEST_SIDE = 1024


class UnreadablePhoto(ValueError):
    """A photograph, or what its text file says of it, cannot be read; `path` says which."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"the photograph {self.path} cannot be read: {self.reason}"


@functools.cache
def find_photos(folder: str | None) -> tuple[tuple[str, str, str], ...]:
    """Photographs as (path, English subject, Chinese subject).

    Args:
        folder: searched in depth, in order of name; the line of text in `<name>.txt` beside a photograph is its
            subject ("a cat on a sofa"), else it is "a photograph"; "" where that file is empty or no text. None: the
            photographs in scikit-image's wheel.

    Raises:
        FileNotFoundError: there are none.
    """
    if folder is not None:
        root = Path(folder).expanduser()
        found = sorted(root.rglob("*")) if root.is_dir() else []
        files = [f for f in found if f.suffix.lower() in _SUFFIXES and not f.name.startswith(".")]
        if not files:
            raise FileNotFoundError(f"the folder {folder} has no photographs: files must end in {', '.join(_SUFFIXES)}")
        return tuple((str(file), *_subject(file)) for file in files)
    spec = importlib.util.find_spec("skimage")  # looks, does not import
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "compositional samples need photographs: give --photos a folder of your own, or pip install scikit-image, "
            "whose wheel has some"
        )
    data = Path(spec.origin).parent / "data"
    found = tuple((str(data / name), *subject) for name, subject in _WHEEL_PHOTOS.items() if (data / name).is_file())
    if not found:
        raise FileNotFoundError(f"scikit-image has no photographs in {data}: give --photos a folder of your own")
    return found


def _subject(file: Path) -> tuple[str, str]:
    text = beside(file, ".txt")
    if text is not None and text.is_file():
        try:
            subject = " ".join(decoded(text.read_bytes()).split()).rstrip(".")
        except (OSError, ValueError):
            subject = ""
        return subject, subject
    return "a photograph", "一张照片"


@functools.lru_cache(maxsize=32)
def open_photo(path: str) -> Image.Image:
    """The photograph in RGB, upright, its longest side at most 1024 pixels; UnreadablePhoto where it is damaged."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (_LONGEST_SIDE, _LONGEST_SIDE))
            photo = to_rgb("the photograph", image)
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
        raise UnreadablePhoto(path, f"it cannot be decoded: {error}") from error
    photo.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    return photo
