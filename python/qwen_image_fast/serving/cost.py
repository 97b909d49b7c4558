"""What a step of a request costs, from sizes alone: for fairness and for honest waiting times. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_image_fast.request import Opened, Request

# Text tokens of a template's end, and bytes of a prompt for each token, about.
TEMPLATE_TOKENS, BYTES_PER_TOKEN = 6, 3


@dataclass(frozen=True)
class StepCost:
    """FLOPs of a transformer's forward for samples of S tokens each: sum of per_token S + per_pair S^2.

    A block of width D has 12 D^2 weights for each token, of which each is a multiplication and an addition, and
    attention takes 4 D for each pair of tokens.
    """

    per_token: float
    per_pair: float

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> StepCost:
        """Of a transformer's configuration."""
        width, blocks = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
        return cls(24.0 * width * width * blocks, 4.0 * width * blocks)

    def step(self, tokens: int, branches: int = 1) -> float:
        return branches * (self.per_token * tokens + self.per_pair * tokens * tokens)

    def request(self, request: Request, opened: Opened) -> float:
        """Of all steps of a request, about: its text is not tokenised yet."""
        tokens, samples = samples_of(request, opened)
        return self.step(tokens, samples) * request.steps_taken


def samples_of(request: Request, opened: Opened) -> tuple[int, int]:
    """Image and text tokens of a sample, about: the text is not tokenised yet; and how many go together: all pictures
    of a prompt, in both branches of guidance."""
    text = TEMPLATE_TOKENS + len(request.prompt.encode()) // BYTES_PER_TOKEN
    return request.tokens(opened) + text, (2 if request.cfg > 1 else 1) * request.each
