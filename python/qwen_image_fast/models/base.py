"""What every model here shares: a recorded configuration and reading and writing diffusers-layout folders."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from qwen_image_fast.checkpoint import (
    check_config,
    check_fit,
    find_weights,
    json_bytes,
    load_state_into,
    pretrained_folder,
    read_config,
    save_state,
    weight_patterns,
)
from qwen_image_fast.folders import read_json
from qwen_image_fast.keywords import check_saving, check_visible, keyword_names, one_device, one_dtype, refuse
from qwen_image_fast.models.hooks import computing_device, hook_of_diffusers
from qwen_image_fast.models.int8_linear import check_place, read_int8_layers
from qwen_image_fast.models.precision import check_precision
from qwen_image_fast.models.stored_modulation import hold_vectors
from qwen_image_fast.models.streaming import refuse_moves
from qwen_image_fast.weights.formats import Opened, check_part, open_weights
from qwen_image_fast.weights.places import single_file

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound="PretrainedModel")

_ADAPTERS = "adapters go on the transformer"
_ATTENTION = "attention is this package's own; accelerate(pipe) keeps diffusers' backends"
_OFFLOAD = "from_pretrained(memory_limit=) of a pipeline streams what does not fit; see docs/memory.md"
_CACHE = "step caches go on the transformer"
_CASTING = "layers are cast in the transformer alone"
# Methods of diffusers' models that a model may be without, and what to do instead.
ELSEWHERE = {
    **dict.fromkeys(("add_adapter", "set_adapter", "load_lora_adapter", "save_lora_adapter"), _ADAPTERS),
    **dict.fromkeys(("set_adapters", "delete_adapters", "disable_lora", "enable_lora"), _ADAPTERS),
    **dict.fromkeys(("fuse_lora", "unfuse_lora", "unload_lora"), _ADAPTERS),
    **dict.fromkeys(("attn_processors", "set_attn_processor", "set_default_attn_processor"), _ATTENTION),
    **dict.fromkeys(("set_attention_backend", "reset_attention_backend"), _ATTENTION),
    **dict.fromkeys(("enable_cache", "disable_cache", "is_cache_enabled", "cache_context"), _CACHE),
    "enable_group_offload": _OFFLOAD,
    "enable_layerwise_casting": _CASTING,
    "enable_parallelism": "pipe.enable_parallel; see docs/distributed.md",
    "fuse_qkv_projections": "projections run together where that is faster",
    "unfuse_qkv_projections": "projections run together where that is faster",
    "compile_repeated_blocks": "torch.compile(model) compiles the whole of it",
    "push_to_hub": "save_pretrained, then huggingface_hub.upload_folder",
}


class Config(dict):
    """Constructor arguments of a model, readable as items and as attributes (`model.config.patch_size`)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"config has no field {name!r}; fields: {', '.join(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"config is read-only: register_to_config({name}=) changes what is saved")

    def __setitem__(self, name: str, value: Any) -> None:
        raise TypeError(f"config is read-only: register_to_config({name}=) changes what is saved")

    def _read_only(self, *args: Any, **fields: Any) -> Any:
        raise TypeError("config is read-only: register_to_config changes what is saved")

    __delitem__ = update = pop = popitem = clear = setdefault = _read_only  # type: ignore[assignment]

    def __reduce__(self) -> tuple:  # a copy is made whole, as no field of it can be set
        return Config, (dict(self),)


