"""What `post_training.py` compares methods on: prompts to learn from, held-out ones, judges that gave no reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class Method(NamedTuple):
    """recipe: its name. updates: of a leg. prompts: of a leg's only round; 0: rounds as the recipe has them, from the
    leg's prompts. changes: to the recipe."""

    recipe: str
    updates: int
    prompts: int
    changes: list[str]


@dataclass(frozen=True)
class World:
    """learned: what is better at the end, for an axis. prompts, reward: said in the results. methods: by name.
    write_prompts(path, count): the file of `rollout.prompts`; more prompts begin with the same ones.
    prompts_a_leg: how many of them a leg is given.
    judged(model, set, judge, small): by judge, which held-out pictures of the set are right. sets: the first is what is
    learned, the others must not be lost. against: the method that the others are to beat. judges: the first after every
    leg, the others at the end, of the first set.
    """

    learned: str
    prompts: str
    reward: str
    methods: dict[str, Method]
    prompts_a_leg: int
    write_prompts: Callable[[Path, int], object]
    judged: Callable[[str, str, str, bool], dict[str, list[bool]]]
    sets: Sequence[str]
    against: str
    judges: Sequence[str] = field(default=("",))
