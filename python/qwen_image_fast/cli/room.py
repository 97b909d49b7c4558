"""Whether there is memory for a picture, before the model that would make it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_image_fast.checkpoint import read_config
from qwen_image_fast.cli.checks import part_folder
from qwen_image_fast.cli.errors import FAILED, CommandError
from qwen_image_fast.picture_memory import PictureMemory
from qwen_image_fast.request import Request
from qwen_image_fast.serving.cost import samples_of


def check_room(
    request: Request, opened: Mapping[str, Any], pipeline: Any, device: str, dtype: Any, pictures: int, strips: bool
) -> None:
    """CommandError where a picture takes more than is free, with what fits.

    Args:
        pipeline: its class. dtype: torch's, of the model. pictures: that go together. strips: the VAE decodes in
            strips, under --memory.
    """
    import torch

    from qwen_image_fast.models.vae import AutoencoderKLQwenImage
    from qwen_image_fast.pipelines.residence import packed_of
    from qwen_image_fast.weights.memory import free_bytes

    free = free_bytes(torch.device(device))
    if free is None:
        return
    configs = [read_config(part_folder(request.model, name)) for name in ("transformer", "vae")]
    vae = dict(AutoencoderKLQwenImage.empty(configs[1]).named_parameters())
    kept = packed_of(vae, dtype, torch.device(device), pipeline.encodes_pictures)
    memory = PictureMemory.of(configs[0], configs[1], dtype.itemsize, strips, kept=kept)
    tokens, samples = samples_of(request, opened)
    size, rows, steps = request.size(opened), tokens * samples * pictures, request.steps_taken
    where = "this machine" if device == "cpu" else device
    if said := memory.sentence(free, size, rows, steps, where):
        helps = not strips and memory._replace(strips=True).needed(size, rows, steps) <= free
        advice = "; with --memory this one would too, as it is decoded in strips" if helps else ""
        raise CommandError(f"{said}{advice}", FAILED)
