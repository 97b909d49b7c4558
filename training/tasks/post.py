"""What comes after training: one layer for all methods, which differ by their loss alone.

A round is: prompts (producers make them), pictures drawn by the model as it is, rewards, advantages or pairs. Then
come `rollout.updates` updates that learn from it, and the next round. With a file of pairs there are no rounds. All of
it is a function of (seed, step, weights): a checkpoint holds what a round has collected and the copies of the weights
that the method needs, so a killed run goes on bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen_image_fast.training.batches.batches import RawSample, StagedBatches
from qwen_image_fast.training.batches.latents import encode_images
from qwen_image_fast.training.batches.preferred import PairBatches
from qwen_image_fast.training.parallel.layout import Parallel
from qwen_image_fast.training.producer.backend import BatchMaker
from qwen_image_fast.training.randomness import generator, normal
from qwen_image_fast.training.recipe.curriculum import Curriculum
from qwen_image_fast.training.recipe.flow import FlowRecipe
from qwen_image_fast.training.recipe.post import AwmRecipe, DpoRecipe, GrpoRecipe, NftRecipe, PostRecipe, SftRecipe
from qwen_image_fast.training.rewards.make import make_rewards
from qwen_image_fast.training.rewards.reward import Reward, scored
from qwen_image_fast.training.rollout.advantages import advantages, check_not_constant, dead_groups, own_pairs
from qwen_image_fast.training.rollout.draw import Condition, Stochastic, decoded, draw
from qwen_image_fast.training.rollout.prompts import Prompt, PromptBatches, Prompts, check_asked
from qwen_image_fast.training.rollout.steps import window
from qwen_image_fast.training.sources.sample import Source
from qwen_image_fast.training.tasks.collected import Picture, Round
from qwen_image_fast.training.tasks.flow import FlowTask
from qwen_image_fast.training.tasks.guards import Guards, measured
from qwen_image_fast.training.tasks.learning import Learning
from qwen_image_fast.training.tasks.policies import Policies
from qwen_image_fast.training.tasks.task import Losses
from qwen_image_fast.training.velocity import velocities

CONSTANT_ROUNDS = 3  # after which a reward that never differed is no reward
_LOOK = 0.7  # noise level at which the drift is measured


class PostTask(FlowTask):
    """A `Task` that collects; its stages may be of kind flow too. Arguments as `FlowTask`."""

    givers: list[Any] | None = None

    def __init__(
        self, recipe: FlowRecipe, folder: Path, source: Source | None = None, run: Curriculum | None = None,
        parallel: Parallel | None = None, sources: dict[str, Source] | None = None, memory_limit: int | None = None,
    ):  # fmt: skip
        self.run_folder = folder
        super().__init__(recipe, folder, source, run, parallel, sources, memory_limit)
        learns = {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}
        self.policies, self.notes = Policies(learns), list[str]()
        self.givers = [self._giver(k) for k in range(len(self.run.stages))]
        self.maker: BatchMaker = StagedBatches(self.run, self.givers)
        self.enter(0)

    def _giver(self, number: int) -> Any:
        stage = self.run.stages[number]
        if not isinstance(stage.recipe, PostRecipe):
            return self.makers[number]
        if stage.recipe.pairs:
            return PairBatches(stage.recipe, self.transformer.config.in_channels, stage.first)
        return PromptBatches(stage.recipe, self.makers[number] if stage.recipe.names_data else None, stage.first)

    def enter(self, number: int) -> None:
        super().enter(number)
        if self.givers is None:
            return
        self.giver, self.first = self.givers[number], self.run.stages[number].first
        self.policies.drop()
        self.latest: list[dict[str, float]] = []
        self.round, self.spreads = Round(-1), dict[str, list[float]]()
        self.taught: list[bool] = []  # of the rounds that this process drew
        self.rewards: list[Reward] = []
        recipe = self.recipe
        if isinstance(recipe, PostRecipe):
            self.guards = Guards(recipe.guards)
            self.learning = Learning(self.transformer, self.policies, recipe)
            for policy in sorted(recipe.policies):
                self.policies.keep(policy)
            if recipe.drawn:
                self.rewards = make_rewards(recipe.rewards, self.run_folder)

    def loss(self, batch: Any) -> Losses:
        recipe = self.recipe
        if not isinstance(recipe, PostRecipe) or (recipe.pairs and isinstance(recipe, SftRecipe)):
            return super().loss(batch)
        if recipe.pairs:
            found = self.learning.pairs(self.to_latents(batch), self.texts(batch))
        else:
            into = batch.step - self.round.step
            place = (into * recipe.accumulate + batch.micro) * recipe.batch
            found = self.learning.from_round(self.round, batch.step, place)
        self.latest.append(found.extra)
        return found

    def describe(self, batch: Any, index: int) -> str:
        if isinstance(batch, Prompts):
            return f"sample {index} of an update on the pictures drawn at step {self.round.step}"
        return super().describe(batch, index)

    def validate(self) -> dict[str, float]:
        return super().validate() if self.recipe.names_data else {}

    def said(self) -> list[str]:
        said, self.notes = self.notes, []
        return said

    # Collecting

    def collect(self, batches: Sequence[Any], doing: Callable[[str], Any]) -> dict[str, float]:
        recipe, prompts = self.recipe, batches[0]
        if not isinstance(recipe, PostRecipe):
            return {}
        latest, self.latest = self.latest, []
        for extra in latest:  # of the update before
            self.notes += self.guards.update(extra)
        if not isinstance(prompts, Prompts):
            return {}
        if isinstance(recipe, AwmRecipe) and recipe.self_anchor and prompts.step > self.first:
            self.policies.follow("average", recipe.average)
        if not prompts:
            return {}
        number = (prompts.step - self.first) // recipe.rollout.updates
        for prompt in prompts:
            check_asked(self.rewards, prompt.asked)
        if isinstance(recipe, NftRecipe) and number:
            kept = recipe.keep + recipe.keep_rise * max(number - 1 - recipe.keep_from, 0)
            self.policies.follow("old", min(kept, recipe.keep_most))
        if "round" in self.policies.kept:
            self.policies.keep("round")
        values: dict[str, float] = {}
        if recipe.guards.every and number % recipe.guards.every == 0:
            values |= self._look(doing)
        self.round, found = self._collected(prompts, number, doing)
        self.notes += self.guards.round(found)
        self.taught.append(bool(self.round.units))
        if not self.round.units:
            one = found["dead_groups"] == 1
            why = "those of each prompt have one reward" if one else "none is better by margin, or has the least reward"
            self.notes.append(
                f"round {number}: nothing is learnt from its {found['pictures']:.0f} pictures, as {why}; prompts that "
                "are drawn rightly at times, or another reward, tell them apart"
            )
        if len(self.taught) == number + 1 == -(-recipe.steps // recipe.rollout.updates) and not any(self.taught):
            self.notes.append("nothing was learnt in any round: the model that is written is the one of the start")
        return values | found

    def _collected(self, prompts: Prompts, number: int, doing: Callable[[str], Any]) -> tuple[Round, dict[str, float]]:
        recipe = self.recipe
        assert isinstance(recipe, PostRecipe)
        rollout, begin = recipe.rollout, time.perf_counter()
        made = Round(prompts.step, self.conditions(prompts, rollout.guidance))
        at_first = rollout.first or rollout.group
        places = [(i, k) for i in range(len(prompts)) for k in range(at_first)]
        drawn, drawing = self._rewarded(made, prompts, places, number, doing)
        alive = [i for i in range(len(prompts)) if not dead_groups(_matrix(drawn, [i], at_first)["total"])[0]]
        values = _statistics(drawn, [(i, k) for i in range(len(prompts)) for k in range(at_first)])
        if rollout.first:
            rest = [(i, k) for i in alive for k in range(at_first, rollout.group)]
            more, seconds = self._rewarded(made, prompts, rest, number, doing)
            drawn, drawing = drawn | more, drawing + seconds
        self._check_spreads(drawn)
        values["dead_groups"] = 1 - len(alive) / len(prompts)
        if alive:
            self._count(made, drawn, alive)
        values |= {"pictures": len(drawn), "learnt_from": len(made.units), "seconds_drawing": drawing,
                   "seconds_collecting": time.perf_counter() - begin}  # fmt: skip
        return made, values

    def _count(self, made: Round, drawn: dict[tuple[int, int], Any], alive: list[int]) -> None:
        """The pictures of the prompts that tell something, what each counts, and what an update takes."""
        recipe = self.recipe
        assert isinstance(recipe, PostRecipe)
        group = recipe.rollout.group
        matrices = _matrix(drawn, alive, group)
        total = matrices.pop("total")
        weights = [reward.weight for reward in recipe.rewards]
        values, rank = advantages(matrices, weights, recipe.advantage)
        assert np.allclose(rank, total)
        for row, i in enumerate(alive):
            start = len(made.pictures)
            for k in range(group):
                one = drawn[i, k]
                made.pictures.append(Picture(i, one["x0"], float(values[row, k]), one["taken"]))
            if isinstance(recipe, DpoRecipe):
                pairs = own_pairs(rank[row], recipe.margin, recipe.pairing)
                made.units += [(start + better, start + worse) for better, worse in pairs]
            elif isinstance(recipe, SftRecipe):
                best = np.argsort(-rank[row], kind="stable")[: recipe.best]
                made.units += [(start + int(k),) for k in best if rank[row, k] >= recipe.least]
            else:
                made.units += [(start + k,) for k in range(group)]

    def _rewarded(
        self, made: Round, prompts: Prompts, places: list[tuple[int, int]], number: int, doing: Callable[[str], Any]
    ) -> tuple[dict[tuple[int, int], Any], float]:
        """Latents, stochastic steps and rewards of pictures (prompt, number in its group); seconds of drawing."""
        recipe, found, spent = self.recipe, dict[tuple[int, int], Any](), 0.0
        assert isinstance(recipe, PostRecipe)
        rollout = recipe.rollout
        with self._drawing() as transformer:
            for start in range(0, len(places), rollout.batch):
                part = places[start : start + rollout.batch]
                doing(f"round {number}: pictures {start} of {len(places)}")
                begin = time.perf_counter()
                conditions = [made.conditions[i] for i, _ in part]
                noise = [self._noise(made, i, k) for i, k in part]
                x0, taken = draw(
                    transformer, self.pipe.scheduler, conditions, noise, steps=rollout.steps,
                    guidance=rollout.guidance, stochastic=self._stochastic(made, part, number),
                )  # fmt: skip
                pictures = decoded(self.pipe.vae, x0, [c.shape for c in conditions])
                spent += time.perf_counter() - begin
                asked = [prompts[i].asked for i, _ in part]
                given = {reward.name: scored(reward, pictures, asked) for reward in self.rewards}
                for n, place in enumerate(part):
                    rewards = {name: values[n] for name, values in given.items()}
                    found[place] = {"x0": x0[n], "taken": taken[n], "rewards": rewards, "total": self._total(rewards)}
        return found, spent

    def _total(self, rewards: dict[str, float]) -> float:
        assert isinstance(self.recipe, PostRecipe)
        weights = [reward.weight for reward in self.recipe.rewards]
        return sum(w * value for w, value in zip(weights, rewards.values())) / sum(weights)

    @contextlib.contextmanager
    def _drawing(self) -> Any:
        """The transformer that draws: of the old policy where there is one, in the type of rollouts."""
        recipe = self.recipe
        assert isinstance(recipe, PostRecipe)
        with self.policies.use("old") if isinstance(recipe, NftRecipe) else torch.no_grad():
            other = recipe.rollout.dtype == "bfloat16" and self.dtype != torch.bfloat16
            yield copy.deepcopy(self.transformer).to(torch.bfloat16) if other else self.transformer

    def _noise(self, made: Round, i: int, k: int) -> Tensor:
        recipe, (frames, height, width) = self.recipe, made.conditions[i].shape
        assert isinstance(recipe, PostRecipe)
        place = i * recipe.rollout.group + (0 if recipe.rollout.same_noise else k)
        shape = (frames * height * width, self.transformer.config.in_channels)
        return normal(shape, recipe.seed, "rollout", step=made.step, sample=place).to(self.device)

    def _stochastic(self, made: Round, part: list[tuple[int, int]], number: int) -> Stochastic | None:
        recipe = self.recipe
        if not isinstance(recipe, GrpoRecipe):
            return None
        seed, group = recipe.seed, recipe.rollout.group
        at = float(generator(seed, "window", step=made.step).random())
        steps = window(at, number, recipe.window, recipe.within, recipe.move, recipe.move_every)

        def noise(n: int, step: int) -> Tensor:
            i, k = part[n]
            frames, height, width = made.conditions[i].shape
            shape = (frames * height * width, self.transformer.config.in_channels)
            return normal(shape, seed, f"rollout step {step}", step=made.step, sample=i * group + k).to(self.device)

        return Stochastic(recipe.step, recipe.noise, steps, noise)

    def _check_spreads(self, drawn: dict[tuple[int, int], Any]) -> None:
        for reward in self.rewards:
            values = [one["rewards"][reward.name] for one in drawn.values()]
            history = self.spreads.setdefault(reward.name, [])
            history.append(max(values) - min(values))
            del history[:-CONSTANT_ROUNDS]
            check_not_constant(reward.name, history, CONSTANT_ROUNDS)

    @torch.no_grad()
    def conditions(self, prompts: Sequence[Prompt], guidance: float) -> list[Condition]:
        """What pictures of prompts are drawn from."""
        nothing, limit = torch.zeros(0), self.recipe.model.max_text_tokens

        def states(captions: Sequence[str]) -> list[Tensor]:
            batch = []
            for caption, prompt in zip(captions, prompts):
                own, task = list(prompt.references), "ti2i" if prompt.references else "t2i"
                blank = np.zeros((*prompt.size, 3), dtype=np.uint8)
                batch.append(RawSample(0, task, caption, [blank, *own], [], own, nothing, 0.0))
            return self.encoders.texts(batch, limit)

        texts = states([prompt.caption for prompt in prompts])
        empty = states([" "] * len(prompts)) if guidance > 1 else [None] * len(prompts)
        found = []
        for prompt, text, uncond in zip(prompts, texts, empty):
            references = encode_images(self.pipe.vae, prompt.references) if prompt.references else []
            shapes = [(1, image.shape[0] // 16, image.shape[1] // 16) for image in prompt.references]
            shape = (1, prompt.size[0] // 16, prompt.size[1] // 16)
            found.append(Condition(text, uncond, shape, [r.to(self.device) for r in references], shapes))
        return found

    @torch.no_grad()
    def _look(self, doing: Callable[[str], Any]) -> dict[str, float]:
        """Pictures of the prompts that never change, drawn by the model as it is."""
        recipe = self.recipe
        assert isinstance(recipe, PostRecipe)
        prompts = self.giver.held_out()
        if not prompts:
            return {}
        doing("pictures of held-out prompts")
        channels = self.transformer.config.in_channels
        conditions = self.conditions(prompts, recipe.rollout.guidance)
        tokens = [c.shape[1] * c.shape[2] for c in conditions]
        noise, other = (
            [normal((n, channels), recipe.seed, what, sample=i).to(self.device) for i, n in enumerate(tokens)]
            for what in ("look", "drift")
        )
        rollout = recipe.rollout
        x0, _ = draw(self.transformer, self.pipe.scheduler, conditions, noise, steps=rollout.steps,
                     guidance=rollout.guidance)  # fmt: skip
        pictures = decoded(self.pipe.vae, x0, [c.shape for c in conditions])
        asked = [prompt.asked for prompt in prompts]
        given = {reward.name: scored(reward, pictures, asked) for reward in self.rewards}
        total = [self._total({name: values[i] for name, values in given.items()}) for i in range(len(prompts))]
        noisy = [(1 - _LOOK) * x + _LOOK * eps for x, eps in zip(x0, other)]
        samples, texts = [c.at(x, _LOOK) for c, x in zip(conditions, noisy)], [c.text for c in conditions]
        now = torch.cat(velocities(self.transformer, samples, noisy, texts))
        with self.policies.use("start"):
            start = torch.cat(velocities(self.transformer, samples, noisy, texts))
        drift = float((now - start).square().mean() / start.square().mean())
        values = {"held_out_reward": float(np.mean(total)), **measured(pictures), "drift": drift}
        self.notes += self.guards.look(values)
        return values

    # What a checkpoint holds

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not isinstance(self.recipe, PostRecipe):
            return {}, {}
        tensors, record = self.round.state()
        found = {f"policies/{name}": t for name, t in self.policies.state().items()}
        found |= {f"round/{name}": t for name, t in tensors.items()}
        return found, {"round": record, "guards": self.guards.state(), "spreads": self.spreads,
                       "latest": self.latest, "read": self.giver.read}  # fmt: skip

    def load_state(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        if not record:
            return
        parts: dict[str, dict[str, Tensor]] = {"policies": {}, "round": {}}
        for full, tensor in tensors.items():
            group, _, name = full.partition("/")
            parts[group][name] = tensor
        self.policies.load(parts["policies"])
        self.round = Round.of(parts["round"], record["round"], self.device)
        self.guards.load(record["guards"])
        self.latest = list(record["latest"])
        self.spreads = {name: list(values) for name, values in record["spreads"].items()}
        # A record of before files were remembered has none.
        self.notes += [
            f"{name} is not what it was when the run was stopped: what follows is not what that run would have done"
            for name, value in self.giver.read.items()
            if record.get("read", {}).get(name, value) != value
        ]


def _matrix(drawn: dict[tuple[int, int], Any], prompts: Sequence[int], group: int) -> dict[str, np.ndarray]:
    """Rewards [prompts, pictures] by name, and their weighted mean as "total"."""
    names = next(iter(drawn.values()))["rewards"]
    found = {n: np.array([[drawn[i, k]["rewards"][n] for k in range(group)] for i in prompts]) for n in names}
    return found | {"total": np.array([[drawn[i, k]["total"] for k in range(group)] for i in prompts])}


def _statistics(drawn: dict[tuple[int, int], Any], places: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Means of the pictures that every prompt has."""
    found = {"reward": float(np.mean([drawn[place]["total"] for place in places]))}
    found["full_reward"] = float(np.mean([drawn[place]["total"] >= 1 - 1e-6 for place in places]))
    names = next(iter(drawn.values()))["rewards"]
    if len(names) > 1:
        found |= {f"reward_{n}": float(np.mean([drawn[place]["rewards"][n] for place in places])) for n in names}
    return found
