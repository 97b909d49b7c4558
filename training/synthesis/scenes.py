"""A small world of balls and boxes, drawn by casting rays: pictures whose depth, objects and cameras are known exactly.

A disc of ground with a plain backdrop, one light with shadows, a camera that looks at the middle from a named side.
Lengths are in the radius of the ground; the ground lies in y = 0, and y points up.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import numpy as np

from .colours import COLOURS, contrast
from .recipe import SynthesisRecipe
from .sample import Box, Sample, article
from .words import is_held_out

SOLIDS = {"ball": "球", "box": "方块"}
BACKDROP, GROUND = -1, 0  # what a pixel shows; solids count from 1
NEAR, FAR = 1.5, 3.8  # of what can be seen: 1.6 to 3.5
_AMBIENT = 0.5  # share of the light that comes from everywhere
_SAMPLES = 2  # rays of a pixel, in each direction, for its colour
_APART = 0.06  # between the shadows' outlines of two solids
_UNLIKE = 1.3  # least contrast of a solid with the ground and with the backdrop
_ATTEMPTS = 100


@dataclass(frozen=True)
class Solid:
    """A ball of radius `size`, or a box whose edges are `2 size` long and which is turned by `turn` radians about the
    vertical. It stands on the ground at (x, z)."""

    shape: str
    colour: str
    x: float
    z: float
    size: float
    turn: float = 0.0


@dataclass(frozen=True)
class World:
    """Solids on a disc of radius 1, before a backdrop. light: towards it, of length 1."""

    solids: tuple[Solid, ...]
    ground: str
    backdrop: str
    light: tuple[float, float, float]


@dataclass(frozen=True)
class Camera:
    """Looks at the middle from `distance`. azimuth: degrees about the vertical, growing as the camera moves to its own
    left; elevation: degrees above the ground; field: of view over the shorter side of the picture, in degrees."""

    azimuth: float = 0.0
    elevation: float = 28.0
    distance: float = 2.6
    field: float = 46.0

    def axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Where it is, and its axes as rows: to the right, up and forward."""
        around, above = math.radians(self.azimuth), math.radians(self.elevation)
        back = np.array([-math.sin(around) * math.cos(above), math.sin(above), math.cos(around) * math.cos(above)])
        right = np.array([math.cos(around), 0.0, math.sin(around)])
        return self.distance * back, np.stack([right, np.cross(back, right), -back])


@dataclass(frozen=True)
class View:
    """What a camera sees.

    image: uint8 [H, W, 3]. depth: float32 [H, W], of the pixel's centre along the camera's axis, in the radius of the
    ground; inf on the backdrop. ids: int8 [H, W], of the pixel's centre: BACKDROP, GROUND, or the number of the solid.
    """

    image: np.ndarray
    depth: np.ndarray
    ids: np.ndarray


def plan(recipe: SynthesisRecipe, rng: random.Random) -> tuple[World, Camera] | None:
    """One to three solids of colours that differ, seen from anywhere; None where they find no room.

    The side of the split is that of the colours and shapes: what is held out was never seen together on that ground.
    """
    ground, backdrop = rng.sample(sorted(set(recipe.ground_colours)), 2)
    colours = [c for c in recipe.text_colours if min(contrast(c, ground), contrast(c, backdrop)) >= _UNLIKE]
    if not colours:
        return None
    solids: list[Solid] = []
    for colour in rng.sample(colours, min(rng.randint(1, 3), len(colours))):
        placed = _placed(rng, colour, solids)
        if placed is None:
            return None
        solids.append(placed)
    names = " ".join([ground, *sorted(f"{one.colour} {one.shape}" for one in solids)])
    if is_held_out(names, recipe.held_out) != (recipe.split == "held_out"):
        return None
    around, above = rng.uniform(0, 2 * math.pi), math.radians(rng.uniform(40, 70))
    light = (math.cos(around) * math.cos(above), math.sin(above), math.sin(around) * math.cos(above))
    return World(tuple(solids), ground, backdrop, light), Camera(rng.uniform(0, 360))


