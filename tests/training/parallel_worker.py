"""A process of a run of several: `python parallel_worker.py JOBS`, JOBS a JSON list of arguments of `run.train`."""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from qwen_image_fast.training import run
from qwen_image_fast.training.parallel import shard
from qwen_image_fast.training.parallel.layout import local

FILL, TRAIN_STEP = shard.fill, run.Trainer.train_step


def counted(into):
    """`fill`, which also says how many bytes this process read meanwhile."""

    def fill(*arguments):
        before = read_so_far()
        result = FILL(*arguments)
        into["process_read"] = read_so_far() - before
        return result

    return fill


def read_so_far():
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])  # rchar: bytes of read(2) and its kin


def asking(mixture):
    """`train_step`, before which the first rank asks for another mixture at a step: (step, folder, text)."""
    step, folder, text = mixture

    def train_step(trainer, batches):
        if trainer.step == step and trainer.parallel.main:
            Path(folder, "mixture.yaml").write_text(text)
        return TRAIN_STEP(trainer, batches)

    return train_step


def deadly(rank, step, number=signal.SIGKILL):
    """`train_step` to which a signal, SIGKILL unless told else, comes on one rank at a step."""

    def train_step(trainer, batches):
        if (trainer.parallel.rank, trainer.step) == (rank, step):
            os.kill(os.getpid(), number)
        return TRAIN_STEP(trainer, batches)

    return train_step


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(sys.argv[1]):
        read = {}
        shard.fill = counted(read)
        mixture = job.pop("mixture", None)
        killed = job.pop("killed", None)
        run.Trainer.train_step = asking(mixture) if mixture else deadly(*killed) if killed else TRAIN_STEP
        trainer = run.train(**job)
        held = sum(local(p).nbytes for p in trainer.task.transformer.parameters())
        found = {"bytes_read": trainer.task.bytes_read, "bytes_held": held, **read}
        print(json.dumps(found), flush=True)
