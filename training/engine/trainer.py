"""The training loop: position -> batches -> loss -> update -> average -> log -> validate -> sample -> checkpoint.

What is trained is a `Task` (`tasks/`). Batch, noise and noise levels of a step are functions of
the recipe and the step number, so that the loop has no state but the step, the weights, their average and the
optimiser's.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen_image_fast import reference
from qwen_image_fast.checkpoint import read_json
from qwen_image_fast.training.batches.mixture import Watched
from qwen_image_fast.training.engine import checkpoint as checkpoints
from qwen_image_fast.training.engine.collecting import TrainingStopped, collect
from qwen_image_fast.training.engine.ema import EMA
from qwen_image_fast.training.engine.interrupts import Interrupted, Interrupts
from qwen_image_fast.training.engine.meter import Meter
from qwen_image_fast.training.engine.optimizer import Optimizer, learning_rate
from qwen_image_fast.training.engine.run_log import RunLog, SilentLog, memory_gb
from qwen_image_fast.training.parallel.layout import Parallel
from qwen_image_fast.training.producer.backend import Ticket
from qwen_image_fast.training.producer.store import Store
from qwen_image_fast.training.producer.store import start as start_producers
from qwen_image_fast.training.recipe.curriculum import Carry, Change, Curriculum, one_stage
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.names import check_unused
from qwen_image_fast.training.recipe.resume import check_changes
from qwen_image_fast.training.recipe.run import RunRecipe
from qwen_image_fast.training.tasks.flops import peak_flops
from qwen_image_fast.training.tasks.task import Collects, Task
from qwen_image_fast.training.terminal import Terminal

if TYPE_CHECKING:  # imported where several processes run: torch must be newer for them than for one
    from qwen_image_fast.training.parallel.checkpoints import Writer


class Trainer:
    """One run in one folder.

    Args:
        recipe, task: what to do; the recipe of a run of one stage, or a curriculum. folder: of the run; made if it is
            not there.
        parallel: this process among others; all have the same folder, and rank 0 alone logs.
        terminal: where the run is followed, already shown; None: `run` shows one of its own.
        named: files of which it was said before that they are left out.
        resume: go on from the newest checkpoint of the folder, where there is one.
        allow_changes: resume although the recipe is not the one of the checkpoint.

    Raises:
        FileExistsError: the folder has checkpoints and `resume` is False.
        ValueError: the checkpoint does not fit, or its recipe is another one; the sentence lists the differences.
    """

    def __init__(
        self, recipe: RunRecipe | Curriculum, task: Task, folder: Path, *, resume: bool = False,
        allow_changes: bool = False, parallel: Parallel | None = None, terminal: Terminal | None = None,
        named: Collection[str] = (),
    ):  # fmt: skip
        self.parallel, self.terminal, self.named = parallel, terminal, named
        self.run_of = recipe if isinstance(recipe, Curriculum) else one_stage(recipe)
        self.stage, self.recipe = 0, self.run_of.stages[0].recipe  # those of the step under way
        self.task, self.folder = task, Path(folder)
        self.parameters = {
            f"{module}.{name}": p
            for module, m in task.modules.items()
            for name, p in m.named_parameters()
            if p.requires_grad
        }
        self.optimizer = Optimizer(self.parameters, self.recipe.optimizer, self.recipe.seed)
        self.ema = EMA(self.optimizer.masters, self.recipe.optimizer.ema)
        peak = peak_flops(task.device)
        self.peak = peak * (parallel.sizes.world if parallel else 1) if peak else None
        self.step = 0
        self.seen: list[tuple[float, float]] = []  # noise level and loss of the latest step's samples, on this rank
        self.interrupts, self.all_asked = Interrupts(), 0
        self.checkpoint_folder = self.folder / "checkpoints"
        found = checkpoints.latest(self.checkpoint_folder)
        self.resumed = resume
        if not resume:
            check_unused(self.folder)
        self.writer: Writer | None = None
        if parallel is not None:
            from qwen_image_fast.training.parallel.checkpoints import Writer

            self.writer = Writer(self.checkpoint_folder, self.recipe.checkpoint.keep, parallel)
            parallel.barrier()  # all have looked
        if parallel is None or parallel.main:
            checkpoints.remove_unfinished(self.checkpoint_folder)
        if found is not None:
            self._restore(found, allow_changes)

    def _restore(self, path: Path, allow_changes: bool) -> None:
        state = self._blank(path) if self.parallel else checkpoints.load(path)
        changed = check_changes(self.run_of, state.recipe, state.step, path, allow_changes)
        try:
            if self.parallel is not None:
                from qwen_image_fast.training.parallel.checkpoints import load_parts, named

                load_parts(path, named(state, self.parameters), self.parallel)
            else:
                checkpoints.check_names(self.optimizer.masters, state, path)
        except ValueError as error:
            if not changed:
                raise
            raise ValueError(f"{error}; the recipe was changed: {'; '.join(changed)}") from error
        with torch.no_grad():
            for name, master in self.optimizer.masters.items():
                master.copy_(state.weights[name])
                self.ema.average[name].copy_(state.ema[name])
        self.optimizer.write_back()
        # The stage of the last update: what the next one takes over is decided when it begins.
        if stage := self.run_of.number(max(state.step - 1, 0)):
            self._enter(stage, Carry(optimizer=False))
        self.optimizer.load_state(state.optimizer)
        if isinstance(self.task, Collects):
            self.task.load_state(state.task, state.collected)
        self.ema.updates, self.step = state.ema_updates, state.step

    def _blank(self, path: Path) -> checkpoints.Checkpoint:
        """What this rank has of a checkpoint, the tensors not yet filled."""
        from qwen_image_fast.training.engine.checkpoint_parts import sizes

        record, stored, masters = read_json(path / checkpoints.RECORD), sizes(path), self.optimizer.masters
        weights, average = ({n: torch.zeros_like(m).detach() for n, m in masters.items()} for _ in range(2))
        # A parameter that has had no gradient has no states.
        kinds = {"exp_avg": torch.zeros_like, "exp_avg_sq": torch.zeros_like, "step": lambda _: torch.zeros(())}
        states = {
            f"{n}/{key}": empty(m.detach())
            for n, m in masters.items()
            for key, empty in kinds.items()
            if f"optimizer/{n}/{key}" in stored
        }
        return checkpoints.Checkpoint(record["step"], record["recipe"], record["ema_updates"], weights, average, states)

    def save(self) -> list[Path]:
        """Write a checkpoint, of several ranks in the background, and the adapters as they are used.

        Returns its folder, and the file of the adapters where there is one."""
        with self._averaged(), checkpoints.explained(self.checkpoint_folder, self.step):
            used = self.task.keep(self.folder, self.step)
        return [self._save(), *([used] if used else [])]

    def _save(self) -> Path:
        task, collected = self.task.state() if isinstance(self.task, Collects) else ({}, {})
        state = checkpoints.Checkpoint(
            self.step, self.run_of.described(), self.ema.updates, dict(self.optimizer.masters), self.ema.average,
            self.optimizer.state(), task, collected,
        )  # fmt: skip
        if self.writer is not None:
            self.writer.save(state, self.parameters)
            return checkpoints.path_of(self.checkpoint_folder, self.step)
        return checkpoints.save(self.checkpoint_folder, state, self.recipe.checkpoint.keep)

    def run(self) -> None:
        """Train to the recipe's last step, then write `folder/model`.

        Raises:
            Interrupted: Ctrl-C or SIGTERM came, and a checkpoint was written.
        """
        main = self.parallel is None or self.parallel.main
        with contextlib.ExitStack() as stack:
            if self.recipe.reference_ops:
                stack.enter_context(reference())
            terminal = self.terminal or stack.enter_context(Terminal(self.run_of.name, main))
            log: Any = RunLog(self.folder, terminal, self.step, self.named) if main else SilentLog()
            try:
                if self.resumed:
                    begins = "no checkpoint to resume: begins at step 0"
                    log.say(f"goes on after step {self.step}" if self.step else begins)
                terminal.begin(self.run_of.steps, self.step)
                with self.interrupts:
                    self._loop(log, terminal)
            finally:
                log.close()
            with self._averaged():
                self.task.export(self.folder / "model")

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the modules."""
        with self.ema.swapped(self.parameters):
            self._reshard()
            yield
        self._reshard()

    def _reshard(self) -> None:
        if self.parallel is not None:
            from qwen_image_fast.training.parallel.shard import reshard

            for module in self.task.modules.values():
                reshard(module)

    def last_checkpoint(self) -> str:
        last = checkpoints.latest(self.checkpoint_folder)
        return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"

    def _loop(self, log: Any, terminal: Terminal) -> None:
        meter = Meter(self.peak)
        # Not of several ranks: FSDP would keep buffers of the inference mode in which pictures are drawn, and train in
        # them.
        if self.step == 0 and self.parallel is None:
            self._look_unless_asked(log, last=False)
        if asked := self._asked():
            raise Interrupted(asked, self.step, self.run_of.steps, self.save())
        for batches, waited in self._batches(log):
            if (stage := self.run_of.number(self.step)) != self.stage:
                self._enter(stage, self.run_of.stages[stage].carry)
                log.say(f"stage {stage}, {self.run_of.stages[stage].name}, begins after step {self.step}")
            recipe = self.recipe
            meter.waited += waited
            collect(self.task, batches, self.step, log, terminal, self._kept)
            losses = self.train_step(batches)
            rejected = [sample for batch in batches for sample in batch.rejected]
            if self.parallel is not None and losses["rejected"]:
                rejected = self.parallel.gather_samples(rejected)
            meter.add(losses, recipe.batch * recipe.accumulate, self.seen)
            terminal.step(self.step)
            if self.writer is not None:
                self.writer.poll()
            log.rejected(self.step, rejected)
            last = self.step == self.run_of.stages[self.stage].last
            if self.step % recipe.log.every == 0 or last:
                values = meter.values() | {"memory_gb": memory_gb(self.task.device)}
                if self.parallel is not None:  # of the rank that has most
                    most = self.parallel.max(values["memory_gb"], values["data_wait"])
                    values["memory_gb"], values["data_wait"] = most
                if len(self.run_of.stages) > 1:
                    values["stage"] = self.stage
                log.metrics(self.step, values)
                meter = Meter(self.peak)
            start = time.perf_counter()
            self._look_unless_asked(log, last)
            asked = self._asked()
            if self.step % recipe.checkpoint.every == 0 or last or asked:
                kept = self.save()
            if asked and self.step < self.run_of.steps:
                if self.writer is not None:
                    self.writer.finish()
                raise Interrupted(asked, self.step, self.run_of.steps, kept)
            spent = time.perf_counter() - start
            meter.start += spent  # speeds are those of training
            terminal.pause(spent)
        if self.writer is not None:
            self.writer.finish()

    def _kept(self) -> str:
        """Where the newest checkpoint is, of this very step."""
        if checkpoints.latest(self.checkpoint_folder) != checkpoints.path_of(self.checkpoint_folder, self.step):
            self.save()
        return self.last_checkpoint()

    def _asked(self) -> int:
        """The signal that asks for an end; of several ranks, where all of them know of one since their last update."""
        return self.interrupts.asked if self.parallel is None else self.all_asked

    def _enter(self, stage: int, carry: Carry) -> None:
        self.stage, self.recipe = stage, self.run_of.stages[stage].recipe
        self.task.enter(stage)
        self.optimizer.enter(self.recipe.optimizer, keep=carry.optimizer)
        self.ema.decay = self.recipe.optimizer.ema
        if not carry.ema:
            self.ema.restart()

    def _look_unless_asked(self, log: Any, last: bool) -> None:
        if self.parallel is not None and not self._asked():
            self._look(log, last)
        elif not self._asked():
            with self.interrupts.heeded_at_once():
                self._look(log, last)

    def _look(self, log: Any, last: bool) -> None:
        """Validation loss and sample pictures with the averaged weights, where this step is due for them."""

        def due(every: int) -> bool:
            return every > 0 and (self.step % every == 0 or last)  # step 0 is before training

        if not due(self.recipe.log.sample_every) and not (due(self.recipe.log.validate_every) and self.step):
            return
        with self._averaged(), torch.no_grad():
            if due(self.recipe.log.validate_every) and self.step and (values := self.task.validate()):
                log.metrics(self.step, values)
            if due(self.recipe.log.sample_every):
                log.samples(self.step, self.task.samples())
        log.rejected(self.step, self.task.rejected)
        self.task.rejected = []

    def train_step(self, batches: list[Any]) -> dict[str, float]:
        """One update: the mean of the micro-batches' losses."""
        total: float | Tensor = 0.0
        # Every micro-batch of every rank has as many samples.
        parts = len(batches) * (self.parallel.sizes.dp if self.parallel else 1)
        tokens, flops, seen = 0, 0.0, []
        extra: dict[str, float] = {}
        levels: list[float] = []
        for batch in batches:
            losses = self.task.loss(batch)
            (losses.total / parts).backward()
            self.optimizer.accumulate()
            tokens += losses.tokens
            flops += losses.flops
            for name, value in losses.extra.items():
                extra[name] = extra.get(name, 0.0) + value / len(batches)
            seen.append(losses.per_sample.detach())
            levels += losses.levels
            total = total + losses.total.detach() / parts
        rejected = sum(len(batch.rejected) for batch in batches)
        if self.parallel is None:
            loss, norm = float(total), float(self.optimizer.clip())
        else:
            loss, norm, tokens, flops, rejected = self._global(total, tokens, flops, rejected)
            self.optimizer.clip_to(norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingStopped(self._not_finite(batches, seen, loss, norm))
        first = self.run_of.stages[self.stage].first
        lr = learning_rate(self.recipe.optimizer, self.step - first, self.recipe.steps)
        self.optimizer.step(lr)
        self.ema.update()
        self.step += 1
        self.seen = list(zip(levels, torch.cat(seen).tolist())) if levels else []
        counted = {"tokens": tokens, "flops": flops, "rejected": rejected}
        return {"loss": loss, "grad_norm": norm, "lr": lr, **counted, **extra}

    def _global(
        self, loss: float | Tensor, tokens: int, flops: float, rejected: int
    ) -> tuple[float, float, int, float, int]:
        """Loss, gradient norm, tokens, operations and rejected samples of all ranks."""
        assert self.parallel is not None
        sizes = self.parallel.sizes
        # Squares are counted once for each part of a gradient; samples, by every rank of cp.
        squares = self.optimizer.squares(sizes.world) * sizes.tp
        asked = self.interrupts.asked
        same = torch.tensor([tokens, flops, rejected, asked > 0], dtype=torch.float64) / sizes.cp
        mine = torch.cat([torch.stack([torch.as_tensor(loss, device=squares.device), squares]).double().cpu(), same])
        total = self.parallel.sum(mine).tolist()
        self.all_asked = (asked or signal.SIGTERM) if total[5] else 0
        return total[0], math.sqrt(total[1]), round(total[2]), total[3], round(total[4])

    def _not_finite(self, batches: list[Any], seen: list[Tensor], loss: float, norm: float) -> str:
        where = f"of step {self.step}"
        for micro, (batch, values) in enumerate(zip(batches, seen)):
            bad = (~values.isfinite()).nonzero().flatten().tolist()
            if bad:
                where += f", micro-batch {micro}, {self.task.describe(batch, bad[0])}"
                break
        if self.parallel is not None:  # the rank that has the sample says which
            where = max(self.parallel.gather(where), key=len)
        kept = self.last_checkpoint()
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
        advice = "lower optimizer.lr or look at that sample, then go on with --resume and --allow-changes"
        return f"train: {what} in the batch {where}; {kept}; {advice}"

    def _batches(self, log: Any) -> Iterator[tuple[list[Any], float]]:
        """The micro-batches of every step to come, and the seconds spent waiting for them."""
        producers = self.recipe.producers
        with contextlib.closing(start_producers(producers, self.task.maker)) as backend:
            store = Store(backend, self._tickets(log), producers.ahead)
            while self.step < self.run_of.steps:
                start = time.perf_counter()
                accumulate = self.run_of.stages[self.run_of.number(self.step)].recipe.accumulate
                batches = [store.next() for _ in range(accumulate)]
                yield batches, time.perf_counter() - start

    def _tickets(self, log: Any) -> Iterator[Ticket]:
        """Orders for the micro-batches to come. A change of the mixture begins with the first step not yet ordered."""
        watched, numbers = Watched(self.folder), itertools.count()
        for step in range(self.step, self.run_of.steps):
            changes = self._changes(watched, step, log)
            for micro in range(self.run_of.stages[self.run_of.number(step)].recipe.accumulate):
                yield Ticket(next(numbers), step, micro, changes)

    def _changes(self, watched: Watched, step: int, log: Any) -> tuple[Change, ...]:
        """Those of the mixture until `step`; of several ranks, which order alike, the first looks and tells."""
        if self.parallel is None or self.parallel.main:
            try:
                change = watched.look(step, self.run_of.weights(step, watched.changes))
                if change:
                    log.say(f"the mixture changes from step {step} on: {dict(change.weights)}")
            except RecipeError as error:
                log.say(f"{error}; the run goes on as before")
        return watched.changes if self.parallel is None else self.parallel.from_main(watched.changes)
