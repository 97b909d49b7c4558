"""Text to image: `QwenImagePipeline`, with the call of diffusers' pipeline of that name."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_image_fast.models.text_encoder import encode_prompts, pad_prompt_embeds
from qwen_image_fast.pipelines.base import Pipeline, QwenImagePipelineOutput
from qwen_image_fast.pipelines.latents import decode_latents, draw_noise, to_output
from qwen_image_fast.sampling import Sample, Text, denoise

logger = logging.getLogger(__name__)

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_TENSOR_INPUTS = ("latents", "prompt_embeds")


class QwenImagePipeline(Pipeline):
    """Text to image with true classifier-free guidance, on packed batches."""

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        true_cfg_scale: float = 4.0,
        height: int | Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | Sequence[Tensor] | None = None,
        prompt_embeds: Tensor | Sequence[Tensor] | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | Sequence[Tensor] | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        *,
        seed: int | Sequence[int] | None = None,
        progress: bool = True,
    ) -> QwenImagePipelineOutput | tuple:
        """Make images. In a batch, every image equals the one made alone within the rounding of library GEMMs.

        Args:
            prompt: one or several. negative_prompt: one for all, or one for each prompt; without it there is no
                guidance (" " is the usual choice). true_cfg_scale: guidance, in use above 1.
            height, width: pixels, multiples of 16 (default 1024); lists give every prompt its own size.
            num_inference_steps, sigmas: the schedule; sigmas before shifting, in (0, 1], falling.
            num_images_per_prompt: images of each prompt, one after another in the result.
            generator: one for the batch or one for each image, as in diffusers. seed: an integer, image i then has
                seed + i, or one for each image; the same noise as diffusers with a CPU generator of that seed. With
                neither, seeds are drawn and reported.
            latents: packed noise [images, tokens, channels], or a list of [tokens, channels].
            prompt_embeds, prompt_embeds_mask (and negative): [prompts, tokens, width] and what counts in them, or a
                list of unpadded [tokens, width].
            output_type: "pil", "np" (float32 [H, W, C] in [0, 1]), "pt" ([C, H, W]) or "latent" (packed tokens).
            callback_on_step_end: f(pipe, step, timestep, {"latents": ...}) -> dict, as in diffusers.
            max_sequence_length: prompt tokens kept, at most 1024.
            guidance_scale, attention_kwargs: accepted for diffusers' signature; no released model uses them.

        Raises:
            ValueError, TypeError: bad arguments, in one sentence; also when the result is not finite.
        """
        self.times, self._interrupt = {}, False
        if attention_kwargs:
            raise ValueError("attention_kwargs must be empty: set the scale of a LoRA on its adapter")
        if guidance_scale is not None:
            logger.warning("guidance_scale is ignored: this model is not guidance-distilled; use true_cfg_scale")
        _check_choices(num_inference_steps, num_images_per_prompt, output_type, callback_on_step_end_tensor_inputs)

        with self._stage("text encoder"):
            cond = self._texts("prompt", prompt, prompt_embeds, prompt_embeds_mask, max_sequence_length)
            uncond = self._negative(
                len(cond), true_cfg_scale, negative_prompt, negative_prompt_embeds, negative_prompt_embeds_mask,
                max_sequence_length,
            )  # fmt: skip
        # From here on one entry per image, the images of a prompt side by side.
        cond = [t for t in cond for _ in range(num_images_per_prompt)]
        uncond = None if uncond is None else [t for t in uncond for _ in range(num_images_per_prompt)]
        sizes = self._sizes(height, width, len(cond), num_images_per_prompt)
        generator, seeds = _generators(generator, seed, len(cond), latents is not None)
        noise = self._noise(latents, sizes, generator)

        samples = [
            Sample(x, (1, h // 2, w // 2), cond[i], None if uncond is None else uncond[i])
            for i, (x, (h, w)) in enumerate(zip(noise, sizes))
        ]
        on_step = None
        if callback_on_step_end is not None:
            on_step = self._step_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, cond)
        with self._stage("denoise"):
            tokens = denoise(
                self.transformer, self.scheduler, samples, steps=num_inference_steps, sigmas=sigmas,
                guidance=true_cfg_scale, free_weights=self.free_modulation_weights, on_step=on_step, progress=progress,
                interrupted=lambda: self.interrupt,
            )  # fmt: skip
            self._check_finite(tokens)
        if output_type == "latent":
            images = torch.stack(tokens) if len(set(sizes)) == 1 else tokens
        else:
            with self._stage("decode"):
                images = [to_output(decode_latents(self.vae, t, h, w), output_type) for t, (h, w) in zip(tokens, sizes)]
        return QwenImagePipelineOutput(images, seeds) if return_dict else (images,)

    def encode_prompt(
        self, prompt: str | Sequence[str], max_sequence_length: int = 1024
    ) -> tuple[Tensor, Tensor | None]:
        """Padded embeddings [prompts, tokens, width] and their mask (None: no padding), as diffusers returns them."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        with torch.no_grad():
            return pad_prompt_embeds(
                encode_prompts(self.text_encoder, self.tokenizer, prompts, max_sequence_length=max_sequence_length)
            )

    # ---- conditions ---------------------------------------------------------------------------------------------

    def _texts(self, name: str, prompt, embeds, mask, max_sequence_length: int) -> list[Text]:
        """The condition of every prompt, from text or from given embeddings."""
        if (prompt is None) == (embeds is None):
            raise ValueError(f"give either {name} or {name}_embeds, got {'neither' if prompt is None else 'both'}")
        if embeds is None:
            if not isinstance(prompt, (str, list, tuple)):
                raise TypeError(f"{name} must be a str or a list of str, got {type(prompt).__name__}")
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            if not prompts:
                raise ValueError(f"{name} must hold at least one prompt, got an empty list")
            states = encode_prompts(self.text_encoder, self.tokenizer, prompts, max_sequence_length=max_sequence_length)
            return [Text(t.to(self.device, self.dtype)) for t in states]
        if not 1 <= max_sequence_length <= 1024:
            raise ValueError(f"max_sequence_length must be in 1..1024, got {max_sequence_length}")
        if isinstance(embeds, Tensor) and embeds.dim() != 3:
            raise ValueError(f"{name}_embeds must have the shape [prompts, tokens, width], got {tuple(embeds.shape)}")
        if mask is not None and (not isinstance(embeds, Tensor) or mask.shape != embeds.shape[:2]):
            raise ValueError(f"{name}_embeds_mask must have the first two dimensions of {name}_embeds")
        texts = []
        for i, e in enumerate(embeds):
            if not e.is_floating_point() or e.dim() != 2 or e.shape[-1] != self.transformer.config.joint_attention_dim:
                raise ValueError(
                    f"{name}_embeds must be floating point, {self.transformer.config.joint_attention_dim} wide, "
                    f"got {e.dtype} {tuple(e.shape)}"
                )
            if not torch.isfinite(e).all():
                raise ValueError(f"{name}_embeds must be finite, got NaN or infinity in entry {i}")
            e = e[:max_sequence_length].to(self.device, self.dtype)
            positions = None
            if mask is not None:
                positions = mask[i, :max_sequence_length].to(e.device).nonzero().flatten()
                e = e[positions]
            texts.append(Text(e, positions))
        if not texts:
            raise ValueError(f"{name}_embeds must hold at least one prompt, got none")
        return texts

    def _negative(self, count: int, scale: float, prompt, embeds, mask, max_sequence_length: int) -> list[Text] | None:
        given = prompt is not None or embeds is not None
        if scale <= 1 or not given:
            if given:
                logger.warning("negative_prompt has no effect: true_cfg_scale is %s, guidance needs more than 1", scale)
            elif scale > 1:
                logger.warning('true_cfg_scale=%s has no effect without a negative_prompt; " " will do', scale)
            return None
        texts = self._texts("negative_prompt", prompt, embeds, mask, max_sequence_length)
        if len(texts) == 1:
            texts = texts * count
        if len(texts) != count:
            raise ValueError(f"negative_prompt must be one for all or one for each prompt, {count}, got {len(texts)}")
        return texts

    # ---- sizes, seeds, noise ------------------------------------------------------------------------------------

    def _sizes(self, height, width, images: int, per_prompt: int) -> list[tuple[int, int]]:
        """Latent height and width of every image."""
        scale, prompts = self.vae_scale_factor, images // per_prompt
        sides = []
        for name, value in (("height", height), ("width", width)):
            values = (
                [128 * scale if value is None else value] * prompts if not isinstance(value, (list, tuple)) else value
            )
            if len(values) != prompts:
                raise ValueError(f"{name} must be one for all or one for each prompt, {prompts}, got {len(values)}")
            for v in values:
                if not isinstance(v, int) or v < 2 * scale or v % (2 * scale):
                    near = max(2 * scale, round(v / (2 * scale)) * 2 * scale) if isinstance(v, (int, float)) else 1024
                    raise ValueError(f"{name} must be a positive multiple of {2 * scale}, got {v}; {near} would do")
            sides.append([v // scale for v in values for _ in range(per_prompt)])
        return list(zip(*sides))

    def _noise(self, latents, sizes: list[tuple[int, int]], generator) -> list[Tensor]:
        channels = self.transformer.config.in_channels
        if latents is None:
            return draw_noise(sizes, channels // 4, generator, self.dtype, self.device)
        if len(latents) != len(sizes):
            raise ValueError(f"latents must hold one entry per image, {len(sizes)}, got {len(latents)}")
        for x, (h, w) in zip(latents, sizes):
            if tuple(x.shape) != (h // 2 * (w // 2), channels):
                raise ValueError(
                    f"latents must be packed tokens {(h // 2 * (w // 2), channels)} for {w * 8}x{h * 8} pixels, "
                    f"got {tuple(x.shape)}"
                )
            if not torch.isfinite(x).all():
                raise ValueError("latents must be finite, got NaN or infinity")
        return [x.to(self.device, self.dtype).contiguous() for x in latents]

    # ---- the loop -----------------------------------------------------------------------------------------------

    def _step_callback(self, callback: Callable, names: Sequence[str], cond: list[Text]):
        """diffusers' callback on top of the loop's: padded tensors where sizes agree, lists where they do not."""

        def on_step(step: int, timestep: float, latents: list[Tensor]) -> list[Tensor] | None:
            same = len({len(x) for x in latents}) == 1
            values = {
                "latents": lambda: torch.stack(latents) if same else latents,
                "prompt_embeds": lambda: pad_prompt_embeds([t.embeds for t in cond])[0],
            }
            changed = callback(self, step, torch.tensor(timestep), {name: values[name]() for name in names}) or {}
            return list(changed["latents"]) if "latents" in changed else None

        return on_step

    def _check_finite(self, tokens: list[Tensor]) -> None:
        if all(bool(torch.isfinite(t).all()) for t in tokens):
            return
        for part in ("transformer", "text_encoder"):
            for name, p in getattr(self, part).named_parameters():
                if not torch.isfinite(p).all():
                    raise ValueError(f"the result is not finite: {part} has NaN or infinity in {name}; load it again")
        raise ValueError(f"the result is not finite in {self.dtype}, though all weights are; try bfloat16 or float32")


def _check_choices(steps, images, output_type, names) -> None:
    for name, value in (("num_inference_steps", steps), ("num_images_per_prompt", images)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value}")
    if output_type not in _OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(_OUTPUT_TYPES)}, got {output_type}")
    if unknown := [n for n in names if n not in _TENSOR_INPUTS]:
        raise ValueError(f"callback_on_step_end_tensor_inputs must be of {', '.join(_TENSOR_INPUTS)}, got {unknown}")


def _generators(generator, seed, images: int, given: bool):
    """The generator or generators of the noise, and the seed of every image where it is known."""
    if generator is not None and seed is not None:
        raise ValueError("give either generator or seed, got both")
    if generator is not None:
        if not isinstance(generator, torch.Generator) and len(generator) != images:
            raise ValueError(f"generator must be one or one for each image, {images}, got {len(generator)}")
        known = [generator] if isinstance(generator, torch.Generator) else list(generator)
        return generator, [g.initial_seed() for g in known] if len(known) == images else [None] * images
    if given:
        return None, [None] * images
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    seeds = [seed + i for i in range(images)] if isinstance(seed, int) else list(seed)
    if len(seeds) != images:
        raise ValueError(f"seed must be one or one for each image, {images}, got {len(seeds)}")
    return [torch.Generator().manual_seed(s) for s in seeds], seeds
