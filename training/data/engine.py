"""What a run is carried by: how parts are judged, and how equal and similar ones are found among all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .compare import Pairs, local_groups
from .filters.duplicates import near_pairs
from .journal import Journal
from .judging import MakeFilters, judge_parts
from .recipe import FilterRecipe
from .timeline import Timeline

JudgeParts = Callable[[FilterRecipe, Journal, MakeFilters, int, Callable[[int], Any]], None]


@dataclass(frozen=True)
class Engine:
    """judge: as `judging.judge_parts`. groups, pairs: as of `compare.compare`. close: ends what was started.
    timeline: of what was done, where the engine's workers say when."""

    judge: JudgeParts = judge_parts
    groups: Callable[[np.ndarray], np.ndarray] = local_groups
    pairs: Callable[[np.ndarray, int], Iterator[Pairs]] = near_pairs
    close: Callable[[], Any] = lambda: None
    timeline: Timeline | None = None


ENGINES = ("local", "ray")


def engine_of(name: str, recipe: FilterRecipe) -> Engine:
    """`local`: this machine; `ray`: Ray Data, on a cluster or on this machine.

    Raises:
        ValueError: there is no such engine. ImportError: Ray Data is not installed.
    """
    if name not in ENGINES:
        raise ValueError(f"filter: the engine must be of {', '.join(ENGINES)}, got {name!r}")
    if name == "local":
        return Engine()
    from .engine_ray import RayEngine

    engine = RayEngine(recipe.ray)
    return Engine(engine.judge, engine.groups, engine.pairs, engine.close, engine.timeline)
