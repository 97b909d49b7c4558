"""A group of processes is one engine: with gloo, two guidance branches, two halves of the tokens, and one that dies."""

import os
import signal
import threading

import numpy as np
import pytest
from serving_harness import Collected, alone, lora_file, picture, task

from qwen_image_fast.serving.messages import Alive, Finished, Ready
from qwen_image_fast.serving.process import EngineProcess
from qwen_image_fast.serving.settings import Model

LONG = ("a red circle on the left of a blue square, and behind them a green triangle on a black background, with a "
        "white star above")  # fmt: skip
NEGATIVE = "a dark picture of bad quality, with text that nobody can read, and with shapes that are not what they are"


class Group:
    """An engine of several processes, and what it said."""

    def __init__(self, lora, **split):
        self.events, self.ready, self.code = Collected(), threading.Event(), threading.Event()
        model = Model(name="tiny", loras={"style": str(lora)}, threads=1, **split)
        self.process = EngineProcess(model, self.event, self.ended)
        assert self.ready.wait(240), "the engine did not become ready"

    def event(self, event):
        if isinstance(event, Ready):
            self.about = event.about
            self.ready.set()
        elif not isinstance(event, Alive):
            self.events(event)

    def ended(self, code):
        self.code.set()


@pytest.fixture
def tiling(models):
    models.pipe.vae.enable_tiling()
    yield
    models.pipe.vae.disable_tiling()


@pytest.mark.parametrize("split", [{"guidance": 2}, {"ulysses": 2}], ids=str)
def test_a_group_makes_the_pictures_of_one_process(models, tmp_path, split, tiling, one_thread):
    """Bit-equal by guidance's branches and the VAE's tiles, equal up to rounding by tokens; then one of the processes
    dies."""
    group = Group(lora_file(tmp_path / "style.safetensors"), vae_tiling=True, **split)
    try:
        guided = {"negative_prompt": NEGATIVE, "cfg": 3.0, "steps": 3}
        tasks = [
            task(LONG, 80, seed=1, **guided),
            task(LONG, 64, seed=2, steps=3),
            task(LONG, 96, seed=3, loras={"style": 0.5}, **guided),
            task(LONG, kind="edit", opened={"image": [picture(64, 80)]}, seed=4, **guided),
            task(LONG, 272, seed=5, steps=1),  # of four tiles
            task(LONG, kind="image_to_image", opened={"image": picture(272, 64)}, seed=6, strength=0.7),
        ]
        for one in tasks:
            group.process.submit(one)
        group.events.wait({one.id for one in tasks})
        for one in tasks:
            event = group.events.last[one.id]
            assert isinstance(event, Finished), event
            got, expected = np.array(event.images[0][0], int), np.array(alone(models, one)[0], int)
            assert np.abs(got - expected).max() <= (0 if "guidance" in split else 1)
        assert group.about["parallel"] == f"guidance {split.get('guidance', 1)} x ulysses {split.get('ulysses', 1)}"
        follower = group.process._all[1]
        os.kill(follower.pid, signal.SIGKILL)
        assert group.code.wait(60), "an engine went on without one of its processes"
    finally:
        group.process.end()
    assert not any(process.is_alive() for process in group.process._all)
