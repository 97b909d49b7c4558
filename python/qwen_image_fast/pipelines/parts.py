"""The parts of a pipeline that have weights: classes, files, variants, and what is wrong before any is read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from qwen_image_fast.checkpoint import BASE_NAME, find_weights, has_weights, pretrained_folder, read_config
from qwen_image_fast.models.controlnet import QwenImageControlNetModel
from qwen_image_fast.models.text_encoder import check_text_encoder
from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
from qwen_image_fast.models.vae import AutoencoderKLQwenImage
from qwen_image_fast.weights.formats import check_part, open_weights

logger = logging.getLogger(__name__)

MODELS = {
    "transformer": QwenImageTransformer2DModel,
    "vae": AutoencoderKLQwenImage,
    "controlnet": QwenImageControlNetModel,
}
WEIGHTS = {**dict.fromkeys(MODELS, BASE_NAME), "text_encoder": "model"}  # base names of the parts' weights


def check_parts(
    folder: Path,
    names: Iterable[str],
    variants: Mapping[str, str],
    files: Mapping[str, list[Path]],
    vision: bool,
    captions: bool,
) -> None:
    """What loading would refuse of the weights, from headers and configurations, before any is read.

    Args:
        names: the parts that are read from the folder. variants: of those that have one.
        files: of the parts whose weights are elsewhere. vision, captions: of the pipeline's class.

    Raises:
        FileNotFoundError, ValueError: weights that are missing, damaged or of another model.
    """
    for name in (name for name in names if name in WEIGHTS):
        place, variant = pretrained_folder(folder, name, []), variants.get(name)
        if name in MODELS:
            model = MODELS[name]
            config = read_config(place)
            model.check_weights(config, open_weights(find_weights(place, WEIGHTS[name], variant), model.part))
        elif captions:
            open_weights(find_weights(place, WEIGHTS[name], variant))
        else:
            check_text_encoder(place, vision, variant, None)
    for name, paths in files.items():
        if name not in MODELS:
            check_text_encoder(folder / name, vision, None, paths)
            continue
        opened, settings = open_weights(paths, MODELS[name].part), settings_of(folder, name)
        if part := MODELS[name].part:
            check_part(opened, paths, part)
        MODELS[name].check_weights(None if settings is None else read_config(settings), opened)


def settings_of(folder: Path, name: str) -> Path | None:
    """A part's place in a folder, where it has a configuration there."""
    return folder / name if (folder / name / "config.json").is_file() else None


def variants_of(folder: Path, names: list[str], variant: str | None) -> dict[str, str]:
    """The variant of the parts that have it. ValueError where none has."""
    if variant is None:
        return {}
    having = [name for name in names if has_weights(folder / name, WEIGHTS[name], variant)]
    if not having and names:
        raise ValueError(
            f"from_pretrained: You are trying to load the model files of the `variant={variant}`, but no part of "
            f"{folder} has any, such as {WEIGHTS[names[0]]}.{variant}.safetensors"
        )
    if others := [name for name in names if name not in having]:
        logger.warning("variant %s: read without it, for lack of such files: %s", variant, ", ".join(others))
    return dict.fromkeys(having, variant)
