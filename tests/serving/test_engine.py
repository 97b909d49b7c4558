"""The engine: whatever joins, leaves, is cancelled and fails, every picture has the bits of the one made alone."""

import random
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from serving_harness import Collected, alone, picture, some_tasks, task

from qwen_image_fast.pipelines.conditions import encode_reference_latents
from qwen_image_fast.sampling import Sample, Text, Track
from qwen_image_fast.serving.adapters import Registered
from qwen_image_fast.serving.alike import groups
from qwen_image_fast.serving.engine import Engine, Limits
from qwen_image_fast.serving.messages import Cancelled, Failed, Finished, Stepped
from qwen_image_fast.serving.previews import Previews


def engine(models, seen, **options):
    found = Engine(models.pipe, seen, pipelines=models.pipeline, loras=models.loras, **options)
    found.start()
    return found


def test_every_picture_is_the_one_made_alone(models):
    """Sizes, steps, guidance, references, masks, strengths, LoRAs and schedules; a third is cancelled on the way, some
    fail, all come at random."""
    chance, seen = random.Random(0), Collected()
    tasks = some_tasks(24, chance)
    doomed = set()
    for k in range(5, len(tasks), 8):
        tasks[k] = task(width=80, height=48, seed=k)
        doomed.add(tasks[k].id)
    running = engine(models, seen, limits=Limits(wave_tokens=400))
    forward = models.pipe.transformer.forward_packed

    def failing(img, txt, layout, *more):
        if any(s == ((1, 3, 5),) for s in layout.shapes):
            raise RuntimeError("this one cannot")
        return forward(img, txt, layout, *more)

    models.pipe.transformer.forward_packed = failing
    cancelled = {t.id for t in tasks[2::6]} - doomed
    try:
        for t in tasks:
            running.submit(t)
            if t.id in cancelled:
                threading.Timer(chance.random() / 2, running.cancel, [t.id]).start()
            time.sleep(chance.random() / 50)
        seen.wait({t.id for t in tasks})
    finally:
        del models.pipe.transformer.forward_packed
        running.end()
    kinds = {t.id: type(seen.last[t.id]) for t in tasks}
    assert {id for id, kind in kinds.items() if kind is Failed} == doomed
    assert {id for id, kind in kinds.items() if kind is Cancelled} <= cancelled
    done = [t for t in tasks if kinds[t.id] is Finished]
    assert len(done) >= len(tasks) - len(doomed) - len(cancelled)
    for t in done:
        expected = alone(models, t)
        found = seen.last[t.id].images
        assert [np.asarray(i).tobytes() for (i,) in found] == [np.asarray(i).tobytes() for i in expected], t.request
    assert max(wave.requests for wave in seen.waves) > 1


def test_short_texts_run_alone_and_rows_are_measured(models):
    seen = Collected()
    running = engine(models, seen)
    running.enough_rows = 10_000
    tasks = [task("a", 64, seed=k, steps=2) for k in range(3)]
    for t in tasks:
        running.submit(t)
    seen.wait({t.id for t in tasks})
    running.end()
    for t in tasks:
        assert np.array_equal(seen.last[t.id].images[0][0], alone(models, t)[0])


class Rows:
    def __init__(self, image_rows, text_rows):
        self.image_rows, self.text_rows = image_rows, text_rows


@pytest.mark.parametrize("rows, enough, amx, expected", [
    ([(64, 20), (32, 20), (64, 4)], 16, False, [[0, 1], [2]]),
    ([(64, 20), (32, 20)], None, False, [[0], [1]]),
    ([(400, 20), (64, 20), (500, 30), (64, 20)], 16, True, [[0, 2], [1, 3]]),
    ([(300, 20), (64, 20), (300, 30)], 16, True, [[0, 1], [2]]),
    ([(400, 300), (400, 300)], 16, True, [[0], [1]]),
])  # fmt: skip
def test_groups(rows, enough, amx, expected):
    members = [Rows(*pair) for pair in rows]
    assert [[members.index(m) for m in group] for group in groups(members, enough, amx)] == expected


