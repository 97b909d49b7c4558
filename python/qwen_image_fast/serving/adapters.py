"""The LoRAs of a server: registered by name when it starts, active for the requests that name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_image_fast.models.lora import TEXT_ENCODER, LoraAdapters, adapters_of

Composition = tuple[tuple[str, float], ...]  # names and weights, in the order of the request


def composition(loras: Mapping[str, float]) -> Composition:
    """What a request's LoRAs come to; a weight of 0 is none."""
    return tuple((name, float(weight)) for name, weight in loras.items() if weight)


class Registered:
    """The adapters of a transformer, switched by the thread that takes its steps, and those of its text encoder, by
    the thread that encodes: both work at once, for requests with different LoRAs."""

    def __init__(self, pipe: Any, sources: Mapping[str, str]):
        """`sources`: files, folders or hub names by name; ValueError, FileNotFoundError as `load_lora_weights`."""
        own = adapters_of(pipe.transformer)
        for name, source in sources.items():
            pipe.load_lora_weights(source, adapter_name=name)
        own.activate({})
        self.names = list(own.loaded)
        self._parts = {"transformer": own}
        self._active: dict[str, Composition] = {"transformer": (), "text_encoder": ()}
        if pipe.text_encoder is None:
            return
        text = self._parts["text_encoder"] = LoraAdapters(pipe.text_encoder)
        for name, layers in own.loaded.items():
            split = {k.removeprefix(TEXT_ENCODER): a for k, a in layers.items() if k.startswith(TEXT_ENCODER)}
            text.loaded[name] = split
            own.loaded[name] = {k: a for k, a in layers.items() if not k.startswith(TEXT_ENCODER)}

    def active(self, part: str) -> Composition:
        return self._active[part]

    def activate(self, wanted: Composition, part: str) -> None:
        """Make exactly these active in one of the two models."""
        if wanted != self._active[part]:
            self._parts[part].activate(dict(wanted))
            self._active[part] = wanted
