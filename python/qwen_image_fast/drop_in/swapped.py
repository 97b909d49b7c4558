"""Base of the classes that `accelerate` gives to objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class SwappedType(type):
    """The type of the classes below: each equals the class it replaces, which it is not.

    diffusers' `from_pipe` takes over the models of another pipeline whose type is equal to the one it expects.
    """

    _original: type

    def __eq__(cls, other):
        return cls is other or cls.__dict__.get("_original") is other

    def __hash__(cls):
        return hash(cls.__dict__.get("_original")) if "_original" in cls.__dict__ else type.__hash__(cls)


class Swapped:
    """Base of the classes that `accelerate` gives to objects.

    Each has the name and module of the class it replaces, because diffusers and transformers write both into files.
    Pickle would then look for it where the original is, so an object is pickled as "the original's fast version".
    """

    _original: type
    _rebuild: Callable[[type], Any]  # an object of the class that replaces an original, for pickle
    _caches = ("_layouts", "_modulation_table", "_said", "_one_frame", "ranks", "cuda_graphs", "_said_graphs")
    _settings = ("convolution",)

    @classmethod
    def methods(cls, original: type) -> dict[str, Any]:
        """Methods that are made from those of the original."""
        return {}

    def __reduce_ex__(self, protocol):
        state = {k: v for k, v in self.__dict__.items() if k not in self._caches}
        return self._rebuild, (self._original,), state
