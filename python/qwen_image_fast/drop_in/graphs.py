"""CUDA graphs under a loop of diffusers: each call of the transformer is queued at once, as graphs.py does it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen_image_fast.drop_in.loop import Step
from qwen_image_fast.drop_in.report import Report
from qwen_image_fast.drop_in.swapped import Swapped
from qwen_image_fast.graphs import StepGraphs
from qwen_image_fast.models.hooks import has_hook, own_forward
from qwen_image_fast.ops._library import on_cuda

# What is made of these alone runs no code of a user's, and nothing that waits for the GPU.
_KNOWN = ("torch", "diffusers", "peft", "qwen_image_fast")


def check_graphs(parts: dict[str, Any], memory_limit: Any, parallel: Any) -> None:
    """ValueError where `accelerate` cannot capture graphs."""
    if "transformer" not in parts or "pipeline" not in parts:
        raise ValueError("accelerate: cuda_graphs must be False without a pipeline, whose loop they serve, got True")
    for name, value in (("memory_limit", memory_limit), ("parallel", parallel)):
        if value is not None:
            raise ValueError(f"accelerate: cuda_graphs must be False together with {name}, got True")
    if not torch.cuda.is_available():
        raise ValueError("accelerate: cuda_graphs must go with a GPU, and torch sees none here")


def add_graphs(parts: dict[str, Any], report: Report) -> None:
    """Let the transformer be captured and replayed, where its loop is known."""
    transformer = parts["transformer"]
    if not isinstance(transformer, Swapped) or not isinstance(parts["pipeline"], Swapped):
        report.left_alone.append(("CUDA graphs", "the transformer or its loop is not accelerated"))
        return
    transformer.__dict__["cuda_graphs"] = StepGraphs()
    report.replaced.append("transformer: calls of the pipeline's loop are captured as CUDA graphs and replayed")


def obstacle_of_graphs(transformer: Any, step: Step | None, img: Tensor, residuals: Any) -> str | None:
    """Why a call is not to be replayed, or None. Looked for in the modules once per time step."""
    if torch.is_grad_enabled():
        return "gradients are recorded"
    if step is None or step.transformer is not transformer:
        return "it was not called by a pipeline's loop that is known here"
    if not on_cuda(img):
        return f"it is on {img.device}"
    if residuals is not None:
        return "a ControlNet adds to its blocks"
    if torch.is_autocast_enabled(img.device.type):
        return "autocast is on"
    loop = step.loop
    if loop.graphs != (step.t, id(transformer)):
        loop.graphs = (step.t, id(transformer))
        loop.no_graphs = _in_modules(transformer)
        if loop.no_graphs is None:
            transformer.__dict__["cuda_graphs"].start(transformer)
    return loop.no_graphs


def _in_modules(transformer: Any) -> str | None:
    """A replay calls no module: what hooks and unknown layers do besides would be left out."""
    for name, module in transformer.named_modules():
        name = name or "the model"
        if type(module).__module__.split(".")[0] not in _KNOWN:
            return f"{name} is a {type(module).__module__}.{type(module).__name__}"
        if module is not transformer and (has_hook(module) or own_forward(module)):
            return f"{name} has a hook"
        if any(not on_cuda(p) for p in module._parameters.values() if p is not None):
            return f"weights of {name} are not on the GPU"
    return None
