"""Runs of kind vae: a VAE from scratch, or its decoder."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_image_fast.training.recipe.fields import must
from qwen_image_fast.training.recipe.run import RunRecipe


@dataclass
class VaeLossRecipe:
    """Reconstruction: MSE + l1 * L1. l1: weight of the absolute error. perceptual: its share of the gradient at the
    last layer; 0: none. latent_noise: deviation of the noise on the latents z. prior: weight of mean z^2 / 2, the part
    of the Kullback-Leibler divergence from N(0, 1) that a fixed deviation leaves; it keeps the noise large beside z.
    """

    l1: float = 0.1
    latent_noise: float = 0.05
    prior: float = 0.0
    perceptual: float = 0.0


@dataclass
class VaeRecipe(RunRecipe):
    """mode: scratch, all of a VAE: a new one or, where it is named, that of `folder`; or decoder, that of `folder`, its
    encoder frozen. folder: a VAE, or a pipeline's. base_dim: width of a new VAE.

    data.tasks: t2i, pictures of the source; ti2i, those that its edits make.

    crop: side in pixels of the random square of each image that is used, a multiple of 8; 0: the whole image.
    statistics: images of which the latents' mean and deviation are measured at the end ("scratch").
    """

    kind: str = "vae"
    mode: str = "scratch"
    folder: str = ""
    base_dim: int = 8
    crop: int = 0
    statistics: int = 256
    loss: VaeLossRecipe = field(default_factory=VaeLossRecipe)

    def check(self) -> None:
        super().check()
        data = self.data
        names = [part.name for part in data.parts]
        must(not (data.mixture or data.filters), "data.mixture", "be empty, as data.filters, for kind vae", names)
        must(self.mode in ("scratch", "decoder"), "mode", "be scratch or decoder", self.mode)
        least = min(side for bucket in data.sizes for side in bucket)
        must(0 <= self.crop <= least and self.crop % 8 == 0, "crop",
             f"be a multiple of 8 up to the smallest side, {least}", self.crop)  # fmt: skip
        must(self.mode == "scratch" or bool(self.folder), "folder", "name a VAE for mode decoder", self.folder)
