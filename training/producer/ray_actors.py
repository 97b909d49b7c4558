"""Producers as Ray actors, on as many machines as the cluster has; batches come through Ray's object store."""

from __future__ import annotations

import os
from typing import Any

from qwen_image_fast.extras import needed_for
from qwen_image_fast.training import blas
from qwen_image_fast.training.producer.backend import MOST_DEATHS, BatchMaker, ProducerDied, Ticket, make
from qwen_image_fast.training.producer.pack import pack, unpack
from qwen_image_fast.training.recipe.run import ProducersRecipe


class _Producer:
    def __init__(self, maker: BatchMaker):
        import torch

        torch.set_num_threads(1)
        blas.on_one_thread("producers.backend ray")
        self.maker = maker

    def make(self, ticket: Ticket) -> tuple[bytes, list[bytes]]:
        head, buffers = pack(make(self.maker, ticket))
        return head, [bytes(buffer) for buffer in buffers]

    def pid(self) -> int:
        return os.getpid()


class RayActors:
    """A `Backend`. Ray starts an actor that died anew, elsewhere if need be, and gives it its tickets again.

    Actors and not Ray Data, which maps a fixed plan over rows: here the trainer asks for micro-batches one by one, in
    its order, and what is in them may change while the run goes on.

    Raises:
        ImportError: Ray is not installed. ValueError: a cluster that was started here is too small for the actors.
    """

    def __init__(self, maker: BatchMaker, recipe: ProducersRecipe):
        with needed_for("producers.backend ray"):
            import ray
        self.ray, self.started = ray, not ray.is_initialized()
        if self.started:
            ray.init(address=recipe.address or None, include_dashboard=False, log_to_driver=False,
                     logging_level="ERROR")  # fmt: skip
            self._check(recipe)
        options = {"num_cpus": recipe.cpus, "num_gpus": recipe.gpus, "max_restarts": -1,
                   "max_task_retries": MOST_DEATHS - 1}  # fmt: skip
        kind, self.copied = ray.remote(_Producer), ray.put(maker)  # held, for actors that are started anew
        self.actors = [kind.options(**options).remote(self.copied) for _ in range(recipe.count)]
        self.pending: dict[int, tuple[int, Ticket, Any]] = {}  # actor, ticket, reference

    def _check(self, recipe: ProducersRecipe) -> None:
        """Actors that nobody has room for would be waited for without end; other clusters may grow."""
        if recipe.address not in ("", "local") or os.environ.get("RAY_ADDRESS"):
            return
        there = self.ray.cluster_resources()
        for kind, each in (("cpus", recipe.cpus), ("gpus", recipe.gpus)):
            room = there.get(kind[:-1].upper(), 0.0)
            if recipe.count * each > room:
                self.ray.shutdown()
                raise ValueError(
                    f"producers: count x {kind} must be at most the {room:g} that Ray found on this machine, got "
                    f"{recipe.count} x {each:g}; give the address of a larger cluster"
                )

    def submit(self, ticket: Ticket) -> None:
        busy = [actor for actor, _, _ in self.pending.values()]
        actor = min(range(len(self.actors)), key=busy.count)
        self.pending[ticket.number] = actor, ticket, self.actors[actor].make.remote(ticket)

    def result(self, number: int) -> Any:
        _, ticket, reference = self.pending.pop(number)
        try:
            return unpack(*self.ray.get(reference))
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self.ray.exceptions.RayActorError as error:
            raise ProducerDied(
                f"train: the producer of micro-batch {ticket.micro} of step {ticket.step} could not be started or died "
                f"{MOST_DEATHS} times; resume with fewer producers.count or look at its samples; Ray says: {error}"
            ) from error

    def close(self) -> None:
        self.pending.clear()
        for actor in self.actors:
            self.ray.kill(actor)
        if self.started:
            self.ray.shutdown()
