"""What every model here shares: a recorded configuration and reading and writing diffusers-layout folders."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn


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
    """Base of the models: `config`, `dtype`, `device`, `from_pretrained`, `save_pretrained`."""

    config: Config

    @property
    def dtype(self):
        return next(self.parameters()).dtype

    @property
    def device(self):
        return next(self.parameters()).device
