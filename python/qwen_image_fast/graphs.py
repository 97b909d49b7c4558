"""CUDA graphs of the transformer's forward pass: captured once for a shape, replayed at every later step and call.

A step of a small image takes the GPU less time than Python takes to queue its thousand kernels; a graph is queued at
once. What changes between steps (latents, text, modulation vectors) is copied into the tensors the graph reads. Where
attention reads lengths on the device, texts have theirs there, and a graph serves a bucket of them (models/buckets.py).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from qwen_image_fast.models.buckets import bucketed
from qwen_image_fast.models.modulation import Modulation, modulation_layers
from qwen_image_fast.models.packing import PackedLayout
from qwen_image_fast.ops._choices import use_reference
from qwen_image_fast.ops.joint_attention import any_length, newer_flash_attention

Lengths = Literal["auto", "any", "one"]


class Capture(Protocol):
    """How graphs are made; those made between two calls of `retire` may share memory and end together."""

    def __call__(self, fn: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
        """Run `fn` once; return a function that runs the same work again, and the result, which stays in its place."""

    def retire(self) -> None:
        """No graph made so far is replayed again."""


@dataclass
class Captured:
    """A graph, and the tensors that it reads and writes; `layout` holds those that are the same for a shape.

    fixed: of the inputs, those that a layout has, and the rest.
    """

    fixed: list[Tensor]
    inputs: list[Tensor]
    layout: PackedLayout
    replay: Callable[[], None]
    out: Tensor


class StepGraphs:
    """The graphs of recent shapes; they share one pool of memory, and when there are too many, all leave together.

    A graph belongs to a shape (image sizes, bucket or lengths of the texts, dtype) and to the state of the transformer:
    other weights, a LoRA added, removed, switched or scaled, or hooks lead to a new one. A new schedule does not:
    modulation vectors are inputs. The result of `forward` is overwritten by the next call.

    Args:
        limit: shapes that are kept. capture: how; None: CUDA graphs.
        lengths: of text that a graph serves: "any" of its bucket, "one", or "auto", any where attention loses nothing
            by it (`ops.joint_attention.any_length`).
    """

    def __init__(self, limit: int = 4, capture: Capture | None = None, lengths: Lengths = "auto"):
        if limit < 1:
            raise ValueError(f"StepGraphs: limit must be at least 1, got {limit}")
        if lengths not in get_args(Lengths):
            raise ValueError(f"StepGraphs: lengths must be 'auto', 'any' or 'one', got {lengths!r}")
        self.limit = limit
        self.lengths = lengths
        self._capture = capture or CudaCapture()
        self._graphs: dict[Hashable, Captured] = {}
        self._state: Hashable = None
        # Recent layouts by identity, and what the graph of each reads in its place.
        self._layouts: dict[int, tuple[PackedLayout, PackedLayout]] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        self._graphs.clear()
        self._layouts.clear()
        self._capture.retire()

    def start(self, transformer: Any) -> None:
        """Called once per sampling loop: drops graphs of another transformer, or of another state of it.

        ValueError: several processes compute its passes together, or something of Python's has a say in every pass.
        """
        if transformer.calls_modules():
            raise ValueError(
                "CUDA graphs: no step cache, attention processor or hook may be on the transformer, as a graph would "
                "not run it: take it off, or disable_cuda_graphs"
            )
        if getattr(transformer, "ranks", None) is not None:
            raise ValueError(
                "CUDA graphs: the transformer's passes must be this process's alone: disable_parallel or "
                "disable_cuda_graphs"
            )
        state = transformer_state(transformer)
        if state != self._state:
            self.clear()
            self._state = state

    def forward(
        self, transformer: Any, img: Tensor, txt: Tensor, layout: PackedLayout, modulation: Modulation
    ) -> Tensor:
        """`transformer.forward_packed` by its graph."""
        layout = self._own(transformer, layout, img)
        fixed = [layout.img_rope, layout.txt_rope, layout.cu_img, layout.cu_txt, layout.cu_joint, layout.segments]
        fixed += [] if layout.txt_segments is None else [layout.txt_segments]
        inputs = [img, txt, *modulation.img, *modulation.txt, modulation.final]
        own = tuple((t.shape, t.dtype, t.device) for t in (*fixed, img, *inputs[2:]))
        key = (layout.shapes, layout.txt_lens, layout.target_lens, txt.dtype, own)
        captured = self._graphs.get(key)
        if captured is None:
            if len(self._graphs) >= self.limit:
                self.clear()
            try:
                captured = self._graphs[key] = self._new(transformer, layout, len(modulation.img), fixed, inputs)
            except BaseException:
                self.clear()  # what failed may have taken memory of the others with it
                raise
            return captured.out
        torch._foreach_copy_(captured.fixed, fixed)  # one launch copies tensors of one dtype
        filled = captured.inputs[1]  # rows of a bucket behind the text keep what they have, which nothing reads
        torch._foreach_copy_([captured.inputs[0], filled[: len(txt)], *captured.inputs[2:]], inputs)
        captured.replay()
        return captured.out

    def _own(self, transformer: Any, layout: PackedLayout, img: Tensor) -> PackedLayout:
        """What the graph reads of a layout: of one length, or of its bucket."""
        known = self._layouts.get(id(layout))
        if known is None:
            own = bucketed(layout) if self._any_length(transformer, layout, img) else layout
            while len(self._layouts) >= 8:
                self._layouts.pop(next(iter(self._layouts)))
            known = self._layouts[id(layout)] = (layout, own)
        return known[1]

    def _any_length(self, transformer: Any, layout: PackedLayout, img: Tensor) -> bool:
        if self.lengths != "auto" or not layout.img_lens:
            return self.lengths == "any"
        norm = transformer.transformer_blocks[0].attn.norm_q.weight
        heads = transformer.inner_dim // len(norm)
        return any_length(img.new_empty(1, 1, 1).expand(1, heads, len(norm)), min(layout.img_lens))

    def _new(
        self, transformer: Any, layout: PackedLayout, blocks: int, fixed: list[Tensor], inputs: list[Tensor]
    ) -> Captured:
        with torch.inference_mode(False):  # so that they can be written in and out of inference mode
            fixed, inputs = [t.clone() for t in fixed], [t.clone() for t in inputs]
            img, txt, *mods = inputs
            if layout.bounds is not None:
                txt = inputs[1] = torch.cat([txt, txt.new_zeros(layout.bounds.txt - len(txt), txt.shape[1])])
        names = ("img_rope", "txt_rope", "cu_img", "cu_txt", "cu_joint", "segments", "txt_segments")
        read: dict[str, Any] = dict(zip(names, fixed))
        own = replace(layout, **read)
        vectors = Modulation(mods[:blocks], mods[blocks:-1], mods[-1])
        replay, out = self._capture(lambda: transformer.forward_packed(img, txt, own, vectors), img.device)
        return Captured(fixed, inputs, own, replay, out)


def transformer_state(transformer: Any) -> Hashable:
    """What a captured pass depends on besides its inputs: where weights lie, modules, hooks, LoRA settings, kernels.

    Modulation layers are left out: they make inputs of the pass, and their weights may have been released.
    """
    outside = {id(layer) for layer in modulation_layers(transformer).values()}
    found: list[Any] = [id(transformer), use_reference(), newer_flash_attention()]
    for module in transformer.modules():
        if id(module) in outside:
            continue
        found.append((type(module), module.training, *module._forward_hooks, None, *module._forward_pre_hooks))
        read = (*module._parameters.values(), *getattr(module, "mix", ()))  # `mix`: the matrices of our own LoRAs
        found += [(p.data_ptr(), p.dtype, p.shape) for p in read if p is not None]
        if hasattr(module, "merged_adapters"):  # a layer of PEFT, of whatever kind
            scaling = tuple(sorted(getattr(module, "scaling", {}).items()))
            found.append(
                (scaling, tuple(module.active_adapters), module.disable_adapters, tuple(module.merged_adapters))
            )
    return tuple(found)


class CudaCapture:
    """Captures with torch.cuda.graph, in one pool of memory and on one stream: only one graph runs at a time.

    They have to end together. torch keeps the workspace of cuBLAS by stream and frees it with any graph that was
    captured there, though others still use it (pytorch issue 193402), and takes no pool again whose last graph has
    gone. The first run is on the same stream, so that the workspace lies outside of the pool.
    """

    def __init__(self) -> None:
        self.pool: Any = None
        self.stream: Any = None

    def retire(self) -> None:
        self.pool = None

    def __call__(self, fn: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
        if device.type != "cuda":
            raise RuntimeError(f"CUDA graphs: the transformer must be on a CUDA device, got {device}")
        try:
            with torch.cuda.device(device):
                return self._captured(fn)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            raise RuntimeError(
                "CUDA graphs: the graph's memory pool must fit beside the model, and does not; keep fewer shapes "
                "(enable_cuda_graphs(limit=1)), make smaller images, or call disable_cuda_graphs()"
            ) from error

    def _captured(self, fn: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if self.stream is None or self.stream.device_index != torch.cuda.current_device():
            self.stream = torch.cuda.Stream()
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            fn()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            out = fn()
        graph.replay()
        return graph.replay, out


def _out_of_memory(error: BaseException | None) -> bool:
    """Also where instantiating the graph failed, or ending a capture that had failed hides why."""
    while error is not None:
        if isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
