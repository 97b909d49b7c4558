"""What to ask for in an evaluation: prompts with the texts and colours that the picture must show."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from qwen_image_fast.folders import read_text
from qwen_image_fast.training.synthesis.editing import make_edit
from qwen_image_fast.training.synthesis.fonts import FontError
from qwen_image_fast.training.synthesis.generator import Undrawable, describe
from qwen_image_fast.training.synthesis.photos import UnreadablePhoto
from qwen_image_fast.training.synthesis.recipe import SynthesisRecipe
from qwen_image_fast.training.synthesis.sample import EditSample, quoted_texts

Made = TypeVar("Made")


@dataclass(frozen=True)
class TextCase:
    """A prompt, the texts it asks for from top to bottom, and role → colour name as in `synthesis.Sample`."""

    prompt: str
    texts: tuple[str, ...]
    language: str = "en"
    colours: Mapping[str, str] = field(default_factory=dict)


def held_out_cases(recipe: SynthesisRecipe, count: int, seed: int = 0) -> list[TextCase]:
    """Captions of the synthesis recipe whose words training never shows.

    Raises:
        fonts.FontError: a language has no font, and what a caption says depends on it: its texts may be too long for
            one, or a recipe has several, places that are not the middle, paragraphs, turns, media or layouts.
    """
    unseen = dataclasses.replace(recipe, split="held_out", shapes=0.0, scenes=0.0)
    made = _first(count, _drawn(describe, unseen, seed, 10 * count), "samples")
    return [TextCase(sample.caption, sample.lines, sample.language, sample.colours) for sample in made]


def held_out_edits(recipe: SynthesisRecipe, count: int, kind: str, seed: int = 0) -> list[EditSample]:
    """The first `count` editing pairs of one kind, with words that training never shows."""
    unseen = dataclasses.replace(recipe, split="held_out", shapes=0.0, scenes=0.0)
    pairs = (pair for pair in _drawn(make_edit, unseen, seed, 1000 * count) if pair.kind == kind)
    return _first(count, pairs, f"edits of the kind {kind}")


def _first(count: int, made: Iterator[Made], what: str) -> list[Made]:
    try:
        found = list(itertools.islice(made, count))
    except FontError as error:
        raise FontError(f"evaluate: {what} of these settings need a font: {error}") from error
    if len(found) < count:
        raise ValueError(f"evaluate: the recipe makes too few {what}: {len(found)} instead of {count}")
    return found


def _drawn(
    draw: Callable[[SynthesisRecipe, int, int], Made], recipe: SynthesisRecipe, seed: int, most: int
) -> Iterator[Made]:
    """The first samples of a recipe, without those whose photograph is damaged or whose text does not fit."""
    for index in range(most):
        with contextlib.suppress(UnreadablePhoto, Undrawable):
            yield draw(recipe, seed, index)


def cases_of_file(path: Path) -> list[TextCase]:
    """Prompts of a file: one a line, or JSON lines with `prompt` and, where it does not quote them, `texts`; lines that
    begin with # are comments.

    The language of a case is Chinese where its texts have a Han character.

    Raises:
        ValueError: a line has no text, or is not what it must be; the file is not in UTF-8.
    """
    cases = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        prompt, texts = line.strip(), None
        if line.lstrip().startswith("{"):
            try:
                record = json.loads(line)
                prompt, texts = str(record["prompt"]), record.get("texts")
            except (json.JSONDecodeError, KeyError) as error:
                raise ValueError(f'evaluate: line {number} of {path} must be JSON with "prompt": {error}') from error
        texts = tuple(map(str, texts)) if texts else quoted_texts(prompt)
        if not texts:
            raise ValueError(f"evaluate: line {number} of {path} must quote the text to draw or give it in texts")
        chinese = any("\u4e00" <= c <= "\u9fff" for text in texts for c in text)
        cases.append(TextCase(prompt, texts, "zh" if chinese else "en"))
    if not cases:
        raise ValueError(f"evaluate: {path} must have at least one prompt")
    return cases


def psnr_outside(made: np.ndarray, wanted: np.ndarray, mask: np.ndarray) -> float:
    """10 log10(255^2 / mean error^2) in dB over the pixels outside a mask; uint8 [H, W, 3], bool [H, W]."""
    error = (made.astype(np.float64) - wanted)[~mask]
    return float(10 * np.log10(255**2 / max(np.mean(error**2), 1e-6))) if error.size else float("nan")
