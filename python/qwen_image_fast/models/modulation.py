"""Modulation vectors of all steps, computed once per schedule; their weights can then leave memory.

The vectors depend on the noise level alone. The matrices that make them are a third of the transformer (6.8 of 20.4
billion parameters), a step's vectors are 4.4 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qwen_image_fast.checkpoint import load_state_into
from qwen_image_fast.models.hooks import at, is_bare, some_weight

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Schedules whose tables are kept, the least recently used one leaving first.
KEPT_TABLES = 4


class Modulation(NamedTuple):
    """Modulation vectors of a number of conditions (noise levels), for every block.

    img, txt: per block [conditions, 6 * width]: shift, scale, gate of attention, then of the MLP.
    final: [conditions, 2 * width]: scale, shift of the output norm.

    Where every module is called (`called.py`) it may hold what vectors are made of instead, [conditions, width]; of all
    blocks there is one.
    """

    img: list[Tensor]
    txt: list[Tensor]
    final: Tensor

    def select(self, rows: slice | Tensor) -> Modulation:
        return Modulation([t[rows] for t in self.img], [t[rows] for t in self.txt], self.final[rows])

    def of_block(self, i: int) -> tuple[Tensor, Tensor]:
        """Of the image stream and of the text stream."""
        return (self.img[0], self.txt[0]) if len(self.img) == 1 else (self.img[i], self.txt[i])

    def with_references(self, at_zero: Modulation) -> Modulation:
        """`zero_cond_t`: image vectors of each sample's target (these) and references (`at_zero`) side by side.

        Text, and the output norm of all image tokens, keep the vectors of the sample's own noise level.
        """
        img = [torch.stack([t, z.expand_as(t)], 1).flatten(0, 1) for t, z in zip(self.img, at_zero.img)]
        return Modulation(img, self.txt, self.final.repeat_interleave(2, 0))


class ModulationTables:
    """The tables of a transformer's recent schedules, and whether its modulation weights are in memory."""

    def __init__(self) -> None:
        self.tables: dict[Any, Modulation] = {}
        self.freed = False

    def get(self, model, levels: Sequence[float], additional_t_cond: int | None = None) -> Modulation:
        """Vectors at every noise level of `levels` (one condition each), as diffusers' loop would compute them.

        A level goes the way of the reference: 1000 * level in float32, rounded to the model's dtype, divided by 1000.
        """
        weight = some_weight(model)
        if self.freed and not unwatched(model):
            restore_modulation_weights(model)
        if model.calls_modules():
            restore_modulation_weights(model)
            return _computed(model, model.device, model.dtype, levels, additional_t_cond)
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        key = (tuple(levels), additional_t_cond, dtype, weight.device, None if self.freed else versions(model))
        if self.freed and key not in self.tables:
            restore_modulation_weights(model)
            key = (*key[:-1], versions(model))
        if key not in self.tables or key[-1] == ():
            table = _computed(model, weight.device, weight.dtype, levels, additional_t_cond)
            while len(self.tables) >= KEPT_TABLES:
                self.tables.pop(next(iter(self.tables)))
        else:
            table = self.tables.pop(key)
        self.tables[key] = table
        return table

    def forget_all_but(self, table: Modulation) -> None:
        """Keep one table, under a key that no longer asks for the weights."""
        self.tables = {(*key[:-1], None): t for key, t in self.tables.items() if t is table}
        self.freed = True


def _computed(
    model: Any, device: torch.device, dtype: torch.dtype, levels: Sequence[float], additional_t_cond: int | None
) -> Modulation:
    timestep = model_timesteps(levels, dtype, device)
    condition = None
    if additional_t_cond is not None:
        condition = torch.full((len(levels),), additional_t_cond, device=device)
    return model.modulation(timestep, condition)


