"""CUDA graphs of the transformer's forward pass: captured once for a shape, replayed at every later step and call.

A step of a small image takes the GPU less time than Python takes to queue its thousand kernels; a graph is queued at
once. What changes between steps (latents, text, modulation vectors) is copied into the tensors the graph reads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qwen_image_fast.models.modulation import Modulation, modulation_layers
from qwen_image_fast.models.packing import PackedLayout

# Runs a function once and returns a function that runs the same work again, and the result, which stays in its place.
Capture = Callable[[Callable[[], Tensor]], "tuple[Callable[[], None], Tensor]"]


@dataclass
class Captured:
    """A graph, and the tensors that it reads and writes; `layout` holds those that are the same for a shape."""

    inputs: list[Tensor]
    layout: PackedLayout
    replay: Callable[[], None]
    out: Tensor


class StepGraphs:
    """The graphs of recent shapes, the least recently used one leaving first.

    A graph belongs to a shape (image sizes, text lengths, dtype) and to the state of the transformer: other weights, a
    LoRA added, removed, switched or scaled, or hooks lead to a new one. A new schedule does not: modulation vectors are
    inputs. The result of `forward` is overwritten by the next call.

    Args:
        limit: shapes that are kept. capture: how; None: CUDA graphs, which share one pool of memory.
    """

    def __init__(self, limit: int = 4, capture: Capture | None = None):
        if limit < 1:
            raise ValueError(f"StepGraphs: limit must be at least 1, got {limit}")
        self.limit = limit
        self._capture = capture or CudaCapture()
        self._graphs: OrderedDict[Hashable, Captured] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        self._graphs.clear()

    def start(self, transformer: Any) -> Hashable:
        """Called once per sampling loop: drops graphs of earlier states of the transformer, returns the present one."""
        state = transformer_state(transformer)
        for key in [k for k in self._graphs if k[0] != state]:  # type: ignore[index]
            del self._graphs[key]
        return state

    def forward(
        self, state: Hashable, transformer: Any, img: Tensor, txt: Tensor, layout: PackedLayout, modulation: Modulation
    ) -> Tensor:
        """`transformer.forward_packed` by its graph; `state` as `start` returned it."""
        tensors = [img, txt, *_layout_tensors(layout), *modulation.img, *modulation.txt, modulation.final]
        key = (
            state, layout.shapes, layout.txt_lens, layout.target_lens,
            tuple((t.shape, t.dtype, t.device) for t in tensors),
        )  # fmt: skip
        captured = self._graphs.get(key)
        if captured is None:
            while len(self._graphs) >= self.limit:
                self._graphs.popitem(last=False)
            captured = self._graphs[key] = self._new(transformer, layout, modulation, tensors)
            return captured.out
        self._graphs.move_to_end(key)
        torch._foreach_copy_(captured.inputs, tensors)
        captured.replay()
        return captured.out

    def _new(self, transformer: Any, layout: PackedLayout, modulation: Modulation, tensors: list[Tensor]) -> Captured:
        with torch.inference_mode(False):  # so that they can be written in and out of inference mode
            inputs = [t.clone() for t in tensors]
        blocks = len(modulation.img)
        img, txt, img_rope, txt_rope, cu_img, cu_txt, segments, *mods = inputs
        own = replace(layout, img_rope=img_rope, txt_rope=txt_rope, cu_img=cu_img, cu_txt=cu_txt, segments=segments)
        vectors = Modulation(mods[:blocks], mods[blocks:-1], mods[-1])
        replay, out = self._capture(lambda: transformer.forward_packed(img, txt, own, vectors))
        return Captured(inputs, own, replay, out)


def _layout_tensors(layout: PackedLayout) -> list[Tensor]:
    return [layout.img_rope, layout.txt_rope, layout.cu_img, layout.cu_txt, layout.segments]


def transformer_state(transformer: Any) -> Hashable:
    """What a captured pass depends on besides its inputs: where weights lie, the modules, hooks, and LoRA settings.

    Modulation layers are left out: they make inputs of the pass, and their weights may have been released.
    """
    outside = {id(layer) for layer in modulation_layers(transformer).values()}
    found: list[Any] = [id(transformer)]
    for module in transformer.modules():
        if id(module) in outside:
            continue
        found.append((type(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks)))
        found += [(p.data_ptr(), p.dtype) for p in module._parameters.values() if p is not None]
        if hasattr(module, "lora_A"):
            found.append(
                (tuple(sorted(module.scaling.items())), tuple(module.active_adapters), module.disable_adapters,
                 tuple(module.merged_adapters))
            )  # fmt: skip
    return tuple(found)


class CudaCapture:
    """Captures with torch.cuda.graph; all graphs take their memory from one pool, since only one runs at a time."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, fn: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if not torch.cuda.is_available():
            raise RuntimeError("CUDA graphs: the transformer must be on a CUDA device, and torch sees none")
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        try:
            stream = torch.cuda.Stream()  # libraries allocate their workspaces in a first run, outside of the capture
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                fn()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                out = fn()
        except torch.cuda.OutOfMemoryError as error:
            raise RuntimeError(
                "CUDA graphs: the graph's memory pool must fit beside the model, and does not; keep fewer shapes "
                "(enable_cuda_graphs(limit=1)), make smaller images, or call disable_cuda_graphs()"
            ) from error
        graph.replay()
        return graph.replay, out
