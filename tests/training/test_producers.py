"""Producers: the same batches from every backend, whoever dies."""

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info
from trainer_helpers import log_of, small_recipe, start, weights

from qwen_image_fast.training.producer.backend import Here, ProducerDied, Ticket
from qwen_image_fast.training.producer.pack import pack, unpack
from qwen_image_fast.training.producer.processes import Processes, _put
from qwen_image_fast.training.producer.store import Store
from qwen_image_fast.training.recipe.run import ProducersRecipe

needs_ray = pytest.mark.skipif(not find_spec("ray"), reason="needs Ray")
BACKENDS = ["processes", pytest.param("ray", marks=needs_ray)]


class Numbers:
    """Batches that say which they are; one of them kills whoever makes it, or fails."""

    def __init__(self, deadly=None, bad=None):
        self.deadly, self.bad = deadly, bad

    def batch(self, step, micro):
        if step == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.bad:
            raise ValueError(f"step {step} is bad")
        return [np.full((3, 4), step), torch.full((2, 3), step, dtype=torch.bfloat16), f"step {step}"]

    def use(self, changes):
        pass


def tickets(count):
    return (Ticket(n, n, 0) for n in range(count))


def left_behind():
    return [name for name in os.listdir("/dev/shm") if name.startswith(f"qif-{os.getpid()}-")]


def test_batches_travel_as_they_are():
    value = Numbers().batch(7, 0)
    array, tensor, words = unpack(*pack(value))
    assert np.array_equal(array, value[0]) and torch.equal(tensor, value[1]) and words == value[2]
    tensor[0, 0] = array[0, 0] = 1
    empty = unpack(*pack(torch.zeros(0, 5)))
    assert empty.shape == (0, 5)


def test_the_store_is_bounded():
    asked = []

    def endless():
        for ticket in tickets(100):
            asked.append(ticket.number)
            yield ticket

    store = Store(Here(Numbers()), endless(), 3)
    for n in range(5):
        assert store.next()[2] == f"step {n}"
        assert len(asked) == n + 1 + 3


class Threads(Numbers):
    def batch(self, step, micro):
        pools = {pool["internal_api"]: pool["num_threads"] for pool in threadpool_info()}
        return [pools.get("openblas", 1), torch.get_num_threads()]


def test_a_worker_computes_on_one_thread():
    backend = Processes(Threads(), 1)
    store = Store(backend, tickets(1), 1)
    assert store.next() == [1, 1]
    backend.close()


def test_a_dead_worker_is_replaced_and_a_failure_is_told():
    backend = Processes(Numbers(bad=9), 2)
    try:
        store = Store(backend, tickets(10), 4)
        for n in range(9):
            if n == 2:
                for worker in backend.workers:
                    os.kill(worker.process.pid, signal.SIGKILL)
            assert store.next()[0][0, 0] == n
        with pytest.raises(ValueError, match="step 9 is bad"):
            store.next()
    finally:
        backend.close()
    assert left_behind() == []


def test_a_batch_that_kills_its_producers_stops_the_run():
    backend = Processes(Numbers(deadly=1), 1)
    try:
        store = Store(backend, tickets(3), 2)
        store.next()
        with pytest.raises(ProducerDied, match=r"3 producers died over micro-batch 0 of step 1 \(signal 9:"):
            store.next()
    finally:
        backend.close()
    assert left_behind() == []


def test_full_shared_memory_is_said(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="the shared memory is full, a batch needs 0 MB; lower producers.ahead"):
        _put(f"qif-{os.getpid()}-full", np.zeros(10))
    assert left_behind() == []


EDITS = {"t2i": 1.0, "ti2i": 1.0, "recon": 1.0}
RUN = {"steps": 6, "batch": 2, "accumulate": 2, "data__tasks": EDITS, "checkpoint__every": 2}


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    trainer = start(small_recipe(folder, **RUN, model__train_text_encoder=False), tmp_path_factory.mktemp("alone"))
    trainer.run()
    return trainer


