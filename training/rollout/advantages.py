"""From rewards to what a picture counts against the others of its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qwen_image_fast.training.recipe.rewards import AdvantageRecipe
from qwen_image_fast.training.rewards.reward import RewardError

_SAME = 1e-6  # rewards that differ by less are one


def dead_groups(rewards: np.ndarray) -> np.ndarray:
    """bool [prompts]: whether all pictures of a prompt have one reward, so that none is better. rewards: [prompts,
    pictures]."""
    return np.ptp(rewards, axis=1) < _SAME


def normalised(rewards: np.ndarray, recipe: AdvantageRecipe) -> np.ndarray:
    """A = (r - mean of the prompt's pictures) / (std + 1e-4) within +-clip, [prompts, pictures]; 0 in dead groups.

    std: of all pictures of the round about their own means, or of the prompt's (Flow-GRPO, arXiv 2505.05470, and its
    code, which has both). Dead groups count in neither: they would only make it smaller.
    """
    distance = rewards - rewards.mean(1, keepdims=True)
    alive = ~dead_groups(rewards)
    if not alive.any():
        return np.zeros_like(rewards)
    if recipe.std == "prompt":
        std = np.sqrt((distance**2).mean(1, keepdims=True))
    else:
        std = np.sqrt((distance[alive] ** 2).mean())
    return np.clip(distance / (std + 1e-4), -recipe.clip, recipe.clip) * alive[:, None]


def advantages(
    rewards: Mapping[str, np.ndarray], weights: Sequence[float], recipe: AdvantageRecipe
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages [prompts, pictures] of several rewards, and the weighted mean of these, which ranks the pictures.

    "apart" adds the normalised advantages by their weights (MixGRPO's and GDPO's way), "sum" normalises the weighted
    sum, in which the reward with the largest spread rules.
    """
    shares = np.asarray(weights, dtype=np.float64) / sum(weights)
    total = sum(share * values for share, values in zip(shares, rewards.values()))
    if recipe.combine == "sum" or len(rewards) == 1:
        return normalised(np.asarray(total), recipe), np.asarray(total)
    added = sum(share * normalised(values, recipe) for share, values in zip(shares, rewards.values()))
    return np.clip(np.asarray(added), -recipe.clip, recipe.clip), np.asarray(total)


def check_not_constant(name: str, history: Sequence[float], rounds: int) -> None:
    """RewardError where a reward has been one number in all pictures of so many rounds.

    Args:
        history: the spread of the reward, largest minus smallest, in each round so far.
    """
    if len(history) >= rounds and max(history[-rounds:]) < _SAME:
        raise RewardError(
            f"reward {name}: it was the same for all pictures of {rounds} rounds, so there is nothing to learn: take "
            "harder prompts, or look at what it measures"
        )


def own_pairs(rewards: np.ndarray, margin: float, pairing: str) -> list[tuple[int, int]]:
    """(better, worse) among the pictures of one prompt, whose rewards differ by more than `margin`.

    "all": each picture with the best reward against those that are worse, in turn, the worst first. "once": the same
    until either are used up, so that no picture is in two pairs, and a prompt with seven right pictures and one wrong
    one does not count seven times. "ends": the first of the best against the worst.
    """
    best = float(rewards.max())
    better = [int(i) for i in np.flatnonzero(rewards >= best - _SAME)]
    worse = [int(i) for i in np.argsort(rewards, kind="stable") if rewards[i] < best - max(margin, _SAME)]
    if not worse:
        return []
    if pairing == "ends":
        return [(better[0], worse[0])]
    if pairing == "once":
        return list(zip(better, worse))
    return [(winner, worse[k % len(worse)]) for k, winner in enumerate(better)]
