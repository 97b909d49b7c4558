"""Training checkpoints: weights, averages and optimiser states as safetensors, the rest as JSON; never a pickle.

    checkpoints/step-00000100/state.safetensors     weights/<name>, ema/<name>, optimizer/<name>/<state>, all float32;
                                                    task/<name>: what a task has collected, and copies of the weights
    checkpoints/step-00000100/trainer.json          step, recipe, updates of the average; what else a task remembers

A checkpoint is written into a hidden folder, flushed to the disk and then renamed, so a folder `step-*` is complete. An
older one is removed only when a newer one is in place. Only what trains is stored: the frozen weights are those of the
folder that the recipe starts from.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from qwen_image_fast.checkpoint import json_bytes, read_json, save_state
from qwen_image_fast.files import atomic_write
from qwen_image_fast.training.parallel.layout import check_torch

STATE, RECORD = "state", "trainer.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass
class Checkpoint:
    """What a run needs to go on. step: updates made. task, collected: what a task has to remember (`Collects`)."""

    step: int
    recipe: dict[str, Any]
    ema_updates: int
    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    task: dict[str, Tensor] = field(default_factory=dict)
    collected: dict[str, Any] = field(default_factory=dict)


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `folder/step-<step>` and remove all but the newest `keep`; the earlier ones outlive any failure.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = path_of(folder, checkpoint.step)
    building = folder / f".{final.name}-{os.getpid()}"
    tensors = {f"weights/{n}": t for n, t in checkpoint.weights.items()}
    tensors |= {f"ema/{n}": t for n, t in checkpoint.ema.items()}
    tensors |= {f"optimizer/{n}": t for n, t in checkpoint.optimizer.items()}
    tensors |= {f"task/{n}": t.clone() for n, t in checkpoint.task.items()}  # some are parts of one tensor
    try:
        with explained(folder, checkpoint.step):
            save_state(
                {n: t.detach() for n, t in tensors.items()}, building, base_name=STATE, max_shard_size="1TB"
            )  # fmt: skip
            publish(building, folder, checkpoint, keep)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return final


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def publish(building: Path, folder: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Put a written checkpoint in its place, with what is not tensors; then remove all but the newest `keep`."""
    final = path_of(folder, checkpoint.step)
    record = {"step": checkpoint.step, "recipe": checkpoint.recipe, "ema_updates": checkpoint.ema_updates}
    if checkpoint.collected:
        record["task"] = checkpoint.collected
    atomic_write(building / RECORD, lambda file: file.write(json_bytes(record)))
    _flush(building)
    if final.exists():  # the same step again, after a resume from an earlier one
        shutil.rmtree(final)
    building.replace(final)
    _flush(folder)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


@contextmanager
def explained(folder: Path, step: int) -> Iterator[None]:
    """OSError of a full disk says what is lost, nothing but this checkpoint."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            last = latest(folder)
            kept = f"the last checkpoint, {last}, is unchanged" if last else "there is no earlier checkpoint"
            what = f"the disk is full: the checkpoint of step {step} was not written, {kept}; free space and resume"
            raise OSError(error.errno, what) from error
        raise


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / RECORD).is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def latest(folder: Path) -> Path | None:
    found = checkpoints(folder)
    return found[-1] if found else None


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed run left half-written. Call it where no other run writes to the folder."""
    for path in folder.glob(".step-*") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint; FileNotFoundError where there is none, ValueError where it is damaged."""
    if not (path / RECORD).is_file():
        raise FileNotFoundError(f"resume: {path} is no training checkpoint: it has no {RECORD}")
    record = read_json(path / RECORD)
    if in_parts(path):
        check_torch()
    try:
        if in_parts(path):
            from qwen_image_fast.training.engine.checkpoint_parts import load_whole

            tensors = load_whole(path)
        else:
            tensors = load_file(path / f"{STATE}.safetensors")
    except Exception as error:
        raise ValueError(f"resume: {path} is damaged ({error}); remove it to resume from the one before") from error
    groups: dict[str, dict[str, Tensor]] = {"weights": {}, "ema": {}, "optimizer": {}, "task": {}}
    for full, tensor in tensors.items():
        group, _, name = full.partition("/")
        groups[group][name] = tensor
    return Checkpoint(
        record["step"], record["recipe"], record["ema_updates"], **groups, collected=record.get("task", {})
    )


def in_parts(path: Path) -> bool:
    """Several processes wrote the checkpoint (training/parallel/checkpoints.py)."""
    return any(path.glob("shard-*.safetensors"))


def check_names(wanted: Mapping[str, Tensor], checkpoint: Checkpoint, path: Path) -> None:
    """The checkpoint holds exactly the trainable weights of this model."""
    missing, unexpected = wanted.keys() - checkpoint.weights.keys(), checkpoint.weights.keys() - wanted.keys()
    if missing or unexpected:
        some = ", ".join(sorted(missing | unexpected)[:3])
        raise ValueError(
            f"resume: {path} holds other weights than this recipe trains: {len(missing)} are missing and "
            f"{len(unexpected)} unexpected, such as {some}"
        )
    for name, tensor in wanted.items():
        if tensor.shape != checkpoint.weights[name].shape:
            raise ValueError(
                f"resume: {name} must have the shape {tuple(tensor.shape)}, "
                f"{path} has {tuple(checkpoint.weights[name].shape)}"
            )


def _flush(folder: Path) -> None:
    """The directory entry itself reaches the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