def model_timesteps(levels: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a model of `dtype` is given for noise levels, as diffusers' loop gives it."""
    return (torch.tensor(levels, dtype=torch.float32) * 1000).to(device=device, dtype=dtype) / 1000


def modulation_layers(model) -> dict[str, Any]:
    """The linear layers that make the vectors, by name."""
    layers = {}
    for i, block in enumerate(model.transformer_blocks):
        layers[f"transformer_blocks.{i}.img_mod.1"] = block.img_mod[1]
        layers[f"transformer_blocks.{i}.txt_mod.1"] = block.txt_mod[1]
    layers["norm_out.linear"] = model.norm_out.linear
    return layers


def table_layers(model) -> dict[str, Any]:
    """All linear layers that a table depends on: those that make the vectors, and those of the time step."""
    time = [f"time_text_embed.timestep_embedder.linear_{k}" for k in (1, 2)]
    return {**modulation_layers(model), **{name: model.get_submodule(name) for name in time}}


def unwatched(model) -> bool:
    """Whether no hook is on a module that a table depends on."""
    return is_bare(*modulation_layers(model).values(), *model.time_text_embed.modules())


def versions(model) -> tuple:
    """The state of every tensor a table depends on; empty if a layer is not a plain one (a LoRA or a hook on it).

    Identity and version of each, and a checksum of their values: a write through `.data` leaves no other trace.
    """
    act = at(model, ("time_text_embed", "timestep_embedder", "act"))
    if type(act) is not nn.SiLU or any(type(layer) is not nn.Linear for layer in table_layers(model).values()):
        return ()
    if not unwatched(model):
        return ()
    tensors = [p for layer in modulation_layers(model).values() for p in layer.parameters()]
    tensors += list(model.time_text_embed.parameters())
    written = tuple((id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in tensors)
    # Those that are streamed cannot be written to, and are not in memory now.
    return (written, checksum([p for p in tensors if not p.is_meta]))


def checksum(weights: Sequence[Tensor]) -> tuple[int, ...]:
    """The sum of the bits of each tensor, as integers; one pass over them, and one read from their device."""
    return tuple(torch.stack([_words(w).sum(dtype=torch.int64) for w in weights]).tolist())


def _words(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    size = flat.element_size()
    whole = flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0
    return flat.view(torch.int64 if whole else _WORDS[size])


def free_modulation_weights(model, table: Modulation) -> int:
    """Release the weights that `table` was made with; returns the bytes freed.

    Another schedule reads them again from the folder the model came from; without a folder it raises.
    """
    tables = model.modulation_tables
    there = model.norm_out.linear.weight is not None  # else their vectors are stored instead
    # A hook wants to see them used.
    if tables.freed or not there or model.streamed is not None or model.calls_modules() or not unwatched(model):
        return 0
    for name, layer in table_layers(model).items():
        # An adapter of `lora.py`, which has a `mix`, reads the weights again before it changes.
        if type(layer) is not nn.Linear and not hasattr(layer, "mix"):
            raise ValueError(
                f"free_modulation_weights: {name} must be a plain Linear, got {type(layer).__name__}; "
                "take the adapter on it off first, or load without free_modulation_weights"
            )
    freed = 0
    for layer in modulation_layers(model).values():
        for p in layer.parameters():
            freed += p.numel() * p.element_size()
            p.data = p.data.new_empty(0)
    tables.forget_all_but(table)
    return freed


def restore_modulation_weights(model) -> None:
    """Read the freed weights again."""
    tables = model.modulation_tables
    if not tables.freed:
        return
    if not model.weight_files:
        raise RuntimeError(
            "the modulation weights were released after the first schedule (free_modulation_weights=True) and this "
            "transformer was not loaded from a folder: use the same steps and size, or load it again"
        )
    weight = some_weight(model)
    holder = nn.Module()
    for name, layer in modulation_layers(model).items():
        owner = holder
        *path, last = name.split(".")
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        with torch.device("meta"):
            fresh = nn.Linear(layer.in_features, layer.out_features)
        owner.add_module(last, fresh)
    load_state_into(
        holder, model.weight_files, dtype=weight.dtype, device=weight.device, strict=False, part="transformer"
    )
    read = dict(holder.named_modules())
    for name, layer in modulation_layers(model).items():
        for parameter, value in zip(layer.parameters(), read[name].parameters()):
            parameter.data = value.data
    tables.freed = False
    tables.tables.clear()
    if "_lora" in model.__dict__:
        model.__dict__["_lora"].fuse_again(modulation_layers(model))