def kill_a_producer(trainer):
    """At step 2, one of the producers of the run, whatever it is doing."""
    step, done = trainer.train_step, []

    def train_step(batches):
        if trainer.step == 2 and not done:
            os.kill(trainer.producers(), signal.SIGKILL)
            done.append(True)
        return step(batches)

    trainer.train_step = train_step
    return done


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_trains_alike_though_a_producer_is_killed(folder, tmp_path, alone, backend, monkeypatch):
    """The condition encoder is frozen, so that its states come from the producers too."""
    from qwen_image_fast.training.engine import trainer as trainers

    producers = {"backend": backend, "count": 2, "cpus": 0.1, "address": "local"}
    recipe = small_recipe(folder, **RUN, model__train_text_encoder=False, producers=producers)
    trainer, made = start(recipe, tmp_path), []
    begin = trainers.start_producers
    monkeypatch.setattr(trainers, "start_producers", lambda *a: made.append(begin(*a)) or made[-1])

    def pid():
        if backend == "processes":
            return made[0].workers[0].process.pid
        return made[0].ray.get(made[0].actors[0].pid.remote())

    trainer.producers = pid
    killed = kill_a_producer(trainer)
    trainer.run()
    assert killed
    assert log_of(tmp_path) == log_of(alone.folder)
    assert all(torch.equal(w, weights(trainer)[name]) for name, w in weights(alone).items())
    assert left_behind() == []


KILLED = """
import signal, sys
from pathlib import Path
import torch
sys.path.insert(0, {helpers!r})
from trainer_helpers import small_recipe, start

if __name__ == "__main__":
    torch.set_num_threads(1)
    recipe = small_recipe({folder!r}, **{changes!r}, model__train_text_encoder=False, producers__backend="processes")
    trainer = start(recipe, Path({run!r}))
    step = trainer.train_step
    def train_step(batches):
        if trainer.step == 3:
            Path({run!r}, "now").touch()
            signal.pause()
        return step(batches)
    trainer.train_step = train_step
    trainer.run()
"""


def test_a_killed_trainer_takes_its_producers_along_and_resumes(folder, tmp_path, alone):
    run, script = tmp_path / "run", tmp_path / "run.py"
    values = {"helpers": str(Path(__file__).parent), "folder": str(folder), "changes": RUN, "run": str(run)}
    script.write_text(KILLED.format(**values))
    with subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not (run / "now").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (run / "now").exists(), process.stderr.read().decode()
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        os.kill(process.pid, signal.SIGKILL)
    mine = f"qif-{process.pid}-"
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        alive = [pid for pid in children if Path(f"/proc/{pid}").exists()]
        if not alive and not any(name.startswith(mine) for name in os.listdir("/dev/shm")):
            break
        time.sleep(0.1)
    assert alive == [] and [name for name in os.listdir("/dev/shm") if name.startswith(mine)] == []
    resumed = start(small_recipe(folder, **RUN, model__train_text_encoder=False), run, resume=True)
    assert resumed.step == 2
    resumed.run()
    assert log_of(run) == log_of(alone.folder)
    assert all(torch.equal(w, weights(resumed)[name]) for name, w in weights(alone).items())


@needs_ray
def test_a_ray_actor_is_replaced_and_what_cannot_be_made_is_told(monkeypatch):
    import ray

    from qwen_image_fast.training.producer.ray_actors import RayActors

    def recipe(cpus=0.1):
        return ProducersRecipe(backend="ray", cpus=cpus)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # `Numbers`, which the actors cannot import
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        backend = RayActors(Numbers(bad=3, deadly=4), recipe())
        assert not backend.started
        store = Store(backend, tickets(4), 1)
        for n in range(3):
            if n == 1:
                os.kill(ray.get(backend.actors[0].pid.remote()), signal.SIGKILL)
            assert store.next()[0][0, 0] == n
        with pytest.raises(ValueError, match="step 3 is bad"):
            store.next()
        backend.submit(Ticket(4, 4, 0))
        with pytest.raises(ProducerDied, match=r"micro-batch 0 of step 4 could .* died 3 times; "):
            backend.result(4)
        backend.close()
        assert ray.is_initialized()  # whoever started it ends it
        with pytest.raises(ValueError, match=r"count x cpus must be at most the 2 .* got 1 x 4; give the address of"):
            backend._check(recipe(cpus=4.0))
        assert not ray.is_initialized()
    finally:
        ray.shutdown()
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_ray_is_asked_for_in_a_sentence(monkeypatch):
    from qwen_image_fast.training.producer.store import start as start_producers

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"producers.backend ray needs the package ray: pip install '\.\[ray\]'"):
        start_producers(ProducersRecipe(backend="ray"), Numbers())
