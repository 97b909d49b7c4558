"""Runs after pre-training: kinds sft, dpo, grpo, nft and awm. All are runs of kind flow whose batches are pictures that
the model itself has drawn, with rewards, or pairs of pictures of which one is preferred."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_image_fast.training.recipe.fields import must, must_be_at_least
from qwen_image_fast.training.recipe.flow import NEW, FlowRecipe
from qwen_image_fast.training.recipe.rewards import AdvantageRecipe, GuardsRecipe, RewardRecipe

REFERENCES = ("start", "round")
STEPS = ("flow", "cps", "dance")


@dataclass
class RolloutRecipe:
    """A round: prompts are taken, pictures drawn of them and rewarded, then so many updates made.

    prompts: a file of prompts, a line each or JSON lines with `prompt`, `texts` and `colours`; empty: the captions, and
    the instructions of edits, of data.source. count: prompts of a round. group: pictures of each. first: so many
    pictures are drawn of a prompt at first, and the others only where these differ in their reward; 0: all at once.
    updates: of a round. steps: denoising steps. guidance: true_cfg_scale of the drawing; 1: none. same_noise: the
    pictures of a prompt begin with the same noise. batch: pictures drawn at a time. dtype: of the weights while
    pictures are drawn: "auto", those that learn, or "bfloat16", a copy.
    """

    prompts: str = ""
    count: int = 6
    group: int = 8
    first: int = 0
    updates: int = 1
    steps: int = 10
    guidance: float = 1.0
    same_noise: bool = False
    batch: int = 32
    dtype: str = "auto"

    def check(self) -> None:
        for name in ("count", "updates", "steps", "batch"):
            must_be_at_least(1, f"rollout.{name}", getattr(self, name))
        must(self.group >= 2, "rollout.group", "be 2 or more: a picture alone has none to be better than", self.group)
        must(self.first == 0 or 2 <= self.first < self.group, "rollout.first",
             "be 0, or 2 or more and below rollout.group", self.first)  # fmt: skip
        must(self.guidance >= 1, "rollout.guidance", "be at least 1", self.guidance)
        must(self.dtype in ("auto", "bfloat16"), "rollout.dtype", "be auto or bfloat16", self.dtype)


@dataclass
class PostRecipe(FlowRecipe):
    """pairs: a file of pairs of pictures for kinds dpo and sft: JSON lines with `prompt`, `chosen` and `rejected`,
    paths from the file's folder; kind sft learns from the chosen ones. Empty: pairs and pictures are drawn by the model
    in rounds and told apart by rewards. rewards: kind, weight and options of each (`recipe/rewards.py`).
    """

    pairs: str = ""
    rollout: RolloutRecipe = field(default_factory=RolloutRecipe)
    rewards: list[RewardRecipe] = field(default_factory=lambda: [RewardRecipe()])
    advantage: AdvantageRecipe = field(default_factory=AdvantageRecipe)
    guards: GuardsRecipe = field(default_factory=GuardsRecipe)

    def check(self) -> None:
        super().check()
        self.rollout.check()
        self.advantage.check()
        self.guards.check()
        must(not self.model.train_text_encoder, "model.train_text_encoder", f"be false for kind {self.kind}", True)
        must(self.model.folder != NEW, "model.folder", f"name a trained model for kind {self.kind}", NEW)
        must(not self.lora.dropout, "lora.dropout", f"be 0 for kind {self.kind}: what draws is what learns",
             self.lora.dropout)  # fmt: skip
        must(not self.model.precision or self.rollout.dtype == "auto", "rollout.dtype",
             "be auto with model.precision", self.rollout.dtype)  # fmt: skip
        must(not self.data.cache, "data.cache", f"be empty for kind {self.kind}", self.data.cache)
        must(self.sigma.weighting == "none", "sigma.weighting", f"be none for kind {self.kind}", self.sigma.weighting)
        if not self.names_data:
            for field_name in ("validate_every", "ocr_samples"):
                value = getattr(self.log, field_name)
                must(not value, f"log.{field_name}", "be 0 without data.source, which it draws from", value)
            must(not self.log.sample_every or bool(self.log.prompts), "log.prompts",
                 "be given for sample pictures without data.source, such as log.prompts='[\"a red circle\"]'",
                 self.log.prompts)  # fmt: skip
        for part in self.data.parts:
            must(not part.tasks.get("recon"), "data.tasks", f"have no recon for kind {self.kind}", part.tasks)
        if self.pairs:
            must(self.kind in ("dpo", "sft"), "pairs", f"be empty for kind {self.kind}: it draws its pictures",
                 self.pairs)  # fmt: skip
            must(self.rollout == RolloutRecipe(), "rollout", "be left out where pairs are given: nothing is drawn",
                 self.rollout)  # fmt: skip
            must(not self.data.source and not self.data.mixture, "data.source", "be empty where pairs are given",
                 self.data.source)  # fmt: skip
        else:
            must(bool(self.rewards), "rewards", "name at least one", self.rewards)
            for number, reward in enumerate(self.rewards):
                reward.check(f"rewards.{number}")
            must(self.optimizer.ema == 0, "optimizer.ema",
                 "be 0: what draws is what learns, and that is written", self.optimizer.ema)  # fmt: skip
            must(not (self.rollout.prompts and (self.data.source or self.data.mixture)), "rollout.prompts",
                 "be empty where there is data.source", self.rollout.prompts)  # fmt: skip

    @property
    def policies(self) -> set[str]:
        """The copies of the weights that learn with which a stage begins: "start", from which the drift is measured;
        "round", of each round's begin; "old" and "average"."""
        return {"start"} if self.drawn and self.guards.every else set()

    @property
    def names_data(self) -> bool:
        return not self.pairs and not self.rollout.prompts

    @property
    def drawn(self) -> bool:
        """Whether the model draws what it learns from."""
        return not self.pairs


