"""What every model here shares: a recorded configuration and reading and writing diffusers-layout folders."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from qwen_image_fast.checkpoint import (
    check_config,
    find_weights,
    json_bytes,
    load_state_into,
    pretrained_folder,
    read_config,
    save_state,
    weight_patterns,
)

Model = TypeVar("Model", bound="PretrainedModel")


class Config(dict):
    """Constructor arguments of a model, readable as items and as attributes (`model.config.patch_size`)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"config has no field {name!r}; fields: {', '.join(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"config is read-only: build a new model to change {name!r}")


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

    @property
    def dtype(self):
        return next(self.parameters()).dtype

    @property
    def device(self):
        return next(self.parameters()).device

    def num_parameters(self) -> int:
        """The number of parameter values; a parameter used in several places counts once."""
        return sum(p.numel() for p in self.parameters())

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
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | None = None,
        local_files_only: bool | None = None,
    ) -> Model:
        """The model of a local folder or hub repository, in eval mode, on `device`.

        `torch_dtype` and `dtype` are one argument under two names: the type of the floating-point weights, by default
        as stored. `variant="fp16"` reads `diffusion_pytorch_model.fp16.safetensors`. The weights are read once, into
        their final place: memory peaks at the model's size. Errors: FileNotFoundError for what is not there, ValueError
        for a configuration of another class, damaged files, or weights that do not fit the configuration.
        """
        if torch_dtype is not None and dtype is not None and torch_dtype != dtype:
            raise ValueError(f"from_pretrained: dtype must equal torch_dtype where both are given, got {dtype}")
        dtype = torch_dtype if dtype is None else dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"from_pretrained: dtype must be a floating-point torch dtype or None, got {dtype!r}")
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        files = [cls.config_name, *weight_patterns(cls.weights_name, variant)]
        folder = pretrained_folder(name_or_path, subfolder, files, **hub)
        config = read_config(folder, cls.config_name)
        weights = find_weights(folder, cls.weights_name, variant)
        with torch.device("meta"):
            model = cls.from_config(config)
        load_state_into(model, weights, dtype=dtype, device=device)
        model.weight_files = weights
        return model.eval()

    def save_pretrained(
        self, folder: str | os.PathLike, *, max_shard_size: int | str = "10GB", variant: str | None = None
    ) -> None:
        """Write config.json and safetensors weights; see `checkpoint.save_state` for shards and what is replaced."""
        config = json_bytes({"_class_name": type(self).__name__, **self.config})
        save_state(
            self.state_dict(),
            folder,
            base_name=self.weights_name,
            max_shard_size=max_shard_size,
            variant=variant,
            extra_files={self.config_name: config},
        )
