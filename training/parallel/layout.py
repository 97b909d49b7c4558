"""Who does what: one device mesh of (dp_replicate, dp_shard, cp, tp), and the sums over it.

rank = ((replicate * dp_shard + shard) * cp + c) * tp + t: tensor-parallel ranks, which talk most, are neighbours. The
ranks of one (replicate, shard) train the same samples: those of cp each hold a part of the tokens, those of tp a part
of the heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from qwen_image_fast.parallel.world import join
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.flow import FlowRecipe
from qwen_image_fast.training.recipe.run import ParallelRecipe, RunRecipe

OLDEST_TORCH = "2.9"  # for several processes; one trains with any that pyproject.toml allows


def check_torch() -> None:
    """RecipeError where this torch lacks what several processes, or their checkpoints, need."""
    from torch.distributed import checkpoint, fsdp

    sharding = getattr(fsdp, "FSDPModule", None)
    if hasattr(checkpoint, "HuggingFaceStorageWriter") and hasattr(sharding, "set_force_sum_reduction_for_comms"):
        return
    raise RecipeError(
        f"parallel: several processes, and what they wrote, need torch {OLDEST_TORCH} or newer, this is "
        f"{torch.__version__}; one process trains with it"
    )


@dataclass(frozen=True)
class Sizes:
    """How many ranks each kind of parallelism has."""

    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int

    @property
    def world(self) -> int:
        return self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def dp(self) -> int:
        return self.dp_replicate * self.dp_shard

    def __str__(self) -> str:
        return f"dp_replicate {self.dp_replicate} x dp_shard {self.dp_shard} x cp {self.cp} x tp {self.tp}"


def sizes_of(parallel: ParallelRecipe, world: int) -> Sizes:
    """The sizes of a recipe on `world` processes; dp_shard 0 becomes what the others leave."""
    others = parallel.dp_replicate * parallel.cp * parallel.tp
    shard = parallel.dp_shard or world // others
    sizes = Sizes(parallel.dp_replicate, shard, parallel.cp, parallel.tp)
    if sizes.world != world:
        what = f"{parallel.dp_replicate} x {parallel.dp_shard or 'the rest'} x {parallel.cp} x {parallel.tp}"
        raise RecipeError(
            f"recipe: parallel: dp_replicate x dp_shard x cp x tp must be the number of processes, {world}, "
            f"got {what}; change parallel, or start {max(sizes.world, others)} processes with torchrun"
        )
    return sizes


def check_recipe_parallel(recipe: RunRecipe, sizes: Sizes, heads: int) -> None:
    """RecipeError where a recipe cannot be split so. heads: attention heads of the transformer."""

    def must(condition: bool, name: str, rule: str, value: Any) -> None:
        if not condition:
            raise RecipeError(f"recipe: {name} must {rule}, got {value!r}")

    if not isinstance(recipe, FlowRecipe):
        raise RecipeError(f"recipe: kind must be flow on several processes, got {recipe.kind!r}")
    must(recipe.batch % sizes.dp == 0, "batch", f"be a multiple of dp_replicate x dp_shard, {sizes.dp}, which share "
         "the samples of a micro-batch", recipe.batch)  # fmt: skip
    must(heads % (sizes.tp * sizes.cp) == 0, "parallel", f"have a tp x cp that divides the {heads} attention heads",
         sizes.tp * sizes.cp)  # fmt: skip
    must(not (recipe.lora.rank and sizes.tp > 1), "lora.rank", "be 0 where parallel.tp is above 1: adapters are not "
         "split by heads, use dp_shard and cp", recipe.lora.rank)  # fmt: skip
    edits = any(part.tasks.get(task) for part in recipe.data.parts for task in ("ti2i", "recon"))
    must(not (edits and recipe.model.train_text_encoder and sizes.dp > 1), "model.train_text_encoder", "be false where "
         "data.tasks has ti2i or recon and dp_replicate x dp_shard is above 1: ranks with other samples would call the "
         "split text encoder more often or less", True)  # fmt: skip
    must(not recipe.model.compile, "model.compile", "be false on several processes", True)
    must(not recipe.model.precision, "model.precision", "be left out on several processes", recipe.model.precision)
    must(recipe.lora.kind == "lora", "lora.kind", "be lora on several processes: the others need whole weights",
         recipe.lora.kind)  # fmt: skip
    keep = [part.name for part in recipe.data.parts if part.keep]
    must(not keep, "data.mixture.keep", "be false on several processes, which have other shares of those samples", keep)
    must(recipe.optimizer.name == "adamw", "optimizer.name", "be adamw on several processes: the others need all",
         recipe.optimizer.name)  # fmt: skip
    must(recipe.optimizer.masters == "float32", "optimizer.masters", "be float32 on several processes",
         recipe.optimizer.masters)  # fmt: skip


@dataclass(frozen=True)
class Parallel:
    """This process among the others.

    Attributes:
        mesh: (dp_replicate, fsdp, tp), fsdp = dp_shard x cp: gradients are summed over the first two.
        cp_group, tp_group: the ranks that share this rank's samples. host_group: gloo, all ranks. writer_group: such a
            group for the thread that writes checkpoints; of two threads on one group, operations would be mixed up.
    """

    sizes: Sizes
    rank: int
    device: torch.device
    mesh: DeviceMesh
    cp_group: dist.ProcessGroup
    tp_group: dist.ProcessGroup
    host_group: dist.ProcessGroup
    writer_group: dist.ProcessGroup

    @property
    def cp_rank(self) -> int:
        return self.rank // self.sizes.tp % self.sizes.cp

    @property
    def share(self) -> tuple[int, int]:
        """(which, of how many) parts of every micro-batch are this rank's."""
        return self.rank // (self.sizes.tp * self.sizes.cp), self.sizes.dp

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Over the samples and tokens of all ranks; ranks that differ in tp alone hold the same ones."""
        total = values.to(self.device, torch.float64 if self.device.type == "cpu" else torch.float32, copy=True)
        dist.all_reduce(total)
        return total / self.sizes.tp

    def max(self, *values: float) -> list[float]:
        total = torch.tensor(values, dtype=torch.float32, device=self.device)
        dist.all_reduce(total, dist.ReduceOp.MAX)
        return total.tolist()

    def barrier(self) -> None:
        dist.barrier(self.host_group)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank."""
        found: list[Any] = [None] * self.sizes.world
        dist.all_gather_object(found, value, group=self.host_group)
        return found

    def from_main(self, value: Any) -> Any:
        """`value` of rank 0."""
        found = [value]
        dist.broadcast_object_list(found, 0, group=self.host_group)
        return found[0]

    def gather_samples(self, entries: list[Any]) -> list[Any]:
        """Entries about samples, of all ranks that have different ones."""
        together = self.sizes.cp * self.sizes.tp
        return [entry for found in self.gather(entries)[::together] for entry in found]


