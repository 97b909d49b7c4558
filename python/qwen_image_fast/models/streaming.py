"""Models whose large weights are not all in memory: read into a ring of buffers while others are computed with.

What is streamed are the matrices of blocks; norms and biases, which are small, always stay. A parameter that is not in
memory is on the meta device. While its unit is used it is a view of a buffer, so everything that calls the layer (a
LoRA, a hook, a kernel) finds the weight where it always is, and results are those of weights that stay.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from qwen_image_fast.checkpoint import load_state_into
from qwen_image_fast.sizes import gb
from qwen_image_fast.weights.cuda_lane import pin
from qwen_image_fast.weights.formats import Opened
from qwen_image_fast.weights.plan import DISK_RATE
from qwen_image_fast.weights.ring import Ring, Source, Track
from qwen_image_fast.weights.sources import FileSource, MemorySource, TensorSource

logger = logging.getLogger(__name__)

# Names of the units' matrices, with the number of the unit.
TRACKS = {
    "modulation": r"transformer_blocks\.(\d+)\.(img|txt)_mod\.1\..*",
    "blocks": r"transformer_blocks\.(\d+)\.(?!(?:img|txt)_mod\.).*",
    "layers": r"(?:model\.)?(?:language_model\.)?layers\.(\d+)\..*",
}
SLOW = 0.8  # of the rate that plans count on


def units_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, list[list[str]]]:
    """The names of the matrices of each unit, by track."""
    found: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, shape in shapes.items():
        for track, pattern in TRACKS.items():
            if len(shape) == 2 and (match := re.fullmatch(pattern, name)):
                found[track][int(match[1])].append(name)
                break
    return {track: [units[i] for i in sorted(units)] for track, units in found.items()}


class Streamed:
    """The units of a model that are read when they are used."""

    def __init__(self, root: nn.Module, ring: Ring, where: str) -> None:
        self.root, self.ring, self.where = root, ring, where
        self.tracks: dict[str, Track] = {}
        self.unit_of: dict[str, tuple[str, int]] = {}  # of each streamed parameter
        self.places: dict[str, tuple[nn.Module, str]] = {}  # the modules themselves: others may wrap them
        self.originals: dict[str, nn.Parameter] = {}
        self.hooks: list[Any] = []

    def add(self, name: str, sources: Sequence[Source | None], again: bool) -> None:
        """A track; what its sources hold leaves memory."""
        self.tracks[name] = Track(self.ring, sources, again)
        for i, source in enumerate(sources):
            for parameter, (_, _, kind) in source.layout.places.items() if source is not None else ():
                self.unit_of[parameter] = (name, i)
                path, _, leaf = parameter.rpartition(".")
                module = self.root.get_submodule(path)
                self.places[parameter] = (module, leaf)
                self.originals[parameter] = module.get_parameter(leaf)
                module._parameters[leaf] = nn.Parameter(
                    torch.empty(kind.shape, dtype=kind.dtype, device="meta"), requires_grad=False
                )

    @contextmanager
    def unit(self, track: str, i: int) -> Iterator[None]:
        """A unit in memory.

        Raises:
            RuntimeError: gradients are enabled: they would need weights that are gone by then.
        """
        source = self.tracks[track].sources[i] if track in self.tracks else None
        if source is not None and torch.is_grad_enabled():
            raise RuntimeError("weights that are streamed have no gradients: run the model under torch.no_grad()")
        with self._held(track, i) if source is not None else ExitStack():
            yield

    @contextmanager
    def _held(self, track: str, i: int) -> Iterator[None]:
        away = {}
        try:
            for name, view in self.ring.enter(self.tracks[track], i).items():
                module, leaf = self.places[name]
                away[name] = module._parameters[leaf]
                module._parameters[leaf] = nn.Parameter(view, requires_grad=False)
            yield
        finally:
            for name, own in away.items():
                module, leaf = self.places[name]
                module._parameters[leaf] = own
            self.ring.leave(self.tracks[track], i)
            self._say_if_slow()

    def in_units(self, names: Iterable[str]) -> Iterator[list[str]]:
        """The names in groups, one for each unit, in which the weights are in memory; names of layers."""
        groups: dict[Any, list[str]] = defaultdict(list)
        for name in names:
            groups[self.unit_of.get(f"{name}.weight", ("", -1))].append(name)
        for key in sorted(groups):
            with self._held(*key) if key[0] else ExitStack():
                yield groups[key]

    def _say_if_slow(self) -> None:
        """Once, where the computation waits for a disk that is slower than plans count on."""
        rate, whole = self.ring.rate, sum(s.nbytes for t in self.tracks.values() for s in t.sources if s is not None)
        if (
            rate.said
            or rate.read < whole
            or rate.waited < 0.1 * rate.reading
            or rate.read >= SLOW * DISK_RATE * rate.reading
        ):
            return
        rate.said = True
        logger.warning(
            "reading the weights from %s is slower than planned, %s/s instead of %s/s, and the computation waits: "
            "a larger memory_limit, a smaller type or a faster disk helps",
            *(self.where, gb(self.ring.rate.read / rate.reading), gb(DISK_RATE)),
        )  # fmt: skip

    def end(self) -> None:
        """Put the parameters back that were there before, of tensors that are somebody else's."""
        for name, own in self.originals.items():
            module, leaf = self.places[name]
            module._parameters[leaf] = own
        for hook in self.hooks:
            hook.remove()


