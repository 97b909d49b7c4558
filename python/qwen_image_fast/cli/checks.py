"""What is wrong with masks and files of weights, before a model is loaded: by headers and configurations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen_image_fast.checkpoint import find_weights, has_weights, pretrained_folder, read_config, weight_patterns
from qwen_image_fast.cli.errors import BAD_INPUT, CommandError, sentence_of
from qwen_image_fast.cli.options import flag
from qwen_image_fast.folders import read_json
from qwen_image_fast.models.controlnet import QwenImageControlNetModel
from qwen_image_fast.models.lora_files import TASKS, find_lora, locate_lora, parse_components, read_lora
from qwen_image_fast.models.lora_keys import split_components
from qwen_image_fast.models.precision import layers_in
from qwen_image_fast.models.stored_modulation import DTYPE, check_dtype, hold_vectors, refuse_changes
from qwen_image_fast.models.text_encoder import empty_text_encoder
from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
from qwen_image_fast.pictures import to_mask
from qwen_image_fast.pipelines.conditions import VAE_AREA, check_effect
from qwen_image_fast.pipelines.control import check_family, check_masked
from qwen_image_fast.pipelines.images import area_size
from qwen_image_fast.request import Request
from qwen_image_fast.request_schedule import StoredLevels
from qwen_image_fast.schedulers import FlowMatchEulerDiscreteScheduler
from qwen_image_fast.tensor_files import read_metadata
from qwen_image_fast.weights.formats import Opened, check_part, open_weights


def check_before_loading(request: Request, opened: Mapping[str, Any], pipeline: Any, dtype: Any) -> None:
    """CommandError for what the pipeline, of that class and torch's dtype, would refuse only once it is loaded."""
    if "mask" in opened:
        _check_mask(request, opened)
    for name in ("transformer", "text_encoder", "vae"):
        given = getattr(request, name) or []
        check_files(name, [given] if isinstance(given, str) else given)
    if (stored := check_numbers(request.model, request.transformer, dtype, request.precision)) is not None:
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(request.model, subfolder="scheduler")
        with _about(*_transformer(request.model, request.transformer)):
            stored.check(request, opened, scheduler)
    if request.kind != "controlnet" and not request.lora:
        return
    transformer = empty_transformer(request.model, request.transformer)
    if request.kind == "controlnet":
        check_net(request.net, "mask" in opened, transformer)  # type: ignore[attr-defined]
    check_loras([lora.name for lora in request.lora], request.model, transformer, pipeline)


def _check_mask(request: Request, opened: Mapping[str, Any]) -> None:
    """It must be white where latents are; that it is white somewhere is known already."""
    size = request.size(opened)
    if getattr(request, "megapixel", False):
        size = area_size(VAE_AREA, *opened["image"][0].size)
    with _about("mask", None):
        check_effect("--mask", to_mask("--mask", opened["mask"]), *size)


def check_files(name: str, given: Iterable[str]) -> None:
    """Those of a part on this disk: what they hold, and that they are whole."""
    files = [Path(file) for file in given]
    if files and all(file.is_file() for file in files):
        with _about(name, " and ".join(map(str, files))):
            check_part(open_weights(files, name), files, name)


def check_numbers(model: str, transformer: str | None, dtype: Any, precision: str | None) -> StoredLevels | None:
    """The transformer's weights must be such that its large layers can be in this precision, and modulation vectors in
    torch's dtype. Returns what it has instead of modulation weights; None: it has them, or is not here."""
    with _about(*_transformer(model, transformer)):
        if (opened := _opened(model, transformer)) is None:
            return None
        if precision is not None:
            layers_in(precision, opened.weights)
        stored = StoredLevels.of_file(opened, read_config(part_folder(model, "transformer")))
        if stored is not None:
            check_dtype(dtype)
        return stored


def empty_transformer(model: str, transformer: str | None) -> Any:
    """On the meta device; with modulation vectors where its file has these."""
    empty = QwenImageTransformer2DModel.empty(read_config(part_folder(model, "transformer")))
    with _about(*_transformer(model, transformer)):
        if (opened := _opened(model, transformer)) is not None:
            hold_vectors(empty, opened.weights, DTYPE)
    return empty


def _opened(model: str, transformer: str | None) -> Opened | None:
    """The transformer's weights, of the folder or in a file; None: they are not on this disk."""
    folder = part_folder(model, "transformer")
    here = find_weights(folder) if transformer is None and has_weights(folder) else []
    files = here if transformer is None else [Path(transformer)]
    return open_weights(files, "transformer") if files and all(file.is_file() for file in files) else None


def _transformer(model: str, transformer: str | None) -> tuple[str, str]:
    """The option that names it, and its value."""
    return ("model", model) if transformer is None else ("transformer", transformer)


def check_net(net: str, masked: bool | None, transformer: Any, option: str = "net") -> None:
    """A ControlNet's folder and whether it goes with the transformer, and with a mask; None: it may be for one."""
    cls = QwenImageControlNetModel
    with _about(option, net):
        folder = pretrained_folder(net, None, [cls.config_name, "model_index.json", *weight_patterns(cls.weights_name)])
        if (folder / "model_index.json").is_file() and not (folder / cls.config_name).is_file():
            holds = read_json(folder / "model_index.json").get("_class_name")
            raise CommandError(f"{flag(option)} must be the folder of a ControlNet alone, {net} holds a whole {holds}")
        config = read_config(folder, cls.config_name)
        cls.check_weights(config, open_weights(find_weights(folder, cls.weights_name)))
        model = cls.empty(config)
        check_family(model, transformer)
        if masked is not None:
            check_masked(model, masked)


def check_loras(names: Iterable[str], model: str, transformer: Any, pipeline: Any) -> None:
    """Whole files, as they are small: keys, shapes and numbers."""
    encoder = None
    for name in names:
        with _about("lora", name):
            state, config = read_lora(*locate_lora(name, None, None, {"revision": None}))
            if encoder is None and split_components(state)[1] and not pipeline.writes_captions:
                encoder = empty_text_encoder(part_folder(model, "text_encoder"), pipeline.uses_vision)
            own, _, _ = parse_components(state, config, transformer, encoder)
            refuse_changes(transformer, own.keys(), "load_lora_weights")


def doubtful_loras(request: Request) -> Iterator[str]:
    """A sentence on each LoRA that was trained on edits alone, where no picture to change goes in.

    The other way round says nothing: a style that was learned from pictures alone is often meant for edits, too.
    """
    if request.kind in ("edit", "layers"):
        return
    for lora in request.lora:
        if of_edits_alone(lora.name):
            yield (
                f"--lora {lora.name} was trained on edits alone, and here the model sees no picture to change: it may "
                "do little, or something else; `qwen-image-fast edit` shows it one"
            )


def of_edits_alone(lora: str) -> bool:
    """Whether a LoRA's file says that it was trained on no picture without one to change."""
    file = find_lora(*locate_lora(lora, None, None, {"revision": None}))
    return {*read_metadata(file).get(TASKS, "t2i").split()} <= {"ti2i", "recon"}


def part_folder(model: str, name: str) -> Path:
    """The folder of a part of the model, of which the configuration is there."""
    return pretrained_folder(model, name, ["config.json"])


@contextmanager
def _about(field: str, value: str | None) -> Iterator[None]:
    """What is wrong is the input of this option."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        text = sentence_of(error)
        if value is not None:
            text = f"{flag(field)} {text}" if text.startswith(value) else f"{flag(field)} {value}: {text}"
        raise CommandError(text, BAD_INPUT) from error