@dataclass
class SftRecipe(PostRecipe):
    """best: so many pictures of each prompt are learnt from, those with the highest reward. least: reward that they
    must have, from 0 to 1.
    """

    best: int = 1
    least: float = 0.5

    def check(self) -> None:
        super().check()
        must(1 <= self.best <= self.rollout.group, "best", f"be from 1 to rollout.group, {self.rollout.group}",
             self.best)  # fmt: skip


@dataclass
class DpoRecipe(PostRecipe):
    """beta: how far the model may go from the reference, for errors that are means over the latent's values; a smaller
    one lets it go further. reference: "round", the model at the round's begin, or "start", at the stage's. margin:
    rewards of a pair differ by more than this. pairing: "all", each of the best pictures of a prompt against the
    others in turn; "once", the same with each picture in one pair at most; "ends", the best against the worst.
    sft_weight: of the flow loss of the better picture beside it.
    """

    beta: float = 2000.0
    reference: str = "round"
    margin: float = 0.05
    pairing: str = "all"
    sft_weight: float = 0.0

    def check(self) -> None:
        super().check()
        must(self.beta > 0, "beta", "be above 0", self.beta)
        must(self.reference in REFERENCES, "reference", "be start or round", self.reference)
        must(self.pairing in ("all", "once", "ends"), "pairing", "be all, once or ends", self.pairing)
        must_be_at_least(0, "margin", self.margin)
        must_be_at_least(0, "sft_weight", self.sft_weight)

    @property
    def compared(self) -> str:
        """The policy that is the reference. Given pairs have no rounds: theirs is the start."""
        return self.reference if self.drawn else "start"

    @property
    def policies(self) -> set[str]:
        return super().policies | {self.compared}