def make(recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], language: str) -> Sample | None:
    """A sample such as `a red ball and a blue box on a grey ground before a white wall`."""
    drawn = plan(recipe, rng)
    if drawn is None:
        return None
    world, camera = drawn
    view = render(world, camera, size)
    if hidden(view, world):
        return None
    names = [solid_name(one, language) for one in world.solids]
    ground, wall = (COLOURS[name].called(language) for name in (world.ground, world.backdrop))
    if language == "zh":
        caption = f"{wall}墙前{ground}地面上的{'和'.join(f'一个{name}' for name in names)}"
    else:
        shown = " and ".join(f"{article(name)} {name}" for name in names)
        caption = f"{shown} on {article(ground)} {ground} ground before {article(wall)} {wall} wall"
    colours = {"ground": world.ground, "backdrop": world.backdrop}
    colours |= {f"solid {number}": one.colour for number, one in enumerate(world.solids)}
    boxes = tuple(_box(view.ids == number) for number in range(1, len(world.solids) + 1))
    return Sample(view.image, caption, (), language, colours, boxes, "scenes")


def solid_name(solid: Solid, language: str) -> str:
    """`red ball` or `红色球`."""
    return f"{COLOURS[solid.colour].called(language)}{'' if language == 'zh' else ' '}{_kind(solid.shape, language)}"


def hidden(view: View, world: World) -> bool:
    """Whether less than a two-hundredth of the picture is left of some solid."""
    least = view.ids.size / 200
    return any((view.ids == number).sum() < least for number in range(1, len(world.solids) + 1))


def turned(camera: Camera, degrees: float) -> Camera:
    """The camera moved to its own left by so many degrees about the middle."""
    return replace(camera, azimuth=(camera.azimuth + degrees) % 360)


def render(world: World, camera: Camera, size: tuple[int, int]) -> View:
    """What the camera sees, on a canvas of (width, height).

    The colour of a pixel is the mean of 2 x 2 rays: of what a ray meets first, c (a + (1 - a) max(0, n . l) s), with
    colour c, normal n, light l, a = 0.5, and s = 0 where another solid is in the light's way.
    """
    width, height = size
    origin, axes = camera.axes()
    fine = _rays(camera, axes, size, _SAMPLES)
    distance, ids, normals = _cast(world, origin, fine)
    points = origin + distance[:, None] * fine
    towards = np.asarray(world.light)
    lit = np.clip(normals @ towards, 0, None)
    facing = (lit > 0) & (ids > BACKDROP)
    between, _, _ = _cast(world, points[facing] + 1e-4 * normals[facing], np.broadcast_to(towards, (facing.sum(), 3)))
    lit[facing] *= np.isinf(between)
    palette = [COLOURS[name].rgb for name in (world.backdrop, world.ground, *(one.colour for one in world.solids))]
    light = np.where(ids == BACKDROP, 1.0, _AMBIENT + (1 - _AMBIENT) * lit)
    pixels = np.asarray(palette, np.float64)[ids + 1] * light[:, None]
    pixels = pixels.reshape(height, _SAMPLES, width, _SAMPLES, 3)
    pixels = sum(pixels[:, y, :, x] for y in range(_SAMPLES) for x in range(_SAMPLES)) / _SAMPLES**2
    centres = _rays(camera, axes, size, 1)
    depth, what, _ = _cast(world, origin, centres)
    depth = depth * (centres @ axes[2])
    return View(
        (pixels + 0.5).astype(np.uint8), depth.reshape(height, width).astype(np.float32), what.reshape(height, width)
    )


def _placed(rng: random.Random, colour: str, others: list[Solid]) -> Solid | None:
    """A solid somewhere on the ground where it touches no other."""
    for _ in range(_ATTEMPTS):
        shape = rng.choice(list(SOLIDS))
        size = rng.uniform(0.16, 0.3)
        room, angle = rng.uniform(0, 0.95 - math.sqrt(2) * size), rng.uniform(0, 2 * math.pi)
        found = Solid(shape, colour, room * math.cos(angle), room * math.sin(angle), size, rng.uniform(0, math.pi / 2))
        if all(math.hypot(found.x - one.x, found.z - one.z) > _reach(found) + _reach(one) + _APART for one in others):
            return found
    return None


