"""What every pipeline does around the sampling loop: checks, sizes, seeds, noise, steps, pictures."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qwen_image_fast.models.finite import all_finite, cause
from qwen_image_fast.models.lora import lora_scale
from qwen_image_fast.models.text_encoder import pad_prompt_embeds
from qwen_image_fast.once import warn_once
from qwen_image_fast.pipelines.arguments import OUTPUT_TYPES, TENSOR_INPUTS, Arguments, check_number, per_prompt, whole
from qwen_image_fast.pipelines.base import QwenImagePipelineOutput
from qwen_image_fast.pipelines.latents import decode_latents, draw_noise, stacked, to_output
from qwen_image_fast.pipelines.prompts import PromptPipeline
from qwen_image_fast.sampling import Changed, Sample, check_same, denoise

logger = logging.getLogger(__name__)


class GenerationPipeline(PromptPipeline):
    """The parts that the pipelines' calls are made of, in the order of their use."""

    encodes_pictures = False

    def _begin(self, call: Arguments) -> None:
        """Check what needs no model, and forget the last call."""
        self.times, self._interrupt = {}, False
        self._guidance_scale, self._attention_kwargs = call.guidance_scale, call.attention_kwargs
        for name in ("transformer", "scheduler"):
            self._need(name, "nothing can be sampled")
        if call.output_type != "latent":
            self._need("vae", f"output_type must be 'latent', got {call.output_type!r}")
        if self.encodes_pictures:
            self._need("vae", "no picture can be encoded")
        lora_scale(call.attention_kwargs)  # which the call has applied
        if call.guidance_scale is not None:
            warn_once(
                logger, self, "guidance_scale is ignored: this model is not guidance-distilled; use true_cfg_scale"
            )
        for name in ("num_inference_steps", "num_images_per_prompt"):
            value = getattr(call, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value}")
        check_number("true_cfg_scale", call.true_cfg_scale)
        if call.guidance_scale is not None:
            check_number("guidance_scale", call.guidance_scale)
        if call.output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {call.output_type}")
        names = call.callback_on_step_end_tensor_inputs
        if unknown := [n for n in names if n not in TENSOR_INPUTS]:
            known = ", ".join(TENSOR_INPUTS)
            raise ValueError(f"callback_on_step_end_tensor_inputs must be of {known}, got {unknown}")
        if not 1 <= call.max_sequence_length <= self.tokenizer_max_length:
            raise ValueError(
                f"max_sequence_length must be in 1..{self.tokenizer_max_length}, got {call.max_sequence_length}"
            )

    # ---- sizes, seeds, noise ------------------------------------------------------------------------------------

    def _sizes(self, call: Arguments, height, width) -> list[tuple[int, int]]:
        """Latent height and width of every image: multiples of 16 pixels, one for all or one for each prompt."""
        scale, prompts = self.vae_scale_factor, self._count(call)
        sides = []
        for name, value in (("height", height), ("width", width)):
            values = per_prompt(name, self.default_sample_size * scale if value is None else value, prompts)
            values = [whole(v) for v in values]
            for v in values:
                if not isinstance(v, int) or v < 2 * scale or v % (2 * scale):
                    near = max(2 * scale, round(v / (2 * scale)) * 2 * scale) if isinstance(v, (int, float)) else 1024
                    raise ValueError(f"{name} must be a positive multiple of {2 * scale}, got {v}; {near} would do")
            sides.append([v // scale for v in values for _ in range(call.num_images_per_prompt)])
        return list(zip(*sides))

    @property
    def size_multiple(self) -> int:
        """Pixels of a side of a latent token."""
        return 2 * self.vae_scale_factor

    def _pixels(self, height, width, defaults: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Height and width of every prompt's result, of any size; `defaults` where they are not given."""
        sizes, prompts = [], len(defaults)
        for (h0, w0), h, w in zip(defaults, per_prompt("height", height, prompts), per_prompt("width", width, prompts)):
            h, w = whole(h), whole(w)
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

    def _say_size(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Warn, before minutes of silence, of latents, height and width, larger than any that the schedule knows; not
        where stages are told, by whoever also tells of sizes."""
        known = self.scheduler.config.get("max_image_seq_len", 8192)
        height, width = max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))
        if (tokens := height * width // 4) > known and self.on_stage is None:
            warn_once(
                logger, self, "a picture of %dx%d has %d tokens, where the model knows up to %d, and time grows with "
                "their square: give a smaller height and width, or a smaller picture",
                width * self.vae_scale_factor, height * self.vae_scale_factor, tokens, known,
            )  # fmt: skip

    def _generators(self, call: Arguments, images: int):
        """The generator or generators of the noise, and the seed of every image where it is known."""
        generator, seed = call.generator, call.seed
        if generator is not None and seed is not None:
            raise ValueError("give either generator or seed, got both")
        if generator is not None:
            if not isinstance(generator, torch.Generator) and len(generator) != images:
                raise ValueError(f"generator must be one or one for each image, {images}, got {len(generator)}")
            known = [generator] if isinstance(generator, torch.Generator) else list(generator)
            return generator, [g.initial_seed() for g in known] if len(known) == images else [None] * images
        if call.latents is not None:
            return None, [None] * images
        if seed is None:
            seed = random.SystemRandom().randrange(2**31)
            if self.transformer.ranks is not None:
                seed = self.transformer.ranks.from_first(seed)
        seeds = [seed + i for i in range(images)] if isinstance(seed, int) else list(seed)
        if len(seeds) != images:
            raise ValueError(f"seed must be one or one for each image, {images}, got {len(seeds)}")
        return [torch.Generator().manual_seed(s) for s in seeds], seeds

    def _noise(self, call: Arguments, sizes: list[tuple[int, int]], generator, layers: int = 1) -> list[Tensor]:
        channels, latents = self.transformer.config.in_channels, call.latents
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
            if not all_finite(x):
                raise ValueError("latents must be finite, got NaN or infinity")
        return [x.to(self.device, self.dtype).contiguous() for x in latents]

    # ---- steps and pictures -------------------------------------------------------------------------------------

    def _denoise(self, call: Arguments, samples: list[Sample], **options) -> list[Tensor]:
        """The loop, with the call's schedule, guidance and callback; `options` are further ones of `denoise`."""
        on_step = None
        if call.callback_on_step_end is not None:
            names = call.callback_on_step_end_tensor_inputs
            on_step = self._step_callback(call.callback_on_step_end, names, samples)
        steps = call.num_inference_steps if call.sigmas is None else len(call.sigmas)
        progress = call.progress
        if self.transformer.ranks is not None:
            progress = progress and self.transformer.ranks.rank == 0
            check_same(self.transformer.ranks, samples, steps, call.true_cfg_scale)
        self._num_timesteps = steps - options.get("begin", 0)
        with self._stage("denoise"), self._timestep():
            tokens = denoise(
                self.transformer, self.scheduler, samples, steps=call.num_inference_steps, sigmas=call.sigmas,
                guidance=call.true_cfg_scale, free_weights=self.free_modulation_weights,
                graphs=self.cuda_graphs, on_step=on_step, before_step=self._begin_step, progress=progress,
                bar_options=self._progress_bar_config if progress else None,
                interrupted=lambda: self.interrupt, **options,
            )  # fmt: skip
            self.check_result(tokens)
        return tokens

    def _begin_step(self, timestep: float) -> None:
        self._current_timestep = torch.tensor(timestep)

    @contextmanager
    def _timestep(self) -> Iterator[None]:
        """Around the loop, in which there is a current timestep."""
        try:
            yield
        finally:
            self._current_timestep = None

    def check_result(self, tokens: list[Tensor]) -> None:
        """ValueError where latents are not finite, with the cause."""
        if not all(all_finite(t) for t in tokens):
            raise ValueError(f"the result is not finite{cause(self._denoisers(), self.dtype)}")

    def _denoisers(self) -> dict[str, Any]:
        """The models that the latents come from, by name."""
        models = {"transformer": self.transformer, "text_encoder": self.text_encoder}
        return {name: model for name, model in models.items() if model is not None}

    def _step_callback(self, callback: Callable, names: Sequence[str], samples: Sequence[Sample]):
        """diffusers' callback on top of the loop's: padded tensors where sizes agree, lists where they do not."""

        def on_step(step: int, timestep: float, latents: list[Tensor]) -> Changed:
            embeds = [s.cond.embeds for s in samples]
            same = len({len(x) for x in latents}) == 1
            known = {
                "latents": lambda: torch.stack(latents) if same else latents,
                "prompt_embeds": lambda: pad_prompt_embeds(embeds)[0],
            }
            changed = callback(self, step, torch.tensor(timestep), {name: known[name]() for name in names})
            changed = {} if changed is None else changed
            if not isinstance(changed, Mapping) or set(changed) - set(known):
                got = sorted(map(str, set(changed) - set(known))) if isinstance(changed, Mapping) else type(changed)
                raise ValueError(f"callback_on_step_end must return a dict of {', '.join(known)} or None, got {got}")
            for name, new in changed.items():
                shapes, expected = ([tuple(x.shape) for x in own] for own in (new, known[name]()))
                if shapes != expected:
                    raise ValueError(f"callback_on_step_end must return {name} of the shapes {expected}, got {shapes}")
            texts = changed.get("prompt_embeds")
            cut = None if texts is None else [new[: len(old)] for new, old in zip(texts, embeds)]
            return Changed(changed.get("latents"), cut)

        return on_step

    def _finish(
        self,
        call: Arguments,
        tokens: list[Tensor],
        sizes: list[tuple[int, int]],
        seeds: list[int | None],
        crops: Sequence[tuple[int, int] | None] | None = None,
    ) -> QwenImagePipelineOutput | tuple:
        """Decode latents of these sizes; `crops`: pixel height and width that are kept of each, from the top left."""
        if call.output_type == "latent":
            images = tokens
        else:
            images = []
            with self._stage("decode"):
                for i, (t, (h, w)) in enumerate(zip(tokens, sizes)):
                    crop = None if crops is None else crops[i]
                    pixels = decode_latents(self.vae, t, h, w)
                    pixels = pixels if crop is None else pixels[:, : crop[0], : crop[1]]
                    images.append(to_output(pixels, call.output_type))
        return self._output(call, images, seeds)

    @staticmethod
    def _output(call: Arguments, images: list[Any], seeds: list[int | None]) -> QwenImagePipelineOutput | tuple:
        found = stacked(images)
        return QwenImagePipelineOutput(found, seeds, call.prompt) if call.return_dict else (found,)