def start(sizes: Sizes, device: torch.device, timeout: float) -> Parallel:
    """Join the other processes. The launcher's MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE say where they are.

    Args:
        timeout: seconds after which a collective operation that some rank does not join fails.
    """
    join(device, timeout)
    names = ("dp_replicate", "fsdp", "tp")
    mesh = init_device_mesh(
        device.type, (sizes.dp_replicate, sizes.dp_shard * sizes.cp, sizes.tp), mesh_dim_names=names
    )
    ranks = torch.arange(sizes.world).view(sizes.dp, sizes.cp, sizes.tp)
    together = [row.tolist() for row in ranks.transpose(1, 2).reshape(-1, sizes.cp)]
    cp_group, _ = dist.new_subgroups_by_enumeration(together, timeout=timedelta(seconds=timeout))
    host_group, writer_group = (dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) for _ in range(2))
    return Parallel(sizes, dist.get_rank(), device, mesh, cp_group, mesh.get_group("tp"), host_group, writer_group)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on every rank."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def part_of(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of this rank's block of a tensor, and where it begins."""
    if not isinstance(tensor, DTensor):
        return tuple(tensor.shape), (0,) * tensor.ndim
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(shape), tuple(offset)


def holders(tensor: Tensor, world: int) -> int:
    """How many ranks hold the same part of a tensor."""
    if not isinstance(tensor, DTensor):
        return world
    parts = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements):
        parts *= 1 if placement.is_replicate() else size
    return world // parts
