"""The shapes that `post_training.py` compares methods on: those of `examples/rl_demo.py`, prompts, reward and judge.

The reward is how near the outline of each thing is to the one that was asked for. TinyEval says which pictures are
right as a whole (number, shapes, colours, places, ground), on prompts that training does not show.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from examples.rl_demo import JUDGED, KEPT, POOL, SHAPES, judged, write_prompts

from benchmarks.post_training_world import Method, World
from qwen_image_fast.training.evaluation.tiny_cases import pictures

JUDGE, PROMPTS = "TinyEval", 160  # of a round
SINGLE = 60  # prompts of a single shape that are not judged: there are not many more
# What shape a thing is, is settled near pure noise, and all methods that choose noise levels learn at those.
LEVELS = ["sigma.mean=2.0", "sigma.std=1.6"]
COMMON = ["optimizer.schedule=cosine", "optimizer.warmup=0", "guards.every=0", "log.every=1"]
REWARD = 'rewards=[{kind: function, options: {name: "examples.rl_demo:outlines"}}]'
DRAWN = [*COMMON, "rollout.dtype=bfloat16", REWARD]
ROUND = [*DRAWN, *LEVELS, "optimizer.cycles=1", "rollout.first=2", "rollout.group=8"]
OPTIONS = "{preset: tiny, size: 128, shapes: 1.0, pure: 0.0, arranged: 0.55}"
RENDERED = [*COMMON[:-2], *LEVELS, "model.train_text_encoder=false", "lora.rank=0", "optimizer.lr=3e-4",
            "optimizer.weight_decay=0", "optimizer.ema=0", "batch=32", "data.text_dropout=0", "log.every=10",
            "log.validate_every=0", "log.sample_every=0", "data.source=synthesis", f"data.options={OPTIONS}",
            ]  # fmt: skip


def _write_prompts(path: Path, count: int) -> Path:
    """Of all tasks in turn, none of them one that is judged."""
    share = -(-count // len(SHAPES))
    pools = [pictures(task, JUDGED + min(share, SINGLE if task in POOL else share))[JUDGED:] for task in SHAPES]
    rows = itertools.zip_longest(*(itertools.islice(itertools.cycle(pool), share) for pool in pools))
    return write_prompts(path, [one for row in rows for one in row][:count], count)


def _judged(model: str, name: str, judge: str, small: bool) -> dict[str, list[bool]]:
    tasks = SHAPES if name == "shapes" else KEPT
    return {JUDGE: [one.fault is None for one in judged(model, tasks, 1 if small else JUDGED)]}


WORLD = World(
    learned="held-out shapes, right as a whole (%)",
    prompts="shapes, counted and placed, that are not judged; SFT on renderings: of all such shapes",
    reward="overlap of each thing with the outline that was asked for",
    methods={
        "DPO": Method("dpo", 40, PROMPTS, ROUND),
        "SFT, own best": Method("sft", 40, PROMPTS, ROUND),
        "SFT, renderings": Method("lora", 77, 0, RENDERED),
        "DiffusionNFT": Method("nft", 34, 0, [*DRAWN, *LEVELS]),
        "AWM": Method("awm", 36, 0, [*DRAWN, *LEVELS]),
        "Flow-GRPO": Method("grpo", 20, 0, [*COMMON, REWARD]),
    },
    prompts_a_leg=PROMPTS,
    write_prompts=_write_prompts,
    judged=_judged,
    sets=("shapes", "text"),
    against="SFT, own best",
    judges=(JUDGE,),
)
