"""What every pipeline does around the sampling loop: prompts, sizes, seeds, noise, steps, pictures."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qwen_image_fast.chat import checked
from qwen_image_fast.models.text_encoder import encode_prompts, pad_prompt_embeds
from qwen_image_fast.pipelines.base import Pipeline, QwenImagePipelineOutput
from qwen_image_fast.pipelines.latents import decode_latents, draw_noise, to_output
from qwen_image_fast.sampling import Sample, Text, denoise

logger = logging.getLogger(__name__)

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_TENSOR_INPUTS = ("latents", "prompt_embeds")


@dataclass
class Request:
    """The arguments that the calls of all pipelines share; see `QwenImagePipeline.__call__`."""

    prompt: Any
    negative_prompt: Any
    true_cfg_scale: float
    num_inference_steps: int
    sigmas: Sequence[float] | None
    guidance_scale: float | None
    num_images_per_prompt: int
    generator: Any
    latents: Any
    prompt_embeds: Any
    prompt_embeds_mask: Tensor | None
    negative_prompt_embeds: Any
    negative_prompt_embeds_mask: Tensor | None
    output_type: str
    return_dict: bool
    attention_kwargs: dict[str, Any] | None
    callback_on_step_end: Callable | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    max_sequence_length: int
    seed: int | Sequence[int] | None
    progress: bool

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Request:
        """From a call's `locals()`."""
        return cls(**{f.name: arguments[f.name] for f in fields(cls)})


