"""The transformer of a diffusers pipeline with our forward."""

from __future__ import annotations

import functools
import inspect
import logging
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_image_fast.drop_in.branches import forward as forward_branches
from qwen_image_fast.drop_in.graphs import obstacle_of_graphs
from qwen_image_fast.drop_in.loop import ModulationTable, current_loop, current_step, modulation_weights
from qwen_image_fast.drop_in.obstacle import compute_dtype, known_parts, obstacle
from qwen_image_fast.drop_in.swapped import Swapped
from qwen_image_fast.graphs import StepGraphs
from qwen_image_fast.models.modulation import Modulation
from qwen_image_fast.models.transformer_forward import TransformerForward, batch_size
from qwen_image_fast.parallel.ranks import Call

logger = logging.getLogger(__name__)


class FastTransformer(Swapped, TransformerForward):
    """Mixed into diffusers' QwenImageTransformer2DModel, in front of it."""

    # Of the calls of a pipeline's loop (graphs.py); None: none are made.
    cuda_graphs: StepGraphs | None = None

    @classmethod
    def methods(cls, original: type) -> dict[str, Any]:
        from diffusers.utils import apply_lora_scale

        forward: Any = apply_lora_scale("attention_kwargs")(cls.forward)
        if "txt_seq_lens" in inspect.signature(original.forward).parameters:
            forward = with_lengths(forward)
        return {"forward": functools.wraps(original.forward)(forward), "_known": known_parts()}

    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        encoder_hidden_states_mask=None,
        timestep=None,
        img_shapes=None,
        guidance=None,
        attention_kwargs=None,
        controlnet_block_samples=None,
        additional_t_cond=None,
        return_dict=True,
        **others,
    ):
        """As diffusers' own; `others`: what that one may take besides."""
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        arguments = {
            "encoder_hidden_states": encoder_hidden_states, "encoder_hidden_states_mask": encoder_hidden_states_mask,
            "timestep": timestep, "img_shapes": img_shapes, "guidance": guidance, "attention_kwargs": attention_kwargs,
            "controlnet_block_samples": controlnet_block_samples, "additional_t_cond": additional_t_cond,
        }  # fmt: skip
        why = obstacle(self, hidden_states)
        if why is None and others:
            why = f"it was called with {', '.join(others)}"
        if why is None and encoder_hidden_states_mask is not None and torch.compiler.is_compiling():
            why = "what is compiled with a text mask cannot leave padding out"
        if why is not None:
            if self.streamed is not None:
                raise RuntimeError(f"weights that are streamed need the fast forward, which may not run: {why}")
            if not torch.compiler.is_compiling() and self.__dict__.get("_said") != why:
                self._said = why
                logger.warning("the transformer runs diffusers' own forward: %s", why)
            return super(TransformerForward, self).forward(
                hidden_states, **arguments, **others, return_dict=return_dict
            )
        if timestep is not None:
            arguments["timestep"] = timestep.to(compute_dtype(hidden_states))
        # All but `attention_kwargs`, whose scale was put on the adapters.
        given = {name: value for name, value in arguments.items() if name != "attention_kwargs"}
        step = None if torch.is_grad_enabled() or torch.compiler.is_compiling() else current_step.get()
        if self.ranks is not None and step is not None and step.transformer is self:
            inputs, finish = self.packed(hidden_states, **given)
            sample = forward_branches(self, self.ranks, step, Call(*inputs), finish)
        elif self.cuda_graphs is not None and self._may_replay(step, hidden_states, controlnet_block_samples):
            (*inputs, _), finish = self.packed(hidden_states, **given)
            sample = finish(self.cuda_graphs.forward(self, *inputs).clone())  # which the other branch overwrites
        else:
            (sample,) = super().forward(hidden_states, **arguments, return_dict=False)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _may_replay(self, step, hidden_states, residuals) -> bool:
        why = "it is compiled" if torch.compiler.is_compiling() else None
        why = why or obstacle_of_graphs(self, step, hidden_states, residuals)
        if why is not None and not torch.compiler.is_compiling() and self.__dict__.get("_said_graphs") != why:
            self._said_graphs = why
            logger.warning("the transformer runs without CUDA graphs: %s", why)
        return why is None

    def _check_inputs(self, hidden_states, encoder_hidden_states, timestep, img_shapes, guidance):
        # Of a quantised weight, or one stored in another type.
        if getattr(self.img_in, "weight", hidden_states).dtype != hidden_states.dtype:
            return batch_size(hidden_states, encoder_hidden_states, timestep), hidden_states.shape[1]
        return super()._check_inputs(hidden_states, encoder_hidden_states, timestep, img_shapes, guidance)

    def _typed(self, hidden_states, encoder_hidden_states):
        """In that of the image: a weight may be stored in another one."""
        return hidden_states, encoder_hidden_states.to(hidden_states.dtype)

    @contextmanager
    def cache_context(self, name, *args, **kwargs):
        """Around each of the pipelines' own calls of the transformer, and so not around those of a user's callback."""
        with super().cache_context(name, *args, **kwargs):
            loop = current_loop.get()
            token = current_step.set(None if loop is None else loop.step(self, name))
            try:
                yield
            finally:
                current_step.reset(token)

    def modulation(self, timestep: Tensor, additional_t_cond: Tensor | None = None) -> Modulation:
        """In the dtype of `timestep`: a weight may be stored in another one."""
        return self.block_modulation(F.silu(self.time_text_embed(timestep, timestep, additional_t_cond)))

    def modulation_of(self, timestep: Tensor, additional_t_cond: Tensor | None) -> Modulation:
        """Inside of a pipeline all samples are at the same time step: one row, kept for the next call of that step."""
        step = None if torch.compiler.is_compiling() else current_step.get()
        if step is None or step.transformer is not self or torch.is_grad_enabled():
            return super().modulation_of(timestep, additional_t_cond)
        weights = modulation_weights(self)
        if weights is None:  # an adapter or a hook: it gets all samples, and nothing is kept
            return super().modulation_of(timestep, additional_t_cond)
        rows = timestep[:1] if additional_t_cond is None else timestep

        def compute() -> Modulation:
            return self.sample_modulation(rows, additional_t_cond)

        table = self.__dict__.setdefault("_modulation_table", ModulationTable())
        modulation = table.get(step, weights, rows, additional_t_cond, compute)
        if self.config.zero_cond_t and len(rows) != len(timestep):  # two rows per sample: its target, its references
            repeated = [t.repeat(len(timestep), 1) for t in (*modulation.img, modulation.final)]
            modulation = Modulation(repeated[:-1], modulation.txt, repeated[-1])
        return modulation

    def target_images(self, img_shapes) -> int | None:
        """The editing pipelines cut the given pictures off the result: they need not be computed."""
        step = None if torch.compiler.is_compiling() else current_step.get()
        if step is None or step.transformer is not self:
            return None
        name = type(step.loop.pipe).__name__
        if name == "QwenImageLayeredPipeline":  # the layers, then the picture
            return len(img_shapes[0]) - 1
        return 1 if name.startswith("QwenImageEdit") else None

    def modulation_bytes(self) -> int:
        """What one time step takes in the table."""
        rows = 2 if self.config.zero_cond_t else 1
        values = self.inner_dim * (len(self.transformer_blocks) * (6 * rows + 6) + 2 * rows)
        return values * torch.empty((), dtype=self.dtype).element_size()


def with_lengths(forward: Any) -> Any:
    """For calls by position to the forward of diffusers before 0.39, where `txt_seq_lens` came after `img_shapes`."""
    names = (
        "txt_seq_lens", "guidance", "attention_kwargs", "controlnet_block_samples", "additional_t_cond", "return_dict"
    )  # fmt: skip

    def method(self, *args, **kwargs):
        kwargs |= dict(zip(names, args[5:], strict=False))
        if kwargs.get("txt_seq_lens") is None:
            kwargs.pop("txt_seq_lens", None)
        return forward(self, *args[:5], **kwargs)

    return method