class StreamingLoader:
    """Loads a model as `load_state_into` does, but for the units that do not stay, which are streamed.

    Args:
        stays: of each track, the units that stay. pinned: hold the others in memory of the host, pinned for the GPU;
            else they are read from their files.
    """

    def __init__(self, ring: Ring, stays: Mapping[str, Collection[int]], pinned: bool = False) -> None:
        self.ring, self.stays, self.pinned = ring, stays, pinned

    def __call__(
        self, root: nn.Module, opened: Opened, *, dtype: torch.dtype | None, device: torch.device, strict: bool = True,
        part: str | None = None, convert: Any = None,
    ) -> Streamed:  # fmt: skip
        """`convert`: as of `load_state_into`; it takes the blocks, which then stay."""
        wanted = root.state_dict().keys()
        weights = {name: weight for name, weight in opened.weights.items() if name in wanted}
        units = units_of({name: weight.shape for name, weight in weights.items()})
        units = {track: own for track, own in units.items() if convert is None or track != "blocks"}
        later = {
            name for track, own in units.items() for i, names in enumerate(own) if i not in self.stays[track]
            for name in names
        }  # fmt: skip
        load_state_into(
            root, opened, dtype=dtype, device=device, strict=strict, part=part, convert=convert, later=later,
            mapped=part == "text_encoder",  # its embedding, of which a prompt reads a few rows
        )  # fmt: skip
        some = next((weights[name] for name in later), None)
        streamed = Streamed(root, self.ring, str(getattr(some, "path", "the disk")))
        for track, own in units.items():
            sources = [
                None if i in self.stays[track] else self._source({n: weights[n] for n in names}, opened.dtype(dtype))
                for i, names in enumerate(own)
            ]
            streamed.add(track, sources, again=track == "blocks")
        return streamed

    def _source(self, weights: Mapping[str, Any], dtype: torch.dtype | None) -> Source:
        source = FileSource(weights, dtype)
        return in_pinned_memory(source, self.ring, torch.device("cuda")) if self.pinned else source


def stream_tensors(root: nn.Module, ring: Ring, stays: Mapping[str, Collection[int]], device: torch.device) -> Streamed:
    """Stream the units of a model that somebody else loaded, from its own tensors, which for a GPU are copied into
    pinned memory; the rest goes to `device`."""
    units = units_of({name: p.shape for name, p in root.named_parameters()})
    tensors = dict(root.named_parameters())
    streamed = Streamed(root, ring, "the host's memory")
    for track, own in units.items():
        sources: list[Source | None] = []
        for i, names in enumerate(own):
            source = TensorSource({name: tensors[name] for name in names})
            sources.append(None if i in stays[track] else in_pinned_memory(source, ring, device))
        streamed.add(track, sources, again=track == "blocks")
    for module in root.modules():
        for p in module._parameters.values():
            if p is not None and not p.is_meta:
                p.data = p.data.to(device)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return streamed


def in_pinned_memory(source: Any, ring: Ring, device: torch.device) -> Source:
    """What a GPU copies from by itself, as long as `ring` lives; for the CPU the source itself."""
    if device.type != "cuda":
        return source
    memory = torch.empty(source.layout.nbytes, dtype=torch.uint8, device="cpu")
    for read in source.reads(source.layout.views(memory)):
        read()
    return MemorySource(pin(ring, memory), source.layout)


def refuse_moves(root: nn.Module) -> None:
    """`to`, `cuda`, `half` and so on raise: what is not in memory cannot be moved."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"a {type(root).__name__} whose weights are streamed stays where and as it is: give device and torch_dtype "
            "to from_pretrained, or load it without memory_limit"
        )

    root.__dict__["_apply"] = refuse


def stream_layers(streamed: Streamed, layers: Sequence[nn.Module]) -> None:
    """Have layers that are called one after another by somebody else's model find their weights."""
    for i, layer in enumerate(layers):
        open_units: list[ExitStack] = []

        def enter(*_: Any, i: int = i, stack: list[ExitStack] = open_units) -> None:
            own = ExitStack()
            own.enter_context(streamed.unit("layers", i))
            stack.append(own)

        def leave(*_: Any, stack: list[ExitStack] = open_units) -> None:
            if stack:
                stack.pop().close()

        streamed.hooks.append(layer.register_forward_pre_hook(enter))
        streamed.hooks.append(layer.register_forward_hook(leave, always_call=True))
