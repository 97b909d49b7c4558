"""What a round has collected: pictures as latents, what they count, and how they were drawn; as tensors and numbers, so
that a checkpoint holds it and a killed run goes on in the middle of a round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qwen_image_fast.training.rollout.draw import Condition, Transition
from qwen_image_fast.training.rollout.steps import Step


@dataclass
class Picture:
    """prompt: number of its condition in the round. x0: float32 [tokens, channels]. taken: its stochastic steps."""

    prompt: int
    x0: Tensor
    advantage: float = 0.0
    taken: list[Transition] = field(default_factory=list)


@dataclass
class Round:
    """step: of the run at which it begins. units: what an update takes one after another: pictures, by their number, or
    pairs (better, worse) of them."""

    step: int
    conditions: list[Condition] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    units: list[tuple[int, ...]] = field(default_factory=list)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and what is not tensors."""
        tensors: dict[str, Tensor] = {}
        for i, condition in enumerate(self.conditions):
            tensors[f"text/{i}"] = condition.text
            if condition.uncond is not None:
                tensors[f"uncond/{i}"] = condition.uncond
            tensors |= {f"reference/{i}/{k}": reference for k, reference in enumerate(condition.references)}
        for i, picture in enumerate(self.pictures):
            tensors[f"x0/{i}"] = picture.x0
            for k, one in enumerate(picture.taken):
                tensors |= {f"before/{i}/{k}": one.before, f"after/{i}/{k}": one.after}
        record = {
            "step": self.step,
            "shapes": [[c.shape, c.reference_shapes] for c in self.conditions],
            "pictures": [[p.prompt, p.advantage, [_written(t) for t in p.taken]] for p in self.pictures],
            "units": self.units,
        }
        return tensors, record

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], record: Mapping[str, Any], device: torch.device) -> Round:
        """The inverse of `state`."""
        at = {name: tensor.to(device) for name, tensor in tensors.items()}
        found = cls(int(record["step"]))
        for i, (shape, shapes) in enumerate(record["shapes"]):
            references = [at[f"reference/{i}/{k}"] for k in range(len(shapes))]
            own = [_shape(s) for s in shapes]
            found.conditions.append(Condition(at[f"text/{i}"], at.get(f"uncond/{i}"), _shape(shape), references, own))
        for i, (prompt, advantage, taken) in enumerate(record["pictures"]):
            steps = [
                Transition(Step(*step), at[f"before/{i}/{k}"], at[f"after/{i}/{k}"]) for k, step in enumerate(taken)
            ]
            found.pictures.append(Picture(prompt, at[f"x0/{i}"], advantage, steps))
        found.units = [tuple(unit) for unit in record["units"]]
        return found


def _written(one: Transition) -> list[Any]:
    step = one.step
    return [step.sigma, step.after, step.first_after, step.kind, step.noise]


def _shape(values: Any) -> tuple[int, int, int]:
    frames, height, width = values
    return int(frames), int(height), int(width)
