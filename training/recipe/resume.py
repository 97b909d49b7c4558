"""Whether a run may go on from a checkpoint with this recipe: known from the checkpoint's record. Imports no torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from qwen_image_fast.training.recipe.curriculum import Curriculum
from qwen_image_fast.training.recipe.fields import differences

# They decide which tensors a checkpoint has, and of which shape: nobody can go on from it with other values.
_SHAPING = (
    "kind", "model.train_text_encoder", "lora.rank", "lora.ranks", "lora.kind", "lora.factor", "lora.targets",
    "mode", "base_dim",
)  # fmt: skip
_STATES = "optimizer.name"  # what the optimiser of the stage under way remembers


def check_resume(run: Curriculum, folder: Path, allow_changes: bool) -> None:
    """As `check_changes`, for the newest checkpoint of a run's folder, before anything is loaded."""
    records = sorted(folder.glob("checkpoints/step-*/trainer.json"), key=lambda path: int(path.parent.name[5:]))
    if not records:
        return
    try:
        record = json.loads(records[-1].read_text(encoding="utf-8"))
        stored, step = record["recipe"], record["step"]
    except (ValueError, KeyError):
        return  # damaged: said where it is read
    check_changes(run, stored, step, records[-1].parent, allow_changes)


def check_changes(run: Curriculum, stored: dict[str, Any], step: int, path: Path, allow_changes: bool) -> list[str]:
    """The fields in which a run differs from the recipe `stored` in the checkpoint `path` after `step` updates.

    Raises:
        ValueError: they differ and `allow_changes` is False, or in a field with which nobody can go on.
    """
    # Where the parts of a model are does not change what it learns.
    changed = [
        change for change in differences(stored, run.described()) if not re.match(r"([^:]*\.)?parallel[.:]", change)
    ]
    if changed and not allow_changes:
        raise ValueError(
            f"resume: the recipe is not the one of {path}: {'; '.join(changed)}; --allow-changes goes on so"
        )
    stage = f"stages.{run.number(max(step - 1, 0))}."
    if fixed := [change for change in changed if _fixed(change, stage)]:
        what = ", and ".join(_as_rule(change) for change in fixed)
        raise ValueError(
            f"resume: {what}: {path} holds weights or states of the former, also with --allow-changes; put it back, or "
            "begin a new run in another folder (--out)"
        )
    return changed


def _fixed(change: str, stage: str) -> bool:
    name = change.partition(": ")[0]
    plain = re.sub(r"^stages\.\d+\.", "", name)
    if plain == _STATES:
        return name in (_STATES, stage + _STATES)
    return any(plain == field or plain.startswith(f"{field}.") for field in _SHAPING)


def _as_rule(change: str) -> str:
    """ "lora.rank: 16 -> 4" as a rule."""
    name, _, values = change.partition(": ")
    old, _, new = values.partition(" -> ")
    return f"{name} must stay {old}, got {new}"