@pytest.mark.parametrize("wave_tokens", [300, 2048])
def test_a_small_request_is_not_held_up_by_a_large_one(models, wave_tokens):
    """By the number of steps: the large one takes one at most before the small one, that came later, is done; whether
    it fits into a wave or is larger."""
    seen = Collected()
    running = engine(models, seen, limits=Limits(wave_tokens=wave_tokens))
    large = task("a large red circle and a blue square", 512, steps=8)
    running.submit(large)
    seen.until(lambda: any(e.id == large.id for e in seen.steps))
    small = task("a small red circle and a blue square", 64, steps=6)
    running.submit(small)
    seen.wait({small.id})
    between = [e.id for e in seen.steps[next(k for k, e in enumerate(seen.steps) if e.id == small.id) :]]
    running.cancel(large.id)
    seen.wait({large.id})
    running.end()
    until = between.index(small.id), len(between) - 1 - between[::-1].index(small.id)
    assert between[until[0] : until[1] + 1].count(large.id) <= 1
    assert isinstance(seen.last[large.id], Cancelled)


def test_cancelling_frees_the_place_at_the_next_step(models):
    seen = Collected()
    running = engine(models, seen)
    t = task("a red circle on the left of a blue square", 64, steps=1000)
    running.submit(t)
    seen.until(lambda: len(seen.steps) >= 2)
    assert running.cancel(t.id, "gone")
    seen.wait({t.id})
    taken = seen.steps[-1].step
    assert seen.last[t.id] == Cancelled(t.id, "gone") and taken < 1000
    assert running.load == (0, 0) and not running.cancel(t.id)
    running.end()


def test_previews_come_early(models):
    seen = Collected()
    running = engine(models, seen)
    t = task("a red circle on the left of a blue square", 128, steps=20, previews=3)
    running.submit(t)
    seen.wait({t.id})
    running.end()
    shown = [e for e in seen.steps if e.preview is not None]
    assert [e.number for e in shown] == [0, 1, 2] and shown[0].step <= 3
    assert [e.step for e in seen.steps] == list(range(1, 21)) and seen.steps[-1].left == 0


def test_previews_have_the_colours_of_the_picture(models):
    """A step that reaches the latents of a picture shows that picture."""
    previews, image = Previews(models.pipe.vae), picture(128, 96)
    with torch.inference_mode():
        (latents,), ((_, height, width),) = encode_reference_latents(models.pipe.vae, [image])
    sample = Sample(latents, (1, height, width), Text(latents))
    levels = torch.tensor([0.5, 0.0])
    track = Track(sample, levels, levels.diff(), None, 0, latents, None, 1.0, True, 1, latents)
    shown = previews.of(track, latents + torch.randn_like(latents)).astype(float)
    small = np.asarray(image.resize((16, 12), Image.Resampling.BOX)).astype(float)
    assert shown.shape == small.shape
    assert np.abs(shown - small).mean() < 0.4 * np.abs(small - small.mean((0, 1))).mean()


def test_an_engine_that_ends_answers_all(models):
    seen = Collected()
    running = engine(models, seen)
    tasks = [task("a red circle on the left of a blue square", 64, seed=k, steps=500) for k in range(6)]
    for t in tasks:
        running.submit(t)
    seen.until(lambda: seen.steps)
    running.end()
    assert {t.id for t in tasks} == set(seen.last)
    with pytest.raises(RuntimeError, match="has ended"):
        running.submit(tasks[0])


def test_memory_of_the_engine_is_that_of_what_runs(models):
    """Nothing of a request that left is kept."""
    seen = Collected()
    running = engine(models, seen)
    tasks = some_tasks(6, random.Random(1))
    for t in tasks:
        running.submit(t)
    seen.wait({t.id for t in tasks})
    running.end()
    assert not running._works and not running._waves and not running._encoded and not running._running
    assert isinstance(models.loras, Registered) and isinstance(seen.steps[0], Stepped)
    assert len(running._tables) <= 16 and torch.is_inference_mode_enabled() is False
