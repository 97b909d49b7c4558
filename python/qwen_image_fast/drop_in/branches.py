"""Both branches of guidance at once, on two groups of processes, under a loop that asks for one after the other.

A loop of diffusers calls the transformer for "cond", then for "uncond", and reads the first result after the second
call. So the first call of a step returns a tensor that the second one fills in. Whether there is a second one, the
first step tells, which takes the branches one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qwen_image_fast.drop_in.loop import Step
from qwen_image_fast.drop_in.report import Report
from qwen_image_fast.drop_in.swapped import Swapped
from qwen_image_fast.parallel.ranks import Call, Ranks


@dataclass
class Waiting:
    """The call of a first branch, and the tensor that its result is wanted in."""

    call: Call
    finish: Callable[[Tensor], Tensor]
    result: Tensor


def forward(transformer: Any, ranks: Ranks, step: Step, call: Call, finish: Callable[[Tensor], Tensor]) -> Tensor:
    """The padded result of a call within a pipeline's loop, by all ranks."""
    loop, guidance = step.loop, ranks.split.guidance == 2
    if not loop.checked:
        ranks.check_same({"steps": loop.schedule, "noise": call.img, "prompts": call.layout.txt_lens})
        loop.checked, first = True, True
    else:
        first = step.branch == "uncond" and not loop.guided
    if step.branch == "cond" and loop.waiting is not None:
        raise unfilled()
    if guidance and step.branch == "cond" and loop.guided:
        like = finish(call.img.new_full((_rows(call), transformer.proj_out.out_features), float("nan")))
        loop.waiting = Waiting(call, finish, like)
        return like
    loop.guided = loop.guided or step.branch == "uncond"
    if (waiting := loop.waiting) is not None:
        loop.waiting = None
        one, other = ranks.together(transformer, [waiting.call, call])
        waiting.result.copy_(waiting.finish(one))
        return finish(other)
    if guidance and first:  # by one group, as one process would: of fewer samples, products may round differently
        return finish(ranks.together(transformer, [call, None])[0])
    return finish(transformer.forward_packed(*call))


def _rows(call: Call) -> int:
    return sum(call.layout.img_lens if call.layout.targets is None else call.layout.target_lens)


def unfilled() -> RuntimeError:
    return RuntimeError(
        "accelerate: a step of this pipeline left out its second branch of guidance, which the steps before it had: "
        "give parallel='ulysses=N' for it"
    )


def share_work(parts: Mapping[str, Any], ranks: Ranks, report: Report) -> None:
    """Let the transformer and the VAE of `accelerate` compute with the other ranks, where they are replaced."""
    for name in ("transformer", "vae"):
        if isinstance(parts.get(name), Swapped):
            parts[name].ranks = ranks
    if isinstance(parts["transformer"], Swapped):
        report.replaced.append(f"transformer: {ranks.split.ranks} processes share a forward: {ranks.split}")
    if isinstance(parts.get("vae"), Swapped):
        report.replaced.append(f"vae: {ranks.split.ranks} processes share tiles, where tiling is enabled")
    if ranks.split.guidance == 2 and not isinstance(parts.get("pipeline"), Swapped):
        why = "no loop that is known here asks for them: only the samples of a batch are shared among the groups"
        report.left_alone.append(("branches of guidance", why))
