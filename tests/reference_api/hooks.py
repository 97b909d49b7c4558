"""Hooks of every kind at every module of diffusers' transformer, before and after `accelerate`.

Each combination is tried on a model that has not drawn before, then on one that has, and each time once more after the
hook was taken away. It is seen where hook and picture are those of the same model without `accelerate`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from accelerate_harness import inputs, small_transformer
from torch import Tensor, nn

from qwen_image_fast import accelerate

CALL = {
    "prompt_embeds": torch.linspace(-1, 1, 5 * 24).sin().reshape(1, 5, 24), "num_inference_steps": 1,
    "height": 64, "width": 48, "output_type": "latent",
}  # fmt: skip


LAYERED = "time_text_embed.addition_t_embedding"


def model(layered: bool = False) -> Any:
    """Of two blocks; with the embedding that the Layered model has."""
    return small_transformer(use_additional_t_cond=layered)


def pipeline(transformer: Any) -> Any:
    """diffusers' text to image without the parts before and behind the transformer."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    parts: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    pipe = diffusers.QwenImagePipeline(scheduler=scheduler, transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    if transformer.config.use_additional_t_cond:
        flag = torch.zeros(1, dtype=torch.long)  # one tensor for all steps, as that of the Layered pipeline
        transformer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"additional_t_cond": flag}), with_kwargs=True
        )
    return pipe


def places(transformer: Any) -> list[str]:
    """Every module that diffusers' forward calls; "" is the model itself."""
    return [name for name, module in transformer.named_modules() if type(module) is not nn.ModuleList]


class Hook:
    """What a user hangs on a module: it counts its calls, and changes what passes by."""

    def __init__(self) -> None:
        self.calls = 0

    def changed(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return x * 1.3 if x.is_floating_point() or x.is_complex() else x
        if isinstance(x, (tuple, list)):
            return type(x)(map(self.changed, x))
        return {k: self.changed(v) for k, v in x.items()} if isinstance(x, dict) else x

    def pre_hook(self, module: nn.Module) -> Callable[[], None]:
        def hook(module, args, kwargs):
            self.calls += 1
            return self.changed(args), self.changed(kwargs)

        return module.register_forward_pre_hook(hook, with_kwargs=True).remove

    def hook(self, module: nn.Module) -> Callable[[], None]:
        def hook(module, args, output):
            self.calls += 1
            return self.changed(output)

        return module.register_forward_hook(hook).remove

    def forward(self, module: nn.Module) -> Callable[[], None]:
        own: Any = module.forward

        def forward(*args, **kwargs):
            self.calls += 1
            return self.changed(own(*args, **kwargs))

        module.forward = forward  # type: ignore[method-assign]
        return lambda: module.__dict__.pop("forward")

    def backward_hook(self, module: nn.Module) -> Callable[[], None]:
        def hook(module, grad_input, grad_output):
            self.calls += 1
            return self.changed(grad_input)

        return module.register_full_backward_hook(hook).remove

    def backward_pre_hook(self, module: nn.Module) -> Callable[[], None]:
        def hook(module, grad_output):
            self.calls += 1
            return self.changed(grad_output)

        return module.register_full_backward_pre_hook(hook).remove


FORWARD = ("pre_hook", "hook", "forward")
KINDS = {
    "pre_hook": "`register_forward_pre_hook`", "hook": "`register_forward_hook`", "forward": "`module.forward = ...`",
    "backward_hook": "`register_full_backward_hook`", "backward_pre_hook": "`register_full_backward_pre_hook`",
}  # fmt: skip


def draw(pipe: Any) -> Tensor:
    return pipe(generator=torch.Generator().manual_seed(0), **CALL).images


def gradients(pipe: Any) -> Tensor:
    """Of the image tokens and of all weights, as one vector."""
    given = inputs()
    given["hidden_states"].requires_grad_()
    pipe.transformer.zero_grad()
    pipe.transformer(**given).sample.square().mean().backward()
    weights = [torch.zeros_like(p) if p.grad is None else p.grad for p in pipe.transformer.parameters()]
    return torch.cat([x.flatten() for x in (given["hidden_states"].grad, *weights)])


def alike(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))


class Both:
    """A pipeline of diffusers, and the same after `accelerate`."""

    def __init__(self, layered: bool = False) -> None:
        transformer = model(layered)
        self.theirs, self.fast = pipeline(copy.deepcopy(transformer)), pipeline(transformer)
        self.plain = {run: run(self.theirs) for run in (draw, gradients)}
        accelerate(self.fast)

    def fault(self, place: str, kind: str) -> str | None:
        """What is wrong with a kind of hook at a place; None: it is seen, and forgotten when it is removed."""
        run = draw if kind in FORWARD else gradients
        expected, calls = self._hooked(self.theirs, place, kind, run)
        self.fast.transformer.__dict__.pop("_modulation_table", None)
        for _ in range(2 if run is draw else 1):  # before all else, and on a model that has drawn
            try:
                got, made = self._hooked(self.fast, place, kind, run)
                after = run(self.fast)
            except Exception as error:  # of a tree that cannot
                return f"ends in {type(error).__name__}: {error}"
            if bool(made) != bool(calls) or not alike(got, expected):
                return "not seen" if not made else "seen, with another result"
            if not alike(after, self.plain[run]):
                return "outlives its removal"
        return None

    def _hooked(self, pipe: Any, place: str, kind: str, run: Callable[[Any], Tensor]) -> tuple[Tensor, int]:
        hook = Hook()
        remove = getattr(hook, kind)(pipe.transformer.get_submodule(place))
        try:
            return run(pipe), hook.calls
        finally:
            remove()


def faults() -> tuple[int, dict[str, str]]:
    """How many modules there are, and what is wrong with which kind of hook on which."""
    for name in ("qwen_image_fast", "diffusers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    both, layered = Both(), Both(layered=True)
    everywhere = [(both, place) for place in places(both.theirs.transformer)] + [(layered, LAYERED)]
    found = {f"{kind} of {place or 'the model'}": b.fault(place, kind) for kind in KINDS for b, place in everywhere}
    return len(everywhere), {name: fault for name, fault in found.items() if fault}
