"""GenEval's rules on what a detector found in a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

LEAST, _LEAST_COUNTING = 0.3, 0.9  # of the detector's confidence
_MOST = 16  # objects of a class
_SLACK = 0.1  # of both sizes, for places


def kept(tag: str, found: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The objects that count for a task, by class: of enough confidence, the surest first, `_MOST` of a class."""
    least = _LEAST_COUNTING if tag == "counting" else LEAST
    objects: dict[str, list[Mapping[str, Any]]] = {}
    for one in sorted(found, key=lambda o: -float(o["score"])):
        own = objects.setdefault(one["class"], [])
        if float(one["score"]) > least and len(own) < _MOST:
            own.append(one)
    return objects


def fault(wanted: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a picture is not what the metadata of a prompt ask for; None: it is.

    Args:
        wanted: a line of evaluation_metadata.jsonl: tag, include and exclude, each of class, count, and maybe color and
            position (relation, number of the other in include).
        found: objects of class, score, box (left, top, right, bottom) and maybe color.
    """
    objects = kept(wanted.get("tag", ""), found)
    matched: list[list[Mapping[str, Any]] | None] = []
    reasons = []
    for asked in wanted["include"]:
        here = objects.get(asked["class"], [])[: asked["count"]]
        if len(here) < asked["count"]:
            reasons.append(f"{len(here)} of {asked['count']} {asked['class']}")
            matched.append(None)
            continue
        if colour := asked.get("color"):
            right = sum(one.get("color") == colour for one in here)
            if right < asked["count"]:
                reasons.append(f"{right} of {asked['count']} {asked['class']} {colour}")
        if position := asked.get("position"):
            relation, other = position
            others = matched[other]
            if others is None:
                reasons.append(f"no other for {relation}")
            elif not all(relation in relations(one, two) for one in here for two in others):
                reasons.append(f"{asked['class']} is not {relation} the other")
        matched.append(here)
    for banned in wanted.get("exclude", ()):
        if len(objects.get(banned["class"], [])) >= banned["count"]:
            reasons.append(f"{banned['count']} or more {banned['class']}")
    return "; ".join(reasons) or None


def relations(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    """Where one object is of another: what is left of the way between their centres along an axis, less a tenth of both
    sizes, must be more than half of the whole way, as in GenEval's evaluate_images.py."""
    boxes = [[float(v) for v in thing["box"]] for thing in (one, other)]
    way, whole = [], []
    for axis in (0, 1):
        centres = [(box[axis] + box[axis + 2]) / 2 for box in boxes]
        sizes = sum(abs(box[axis + 2] - box[axis]) for box in boxes)
        offset = centres[0] - centres[1]
        way.append(math.copysign(max(abs(offset) - _SLACK * sizes, 0.0), offset))
        whole.append(offset)
    length = math.hypot(*whole)
    if length == 0:
        return set()
    x, y = way[0] / length, way[1] / length
    named = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in named.items() if holds}
