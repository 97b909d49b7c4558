"""Training the VAE: from scratch with an initialisation that does not collapse, or its decoder alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_image_fast.models.vae import AutoencoderKLQwenImage
from qwen_image_fast.models.vae_blocks import CausalConv3d, ResidualBlock
from qwen_image_fast.tiny import tiny_configs
from qwen_image_fast.training.batches.batches import choose
from qwen_image_fast.training.batches.latents import to_pixels
from qwen_image_fast.training.batches.replace import usable
from qwen_image_fast.training.randomness import generator, key, normal
from qwen_image_fast.training.recipe.curriculum import Change
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.names import vae_folder
from qwen_image_fast.training.recipe.vae import VaeRecipe
from qwen_image_fast.training.sources.buckets import fit, nearest_bucket
from qwen_image_fast.training.sources.make import make_source
from qwen_image_fast.training.sources.sample import Sample, Source
from qwen_image_fast.training.tasks.device import pick_device
from qwen_image_fast.training.tasks.task import Drawn, Losses

# Bounds of the weight that the dynamic balance gives the perceptual loss.
BALANCE_RANGE = (1e-4, 1e4)
# The log-variance of latents that are their mean: a deviation of 5e-5.
CERTAIN = -20.0


@torch.no_grad()
def initialise(vae: nn.Module, seed: int) -> None:
    """Weights from which a narrow VAE learns.

    Only the last temporal slice of a causal 3x3x3 weight acts on an image, so a fan-in over all 27 taps makes the
    activations three times too small and the network collapses to one constant image. Here the other taps are zero,
    and the acting ones N(0, 1.6^2 / fan_in) with the fan-in of that slice; a residual block's conv2 is halved, the two
    conv_out are scaled by 0.3, biases are zero.
    """
    for name, module in sorted(vae.named_modules()):
        if not isinstance(module, (nn.Conv2d, nn.Conv3d)):
            continue
        fan_in = math.prod(module.weight.shape[1:]) / (module.weight.shape[2] if module.weight.ndim == 5 else 1)
        weight = normal(tuple(module.weight.shape), seed, f"vae {name}") * (1.6 / math.sqrt(fan_in))
        if isinstance(module, CausalConv3d):
            weight[:, :, :-1] = 0
        if name.endswith("conv_out"):
            weight *= 0.3
        module.weight.copy_(weight)
        if module.bias is not None:
            module.bias.zero_()
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            module.conv2.weight.mul_(0.5)


def edge_loss(made: Tensor, wanted: Tensor, scales: int = 3) -> Tensor:
    """A perceptual loss without a network: L1 of gradients and Laplacians on an image pyramid.

    sum over scales of mean |D a - D b| for D = d/dx, d/dy and the 5-point Laplacian, each scale half as large as the
    one before. It weighs edges, which reconstruction losses blur. A stand-in for features of a trained network.

    Args:
        made, wanted: [B, C, H, W].
    """
    total = made.new_zeros(())
    difference = made - wanted
    kernel = made.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]]).expand(made.shape[1], 1, 3, 3)
    for _ in range(scales):
        total = total + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        total = total + F.conv2d(difference, kernel, groups=made.shape[1]).abs().mean()
        if min(difference.shape[-2:]) < 8:
            break
        difference = F.avg_pool2d(difference, 2)
    return total


def balance(reconstruction: Tensor, perceptual: Tensor, last: Tensor, share: float) -> Tensor:
    """share * |d reconstruction / d last| / |d perceptual / d last|, clamped: the adaptive weight of VQGAN
    (Esser et al., arXiv 2012.09841, equation 7) with `last` the decoder's last weight. It carries no gradient."""
    (a,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
    (b,) = torch.autograd.grad(perceptual, last, retain_graph=True)
    return share * (a.norm() / b.norm().clamp_min(1e-12)).clamp(*BALANCE_RANGE).detach()


@dataclass
class VaeBatch:
    """images: uint8 [H, W, 3] of one size. step, first: of the run, and the index of the first image. rejected: index,
    origin and reason of those that others stand for."""

    images: list[np.ndarray]
    step: int
    first: int
    rejected: list[tuple[int, str, str]]


@dataclass
class VaeBatches:
    """Images in their buckets; the image of an index is always the same, where need be another in its place."""

    recipe: VaeRecipe
    source: Source

    def batch(self, step: int, micro: int) -> VaeBatch:
        first = (step * self.recipe.accumulate + micro) * self.recipe.batch
        indices = range(first, first + self.recipe.batch)
        images, rejected = self.images(self.recipe.seed, indices, step)
        return VaeBatch(images, step, first, rejected)

    def use(self, changes: Sequence[Change]) -> None:
        """There is one source, so no mixture that could change."""

    def images(
        self, seed: int, indices: Sequence[int], step: int = 0
    ) -> tuple[list[np.ndarray], list[tuple[int, str, str]]]:
        """uint8 [H, W, 3], all in the bucket of the first one; with `crop` a random square of that side of each. And
        index, origin and reason of those that others stand for."""
        return self._cut([usable(self._make(seed, i), seed, i) for i in indices], seed, indices, step)

    def held_out(self, seed: int, indices: Sequence[int]) -> tuple[list[np.ndarray], list[tuple[int, str, str]]]:
        """`images` that training never sees; where pictures of files are trained on and none is held out, some of
        those."""
        source: Any = self.source
        if not getattr(source, "held_places", None):
            return self.images(seed, indices)
        made = [usable(lambda _, place: source.held_out(place, False), seed, i) for i in indices]
        return self._cut(made, seed, indices, 0)

    def _make(self, seed: int, index: int) -> Callable[[int, int], Sample]:
        """What draws a sample: a picture of the source or, by the share of ti2i in `data.tasks`, one after an edit."""
        tasks, source = self.recipe.data.tasks, self.source
        if not tasks.get("ti2i") or choose(generator(seed, "task", sample=index), tasks) != "ti2i":
            return source.sample
        if not hasattr(source, "edit"):
            named = self.recipe.data.source
            raise RecipeError(f"recipe: data.tasks must not have ti2i: the source {named} has no edits")
        return source.edit

    def _cut(
        self, made: Sequence[tuple[Sample, list[tuple[str, str]]]], seed: int, indices: Sequence[int], step: int
    ) -> tuple[list[np.ndarray], list[tuple[int, str, str]]]:
        size = nearest_bucket(*made[0][0].image.shape[:2], self.recipe.data.sizes)
        images = [self._crop(fit(sample.image, size), seed, i, step) for i, (sample, _) in zip(indices, made)]
        return images, [(i, *why) for i, (_, rejected) in zip(indices, made) for why in rejected]

    def _crop(self, image: np.ndarray, seed: int, index: int, step: int) -> np.ndarray:
        side = self.recipe.crop
        if not side:
            return image
        rng = generator(seed, "crop", step=step, sample=index)
        top, left = (int(rng.integers(0, n - side + 1)) for n in image.shape[:2])
        return image[top : top + side, left : left + side]


class VaeTask:
    """A `Task`: see `trainer.py`. Latents are the encoder's means; in mode "scratch" with a little noise, so that
    nearby latents decode alike, and a pull towards zero: a Kullback-Leibler term with a fixed deviation."""

    def __init__(self, recipe: VaeRecipe, source: Source | None = None):
        self.recipe = recipe
        source = source if source is not None else make_source(recipe.data)
        self.rejected: list[tuple[None, str, str]] = []
        self.device = pick_device(recipe.device)
        if recipe.folder:
            self.vae = AutoencoderKLQwenImage.from_pretrained(
                vae_folder(recipe.folder), torch_dtype=torch.float32, device=self.device
            )
        else:
            with torch.random.fork_rng(devices=[]):  # the constructor draws weights, which are replaced
                self.vae = AutoencoderKLQwenImage(**{**tiny_configs()["vae"], "base_dim": recipe.base_dim})
            initialise(self.vae, recipe.seed)
            self.vae.to(self.device)
        self.vae.requires_grad_(False)
        trained = [self.vae.decoder]
        if recipe.mode == "scratch":
            trained += [self.vae.encoder, self.vae.quant_conv]
            self.vae.post_quant_conv.requires_grad_(True)
        for part in trained:
            part.requires_grad_(True)
        for name, p in self.vae.named_parameters():
            if "time_conv" in name:  # an image does not pass through them
                p.requires_grad_(False)
        self.modules: dict[str, nn.Module] = {"vae": self.vae}
        self.maker = VaeBatches(recipe, source)

    def enter(self, number: int) -> None:
        """There is one stage."""

    def loss(self, batch: VaeBatch) -> Losses:
        loss, x = self.recipe.loss, to_pixels(batch.images, self.vae.decoder.conv_in.weight)
        frozen = self.recipe.mode == "decoder"
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            z = self.vae.encode(x).latent_dist.mode()
        prior = loss.prior * z.square().mean() / 2
        if loss.latent_noise:
            draws = [
                normal(tuple(z.shape[1:]), self.recipe.seed, "latents", step=batch.step, sample=batch.first + i)
                for i in range(len(z))
            ]
            z = z + loss.latent_noise * torch.stack(draws).to(z)
        # Not `decode`, which clamps: a clamped pixel has no gradient.
        made = self.vae.decoder(self.vae.post_quant_conv(z[:, :, 0]))
        error = made - x[:, :, 0]
        per_sample = error.square().mean((1, 2, 3)) + loss.l1 * error.abs().mean((1, 2, 3))
        total, extra = per_sample.mean() + prior, {"psnr": psnr(error.detach())}
        if loss.perceptual:
            perceptual = edge_loss(made, x[:, :, 0])
            weight = balance(total, perceptual, self.vae.decoder.conv_out.weight, loss.perceptual)
            extra |= {"perceptual": float(perceptual.detach()), "balance": float(weight)}
            total = total + weight * perceptual
        return Losses(total, per_sample, len(z) * math.prod(z.shape[-2:]) // 4, extra)

    def describe(self, batch: VaeBatch, index: int) -> str:
        return f"sample {batch.first + index}"

    def _held_out(self, count: int) -> list[np.ndarray]:
        images, rejected = self.maker.held_out(key(self.recipe.seed, "validation") % 2**31, range(count))
        self.rejected += [(None, origin, reason) for _, origin, reason in rejected]
        return images

    def _reconstruct(self, images: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        x = to_pixels(images, self.vae.decoder.conv_in.weight)
        return x, self.vae.decode(self.vae.encode(x).latent_dist.mode()).sample

    def validate(self) -> dict[str, float]:
        """PSNR of images that training never sees, in dB for pixels in [-1, 1]; nothing where there are none."""
        if not getattr(self.maker.source, "held_places", True):
            return {}
        x, made = self._reconstruct(self._held_out(self.recipe.log.validation_samples))
        return {"validation_psnr": psnr(made - x)}

    def samples(self) -> list[Drawn]:
        """Held-out images and their reconstructions."""
        images = self._held_out(8)
        _, made = self._reconstruct(images)
        pixels = ((made[:, :, 0] / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Drawn("a held-out picture, and what became of it", pair) for pair in zip(images, pixels)]

    def keep(self, folder: Path, step: int) -> None:
        """Nothing: a VAE is written at the end."""

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """The VAE's folder; a VAE from scratch with the mean and deviation of its own latents in config.json, and with
        a distribution that is its mean."""
        if self.recipe.mode == "decoder":
            self.vae.save_pretrained(folder)
            return
        mean, std = latent_statistics(self.vae, self.maker, self.recipe)
        fresh = AutoencoderKLQwenImage.from_config(self.vae.config, latents_mean=mean, latents_std=std)
        fresh.load_state_dict(without_deviation(self.vae.state_dict()))
        fresh.save_pretrained(folder)


def without_deviation(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VAE's weights with the log-variance of every latent at -20; all others as they are.

    `VaeTask` trains the encoder by its means alone: nothing ever taught the channels of the log-variance, which are the
    second half of the last layer's. Image-to-image and inpainting draw from that distribution, and would draw noise.
    """
    weight, bias = state["quant_conv.weight"].clone(), state["quant_conv.bias"].clone()
    weight[len(weight) // 2 :], bias[len(bias) // 2 :] = 0, CERTAIN
    return {**state, "quant_conv.weight": weight, "quant_conv.bias": bias}


def latent_statistics(vae: Any, maker: VaeBatches, recipe: VaeRecipe) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over `recipe.statistics` held-out images."""
    held_out = key(recipe.seed, "statistics") % 2**31
    weight, latents = vae.decoder.conv_in.weight, []
    for start in range(0, recipe.statistics, recipe.batch):
        images, _ = maker.images(held_out, range(start, min(start + recipe.batch, recipe.statistics)))
        z = vae.encode(to_pixels(images, weight)).latent_dist.mode()
        latents.append(z.double().transpose(0, 1).flatten(1))
    values = torch.cat(latents, 1)
    return values.mean(1).tolist(), values.std(1).tolist()


def psnr(error: Tensor) -> float:
    """10 log10(4 / mean error^2): pixels in [-1, 1] span 2."""
    return 10 * math.log10(4 / max(float(error.square().mean()), 1e-12))