@dataclass
class GrpoRecipe(PostRecipe):
    """step: how noise enters a step: "flow" (Flow-GRPO's stochastic equation), "cps" (coefficients that keep the
    noise level) or "dance" (a constant amount). noise: how much. window: stochastic steps of a rollout, which are those
    that learn. within: they lie in the first so many steps. move: "random", another place in each round, or
    "progressive", one step further every so many rounds and back to the first. move_every: these rounds.

    clip: of the ratio of probabilities, which are means over the latent's values. ratio: "plain", or "guard",
    GRPO-Guard's, whose mean is 1 and whose spread is alike at all steps. kl: weight of the distance from the
    reference. kl_form: "exact", or "flow_grpo", which is the exact one times the step's length. guidance: of the
    update. reference: "start", or "round".
    """

    step: str = "flow"
    noise: float = 0.7
    window: int = 2
    within: int = 5
    move: str = "random"
    move_every: int = 25
    clip: float = 1e-4
    ratio: str = "plain"
    kl: float = 0.0
    kl_form: str = "exact"
    guidance: float = 1.0
    reference: str = "start"

    def check(self) -> None:
        super().check()
        must(self.step in STEPS, "step", f"be of {', '.join(STEPS)}", self.step)
        must(self.noise > 0, "noise", "be above 0: without noise a step has no probability", self.noise)
        must(self.step != "cps" or self.noise < 1, "noise", "be below 1 for cps", self.noise)
        must(self.window >= 1, "window", "be 1 or more: without stochastic steps nothing is learnt", self.window)
        must(self.within < self.rollout.steps, "within",
             f"be below rollout.steps, {self.rollout.steps}: the last step has no noise", self.within)  # fmt: skip
        must(self.window <= self.within, "window", f"be at most within, {self.within}", self.window)
        must(self.move in ("random", "progressive"), "move", "be random or progressive", self.move)
        must_be_at_least(1, "move_every", self.move_every)
        must(self.clip > 0, "clip", "be above 0", self.clip)
        must(self.ratio in ("plain", "guard"), "ratio", "be plain or guard", self.ratio)
        must(self.kl_form in ("exact", "flow_grpo"), "kl_form", "be exact or flow_grpo", self.kl_form)
        must(self.reference in REFERENCES, "reference", "be start or round", self.reference)
        must_be_at_least(0, "kl", self.kl)
        must_be_at_least(1, "guidance", self.guidance)
        must(self.rollout.dtype == "auto", "rollout.dtype", "be auto for kind grpo: its steps must be those that learn",
             self.rollout.dtype)  # fmt: skip

    @property
    def policies(self) -> set[str]:
        return super().policies | {"round"} | ({self.reference} if self.kl else set())


@dataclass
class ForwardRecipe(PostRecipe):
    """levels: noise levels at which each picture is learnt from in an update. shared: the pictures of a prompt have the
    same noise and noise levels. anchor: weight of the squared distance from the velocity of the model at the stage's
    begin.
    """

    levels: int = 1
    shared: bool = True
    anchor: float = 1e-4

    def check(self) -> None:
        super().check()
        must_be_at_least(1, "levels", self.levels)
        must_be_at_least(0, "anchor", self.anchor)

    @property
    def policies(self) -> set[str]:
        return super().policies | ({"start"} if self.anchor else set())


@dataclass
class NftRecipe(ForwardRecipe):
    """beta: how far the two implicit policies lie from the old one. keep, keep_rise, keep_from, keep_most: after round
    n the old policy keeps a share of itself and takes the rest from the model: keep + keep_rise max(n - keep_from, 0),
    at most keep_most. The old policy draws.
    """

    beta: float = 1.0
    keep: float = 0.0
    keep_rise: float = 0.0
    keep_from: int = 0
    keep_most: float = 0.999

    def check(self) -> None:
        super().check()
        must(self.beta > 0, "beta", "be above 0", self.beta)
        for name in ("keep", "keep_most"):
            must(0 <= getattr(self, name) < 1, name, "be in [0, 1)", getattr(self, name))
        must_be_at_least(0, "keep_rise", self.keep_rise)
        must_be_at_least(0, "keep_from", self.keep_from)

    @property
    def policies(self) -> set[str]:
        return super().policies | {"old"}


@dataclass
class AwmRecipe(ForwardRecipe):
    """error: "square", the mean squared error of the velocity, or "power", ((e + 1e-10) ** power) / power of it,
    which bounds what one picture counts. power: its exponent. self_anchor: weight of the squared distance from the
    velocity of a slow average of the model. average: share of itself that this average keeps in an update.
    """

    error: str = "square"
    power: float = 0.25
    self_anchor: float = 0.0
    average: float = 0.3

    def check(self) -> None:
        super().check()
        must(self.error in ("square", "power"), "error", "be square or power", self.error)
        must(0 < self.power <= 1, "power", "be in (0, 1]", self.power)
        must(0 <= self.average < 1, "average", "be in [0, 1)", self.average)
        must_be_at_least(0, "self_anchor", self.self_anchor)

    @property
    def policies(self) -> set[str]:
        return super().policies | ({"average"} if self.self_anchor else set())
