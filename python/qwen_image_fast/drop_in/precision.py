"""`accelerate(pipe, precision="int8")`: the blocks' large layers in 8 bits, with the pipeline's own beside them."""

from __future__ import annotations

from typing import Any

from torch import nn
from tqdm import tqdm

from qwen_image_fast.drop_in.report import Report
from qwen_image_fast.models.hooks import is_bare
from qwen_image_fast.models.int8_linear import Int8Linear, quantised
from qwen_image_fast.models.precision import int8_layers, precisions

# Attribute of a transformer whose layers are in 8 bits: its own, by name.
OWN = "_own_layers"


def compute_in_8_bits(transformer: Any, report: Report, precision: str) -> None:
    """Put layers in 8 bits, or with weights in 4, in the place of the plain ones; others are named in the report."""
    own: dict[str, Any] = transformer.__dict__.setdefault(OWN, {})
    layers = int8_layers(transformer)
    bits = precisions(layers, precision)
    made = left = 0
    for path, layer in tqdm(layers.items(), desc="quantise", leave=False, disable=None):
        if isinstance(layer, Int8Linear):
            if layer.int8.four != (bits[path] == "int4"):
                has = "int4" if layer.int8.four else "int8"
                raise ValueError(
                    f"accelerate: precision must be {has}, as it is already, or restore first, got {precision!r}"
                )
            made += 1
        elif type(layer) is not nn.Linear or not is_bare(layer):
            left += 1
            why = f"{path} is a {type(layer).__name__} or has a hook"
        else:
            own[path] = layer
            _put(transformer, path, Int8Linear(quantised(layer.weight, precision=bits[path]), layer.bias))
            made += 1
    now = [layer for layer in transformer.modules() if isinstance(layer, Int8Linear)]
    report.added = sum(layer.packed.numel() for layer in now)
    of_4 = ", of weights in 4" if precision == "int4" else ""
    report.replaced.append(f"transformer: {made} linear layers compute in 8 bits{of_4}, which is an approximation")
    if left:
        report.left_alone.append((f"{left} linear layers", f"not in 8 bits: {why}"))


def put_back(transformer: Any) -> bool:
    """Give a transformer its own layers again; False if it has them. Adapters of PEFT around them stay."""
    own = transformer.__dict__.pop(OWN, {})
    for path, layer in own.items():
        now = transformer.get_submodule(path)
        if isinstance(now, Int8Linear):
            _put(transformer, path, layer)
        elif isinstance(getattr(now, "base_layer", None), Int8Linear):
            now.base_layer = layer
    return bool(own)


def _put(transformer: Any, path: str, layer: Any) -> None:
    parent, _, name = path.rpartition(".")
    setattr(transformer.get_submodule(parent), name, layer)