def _reach(solid: Solid) -> float:
    return solid.size * (math.sqrt(2) if solid.shape == "box" else 1.0)


def _rays(camera: Camera, axes: np.ndarray, size: tuple[int, int], samples: int) -> np.ndarray:
    """Directions of length 1, [height * width * samples ** 2, 3]: rows first, from the top left."""
    width, height = size
    scale = 2 * math.tan(math.radians(camera.field) / 2) / min(size) / samples
    across = (np.arange(width * samples) - (width * samples - 1) / 2) * scale
    down = ((height * samples - 1) / 2 - np.arange(height * samples)) * scale
    grid = np.stack([*np.broadcast_arrays(across[None], down[:, None]), np.ones((len(down), len(across)))], -1)
    rays = grid.reshape(-1, 3) @ axes
    return rays / np.sqrt(rays[:, 0] ** 2 + rays[:, 1] ** 2 + rays[:, 2] ** 2)[:, None]


def _cast(world: World, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How far each ray goes, what it meets there, and the normal of that; inf, BACKDROP and 0 where it meets nothing.

    origin: [3], or one for each ray.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ahead = -origin[..., 1] / rays[:, 1]
        at = origin + ahead[:, None] * rays
        meets = (ahead > 0) & (at[:, 0] ** 2 + at[:, 2] ** 2 <= 1)
    distance = np.where(meets, ahead, np.inf)
    ids = np.where(meets, GROUND, BACKDROP).astype(np.int8)
    normals = np.zeros_like(rays)
    normals[:, 1] = meets
    for number, solid in enumerate(world.solids, 1):
        near = _near(solid, origin, rays)
        starts = origin if origin.ndim == 1 else origin[near]
        reached, normal = (_ball if solid.shape == "ball" else _cube)(solid, starts, rays[near])
        nearer = reached < distance[near]
        seen = near[nearer]
        distance[seen], ids[seen], normals[seen] = reached[nearer], number, normal[nearer]
    return distance, ids, normals


def _near(solid: Solid, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """Indices of the rays whose lines meet the ball around the solid: few of a picture's, and no other can meet it."""
    offset = np.array([solid.x, solid.size, solid.z]) - origin
    along = offset[..., 0] * rays[:, 0] + offset[..., 1] * rays[:, 1] + offset[..., 2] * rays[:, 2]
    around = solid.size * (1.0 if solid.shape == "ball" else math.sqrt(3)) + 1e-6
    return np.flatnonzero((offset**2).sum(-1) - along**2 <= around**2)


def _ball(solid: Solid, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """|o + t d - c| = r for the smaller t, where it is positive."""
    centre = np.array([solid.x, solid.size, solid.z])
    offset = origin - centre
    along = (offset * rays).sum(-1)
    root = along**2 - (offset**2).sum(-1) + solid.size**2
    distance = -along - np.sqrt(np.maximum(root, 0))
    distance = np.where((root >= 0) & (distance > 0), distance, np.inf)
    reached = np.where(np.isfinite(distance), distance, 0.0)[:, None]
    return distance, (offset + reached * rays) / solid.size


def _cube(solid: Solid, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The last of the three slabs that a ray enters, if it leaves none before."""
    cosine, sine = math.cos(solid.turn), math.sin(solid.turn)
    turn = np.array([[cosine, 0, -sine], [0, 1, 0], [sine, 0, cosine]])  # its rows: the box's axes
    start = (origin - np.array([solid.x, solid.size, solid.z])) @ turn.T
    way = rays @ turn.T
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = (-solid.size - start) / way, (solid.size - start) / way
    enters, leaves = np.fmin(first, second), np.fmax(first, second)
    face = enters.argmax(1)
    distance = np.take_along_axis(enters, face[:, None], 1)[:, 0]
    distance = np.where((distance > 0) & (distance <= leaves.min(1)), distance, np.inf)
    normal = -np.sign(np.take_along_axis(way, face[:, None], 1)) * turn[face]
    return distance, normal


def _box(mask: np.ndarray) -> Box:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _kind(shape: str, language: str) -> str:
    return SOLIDS[shape] if language == "zh" else shape
