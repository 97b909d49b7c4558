"""What pictures are rewarded for, and what stops a run that is rewarded for the wrong thing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qwen_image_fast.training.recipe.fields import RecipeError, convert, must, must_be_at_least


@dataclass
class TextReward:
    """layout: "band", only the places are read where the prompt's layout says that the text stands; "page", text is
    looked for everywhere; "auto": band where the layout is known. side: pixels to which the shorter side of a page is
    enlarged before text is looked for. wrong_colour: what a text counts whose named colour, or ground, is wrong.
    """

    layout: str = "auto"
    side: int = 320
    wrong_colour: float = 0.5

    def check(self, name: str) -> None:
        must(self.layout in ("auto", "band", "page"), f"{name}.layout", "be auto, band or page", self.layout)
        must(32 <= self.side <= 2048, f"{name}.side", "be from 32 to 2048 pixels", self.side)
        must(0 <= self.wrong_colour <= 1, f"{name}.wrong_colour", "be in [0, 1]", self.wrong_colour)


@dataclass
class NoOptions:
    def check(self, name: str) -> None:
        pass


@dataclass
class FunctionReward:
    """name: of a Python function, "package.module:function", called with a list of pictures (uint8 [H, W, 3]) and as
    many `rewards.Asked`; it returns a number for each, higher for better.
    """

    name: str = ""

    def check(self, name: str) -> None:
        module, colon, function = self.name.partition(":")
        ok = bool(module and colon and function)
        must(ok, f"{name}.name", 'be "package.module:function"', self.name)


@dataclass
class JudgeReward:
    """endpoint: of OpenAI's chat completions, such as http://localhost:8000/v1. model: its name there. question: what
    is asked beside the picture; {prompt} stands for the prompt. low, high: the scores that it may give, of which 0 to 1
    are made. api_key_file: a file that holds the key. timeout: seconds of one answer. attempts: of one picture.
    parallel: requests at a time. answers: questions to each picture, of which the mean counts. options: further fields
    of the request; the temperature is 0.
    """

    endpoint: str = ""
    model: str = ""
    question: str = "The picture was made for this prompt: {prompt}\nHow well does it show what the prompt asks for?"
    low: float = 0.0
    high: float = 10.0
    api_key_file: str = ""
    timeout: float = 60.0
    attempts: int = 4
    parallel: int = 8
    answers: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def check(self, name: str) -> None:
        known = self.endpoint.startswith(("http://", "https://"))
        must(known, f"{name}.endpoint", "begin with http:// or https://", self.endpoint)
        must(bool(self.model), f"{name}.model", "be a name at the endpoint", self.model)
        must(self.low < self.high, f"{name}.high", f"be above low, {self.low:g}", self.high)
        must(self.timeout > 0, f"{name}.timeout", "be above 0", self.timeout)
        for one in ("attempts", "parallel", "answers"):
            must_be_at_least(1, f"{name}.{one}", getattr(self, one))
        must("temperature" not in self.options, f"{name}.options", "leave the temperature out, which is 0",
             self.options)  # fmt: skip


# What each kind of reward may be told.
REWARDS: dict[str, Any] = {
    "text": TextReward, "colour": NoOptions, "layout": NoOptions, "edit": NoOptions, "function": FunctionReward,
    "judge": JudgeReward,
}  # fmt: skip


@dataclass
class RewardRecipe:
    """kind: text, what is read in a picture against what was asked for; colour, named colours of text and ground;
    layout, whether the texts stand where they are said to; edit, whether an edit was done and the rest left alone;
    function, a Python function of yours; judge, a vision-language model behind an endpoint. weight: of its advantages.
    options: of the kind.
    """

    kind: str = "text"
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def settings(self, name: str = "rewards") -> Any:
        """`options`, as fields; RecipeError where they are not those of the kind."""
        if self.kind not in REWARDS:
            raise RecipeError(f"recipe: {name}.kind must be of {', '.join(REWARDS)}, got {self.kind!r}")
        if REWARDS[self.kind] is NoOptions and self.options:
            raise RecipeError(f"recipe: {name}.options must be empty: {self.kind} has none")
        made = convert(self.options, REWARDS[self.kind], f"{name}.options")
        made.check(f"{name}.options")
        return made

    def check(self, name: str) -> None:
        must(self.weight > 0, f"{name}.weight", "be above 0", self.weight)
        self.settings(name)


@dataclass
class AdvantageRecipe:
    """What rewards count against each other. combine: "apart", every reward is normalised by itself and the advantages
    are added by their weights, so that none rules by its spread; "sum", the weighted sum of the rewards is normalised.
    std: by which the distance from the mean of a prompt's pictures is divided: "batch", of all pictures of a round, or
    "prompt", of those of the prompt. clip: the largest advantage.
    """

    combine: str = "apart"
    std: str = "batch"
    clip: float = 5.0

    def check(self) -> None:
        must(self.combine in ("apart", "sum"), "advantage.combine", "be apart or sum", self.combine)
        must(self.std in ("batch", "prompt"), "advantage.std", "be batch or prompt", self.std)
        must(self.clip > 0, "advantage.clip", "be above 0", self.clip)


@dataclass
class GuardsRecipe:
    """What is measured beside the loss, and at which value the run stops; 0: at none. patience: rounds, or looks, in a
    row. stop: false, it is only said.

    every: rounds between looks at pictures of held-out prompts, which never change; 0: no look. count: of these
    prompts. dead: share of the prompts of a round whose pictures all have one reward. drift: mean squared distance of
    the velocity from the reference's, as a share of the velocity's square. edges, entropy: fall of the edge density, or
    of the entropy of the colours, of the looks' pictures, as a share of what it was at first. held_out: fall of the
    looks' reward. clipped: share of the ratios that are clipped, for kind grpo. unlearning: updates in a row in which
    both pictures of a pair get worse, for kind dpo.
    """

    every: int = 10
    count: int = 8
    patience: int = 3
    stop: bool = True
    dead: float = 0.95
    drift: float = 0.0
    edges: float = 0.5
    entropy: float = 0.5
    held_out: float = 0.2
    clipped: float = 0.5
    unlearning: int = 50

    def check(self) -> None:
        must_be_at_least(0, "guards.every", self.every)
        for name in ("count", "patience"):
            must_be_at_least(1, f"guards.{name}", getattr(self, name))
        for name in ("dead", "edges", "entropy", "held_out", "clipped"):
            must(0 <= getattr(self, name) <= 1, f"guards.{name}", "be in [0, 1]", getattr(self, name))
        for name in ("drift", "unlearning"):
            must_be_at_least(0, f"guards.{name}", getattr(self, name))
