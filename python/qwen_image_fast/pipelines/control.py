"""What the ControlNet pipelines share: condition tokens, and the residuals of every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from qwen_image_fast.models.controlnet import QwenImageControlNetModel, QwenImageMultiControlNetModel
from qwen_image_fast.models.finite import all_finite, cause
from qwen_image_fast.models.packing import pack
from qwen_image_fast.pictures import to_mask, to_rgb
from qwen_image_fast.pipelines.arguments import Arguments, check_number, per_prompt
from qwen_image_fast.pipelines.base import CONTROLNET
from qwen_image_fast.pipelines.conditions import check_effect, encode_distribution, normalized
from qwen_image_fast.pipelines.generation import GenerationPipeline
from qwen_image_fast.pipelines.images import resize, to_tensor
from qwen_image_fast.pipelines.in_parts import Denoising, Parts
from qwen_image_fast.pipelines.latents import pack_latents
from qwen_image_fast.pipelines.masks import check_ratio, check_white
from qwen_image_fast.sampling import Residuals, Sample


@dataclass
class Control:
    """One ControlNet with the condition tokens of all samples, packed; scale: its weight at every step."""

    net: QwenImageControlNetModel
    tokens: Tensor
    scale: list[float]


class ControlPipeline(GenerationPipeline):
    """A text-to-image pipeline with one ControlNet, or several."""

    parts = GenerationPipeline.parts | CONTROLNET
    encodes_pictures = True

    def __init__(
        self, scheduler, vae, text_encoder, tokenizer, transformer, controlnet, *, free_modulation_weights: bool = False
    ):
        super().__init__(
            scheduler, vae, text_encoder, tokenizer, transformer, free_modulation_weights=free_modulation_weights
        )
        self.controlnet = controlnet
        if controlnet is not None and not self.controlnets:
            raise ValueError("controlnet must be one or several, got none")
        for net in self.controlnets:
            if not isinstance(net, QwenImageControlNetModel):
                kind = f"{type(net).__module__}.{type(net).__name__}"
                raise TypeError(
                    f"controlnet must be a QwenImageControlNetModel of this package, or several, got {kind}"
                )
            if transformer is not None:
                check_family(net, transformer)

    @property
    def controlnets(self) -> list[QwenImageControlNetModel]:
        if self.controlnet is None:
            return []
        several: Any = self.controlnet
        if isinstance(several, QwenImageMultiControlNetModel):
            return [cast(QwenImageControlNetModel, net) for net in several.nets]
        return list(several) if isinstance(several, (list, tuple)) else [several]

    @property
    def _modules(self):
        return [*super()._modules, *self.controlnets]

    def _denoisers(self):
        return {**super()._denoisers(), **_named(self.controlnets)}

    def _run(self, call: Arguments, height, width, control_image, control_mask, scale, start, end) -> Parts:
        nets, images = self._controls(control_image, self._count(call))
        weights = zip(*(_numbers(name, value, len(nets)) for name, value in (
            ("controlnet_conditioning_scale", scale), ("control_guidance_start", start), ("control_guidance_end", end)
        )))  # fmt: skip
        sizes = self._sizes(call, height, width)
        self._say_size(sizes)
        for net in nets:
            check_masked(net, control_mask is not None)
        given = [self._control_pictures(call, image, control_mask, sizes) for image in images]
        cond, uncond = self._conditions(call)
        generator, seeds = self._generators(call, len(cond))
        with self._stage("encode"):
            tokens = [self._control_tokens(*own, sizes, generator) for own in given]
        samples = [
            Sample(x, (1, h // 2, w // 2), cond[i], None if uncond is None else uncond[i])
            for i, (x, (h, w)) in enumerate(zip(self._noise(call, sizes, generator), sizes))
        ]
        steps = call.num_inference_steps if call.sigmas is None else len(call.sigmas)
        controls = [
            Control(net, t, [w * (first <= i / steps and (i + 1) / steps <= last) for i in range(steps)])
            for net, t, (w, first, last) in zip(nets, tokens, weights)
        ]
        options = {"control": lambda levels: control_residuals(controls, samples, levels)}
        result = yield Denoising(call, samples, options)
        return self._finish(call, result, sizes, seeds)

    def _controls(self, control_image, prompts: int) -> tuple[list[QwenImageControlNetModel], list]:
        """The ControlNet and the pictures of each control: several ControlNets, or a union one several times."""
        self._need("controlnet", "no picture leads the image")
        nets = self.controlnets
        for net in nets:
            if (net.dtype, net.device) != (self.dtype, self.device):
                raise ValueError(
                    f"controlnet must have the transformer's dtype and device, {self.dtype} on {self.device}, got "
                    f"{net.dtype} on {net.device}; pipe.to(...) moves all parts"
                )
        if len(nets) == 1:
            given = control_image if isinstance(control_image, (list, tuple)) else []
            multi = isinstance(self.controlnet, QwenImageMultiControlNetModel) and bool(given)
            several = multi or (len(given) > 1 and prompts == 1) or any(isinstance(one, (list, tuple)) for one in given)
            images = list(given) if several else [control_image]
            return nets * len(images), images
        if not isinstance(control_image, (list, tuple)) or len(control_image) != len(nets):
            got = len(control_image) if isinstance(control_image, (list, tuple)) else type(control_image).__name__
            raise ValueError(f"control_image must hold one for each of the {len(nets)} ControlNets, got {got}")
        return nets, list(control_image)

    def _control_pictures(self, call, image, mask, sizes) -> tuple[list[Image.Image], list[Image.Image] | None]:
        """A control picture of every image, and its mask if there is one, in pixels of the image."""
        each, count, scale = call.num_images_per_prompt, self._count(call), self.vae_scale_factor
        pixels = [(w * scale, h * scale) for h, w in sizes]
        pictures = [to_rgb("control_image", one) for one in per_prompt("control_image", image, count)]
        fitted = [resize(pictures[k // each], *size) for k, size in enumerate(pixels)]
        if mask is None:
            return fitted, None
        masks = [to_mask("control_mask", one) for one in per_prompt("control_mask", mask, count)]
        for own, picture in zip(masks, pictures):
            check_ratio("control_mask", own, picture)
            check_white("control_mask", own)
        for k, (width, height) in enumerate(pixels[::each]):
            check_effect("control_mask", masks[k], width, height, scale)
        return fitted, [resize(masks[k // each], *size) for k, size in enumerate(pixels)]

    def _control_tokens(self, pictures, masks, sizes, generator) -> Tensor:
        """The packed condition of all images: normalised latents, drawn from the VAE's distribution; with a mask of
        the picture blanked where it is white, and what is kept of each latent pixel."""
        single = generator is None or isinstance(generator, torch.Generator)
        rows = []
        for k, (h, w) in enumerate(sizes):
            pixels = to_tensor(pictures[k])
            white = None
            if masks is not None:
                white = (to_tensor(masks[k].convert("L").convert("RGB"))[:, :1] >= 0).float()
                pixels = pixels.masked_fill(white.bool(), -1)
            distribution = encode_distribution(self.vae, pixels)
            latents = normalized(self.vae, distribution.sample(generator if single else generator[k]))
            if white is not None:
                kept = 1 - torch.nn.functional.interpolate(white[:, :, 0], size=(h, w))[:, :, None]
                latents = torch.cat([latents, kept.to(latents)], 1)
            rows.append(pack_latents(latents)[0].to(self.device, self.dtype))
        return torch.cat(rows)


def check_family(net, transformer) -> None:
    """ValueError unless a ControlNet, on any device, is one for this transformer."""
    if (own := _family(net)) != (expected := _family(transformer)):
        different = {name: (value, own[name]) for name, value in expected.items() if own[name] != value}
        raise ValueError("controlnet must be of the transformer's family: " + "; ".join(
            f"{name} must be {value}, got {got}" for name, (value, got) in different.items()
        ))  # fmt: skip


def check_masked(net, masked: bool) -> None:
    """ValueError unless a ControlNet is made for a call with a mask, or without."""
    if (net.config.extra_condition_channels > 0) != masked:
        what = (
            "an inpainting ControlNet, which needs a mask" if not masked else "a union ControlNet, which takes no mask"
        )
        raise ValueError(f"controlnet must fit the pipeline, got {what}")


def _family(model) -> dict[str, object]:
    """What a transformer and its ControlNets have in common."""
    same = ("num_attention_heads", "attention_head_dim", "in_channels", "joint_attention_dim", "axes_dims_rope")
    return {name: tuple(v) if isinstance(v := model.config[name], (list, tuple)) else v for name in same}


def _named(nets: Sequence[QwenImageControlNetModel]) -> dict[str, QwenImageControlNetModel]:
    """As an error names them: controlnet, or controlnet[0] and so on."""
    return {"controlnet" if len(nets) == 1 else f"controlnet[{i}]": net for i, net in enumerate(nets)}


def _numbers(name: str, value, controls: int) -> list[float]:
    """One for all control pictures, or one for each."""
    values = list(value) if isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) == 1 else [value] * controls
    if len(values) != controls:
        raise ValueError(f"{name} must be one for all or one for each control picture, {controls}, got {len(values)}")
    for v in values:
        check_number(name, v)
    return values


def control_residuals(controls: Sequence[Control], samples: Sequence[Sample], levels: Tensor) -> Residuals:
    """The sum of the ControlNets' residuals at every step, computed with the prompt and used without it too.

    levels: float32 [steps, samples], the noise levels. A ControlNet whose first residuals are not finite is named in a
    ValueError; later ones show in the result.
    """
    net = controls[0].net
    device, dtype = net.device, net.dtype
    layout = pack(
        tuple(s.shapes for s in samples), [len(s.cond.embeds) for s in samples], axes_dim=net.config.axes_dims_rope,
        txt_positions=[
            torch.arange(len(s.cond.embeds)) if s.cond.positions is None else s.cond.positions.cpu() for s in samples
        ],
        device=device,
    )  # fmt: skip
    # The way of the reference: 1000 sigma in float32, rounded to the model's dtype, divided by 1000.
    timesteps = (levels * 1000).to(device, dtype) / 1000
    shared = bool((levels == levels[:, :1]).all())
    nets = {id(c.net): c.net for c in controls}
    text = torch.cat([s.cond.embeds for s in samples])
    texts = {key: n.embed_text(text) for key, n in nets.items()}

    def residuals(step: int, x: Tensor) -> list[Tensor]:
        timestep = timesteps[step, :1] if shared else timesteps[step]
        modulations = {key: n.modulation(timestep) for key, n in nets.items()}
        total: list[Tensor] = []
        for c in controls:
            key = id(c.net)
            found = c.net.forward_packed(x, c.tokens, texts[key], layout, modulations[key])
            if step == 0 and not all(all_finite(r) for r in found):
                one = {name: net for name, net in _named([*nets.values()]).items() if net is c.net}
                raise ValueError(f"the residuals of a ControlNet are not finite{cause(one, dtype)}")
            found = [r * c.scale[step] for r in found]
            total = [a + b for a, b in zip(total, found)] if total else found
        return total

    return residuals
