"""What Edit and Edit-Plus share: references in the text and in the image stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from qwen_image_fast.models.vision import VisionProcessor, look
from qwen_image_fast.pipelines.base import PROCESSOR, QwenImagePipelineOutput
from qwen_image_fast.pipelines.conditions import (
    VAE_AREA,
    encode_reference_latents,
    encode_seen,
    prepare_reference,
)
from qwen_image_fast.pipelines.generation import GenerationPipeline, Request, per_prompt
from qwen_image_fast.pipelines.images import area_size
from qwen_image_fast.sampling import Sample


class EditingPipeline(GenerationPipeline):
    """A pipeline with a processor of pictures for the condition encoder, in the order of diffusers' constructors."""

    parts = GenerationPipeline.parts | PROCESSOR
    uses_vision = True
    plus: bool  # whether the template is Edit-Plus'

    def __init__(
        self, scheduler, vae, text_encoder, tokenizer, processor, transformer, *, free_modulation_weights: bool = False
    ):
        super().__init__(
            scheduler, vae, text_encoder, tokenizer, transformer, free_modulation_weights=free_modulation_weights
        )
        self.processor = VisionProcessor.of(processor)

    def _edit(
        self,
        request: Request,
        images: Sequence[Sequence[Image.Image]],
        height,
        width,
        preserve_size: bool,
        condition_area: int,
        grid_positions: bool,
    ) -> QwenImagePipelineOutput | tuple:
        """The call, from the RGB references of each prompt on."""
        options: dict[str, Any] = {"preserve_size": preserve_size, "condition_area": condition_area}
        options["multiple"] = self.size_multiple
        # A picture that several prompts share stays one object: it is encoded once.
        prepared = {id(p): prepare_reference(p, **options) for own in images for p in own}
        references = [[prepared[id(p)] for p in own] for own in images]
        crops = self._pixels(request, images, height, width, preserve_size)

        with self._stage("vision"):
            needed = request.prompt is not None or request.negative_prompt is not None
            flat = [r.condition for own in references for r in own] if needed else []
            found = iter(look(self.text_encoder, flat, self.processor))
            seen = [[next(found) for _ in own] for own in references] if needed else []

        def encode(prompts: Sequence[str]):
            return encode_seen(self.text_encoder, self.tokenizer, prompts, seen, self.plus, grid_positions)

        cond, uncond = self._conditions(request, encode)
        with self._stage("encode"):
            encoded = {id(r.vae): encode_reference_latents(self.vae, [r.vae]) for own in references for r in own}
        each = request.num_images_per_prompt
        sizes = [self._latent_size(crop, preserve_size) for crop in crops for _ in range(each)]
        generator, seeds = self._generators(request, len(cond))
        samples = []
        for i, (x, (h, w)) in enumerate(zip(self._noise(request, sizes, generator), sizes)):
            own = [encoded[id(r.vae)] for r in references[i // each]]
            latents = [t.to(self.device, self.dtype) for e in own for t in e.latents]
            shapes = [shape for e in own for shape in e.shapes]
            samples.append(
                Sample(x, (1, h // 2, w // 2), cond[i], None if uncond is None else uncond[i], latents, shapes)
            )
        tokens = self._denoise(request, samples)
        keep = [crop for crop in crops for _ in range(each)] if preserve_size else None
        return self._finish(request, tokens, sizes, seeds, keep)

    @property
    def size_multiple(self) -> int:
        """Pixels of a side of a latent token."""
        return 2 * self.vae_scale_factor

    def _pixels(self, request: Request, images, height, width, preserve_size: bool) -> list[tuple[int, int]]:
        """Height and width of every prompt's result."""
        prompts = len(images)
        sizes = []
        for own, h, w in zip(images, per_prompt("height", height, prompts), per_prompt("width", width, prompts)):
            for name, value in (("height", h), ("width", w)):
                if value is not None and (not isinstance(value, int) or value < 1):
                    raise ValueError(f"{name} must be a positive integer, got {value}")
            default = own[-1].size if own else (1024, 1024)
            default = default if preserve_size else area_size(VAE_AREA, *default)
            sizes.append((h or default[1], w or default[0]))
        return sizes

    def _latent_size(self, pixels: tuple[int, int], preserve_size: bool) -> tuple[int, int]:
        """Latent height and width: up to whole tokens, of which the rest is cut, or down to them, as in diffusers."""
        multiple = self.size_multiple
        tokens = [-(-side // multiple) if preserve_size else side // multiple for side in pixels]
        if min(tokens) < 1:
            raise ValueError(f"height and width must be at least {multiple}, got {pixels[1]}x{pixels[0]}")
        return 2 * tokens[0], 2 * tokens[1]
