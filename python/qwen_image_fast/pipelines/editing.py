"""What Edit and Edit-Plus share: references in the text and in the image stream."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qwen_image_fast.models.rope import POSITIONS
from qwen_image_fast.models.text_encoder import EDIT_DROP, EDIT_PLUS_DROP, EDIT_PLUS_TEMPLATE, EDIT_TEMPLATE
from qwen_image_fast.models.vision import Seen, VisionProcessor, look
from qwen_image_fast.pipelines.arguments import Arguments
from qwen_image_fast.pipelines.base import PROCESSOR
from qwen_image_fast.pipelines.conditions import (
    VAE_AREA,
    encode_edit_prompts,
    encode_reference_latents,
    encode_seen,
    prepare_reference,
)
from qwen_image_fast.pipelines.generation import GenerationPipeline
from qwen_image_fast.pipelines.images import area_size
from qwen_image_fast.pipelines.in_parts import Denoising, Parts
from qwen_image_fast.sampling import Sample


class EditingPipeline(GenerationPipeline):
    """A pipeline with a processor of pictures for the condition encoder, in the order of diffusers' constructors."""

    parts = GenerationPipeline.parts | PROCESSOR
    uses_vision = True
    encodes_pictures = True
    plus: bool  # whether the template is Edit-Plus'

    def __init__(
        self, scheduler, vae, text_encoder, tokenizer, processor, transformer, *, free_modulation_weights: bool = False
    ):
        super().__init__(
            scheduler, vae, text_encoder, tokenizer, transformer, free_modulation_weights=free_modulation_weights
        )
        self.processor: Any = None if processor is None else VisionProcessor.of(processor)

    def _look(self, call: Arguments, conditions: Sequence[Image.Image]) -> list[Seen]:
        """The pictures as the condition encoder sees them; none, where no text is encoded."""
        if call.prompt is None and call.negative_prompt is None:
            return []
        for part in ("text_encoder", "processor"):
            self._need(part, "prompt must be given as prompt_embeds")
        with self._stage("vision"):
            return look(self.text_encoder, conditions, self.processor)

    def _edit(
        self,
        call: Arguments,
        images: Sequence[Sequence[Image.Image]],
        height,
        width,
        preserve_size: bool,
        condition_area: int,
        grid_positions: bool,
    ) -> Parts:
        """The call, from the RGB references of each prompt on."""
        if (most := max(map(len, images), default=0)) >= POSITIONS:  # said here, before minutes of encoding
            raise ValueError(f"image must hold fewer than {POSITIONS} pictures for a prompt, got {most}")
        options: dict[str, Any] = {"preserve_size": preserve_size, "condition_area": condition_area}
        options["multiple"] = self.size_multiple
        # A picture that several prompts share stays one object: it is encoded once.
        distinct = {id(p): p for own in images for p in own}
        prepared = {key: prepare_reference(p, **options) for key, p in distinct.items()}
        references = [[prepared[id(p)] for p in own] for own in images]
        defaults = [own[-1].size[::-1] if own else (1024, 1024) for own in images]
        if not preserve_size:
            defaults = [area_size(VAE_AREA, w, h)[::-1] for h, w in defaults]
        crops = self._pixels(height, width, defaults)
        each = call.num_images_per_prompt
        sizes = [self._latent_size(crop, preserve_size) for crop in crops for _ in range(each)]

        scale = self.vae_scale_factor
        self._say_size([*sizes, *((r.vae.height // scale, r.vae.width // scale) for r in prepared.values())])
        found = iter(self._look(call, [r.condition for own in references for r in own]))
        seen = [list(islice(found, len(own))) for own in references]

        def encode(prompts: Sequence[str]):
            return encode_seen(self.text_encoder, self.tokenizer, prompts, seen, self.plus, grid_positions)

        cond, uncond = self._conditions(call, encode, images)
        with self._stage("encode"):
            encoded = {key: encode_reference_latents(self.vae, [r.vae]) for key, r in prepared.items()}
        generator, seeds = self._generators(call, len(cond))
        samples = []
        for i, (x, (h, w)) in enumerate(zip(self._noise(call, sizes, generator), sizes)):
            own = [encoded[id(p)] for p in images[i // each]]
            latents = [t.to(self.device, self.dtype) for e in own for t in e.latents]
            shapes = [shape for e in own for shape in e.shapes]
            samples.append(
                Sample(x, (1, h // 2, w // 2), cond[i], None if uncond is None else uncond[i], latents, shapes)
            )
        tokens = yield Denoising(call, samples, {})
        keep = [crop for crop in crops for _ in range(each)] if preserve_size else None
        return self._finish(call, tokens, sizes, seeds, keep)


class PicturePrompts(EditingPipeline):
    """Editing whose prompts are encoded with their pictures, in a template of their own."""

    condition_area: int  # pixels of a picture for Qwen2.5-VL at most, where a call says nothing else

    @property
    def prompt_template_encode(self) -> str:
        """As Edit's pipeline has it, or Edit-Plus', which puts a line for each picture before the prompt."""
        return EDIT_PLUS_TEMPLATE if self.plus else EDIT_TEMPLATE

    @property
    def prompt_template_encode_start_idx(self) -> int:
        return EDIT_PLUS_DROP if self.plus else EDIT_DROP

    def _pictures_of(self, image: Any, prompts: int) -> list[list[Image.Image]]:
        """The pictures of each prompt, upright and RGB."""
        raise NotImplementedError

    def encode_prompt(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        device: str | torch.device | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        max_sequence_length: int = 1024,
    ) -> tuple[Tensor, Tensor | None]:
        """As `QwenImagePipeline.encode_prompt`, with the pictures of the call, as its `preserve_size` prepares them.

        `max_sequence_length` is for diffusers' signature: prompts with pictures are not cut, there nor here.
        """

        def encode(prompts: Sequence[str]) -> list[Tensor]:
            self._need("processor", "prompt cannot be encoded")
            return encode_edit_prompts(
                self.text_encoder, self.tokenizer, self.processor, prompts, self._pictures_of(image, len(prompts)),
                plus=self.plus, condition_area=self.condition_area,
            )  # fmt: skip

        given = prompt_embeds, prompt_embeds_mask
        return self._embeds_of(prompt, encode, given, device, num_images_per_prompt, None)
