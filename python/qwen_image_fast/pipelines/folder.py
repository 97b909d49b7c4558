"""A pipeline's folder: which parts are read from it, in which type and variant, and how it is written again."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from qwen_image_fast.checkpoint import json_bytes
from qwen_image_fast.files import atomic_write
from qwen_image_fast.folders import DOWNLOAD_PATTERNS, read_json, resolve_folder
from qwen_image_fast.keywords import check_saving, keyword_names, one_device, part_dtypes, refuse
from qwen_image_fast.model_defaults import GENERATION_FILE
from qwen_image_fast.models.precision import check_precision
from qwen_image_fast.models.text_encoder import load_captioner, load_text_encoder
from qwen_image_fast.models.text_encoder_files import save_text_encoder
from qwen_image_fast.models.vision import VisionProcessor
from qwen_image_fast.pipelines.parts import MODELS, WEIGHTS, check_parts, settings_of, variants_of
from qwen_image_fast.pipelines.residence import Residence, stored_weights
from qwen_image_fast.schedulers import FlowMatchEulerDiscreteScheduler
from qwen_image_fast.weights.formats import parts_in
from qwen_image_fast.weights.places import single_file

logger = logging.getLogger(__name__)


class PipelineFolder:
    """`from_pretrained` and `save_pretrained` of a pipeline."""

    parts: ClassVar[dict[str, list[str]]]
    uses_vision: ClassVar[bool]
    writes_captions: ClassVar[bool]
    # The folder, and the parts as they were read from it.
    _source: Path | None
    _read: dict[str, Any]
    controlnets: Any  # of the pipelines that have some

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        torch_dtype: Any = None,
        dtype: Any = None,
        device: str | torch.device = "cpu",
        device_map: str | torch.device | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | None = None,
        local_files_only: bool | None = None,
        free_modulation_weights: bool = False,
        precision: str | None = None,
        memory_limit: int | str | None = None,
        **components,
    ):
        """The pipeline of a diffusers-layout folder or hub repository; nothing of diffusers is needed.

        Args:
            torch_dtype, dtype: of all models, under either name, or a dict of parts, {"vae": torch.float32, "default":
                torch.bfloat16}; None: as stored.
            device, device_map: where the weights go, tensor by tensor; so with any `low_cpu_mem_usage`.
            variant: "fp16" reads `*.fp16.safetensors`; a part that has none is read without, and a warning names it.
            free_modulation_weights: release the modulation weights (a third of the transformer) once the vectors of a
                schedule are known; another schedule reads them from the folder again.
            precision: "int8" makes the transformer compute in 8 bits (docs/quantization.md), an approximation.
            memory_limit: bytes or "20GB" that the process, or the GPU, may hold: weights that do not fit are streamed,
                with the same result (docs/memory.md).
            components: ready-made parts to use instead of the folder's (`transformer=...`), None, or a file with the
                weights of the transformer, the VAE or the text encoder (`transformer="q4.gguf"`; docs/formats.md); for
                a text encoder of llama.cpp that sees pictures two, of which one is named mmproj.

        Raises:
            FileNotFoundError, ValueError: what is missing, damaged or of another model, in one sentence.
            TypeError: an unknown keyword; the nearest is named, or what to do instead.
        """
        known = [n for n in keyword_names(cls.from_pretrained) if n != "name_or_path"]
        refuse("from_pretrained", [n for n in components if n not in cls.parts], [*cls.parts, *known])
        where = one_device(device, device_map, use_safetensors)
        dtypes = part_dtypes(torch_dtype, dtype, cls.parts)
        check_precision("from_pretrained", precision, where)
        if precision is not None and "transformer" in components and not _is_file(components["transformer"]):
            raise ValueError(
                "from_pretrained: precision must be None with a transformer that is loaded already; give it to "
                "that one's from_pretrained"
            )
        hub: dict[str, Any] = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
        }
        folder = resolve_folder(name_or_path, allow_patterns=_without(cls.parts, components), **hub)
        index = read_json(folder / "model_index.json")
        if not str(index.get("_class_name", "")).startswith("QwenImage"):
            raise ValueError(
                f"from_pretrained: {folder} must hold a Qwen-Image pipeline, its model_index.json names "
                f"{index.get('_class_name')}"
            )
        missing = [n for n in cls.parts if n not in components and n in index and index[n] in (None, [None, None])]
        read = [n for n in cls.parts if n not in components and n not in missing]
        variants = variants_of(folder, [n for n in read if n in WEIGHTS], variant)
        files = {n: cls._files(n, c, hub) for n, c in components.items() if _is_file(c)}
        check_parts(folder, read, variants, files, cls.uses_vision, cls.writes_captions)
        loaded: dict[str, Any] = {}
        stored = stored_weights(cls, folder, read, files, variants)
        residence = Residence(cls, stored, dtypes, where, memory_limit, precision)
        for name, paths in files.items():
            models: dict[str, Any] = {"torch_dtype": dtypes[name], "device": where}
            models |= {"precision": precision} if name == "transformer" else {}
            components[name] = residence.load(folder, name) or cls._load_files(folder, name, paths, models)
            logger.info("loaded %s from %s", name, ", ".join(map(str, paths)))
        for name in read:
            models = {"torch_dtype": dtypes[name], "device": where, "variant": variants.get(name)}
            models |= {"precision": precision} if name == "transformer" else {}
            loaded[name] = residence.load(folder, name) or cls._load(folder, name, models)
            logger.info("loaded %s from %s", name, folder / name)
        parts = {**dict.fromkeys(cls.parts), **loaded, **components}
        make: Any = cls
        pipe = make(**parts, free_modulation_weights=free_modulation_weights)
        pipe._source = folder
        pipe._read = {name: getattr(pipe, name) for name in loaded}
        residence.bound(pipe)
        return pipe

    @classmethod
    def _load(cls, folder: Path, name: str, models: dict[str, Any]) -> Any:
        if name in MODELS:
            return MODELS[name].from_pretrained(folder, subfolder=name, **models)
        if name == "text_encoder":
            if cls.writes_captions:
                return load_captioner(folder / name, **models)
            return load_text_encoder(folder / name, vision=cls.uses_vision, **models)
        if name == "scheduler":
            return FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder=name)
        return _load_settings(folder, name)

    @classmethod
    def _files(cls, name: str, given: Any, hub: Mapping[str, Any]) -> list[Path]:
        """The files that a part's weights are to be read from, on this disk."""
        one = isinstance(given, (str, os.PathLike))
        if not (name in MODELS and one) and (name != "text_encoder" or cls.writes_captions):
            raise TypeError(f"from_pretrained: {name} must be the part itself for a {cls.__name__}, got {given}")
        hub = {key: value for key, value in hub.items() if key != "revision"}  # which is the folder's
        return [single_file(file, **hub) for file in ([given] if one else given)]

    @classmethod
    def _load_files(cls, folder: Path, name: str, paths: list[Path], models: dict[str, Any]) -> Any:
        """A part with weights from files, and settings from its place in the folder."""
        if name in MODELS:
            return MODELS[name].from_single_file(paths[0], config=settings_of(folder, name), **models)
        return load_text_encoder(folder / name, vision=cls.uses_vision, files=paths, **models)

    @classmethod
    def from_single_file(cls, path_or_name: str | os.PathLike, *, config: str | os.PathLike | None = None, **options):
        """The pipeline with the weights of one GGUF or safetensors file, and of a folder what the file does not hold.

        Args:
            path_or_name: a path, "owner/name/file.gguf" of the hub, or its URL. Often a transformer alone.
            config: folder or hub name of the pipeline that the other parts, and all settings, are read from.
            options: as of `from_pretrained`.

        Raises:
            FileNotFoundError, ValueError: what is missing, damaged, of another model or in a format that is not read.
            TypeError: no `config`, or an unknown keyword.
        """
        if config is None:
            raise TypeError("from_single_file: config must name a pipeline's folder or hub model, for its other parts")
        hub = {key: options[key] for key in ("cache_dir", "token", "local_files_only") if key in options}
        path = single_file(path_or_name, **hub)
        return cls.from_pretrained(config, **{**dict.fromkeys(parts_in(path), path), **options})

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
    ) -> None:
        """Write the whole pipeline as a diffusers-layout folder, which diffusers reads too.

        The condition encoder of a pipeline that was loaded from a folder is written with what this pipeline did not
        load (head, vision tower), from there; its tokenizer and processor are copied. Parts that are None are noted.

        Args:
            variant: "fp16" writes `*.fp16.safetensors` of all models; it changes no type. max_shard_size: bytes of a
                file at most, default 10GB.

        Raises:
            ValueError: `safe_serialization=False`, which would be pickles.
        """
        check_saving(safe_serialization, push_to_hub)
        parts = {name: getattr(self, name) for name in self.parts}
        if parts.get("controlnet") is not None:
            if len(nets := self.controlnets) != 1:
                raise ValueError(f"save_pretrained: controlnet must be a single one, got {len(nets)}")
            parts["controlnet"] = nets[0]
        folder = Path(save_directory).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        files: dict[str, Any] = {"variant": variant, "max_shard_size": max_shard_size or "10GB"}
        index: dict[str, Any] = {"_class_name": type(self).__name__, "_diffusers_version": "0.36.0"}
        for name, part in parts.items():
            index[name] = self.parts[name] if part is not None else [None, None]
            if part is None:
                continue
            if name in MODELS:
                part.save_pretrained(folder / name, **files)
            elif name == "text_encoder":
                save_text_encoder(part, folder / name, **files)
            elif self._source is None or self._read.get(name) is not part or not (self._source / name).is_dir():
                part.save_pretrained(folder / name)
            elif (self._source / name).resolve() != (folder / name).resolve():
                shutil.copytree(self._source / name, folder / name, dirs_exist_ok=True)
        if self._source is not None and (self._source / GENERATION_FILE).is_file():
            generation = (self._source / GENERATION_FILE).read_bytes()
            atomic_write(folder / GENERATION_FILE, lambda file: file.write(generation))
        atomic_write(folder / "model_index.json", lambda file: file.write(json_bytes(index)))


def _is_file(part: Any) -> bool:
    """Whether a part is named by its file, or files."""
    several = isinstance(part, (list, tuple)) and bool(part)
    return isinstance(part, (str, os.PathLike)) or (several and all(isinstance(p, (str, os.PathLike)) for p in part))


def _without(parts: Iterable[str], given: Mapping[str, Any]) -> list[str] | None:
    """What to download where the weights of some parts are given; None: all."""
    if not set(WEIGHTS) & set(given):
        return None
    settings = [pattern for pattern in DOWNLOAD_PATTERNS if pattern != "*.safetensors"]
    return settings + [f"{part}/*.safetensors" for part in parts if part not in given]


def _load_settings(folder: Path, name: str) -> Any:
    """A tokenizer or a processor."""
    from transformers import Qwen2Tokenizer

    if not (folder / name).is_dir():
        hint = "; editing needs an editing model's folder" if name == "processor" else ""
        raise FileNotFoundError(f"from_pretrained: there is no {name} folder {folder / name}{hint}")
    reader: Any = VisionProcessor if name == "processor" else Qwen2Tokenizer
    return reader.from_pretrained(folder / name)