def record_config(init):
    """Decorate `__init__` so that all its arguments, defaults included, are kept in `self.config`."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in bound.arguments.items() if k != "self"}
        object.__setattr__(self, "config", Config(fields))
        init(self, *args, **kwargs)

    return wrapper


class PretrainedModel(nn.Module):
    """Base of the models: a configuration, and diffusers-layout folders that diffusers reads and writes too.

    A subclass decorates `__init__` with `record_config`. It is built under `torch.device("meta")` when it is loaded, so
    a buffer that is not stored must be made with an explicit device (`torch.arange(n, device="cpu")`).
    """

    config: Config
    config_name = "config.json"
    weights_name = "diffusion_pytorch_model"
    weight_files: Sequence[Path] = ()  # where the weights were read from
    streamed: Any = None  # weights that are read when they are used (models/streaming.py)
    # What it is to a pipeline, and whose names of tensors are read for ours (weights/names.py).
    part: str | None = None
    # What scripts for diffusers ask of a class.
    _supports_gradient_checkpointing = False
    _keep_in_fp32_modules: Sequence[str] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in (config := self.__dict__.get("config", {})):
                warnings.warn(f"{name} is a field of the configuration: model.config.{name}", FutureWarning, 2)
                return config[name]
            if name not in ELSEWHERE:
                raise
            text = f"{type(self).__name__} has no {name}: {ELSEWHERE[name]}"
            raise AttributeError(text, name=name, obj=self) from None

    def register_to_config(self, **fields: Any) -> None:
        """Change fields of `config`, which is what is saved; the model itself stays as it is."""
        self.config = Config({**self.config, **fields})

    @property
    def dtype(self):
        """Of the weights, while they are computed with."""
        cast = hook_of_diffusers(self, "layerwise_casting")
        return next(self.parameters()).dtype if cast is None else cast.compute_dtype

    @property
    def device(self):
        """Of the weights, while they are computed with."""
        return computing_device(self)

    def to(self, *args, **kwargs):
        """As `torch.nn.Module.to`. ValueError for a GPU where torch sees none, and for one with a model in 8 bits."""
        for device in (*args[:1], kwargs.get("device")):
            if isinstance(device, (str, torch.device)):
                check_visible("to", device)
                check_place(self, torch.device(device))
        return super().to(*args, **kwargs)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of parameter values; a parameter used in several places counts once."""
        out = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)} if exclude_embeddings else set()
        counted = (p for p in self.parameters() if id(p) not in out and (p.requires_grad or not only_trainable))
        return sum(p.numel() for p in counted)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters, and of the buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(t.numel() * t.element_size() for t in tensors)

    @classmethod
    def from_config(cls: type[Model], config: Mapping[str, Any], **overrides) -> Model:
        """A model with fresh weights from a stored configuration, some fields replaced by `overrides`."""
        return cls(**check_config({**config, **overrides}, cls))

    @classmethod
    def from_pretrained(
        cls: type[Model],
        name_or_path: str | os.PathLike,
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        device_map: str | torch.device | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | None = None,
        local_files_only: bool | None = None,
        precision: str | None = None,
        **unknown,
    ) -> Model:
        """The model of a local folder or hub repository, in eval mode, on `device`.

        `torch_dtype` and `dtype` are one argument under two names: the type of the floating-point weights, by default
        as stored; so are `device` and `device_map`. `variant="fp16"` reads
        `diffusion_pytorch_model.fp16.safetensors`. Large weights that stay on the CPU as they are stored are pages of
        the file, read when they are used; others are read once, into their final place: memory peaks at the model's
        size, with any `low_cpu_mem_usage`. `precision="int8"`, of transformers, makes the blocks' large layers
        compute in 8 bits (docs/quantization.md): an approximation. Errors: FileNotFoundError for what is not there,
        ValueError for a configuration of another class, damaged files, weights that do not fit the configuration, or a
        precision that cannot be had; TypeError for an unknown keyword.
        """
        refuse("from_pretrained", unknown, keyword_names(cls.from_pretrained))
        dtype, device = one_dtype(torch_dtype, dtype), one_device(device, device_map, use_safetensors)
        cls._check_precision("from_pretrained", precision, device)
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        files = [cls.config_name, *weight_patterns(cls.weights_name, variant)]
        folder = pretrained_folder(name_or_path, subfolder, files, **hub)
        config = read_config(folder, cls.config_name)
        weights = find_weights(folder, cls.weights_name, variant)
        return cls._load(config, weights, dtype, device, precision=precision)

    @classmethod
    def from_single_file(
        cls: type[Model],
        path_or_name: str | os.PathLike,
        *,
        config: str | os.PathLike | Mapping[str, Any] | None = None,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        device_map: str | torch.device | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | None = None,
        local_files_only: bool | None = None,
        precision: str | None = None,
        **unknown,
    ) -> Model:
        """The model in one GGUF or safetensors file of ComfyUI, llama.cpp or others, in eval mode on `device`.

        Formats and what is refused: docs/formats.md. Quantised weights become floating point when they are read.

        Args:
            path_or_name: a path, "owner/name/file.gguf" of the hub, or its URL.
            config: fields, a config.json, or a folder or hub name that holds it or the pipeline. Default: the released
                configuration, in the sizes of the file.
            subfolder: where in `config` the file of the configuration is. Default: the model's own, where there is one.
            torch_dtype, dtype: of all floating-point weights. Default: as stored if none is quantised, else bfloat16.
            device, device_map: where the weights go, one by one.
            precision: "int8" computes in 8 bits (docs/quantization.md): of transformers in floating-point files, or in
                ComfyUI's int8, which are used as they are.

        Raises:
            FileNotFoundError, ValueError: what is missing, damaged, of another model or in a format that is not read.
            TypeError: an unknown keyword.
        """
        refuse("from_single_file", unknown, keyword_names(cls.from_single_file))
        dtype, device = one_dtype(torch_dtype, dtype), one_device(device, device_map, None)
        cls._check_precision("from_single_file", precision, device)
        hub = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        path = single_file(path_or_name, revision=revision, **hub)
        opened = open_weights([path], cls.part)
        if cls.part is not None:
            check_part(opened, [path], cls.part)
        found = cls._config_of(config, opened, hub, subfolder)
        return cls._load(found, [path], dtype, device, opened, precision)

    @classmethod
    def _config_of(
        cls, config: Any, opened: Opened, hub: Mapping[str, Any], subfolder: str | None = None
    ) -> Mapping[str, Any]:
        """The configuration that `from_single_file` was given, or that of the shapes in the file."""
        at_path = isinstance(config, str | os.PathLike) and not Path(config).expanduser().is_file()
        if subfolder is not None and not at_path:
            raise ValueError("from_single_file: subfolder has no effect without config, a folder or hub name")
        if config is None:
            return cls.config_of_shapes({name: weight.shape for name, weight in opened.weights.items()})
        if isinstance(config, Mapping):
            return config
        if Path(config).expanduser().is_file():
            return read_json(Path(config).expanduser())
        if subfolder is not None:
            return read_config(pretrained_folder(config, subfolder, [cls.config_name], **hub), cls.config_name)
        inside = f"{cls.part}/{cls.config_name}"
        folder = pretrained_folder(config, None, [cls.config_name, inside], **hub)
        return read_config(folder / str(cls.part) if (folder / inside).is_file() else folder, cls.config_name)

    @classmethod
    def config_of_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The configuration of a file that says none, from the shapes of its tensors."""
        raise ValueError(f"from_single_file: config must be given for a {cls.__name__}: its folder or hub name")

    @classmethod
    def _check_precision(cls, where: str, precision: str | None, device: torch.device) -> None:
        if precision is not None and cls.part != "transformer":
            raise ValueError(f"{where}: precision must be None for a {cls.__name__}, got {precision!r}")
        check_precision(where, precision, device)

    @classmethod
    def _load(
        cls: type[Model],
        config: Mapping[str, Any],
        files: Sequence[Path],
        dtype: torch.dtype | None,
        device: torch.device,
        opened: Opened | None = None,
        precision: str | None = None,
        loader: Callable = load_state_into,
    ) -> Model:
        """`loader`: what gives the model its weights; what it returns is the model's `streamed`."""
        opened = opened or open_weights(files, cls.part)
        model = cls.empty({**config, **({"zero_cond_t": True} if opened.zero_cond_t else {})})
        hold_vectors(model, opened.weights, opened.dtype(dtype))
        convert = None if precision is None else functools.partial(read_int8_layers, device=device, precision=precision)
        model.streamed = loader(model, opened, dtype=dtype, device=device, part=cls.part, convert=convert)
        if model.streamed is not None:
            refuse_moves(model)
        model.weight_files = files
        return model.eval()

    @classmethod
    def empty(cls: type[Model], config: Mapping[str, Any]) -> Model:
        """The model of a stored configuration without weights, on the meta device."""
        with torch.device("meta"):
            return cls.from_config(config)

    @classmethod
    def check_weights(cls, config: Mapping[str, Any] | None, opened: Opened) -> None:
        """ValueError where opened files, of which no weight is read, are not those of a stored configuration.

        `config`: None where the file says it by its shapes.
        """
        config = cls._config_of(None, opened, {}) if config is None else config
        model = cls.empty({**config, **({"zero_cond_t": True} if opened.zero_cond_t else {})})
        hold_vectors(model, opened.weights, opened.dtype(None))
        check_fit(model, opened.weights)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
    ) -> None:
        """Write config.json and safetensors weights; see `checkpoint.save_state` for shards and what is replaced.

        With `is_main_process=False`, as other ranks of a run pass it, nothing is written. ValueError with
        `safe_serialization=False`, which would be pickles.
        """
        check_saving(safe_serialization, push_to_hub)
        if self.streamed is not None:
            where = ", ".join(map(str, self.weight_files))
            raise ValueError(f"save_pretrained: weights that are streamed are not saved; they are those of {where}")
        if self.__dict__.get("_hf_peft_config_loaded"):
            raise ValueError(
                "save_pretrained: adapters of PEFT are in the place of layers: save_lora_adapter saves them, and "
                "unload_lora puts the layers back"
            )
        if not is_main_process:
            return
        known = inspect.signature(type(self).__init__).parameters
        if left := [name for name in self.config if name not in known]:
            logger.warning("save_pretrained: left out of config.json, as the model takes no %s", ", ".join(left))
        fields = {name: value for name, value in self.config.items() if name in known}
        config = json_bytes({"_class_name": type(self).__name__, **fields})
        save_state(
            self.state_dict(),
            save_directory,
            base_name=self.weights_name,
            max_shard_size=max_shard_size,
            variant=variant,
            extra_files={self.config_name: config},
        )
