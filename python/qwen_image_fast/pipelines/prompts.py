"""Prompts to the conditions of every image: enhancement, encoding, given embeddings, guidance."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qwen_image_fast.chat import checked
from qwen_image_fast.models.finite import all_finite, cause
from qwen_image_fast.models.text_encoder import T2I_DROP, T2I_TEMPLATE, encode_prompts, pad_prompt_embeds
from qwen_image_fast.once import warn_once
from qwen_image_fast.pipelines.arguments import Arguments
from qwen_image_fast.pipelines.base import Pipeline
from qwen_image_fast.sampling import Text

logger = logging.getLogger(__name__)

SAMPLE_SIZE, MAX_TOKENS = 128, 1024


class PromptPipeline(Pipeline):
    """The part of a call from prompts, or their embeddings, to conditions."""

    # diffusers' names. They are what the released models were trained with, and cannot be set.

    @property
    def default_sample_size(self) -> int:
        """Latent height and width of a result where neither the call nor a picture says one; 8 pixels each."""
        return SAMPLE_SIZE

    @property
    def tokenizer_max_length(self) -> int:
        """The largest `max_sequence_length`."""
        return MAX_TOKENS

    @property
    def prompt_template_encode(self) -> str:
        """What a prompt stands in, as {}, before it is encoded."""
        return T2I_TEMPLATE

    @property
    def prompt_template_encode_start_idx(self) -> int:
        """Tokens of the template before the prompt, whose states are dropped."""
        return T2I_DROP

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        device: str | torch.device | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        max_sequence_length: int = 1024,
    ) -> tuple[Tensor, Tensor | None]:
        """Padded embeddings [images, tokens, width] and their mask (None: no padding), as diffusers returns them.

        The images of a prompt stand side by side. Embeddings that are given instead of a prompt are cut and repeated.
        `device`: of the result; default: where it was computed.
        """

        def encode(prompts: Sequence[str]) -> list[Tensor]:
            return encode_prompts(self.text_encoder, self.tokenizer, prompts, max_sequence_length=max_sequence_length)

        given = prompt_embeds, prompt_embeds_mask
        return self._embeds_of(prompt, encode, given, device, num_images_per_prompt, max_sequence_length)

    def _embeds_of(
        self,
        prompt: Any,
        encode: Callable[[Sequence[str]], list[Tensor]],
        given: tuple[Tensor | None, Tensor | None],
        device: str | torch.device | None,
        each: int,
        limit: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        embeds, mask = given
        if embeds is None:
            for part in ("text_encoder", "tokenizer"):
                self._need(part, "prompt cannot be encoded")
            with torch.no_grad():
                embeds, mask = pad_prompt_embeds(self._checked(encode(_prompts("prompt", prompt))))
        embeds = embeds[:, :limit].repeat_interleave(each, 0).to(device or embeds.device)
        if mask is not None:
            mask = mask[:, :limit].repeat_interleave(each, 0).to(embeds.device)
        return embeds, None if mask is None or bool(mask.all()) else mask

    def _count(self, call: Arguments) -> int:
        """The number of prompts."""
        prompt, embeds = call.prompt, call.prompt_embeds
        if (prompt is None) == (embeds is None):
            raise ValueError(f"give either prompt or prompt_embeds, got {'neither' if prompt is None else 'both'}")
        if embeds is not None and not len(embeds):
            raise ValueError("prompt_embeds must hold at least one prompt, got none")
        return len(_prompts("prompt", prompt) if embeds is None else embeds)

    def _conditions(
        self,
        call: Arguments,
        encode: Callable[[Sequence[str]], list[Tensor]] | None = None,
        pictures: Sequence[Sequence[Image.Image]] = (),
    ) -> tuple[list[Text], list[Text] | None]:
        """The conditions of every image, the images of a prompt side by side: with, and without the prompt.

        `encode` makes the states of texts, as many as there are prompts; default: the text-to-image template. The
        prompt enhancer, if there is one, sees each prompt with its `pictures`.
        """
        count = self._count(call)
        if call.prompt is not None:
            call.prompt = _prompts("prompt", call.prompt)
            if self.prompt_enhancer is not None:
                with self._stage("enhance"):
                    shown = pictures or [()] * count
                    call.prompt = [
                        checked("prompt_enhancer", self.prompt_enhancer(p, own)) for p, own in zip(call.prompt, shown)
                    ]
        with self._stage("text encoder"):
            cond = self._texts(call, "prompt", encode)
            uncond = None
            given = call.negative_prompt is not None or call.negative_prompt_embeds is not None
            if given and call.true_cfg_scale > 1:
                uncond = self._texts(call, "negative_prompt", encode, count)
            elif given:
                message = "negative_prompt has no effect: true_cfg_scale is %s, guidance needs more than 1"
                warn_once(logger, self, message, call.true_cfg_scale)
            elif call.true_cfg_scale > 1:
                message = 'true_cfg_scale=%s has no effect without a negative_prompt; " " will do'
                warn_once(logger, self, message, call.true_cfg_scale)
        each = range(call.num_images_per_prompt)
        return [t for t in cond for _ in each], None if uncond is None else [t for t in uncond for _ in each]

    def _texts(self, call: Arguments, name: str, encode, count: int | None = None) -> list[Text]:
        """The condition of every prompt, from text or from given embeddings; with `count`, one is enough for all."""
        prompt, embeds = getattr(call, name), getattr(call, f"{name}_embeds")
        if prompt is not None and embeds is not None:
            raise ValueError(f"give either {name} or {name}_embeds, got both")
        values: Any = _prompts(name, prompt) if embeds is None else self._given(call, name, embeds)
        if count is not None and len(values) not in (1, count):
            raise ValueError(f"{name} must be one for all or one for each prompt, {count}, got {len(values)}")
        if count is not None and len(values) != count:
            values = values * count
        if embeds is not None:
            return values
        for part in ("text_encoder", "tokenizer"):
            self._need(part, f"{name} must be given as {name}_embeds")
        if encode is None:
            limit = call.max_sequence_length
            states = encode_prompts(self.text_encoder, self.tokenizer, values, max_sequence_length=limit)
        else:
            states = encode(values)
        return [Text(t) for t in self._checked([t.to(self.device, self.dtype) for t in states])]

    def _checked(self, states: list[Tensor]) -> list[Tensor]:
        """The states of prompts, if they are finite."""
        if not all(all_finite(t) for t in states):
            raise ValueError(f"the states are not finite{cause({'text_encoder': self.text_encoder}, self.dtype)}")
        return states

    def _given(self, call: Arguments, name: str, embeds) -> list[Text]:
        mask, limit = getattr(call, f"{name}_embeds_mask"), call.max_sequence_length
        width = self.transformer.config.joint_attention_dim
        if isinstance(embeds, Tensor) and embeds.dim() != 3:
            raise ValueError(f"{name}_embeds must have the shape [prompts, tokens, width], got {tuple(embeds.shape)}")
        if mask is not None and (not isinstance(embeds, Tensor) or mask.shape != embeds.shape[:2]):
            raise ValueError(f"{name}_embeds_mask must have the first two dimensions of {name}_embeds")
        texts = []
        for i, e in enumerate(embeds):
            if not e.is_floating_point() or e.dim() != 2 or e.shape[-1] != width:
                raise ValueError(f"{name}_embeds must be floating point, {width} wide, got {e.dtype} {tuple(e.shape)}")
            if not all_finite(e):
                raise ValueError(f"{name}_embeds must be finite, got NaN or infinity in entry {i}")
            e = (e if self.uses_vision else e[:limit]).to(self.device, self.dtype)
            positions = None
            if mask is not None:
                positions = mask[i, : len(e)].to(e.device).nonzero().flatten()
                e = e[positions]
            texts.append(Text(e, positions))
        return texts


def _prompts(name: str, prompt: Any) -> list[str]:
    if not isinstance(prompt, (str, list, tuple)):
        raise TypeError(f"{name} must be a str or a list of str, got {type(prompt).__name__}")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError(f"{name} must hold at least one prompt, got an empty list")
    for i, text in enumerate(prompts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{i}] must be a str, got {type(text).__name__}")
    return prompts
