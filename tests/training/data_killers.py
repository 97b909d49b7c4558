"""Filters that end the process they run in, for runs in processes of their own."""

import os
import signal

from qwen_image_fast.training.data import parts
from qwen_image_fast.training.data.filters.base import Filter, Verdict
from qwen_image_fast.training.data.judge import build_filters
from qwen_image_fast.training.data.pipeline import run_filters


class Killer(Filter):
    """Ends the process, as `kill -9` does, at the record that `origin` names."""

    name, stage = "file_size", 1

    def __init__(self, origin):
        self.origin = origin

    def judge(self, picture):
        if picture.record.origin == self.origin:
            os.kill(os.getpid(), signal.SIGKILL)
        return Verdict(1.0)


def filters_that_kill(recipe):
    """Those of the recipe, and a `Killer` at the record that the licence of its source names."""
    return [Killer(recipe.sources[0].licence), *build_filters(recipe)]


def run_and_die(recipe, out, records):
    parts.RECORDS = records
    run_filters(recipe, out, filters=filters_that_kill)
