"""Checkpoints that every rank writes and reads its own part of: torch's distributed checkpoint in safetensors files.

    checkpoints/step-00000100/shard-0000N-model-00001-of-00001.safetensors    the tensors of state.safetensors, in parts
    checkpoints/step-00000100/trainer.json                                    step, recipe, updates of the average

A part's place in its tensor stands in its file, so any other number or arrangement of ranks, or a single process, reads
what it needs; and a checkpoint of a single process is one of a single part. Tensors are copied to the host at once and
written while training goes on. As ever, a folder `step-*` is complete: it is renamed when every rank has written.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from qwen_image_fast.training.engine import checkpoint as checkpoints
from qwen_image_fast.training.engine.checkpoint import Checkpoint
from qwen_image_fast.training.engine.checkpoint_parts import sizes
from qwen_image_fast.training.parallel.layout import Parallel


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The tensor of which every rank has a part, split as `like`."""
    if not isinstance(like, DTensor):
        return part.detach()
    return DTensor.from_local(
        part.detach(), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


class Writer:
    """Writes checkpoints in the background, one at a time.

    Args:
        folder: of the checkpoints. keep: how many.
    """

    def __init__(self, folder: Path, keep: int, parallel: Parallel):
        self.folder, self.keep, self.parallel = folder, keep, parallel
        self.pending: tuple[Future, Checkpoint, Path] | None = None

    def save(self, state: Checkpoint, like: Mapping[str, Tensor]) -> None:
        """Begin to write; tensors of `state` may change as soon as this returns. like: the parameters, by name."""
        self.finish()
        building = self.folder / f".step-{state.step:08d}"
        if self.parallel.main:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
        self.parallel.barrier()
        tensors = named(state, like)
        writer = HuggingFaceStorageWriter(str(building), save_distributed=True)
        with checkpoints.explained(self.folder, state.step):
            future = dcp.async_save(tensors, storage_writer=writer, process_group=self.parallel.writer_group)
        assert isinstance(future, Future)
        self.pending = future, state, building

    def poll(self) -> None:
        """Put a checkpoint that is complete in its place."""
        if self.pending is not None and self.pending[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait for what is being written. OSError: the disk is full."""
        if self.pending is None:
            return
        (future, state, building), self.pending = self.pending, None
        with checkpoints.explained(self.folder, state.step):
            future.result()
            if self.parallel.main:
                checkpoints.publish(building, self.folder, state, self.keep)


def named(state: Checkpoint, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of a checkpoint under its name in the files."""
    tensors = {f"weights/{n}": whole(t, like[n]) for n, t in state.weights.items()}
    tensors |= {f"ema/{n}": whole(t, like[n]) for n, t in state.ema.items()}
    for full, tensor in state.optimizer.items():
        name, _, key = full.rpartition("/")
        # AdamW's step counter, the same on all ranks, is that of the parameter: it starts anew with the states.
        tensors[f"optimizer/{full}"] = tensor if key == "step" else whole(tensor, like[name])
    return tensors


def load_parts(path: Path, tensors: dict[str, Tensor], parallel: Parallel) -> None:
    """Fill `tensors` (of `named`) from a checkpoint of any layout. ValueError: it does not fit, or is damaged."""
    stored = sizes(path)
    check(path, {n: t.shape for n, t in tensors.items()}, stored)
    reader = HuggingFaceStorageReader(str(path))
    try:
        dcp.load(dict(tensors), storage_reader=reader, process_group=parallel.host_group)
    except Exception as error:
        raise ValueError(f"resume: {path} is damaged ({error}); remove it to resume from the one before") from error


def check(path: Path, wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """The checkpoint holds what this run needs."""
    missing = sorted(wanted.keys() - stored.keys())
    extra = sorted(n for n in stored.keys() - wanted.keys() if n.startswith("weights/"))
    wrong = [n for n in wanted if n in stored and tuple(wanted[n]) != tuple(stored[n])]
    if missing or extra or wrong:
        some = ", ".join((missing + extra + wrong)[:3])
        raise ValueError(
            f"resume: {path} holds other weights than this recipe trains: {len(missing)} are missing, {len(extra)} "
            f"unexpected and {len(wrong)} of another shape, such as {some}"
        )
