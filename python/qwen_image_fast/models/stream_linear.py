"""Linear layers of the image and text streams together: one launch on CUDA where `ops.linear_kernels` chooses so, one
call on CPUs with AMX, and one for layers in 8 bits.

Anything that makes a layer more than its weight and bias (an adapter, a hook, a quantised or parametrised weight,
autocast) keeps it a module that is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qwen_image_fast.models.hooks import is_bare
from qwen_image_fast.models.int8_linear import Int8Linear
from qwen_image_fast.ops import int8_rows, linear_int8
from qwen_image_fast.ops._library import has_kernels, watched
from qwen_image_fast.ops._linear import fused, groups_streams
from qwen_image_fast.ops.linear_amx import linear_amx, worthwhile
from qwen_image_fast.ops.linear_gate_residual import linear_gate_residual
from qwen_image_fast.ops.linear_gelu import linear_gelu
from qwen_image_fast.ops.linear_qkv import linear_qkv

# Rows from which on products of the parts of a batch lose nothing against one of all.
LARGE_PART = 1024


def project(layers: Sequence[Any], x: Sequence[Tensor]) -> list[Tensor]:
    """layer_i(x_i), for layers of one shape."""
    if in_one_launch("linear_qkv", layers, x):
        return linear_qkv(x, *_parameters(layers))
    return each(layers, x)


def each(layers: Sequence[Any], x: Sequence[Tensor]) -> list[Tensor]:
    """layer_i(x_i), for any layers: as modules, or all by AMX or in 8 bits."""
    if in_8_bits(layers, x):
        return _int8(layers, x)
    if x[0].is_cpu and all(map(_plain, layers, x)) and worthwhile(x, [layer.weight for layer in layers]):
        return linear_amx(x, *_parameters(layers))
    return [layer(t) for layer, t in zip(layers, x)]


def gelu(layers: Sequence[Any], x: Sequence[Tensor]) -> list[Tensor]:
    """gelu_tanh(layer_i(x_i)), in one launch."""
    return linear_gelu(x, *_parameters(layers))


def gate_residual(layers: Sequence[Any], residual, x, gate, offsets) -> list[Tensor]:
    """residual_i + gate_i * layer_i(x_i), in one launch."""
    return linear_gate_residual(residual, x, *_parameters(layers), gate, offsets)


def joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def text_apart(layers: Sequence[Any], x: Tensor) -> bool:
    """Whether the text stream, whose layers these are, is computed beside that of the image and not in its calls."""
    return _alone_on_cuda(x) and all(_plain(layer, x) for layer in layers)


def multiplied_apart(layers: Sequence[Any], x: Sequence[Sequence[Tensor]]) -> bool:
    """Whether rows that lie in several tensors are multiplied where they are: few large parts, by plain layers."""
    return (
        _alone_on_cuda(x[0][0])
        and any(1 < len(parts) <= 4 and min(map(len, parts)) >= LARGE_PART for parts in x)
        and all(_plain(layer, parts[0]) for layer, parts in zip(layers, x))
    )


def _alone_on_cuda(x: Tensor) -> bool:
    """On CUDA, without gradients, and no launch takes both streams."""
    return x.is_cuda and not torch.is_grad_enabled() and not watched() and not groups_streams(x)


def of_parts(layer: Any, parts: Sequence[Tensor]) -> Tensor:
    """layer of rows that lie in several tensors, each result written where it belongs."""
    out = parts[0].new_empty(sum(map(len, parts)), layer.out_features)
    for part, rows in zip(parts, out.split([len(part) for part in parts])):
        torch.addmm(layer.bias, part, layer.weight.t(), out=rows)
    return out


def in_one_launch(op: str, layers: Sequence[Any], x: Sequence[Tensor]) -> bool:
    """Whether these layers may and should be one launch of `op`."""
    if not x[0].is_cuda:  # first, as it answers for the CPU
        return False
    return all(map(_plain, layers, x)) and fused(op, x, [layer.weight for layer in layers])


def in_8_bits(layers: Sequence[Any], x: Sequence[Tensor]) -> bool:
    """Whether all are layers in 8 bits with nothing besides, and no gradient is wanted of what they take."""
    return (
        all(type(layer) is Int8Linear and is_bare(layer) for layer in layers)
        and all(map(has_kernels, x))
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in x))
    )


def int8_gate_residual(layers: Sequence[Any], residual, x, gate, offsets, gelu: bool) -> list[Tensor]:
    """residual_i + gate_i * layer_i(x_i), or of gelu_tanh(x_i), in 8 bits."""
    return _int8(layers, x, gelu, residual, gate, offsets)


def _int8(layers: Sequence[Any], x: Sequence[Tensor], gelu: bool = False, *gated) -> list[Tensor]:
    """One call for all; what several layers take is rounded once."""
    made: list[tuple[Tensor, tuple[int, bool], tuple[Tensor, Tensor]]] = []
    taken = []
    for layer, t in zip(layers, x):
        kind = layer.group, layer.float8
        rows = next((r for other, known, r in made if other is t and known == kind), None)
        if rows is None:
            rows = int8_rows(t, layer.group, gelu, layer.float8)
            made.append((t, kind, rows))
        taken.append(rows)
    dtype = x[0].dtype
    biases = [None if layer.bias is None else layer.bias.to(dtype) for layer in layers]
    return linear_int8(taken, [layer.int8 for layer in layers], biases, dtype, *gated)


def _plain(layer: Any, x: Tensor) -> bool:
    return (
        type(layer) is nn.Linear
        and layer.bias is not None
        and layer.weight.dtype == x.dtype
        and type(layer.weight) is nn.Parameter
        and is_bare(layer)
        and not torch.is_autocast_enabled(x.device.type)
    )


def _parameters(layers: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    return [layer.weight for layer in layers], [layer.bias for layer in layers]
