"""Tasks of vision as editing pairs (the report's section 5.2): a scene, an instruction, and the picture that answers.

| kind | the answer |
|---|---|
| depth | inverse depth in three equal channels: 0 at FAR and beyond, 255 at NEAR |
| segment | the solid that is named in white on black; or each solid in its own colour, black ones in grey, on black |
| view | the same scene from 45 or 90 degrees to the left or right |
| edges | the outlines of what can be told apart, one pixel wide, white on black |
| colourise | the colours of a grey picture |
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from . import scenes
from .colours import COLOURS
from .recipe import SynthesisRecipe
from .sample import EditSample
from .scenes import FAR, NEAR, View, World

# Kind → instructions in English and Chinese.
INSTRUCTIONS = {
    "depth": (("show the depth", "estimate the depth of the picture"), ("画出深度", "估计图片的深度")),
    "segment": (("segment {what}", "cut out {what}"), ("分割{what}", "抠出{what}")),
    "view": (("turn {degrees} degrees to the {side}",), ("向{side}转{degrees}度",)),
    "edges": (("show the edges", "draw the outlines"), ("画出边缘", "画出轮廓")),
    "colourise": (("colourise the picture", "give the picture its colours"), ("给图片上色", "把图片变成彩色")),
}
_EVERYTHING = {"en": "all things", "zh": "所有物体"}
_SIDES = {"left": "左", "right": "右"}
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


@dataclass(frozen=True)
class Task:
    """A pair with what is known of its scene. wanted: number of the solid to segment; 0: all, or another task."""

    pair: EditSample
    view: View
    world: World
    wanted: int = 0

    def colours(self) -> tuple[tuple[int, int, int], ...]:
        """Of the solids in an answer that segments all."""
        return tuple(segment_colour(one.colour) for one in self.world.solids)


def task(recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], language: str) -> Task | None:
    """A task of a kind of `recipe.vision`, all with equal chance; None where the scene does not suit it."""
    kind = rng.choice(recipe.vision)
    drawn = scenes.plan(recipe, rng)
    if drawn is None:
        return None
    world, camera = drawn
    view = scenes.render(world, camera, size)
    if scenes.hidden(view, world):
        return None
    source, wanted, words = view.image, 0, {}
    if kind == "depth":
        target = depth_picture(view.depth)
    elif kind == "segment":
        wanted = rng.randrange(len(world.solids) + 1)
        name = scenes.solid_name(world.solids[wanted - 1], language) if wanted else ""
        words = {"what": f"{'the ' if language == 'en' else ''}{name}" if wanted else _EVERYTHING[language]}
        target = _segments(view, world, wanted)
    elif kind == "view":
        side, degrees = rng.choice(list(_SIDES)), rng.choice((45, 90))
        words = {"side": _SIDES[side] if language == "zh" else side, "degrees": str(degrees)}
        seen = scenes.render(world, scenes.turned(camera, degrees if side == "left" else -degrees), size)
        if scenes.hidden(seen, world):
            return None
        target = seen.image
    elif kind == "edges":
        target = _white(outlines(view.ids))
    else:
        source, target = grey(view.image), view.image
    english, chinese = INSTRUCTIONS[kind]
    instruction = rng.choice(chinese if language == "zh" else english).format(**words)
    mask = np.ones(view.ids.shape, bool)
    pair = EditSample(source, target, instruction, mask, kind, language, (), (), "scenes")
    return Task(pair, view, world, wanted)


def make_pair(recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], language: str) -> EditSample | None:
    """The pair of `task`."""
    made = task(recipe, rng, size, language)
    return made and made.pair


def depth_picture(depth: np.ndarray) -> np.ndarray:
    """255 (1/d - 1/FAR) / (1/NEAR - 1/FAR), clipped, as uint8 [H, W, 3]."""
    value = (1 / depth - 1 / FAR) / (1 / NEAR - 1 / FAR)
    return np.repeat((value.clip(0, 1) * 255 + 0.5).astype(np.uint8)[..., None], 3, axis=2)


def depth_of(picture: np.ndarray) -> np.ndarray:
    """Depth, float64 [H, W], of a picture of it: the inverse of `depth_picture`, from the mean of the channels."""
    return 1 / (picture.astype(np.float64).mean(2) / 255 * (1 / NEAR - 1 / FAR) + 1 / FAR)


def outlines(ids: np.ndarray) -> np.ndarray:
    """bool [H, W]: pixels that show something else than the one to their right or below."""
    found = np.zeros(ids.shape, bool)
    found[:, :-1] |= ids[:, :-1] != ids[:, 1:]
    found[:-1] |= ids[:-1] != ids[1:]
    return found


def grey(image: np.ndarray) -> np.ndarray:
    """Luma in three equal channels, uint8."""
    return np.repeat((image @ _LUMA + 0.5).astype(np.uint8)[..., None], 3, axis=2)


def segment_colour(colour: str) -> tuple[int, int, int]:
    """What a solid of this colour is shown in: its own, where that is not too near the black around it."""
    return COLOURS["grey" if colour == "black" else colour].rgb


def _segments(view: View, world: World, wanted: int) -> np.ndarray:
    if wanted:
        return _white(view.ids == wanted)
    palette = [(0, 0, 0), (0, 0, 0), *(segment_colour(one.colour) for one in world.solids)]
    return np.asarray(palette, np.uint8)[view.ids + 1]


def _white(mask: np.ndarray) -> np.ndarray:
    return np.repeat(np.where(mask, 255, 0).astype(np.uint8)[..., None], 3, axis=2)
