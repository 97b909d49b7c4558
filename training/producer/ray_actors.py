"""Producers as Ray actors, on as many machines as the cluster has; batches come through Ray's object store."""

from __future__ import annotations

from typing import Any

from qwen_image_fast.training.producer.store import BatchMaker, ProducerDied, Ticket, make, pack, unpack
from qwen_image_fast.training.recipe import ProducersRecipe


class _Producer:
    def __init__(self, maker: BatchMaker):
        import torch

        torch.set_num_threads(1)
        self.maker = maker

    def make(self, ticket: Ticket) -> tuple[bytes, list[bytes]]:
        head, buffers = pack(make(self.maker, ticket))
        return head, [bytes(buffer) for buffer in buffers]

    def pid(self) -> int:
        import os

        return os.getpid()


class RayActors:
    """A `Backend`. Ray starts an actor that died anew, elsewhere if need be, and gives it its tickets again.

    Raises:
        ImportError: Ray is not installed.
    """

    def __init__(self, maker: BatchMaker, recipe: ProducersRecipe):
        try:
            import ray
        except ImportError as error:
            raise ImportError("producers.backend ray needs Ray: pip install 'qwen-image-fast[ray]'") from error
        self.ray, self.started = ray, not ray.is_initialized()
        if self.started:
            ray.init(address=recipe.address or None, include_dashboard=False, log_to_driver=False,
                     logging_level="ERROR")  # fmt: skip
        options = {"num_cpus": recipe.cpus, "num_gpus": recipe.gpus, "max_restarts": -1, "max_task_retries": -1}
        kind, self.copied = ray.remote(_Producer), ray.put(maker)  # held, for actors that are started anew
        self.actors = [kind.options(**options).remote(self.copied) for _ in range(recipe.count)]
        self.pending: dict[int, tuple[int, Any]] = {}  # actor and reference

    def submit(self, ticket: Ticket) -> None:
        busy = [actor for actor, _ in self.pending.values()]
        actor = min(range(len(self.actors)), key=busy.count)
        self.pending[ticket.number] = actor, self.actors[actor].make.remote(ticket)

    def result(self, number: int) -> Any:
        _, reference = self.pending.pop(number)
        try:
            return unpack(*self.ray.get(reference))
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self.ray.exceptions.RayActorError as error:
            raise ProducerDied(f"train: the Ray actor of a batch cannot be started again: {error}") from error

    def close(self) -> None:
        self.pending.clear()
        for actor in self.actors:
            self.ray.kill(actor)
        if self.started:
            self.ray.shutdown()