class GenerationPipeline(Pipeline):
    """The parts that the pipelines' calls are made of, in the order of their use."""

    def _begin(self, request: Request) -> None:
        """Check what needs no model, and forget the last call."""
        self.times, self._interrupt = {}, False
        if request.attention_kwargs:
            raise ValueError("attention_kwargs must be empty: set the scale of a LoRA on its adapter")
        if request.guidance_scale is not None:
            logger.warning("guidance_scale is ignored: this model is not guidance-distilled; use true_cfg_scale")
        for name in ("num_inference_steps", "num_images_per_prompt"):
            value = getattr(request, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value}")
        check_number("true_cfg_scale", request.true_cfg_scale)
        if request.output_type not in _OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(_OUTPUT_TYPES)}, got {request.output_type}")
        names = request.callback_on_step_end_tensor_inputs
        if unknown := [n for n in names if n not in _TENSOR_INPUTS]:
            known = ", ".join(_TENSOR_INPUTS)
            raise ValueError(f"callback_on_step_end_tensor_inputs must be of {known}, got {unknown}")
        if not 1 <= request.max_sequence_length <= 1024:
            raise ValueError(f"max_sequence_length must be in 1..1024, got {request.max_sequence_length}")

    def encode_prompt(
        self, prompt: str | Sequence[str], max_sequence_length: int = 1024
    ) -> tuple[Tensor, Tensor | None]:
        """Padded embeddings [prompts, tokens, width] and their mask (None: no padding), as diffusers returns them."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        with torch.no_grad():
            return pad_prompt_embeds(
                encode_prompts(self.text_encoder, self.tokenizer, prompts, max_sequence_length=max_sequence_length)
            )

    # ---- prompts ------------------------------------------------------------------------------------------------

    def _count(self, request: Request) -> int:
        """The number of prompts."""
        prompt, embeds = request.prompt, request.prompt_embeds
        if (prompt is None) == (embeds is None):
            raise ValueError(f"give either prompt or prompt_embeds, got {'neither' if prompt is None else 'both'}")
        if embeds is not None and not len(embeds):
            raise ValueError("prompt_embeds must hold at least one prompt, got none")
        return len(_prompts("prompt", prompt) if embeds is None else embeds)

    def _conditions(
        self,
        request: Request,
        encode: Callable[[Sequence[str]], list[Tensor]] | None = None,
        pictures: Sequence[Sequence[Image.Image]] = (),
    ) -> tuple[list[Text], list[Text] | None]:
        """The conditions of every image, the images of a prompt side by side: with, and without the prompt.

        `encode` makes the states of texts, as many as there are prompts; default: the text-to-image template. The
        prompt enhancer, if there is one, sees each prompt with its `pictures`.
        """
        count = self._count(request)
        if request.prompt is not None:
            request.prompt = _prompts("prompt", request.prompt)
            if self.prompt_enhancer is not None:
                with self._stage("enhance"):
                    shown = pictures or [()] * count
                    request.prompt = [
                        checked("prompt_enhancer", self.prompt_enhancer(p, own))
                        for p, own in zip(request.prompt, shown)
                    ]
        with self._stage("text encoder"):
            cond = self._texts(request, "prompt", encode)
            uncond = None
            given = request.negative_prompt is not None or request.negative_prompt_embeds is not None
            if given and request.true_cfg_scale > 1:
                uncond = self._texts(request, "negative_prompt", encode, count)
            elif given:
                scale = request.true_cfg_scale
                logger.warning("negative_prompt has no effect: true_cfg_scale is %s, guidance needs more than 1", scale)
            elif request.true_cfg_scale > 1:
                message = 'true_cfg_scale=%s has no effect without a negative_prompt; " " will do'
                logger.warning(message, request.true_cfg_scale)
        each = range(request.num_images_per_prompt)
        return [t for t in cond for _ in each], None if uncond is None else [t for t in uncond for _ in each]

    def _texts(self, request: Request, name: str, encode, count: int | None = None) -> list[Text]:
        """The condition of every prompt, from text or from given embeddings; with `count`, one is enough for all."""
        prompt, embeds = getattr(request, name), getattr(request, f"{name}_embeds")
        if prompt is not None and embeds is not None:
            raise ValueError(f"give either {name} or {name}_embeds, got both")
        values: Any = _prompts(name, prompt) if embeds is None else self._given(request, name, embeds)
        if count is not None and len(values) not in (1, count):
            raise ValueError(f"{name} must be one for all or one for each prompt, {count}, got {len(values)}")
        if count is not None and len(values) != count:
            values = values * count
        if embeds is not None:
            return values
        if encode is None:
            limit = request.max_sequence_length
            states = encode_prompts(self.text_encoder, self.tokenizer, values, max_sequence_length=limit)
        else:
            states = encode(values)
        return [Text(t.to(self.device, self.dtype)) for t in states]

    def _given(self, request: Request, name: str, embeds) -> list[Text]:
        mask, limit = getattr(request, f"{name}_embeds_mask"), request.max_sequence_length
        width = self.transformer.config.joint_attention_dim
        if isinstance(embeds, Tensor) and embeds.dim() != 3:
            raise ValueError(f"{name}_embeds must have the shape [prompts, tokens, width], got {tuple(embeds.shape)}")
        if mask is not None and (not isinstance(embeds, Tensor) or mask.shape != embeds.shape[:2]):
            raise ValueError(f"{name}_embeds_mask must have the first two dimensions of {name}_embeds")
        texts = []
        for i, e in enumerate(embeds):
            if not e.is_floating_point() or e.dim() != 2 or e.shape[-1] != width:
                raise ValueError(f"{name}_embeds must be floating point, {width} wide, got {e.dtype} {tuple(e.shape)}")
            if not torch.isfinite(e).all():
                raise ValueError(f"{name}_embeds must be finite, got NaN or infinity in entry {i}")
            e = (e if self.uses_vision else e[:limit]).to(self.device, self.dtype)
            positions = None
            if mask is not None:
                positions = mask[i, : len(e)].to(e.device).nonzero().flatten()
                e = e[positions]
            texts.append(Text(e, positions))
        return texts

    # ---- sizes, seeds, noise ------------------------------------------------------------------------------------

    def _sizes(self, request: Request, height, width) -> list[tuple[int, int]]:
        """Latent height and width of every image: multiples of 16 pixels, one for all or one for each prompt."""
        scale, prompts = self.vae_scale_factor, self._count(request)
        sides = []
        for name, value in (("height", height), ("width", width)):
            values = per_prompt(name, 128 * scale if value is None else value, prompts)
            for v in values:
                if not isinstance(v, int) or v < 2 * scale or v % (2 * scale):
                    near = max(2 * scale, round(v / (2 * scale)) * 2 * scale) if isinstance(v, (int, float)) else 1024
                    raise ValueError(f"{name} must be a positive multiple of {2 * scale}, got {v}; {near} would do")
            sides.append([v // scale for v in values for _ in range(request.num_images_per_prompt)])
        return list(zip(*sides))

    @property
    def size_multiple(self) -> int:
        """Pixels of a side of a latent token."""
        return 2 * self.vae_scale_factor

    def _pixels(self, height, width, defaults: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Height and width of every prompt's result, of any size; `defaults` where they are not given."""
        sizes, prompts = [], len(defaults)
        for (h0, w0), h, w in zip(defaults, per_prompt("height", height, prompts), per_prompt("width", width, prompts)):
            for name, value in (("height", h), ("width", w)):
                if value is not None and (not isinstance(value, int) or value < 1):
                    raise ValueError(f"{name} must be a positive integer, got {value}")
            sizes.append((h0 if h is None else h, w0 if w is None else w))
        return sizes

    def _latent_size(self, pixels: tuple[int, int], preserve_size: bool) -> tuple[int, int]:
        """Latent height and width: up to whole tokens, of which the rest is cut, or down to them, as in diffusers."""
        multiple = self.size_multiple
        tokens = [-(-side // multiple) if preserve_size else side // multiple for side in pixels]
        if min(tokens) < 1:
            raise ValueError(f"height and width must be at least {multiple}, got {pixels[1]}x{pixels[0]}")
        return 2 * tokens[0], 2 * tokens[1]

    def _generators(self, request: Request, images: int):
        """The generator or generators of the noise, and the seed of every image where it is known."""
        generator, seed = request.generator, request.seed
        if generator is not None and seed is not None:
            raise ValueError("give either generator or seed, got both")
        if generator is not None:
            if not isinstance(generator, torch.Generator) and len(generator) != images:
                raise ValueError(f"generator must be one or one for each image, {images}, got {len(generator)}")
            known = [generator] if isinstance(generator, torch.Generator) else list(generator)
            return generator, [g.initial_seed() for g in known] if len(known) == images else [None] * images
        if request.latents is not None:
            return None, [None] * images
        if seed is None:
            seed = random.SystemRandom().randrange(2**31)
        seeds = [seed + i for i in range(images)] if isinstance(seed, int) else list(seed)
        if len(seeds) != images:
            raise ValueError(f"seed must be one or one for each image, {images}, got {len(seeds)}")
        return [torch.Generator().manual_seed(s) for s in seeds], seeds

    def _noise(self, request: Request, sizes: list[tuple[int, int]], generator, layers: int = 1) -> list[Tensor]:
        channels, latents = self.transformer.config.in_channels, request.latents
        if latents is None:
            return draw_noise(sizes, channels // 4, generator, self.dtype, self.device, layers)
        if len(latents) != len(sizes):
            raise ValueError(f"latents must hold one entry per image, {len(sizes)}, got {len(latents)}")
        for x, (h, w) in zip(latents, sizes):
            shape = (layers * (h // 2) * (w // 2), channels)
            if tuple(x.shape) != shape:
                raise ValueError(
                    f"latents must be packed tokens {shape} for {w * 8}x{h * 8} pixels, got {tuple(x.shape)}"
                )
            if not torch.isfinite(x).all():
                raise ValueError("latents must be finite, got NaN or infinity")
        return [x.to(self.device, self.dtype).contiguous() for x in latents]

    # ---- steps and pictures -------------------------------------------------------------------------------------

    def _denoise(self, request: Request, samples: list[Sample], **options) -> list[Tensor]:
        """The loop, with the request's schedule, guidance and callback; `options` are further ones of `denoise`."""
        on_step = None
        if request.callback_on_step_end is not None:
            names = request.callback_on_step_end_tensor_inputs
            on_step = self._step_callback(request.callback_on_step_end, names, [s.cond for s in samples])
        with self._stage("denoise"):
            tokens = denoise(
                self.transformer, self.scheduler, samples, steps=request.num_inference_steps, sigmas=request.sigmas,
                guidance=request.true_cfg_scale, free_weights=self.free_modulation_weights,
                graphs=self.cuda_graphs, on_step=on_step, progress=request.progress,
                interrupted=lambda: self.interrupt, **options,
            )  # fmt: skip
            self._check_finite(tokens)
        return tokens

    def _step_callback(self, callback: Callable, names: Sequence[str], cond: list[Text]):
        """diffusers' callback on top of the loop's: padded tensors where sizes agree, lists where they do not."""

        def on_step(step: int, timestep: float, latents: list[Tensor]) -> list[Tensor] | None:
            same = len({len(x) for x in latents}) == 1
            values = {
                "latents": lambda: torch.stack(latents) if same else latents,
                "prompt_embeds": lambda: pad_prompt_embeds([t.embeds for t in cond])[0],
            }
            changed = callback(self, step, torch.tensor(timestep), {name: values[name]() for name in names}) or {}
            if "latents" not in changed:
                return None
            got, expected = ([tuple(x.shape) for x in own] for own in (changed["latents"], latents))
            if got != expected:
                raise ValueError(f"callback_on_step_end must return latents of the shapes {expected}, got {got}")
            return list(changed["latents"])

        return on_step

    def _check_finite(self, tokens: list[Tensor]) -> None:
        if all(bool(torch.isfinite(t).all()) for t in tokens):
            return
        for part in ("transformer", "text_encoder"):
            for name, p in getattr(self, part).named_parameters():
                if not torch.isfinite(p).all():
                    raise ValueError(f"the result is not finite: {part} has NaN or infinity in {name}; load it again")
        raise ValueError(f"the result is not finite in {self.dtype}, though all weights are; try bfloat16 or float32")

    def _finish(
        self,
        request: Request,
        tokens: list[Tensor],
        sizes: list[tuple[int, int]],
        seeds: list[int | None],
        crops: Sequence[tuple[int, int] | None] | None = None,
    ) -> QwenImagePipelineOutput | tuple:
        """Decode latents of these sizes; `crops`: pixel height and width that are kept of each, from the top left."""
        if request.output_type == "latent":
            images: Any = torch.stack(tokens) if len(set(sizes)) == 1 else tokens
        else:
            images = []
            with self._stage("decode"):
                for i, (t, (h, w)) in enumerate(zip(tokens, sizes)):
                    crop = None if crops is None else crops[i]
                    pixels = decode_latents(self.vae, t, h, w)
                    pixels = pixels if crop is None else pixels[:, : crop[0], : crop[1]]
                    images.append(to_output(pixels, request.output_type))
        return QwenImagePipelineOutput(images, seeds, request.prompt) if request.return_dict else (images,)


def check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def per_prompt(name: str, value: Any, prompts: int) -> list[Any]:
    """A list, a tuple or a batch of pictures with an entry for each prompt, or one value for all of them."""
    if getattr(value, "ndim", 0) == 4:
        value = list(value) if len(value) != 1 else value[0]
    if not isinstance(value, (list, tuple)):
        return [value] * prompts
    if len(value) != prompts:
        raise ValueError(f"{name} must be one for all or one for each prompt, {prompts}, got {len(value)}")
    return list(value)


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
