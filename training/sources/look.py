"""A first look at a source, before any model is loaded: what is there, what is missing, and what is there twice."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tqdm import tqdm

from qwen_image_fast.training.data.filters.picture import BrokenImage, Picture
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.randomness import generator
from qwen_image_fast.training.recipe.captions import CaptionsRecipe
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.sources.example import Catalogue, Example
from qwen_image_fast.training.sources.texts import plain_caption

NO_WHITE = "a mask must be white where the loss counts, and this one has no white"
# Examples that are looked at; of more, so many at places drawn once for all.
MOST = 2000
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Seen:
    """What is known about an example: its place and origin; the hashes of its target and references; the size (height,
    width) of each, None where the file is no picture; the kinds of its captions; whether it has a mask; its fault, a
    sentence; whether it has no caption of its own."""

    place: int
    origin: str
    ids: tuple[str, ...]
    sizes: tuple[tuple[int, int] | None, ...]
    kinds: tuple[str, ...] = ()
    masked: bool = False
    fault: str = ""
    bare: bool = False


def look(name: str, catalogue: Catalogue, captions: CaptionsRecipe) -> list[Seen]:
    """At all examples, or at 2,000 of more.

    Raises:
        RecipeError: examples have no caption or name files that are not there, the sentence counts them; or there is
            none that could be used.
    """
    places: Sequence[int] = range(len(catalogue))
    if len(catalogue) > MOST:
        draws = generator(0, "look", sample=len(catalogue))
        places = sorted(draws.choice(len(catalogue), MOST, replace=False).tolist())
    seen, bare, missing, masks = [], [], [], []
    for place in tqdm(places, desc=f"looking at {name}", unit="picture", leave=False, delay=1):
        example = catalogue.read(place)
        seen.append(_seen(place, example))
        if example.mask is not None and example.mask.image and not _white(example.mask):
            masks.append(example.mask.origin)
        if example.missing is not None:
            missing.append(f"{example.target.origin} names {example.missing}, which is not there")
        elif not (example.target.fault or plain_caption(example.target, captions)):
            bare.append(example.target.origin)
    if missing:
        raise RecipeError(f"recipe: data.source {missing[0]} ({len(missing)} of {len(places)} rows name such files)")
    if bare:
        what, also = ("instruction", "") if catalogue.edits else ("caption", " or data.captions.trigger")
        raise RecipeError(
            f"recipe: every picture needs its {what}, {bare[0]} has none or an empty one ({len(bare)} of "
            f"{len(places)}): write it, or set data.captions.default{also} for all"
        )
    if all(s.fault for s in seen):
        raise RecipeError(
            f"recipe: data.source {name} has no picture that can be used: {seen[0].origin}: {seen[0].fault}"
        )
    if masks:
        raise RecipeError(f"recipe: {masks[0]}: {NO_WHITE} ({len(masks)} of {len(places)})")
    return seen


def has_white(pixels: np.ndarray) -> bool:
    """Whether a mask, uint8, has a pixel above the middle."""
    return int(pixels.max()) > 127


def _white(mask: Record) -> bool:
    try:
        return has_white(Picture(mask).rgb)
    except BrokenImage:
        return True  # left out, and said, when it is its turn


def _seen(place: int, example: Example) -> Seen:
    records = (example.target, *example.references)
    sizes = tuple(map(size_of, records))
    fault = next((record.fault for record in records if record.fault), "")
    if not fault and None in sizes:
        fault = "it is no picture that can be read, or an animated one"
    kinds, masked = tuple(example.target.captions), example.mask is not None
    bare = not example.target.caption.strip() or not all(map(str.strip, example.target.captions.values()))
    return Seen(place, example.target.origin, tuple(r.id for r in records), sizes, kinds, masked, fault, bare)


def size_of(record: Record) -> tuple[int, int] | None:
    """(height, width) of a picture, upright, from its header; None where it has none, and for several in one file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(record.image)) as image:
                if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                    return None
                width, height = image.size
                turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        return (width, height) if turned else (height, width)
    except Exception:  # Pillow's readers raise a dozen types on damaged files
        return None


def faults(seen: Sequence[Seen]) -> Iterator[str]:
    """Sentences about examples that will be left out, and about pictures that are there several times."""
    broken = [s for s in seen if s.fault]
    for s in broken[:5]:
        yield f"{s.origin} will be left out: {s.fault}"
    if len(broken) > 5:
        yield f"{len(broken) - 5} more will be left out, which rejected.jsonl will list"
    counts = Counter(s.ids[0] for s in seen if not s.fault)
    if twice := sum(count - 1 for count in counts.values()):
        first = next(s.origin for s in seen if counts[s.ids[0]] > 1)
        several = f"{twice} pictures are copies of others, such as {first}"
        yield several if twice > 1 else f"1 picture is a copy of another, {first}"
