"""One forward of the transformer by several ranks, which all have its inputs and all get its result.

The samples of a packed batch are shared among groups of ranks: with guidance, whose branches are samples of their own,
one branch each, without exchange until the end (every rank computes what one process would, with the same bits). The
ranks of a group share its tokens (ulysses.py), equal up to rounding.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from qwen_image_fast.models.modulation import Modulation
from qwen_image_fast.models.packing import PackedLayout
from qwen_image_fast.parallel.split import Split, parse_split
from qwen_image_fast.parallel.ulysses import SplitLayout, split_layout
from qwen_image_fast.parallel.world import join, world_size

KEPT = 16  # layouts whose parts are kept: those of recent waves


class Call(NamedTuple):
    """The inputs of `forward_packed`."""

    img: Tensor
    txt: Tensor
    layout: PackedLayout
    modulation: Modulation
    residuals: Sequence[Tensor] | None = None


class Part(NamedTuple):
    """A rank's rows of a batch."""

    layout: SplitLayout
    img: slice
    txt: slice


@dataclass(eq=False)
class Ranks:
    """This process among those that make pictures together.

    Attributes:
        world: all of them; host: the same by gloo, for what is not on the device. group: those that share this rank's
            samples.
    """

    split: Split
    rank: int
    world: dist.ProcessGroup
    host: dist.ProcessGroup
    group: dist.ProcessGroup

    def __post_init__(self) -> None:
        self._kept: OrderedDict[Any, tuple[PackedLayout, Any]] = OrderedDict()

    @property
    def branch(self) -> int:
        """Which group this rank is of."""
        return self.rank // self.split.ulysses

    @property
    def place(self) -> int:
        """Which of its group it is."""
        return self.rank % self.split.ulysses

    # ---- the transformer ----------------------------------------------------------------------------------------

    def forward(self, transformer: Any, *inputs: Any) -> Tensor:
        """`transformer.forward_packed` of a batch; every rank calls it with the same one."""
        call = Call(*inputs)
        if self.split.guidance == 1:
            return self.together(transformer, [call])[0]
        first, second = self._remember("halves", call.layout, lambda: _halves(call.layout))
        calls = [None if part is None else _samples(call, *part) for part in (first, second)]
        return torch.cat(self.together(transformer, calls))

    def together(self, transformer: Any, calls: Sequence[Call | None]) -> list[Tensor]:
        """`forward_packed` of several batches at once, one of each group; None: that group has nothing to do."""
        own = calls[self.branch]
        width = transformer.config.patch_size**2 * transformer.out_channels
        counts = [n for call in calls for n in self._rows(call)]
        out = None if own is None else self._forward(transformer, own)
        if out is None:
            like = next(call.img for call in calls if call is not None)
            kind = like.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
            out = like.new_empty(0, width, dtype=dtype)
        rows = self._gather(out, counts)
        found = []
        for k, call in enumerate(calls):
            parts = rows[k * self.split.ulysses : (k + 1) * self.split.ulysses]
            whole = torch.cat(parts) if len(parts) > 1 else parts[0]
            if call is not None and call.layout.targets is not None and self.split.ulysses > 1:
                whole = whole[call.layout.targets]
            found.append(whole)
        return found

    def _rows(self, call: Call | None) -> list[int]:
        """Of the result, by each rank of a group."""
        ranks = self.split.ulysses
        if call is None:
            return [0] * ranks
        if ranks > 1:
            total = sum(call.layout.img_lens)
            return [total * (r + 1) // ranks - total * r // ranks for r in range(ranks)]
        return [sum(call.layout.img_lens if call.layout.targets is None else call.layout.target_lens)]

    def _forward(self, transformer: Any, call: Call) -> Tensor:
        if self.split.ulysses == 1:
            return transformer.forward_alone(*call)
        layout, img, txt = self._remember("rows", call.layout, lambda: Part(*split_layout(
            # All image rows of the last block are computed: which are targets differs between the ranks.
            replace(call.layout, targets=None, cu_targets=None), self.place, self.split.ulysses, self.group
        )))  # fmt: skip
        added = None if call.residuals is None else [r[img] for r in call.residuals]
        return transformer.forward_alone(call.img[img], call.txt[txt], layout, call.modulation, added)

    def _gather(self, own: Tensor, counts: list[int]) -> list[Tensor]:
        """The rows of every rank; all backends have a collective of equal parts."""
        most = max(counts)
        padded = own.new_zeros(most, own.shape[1])
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded, group=self.world)
        return [part[:n] for part, n in zip(found, counts)]

    def _remember(self, what: str, layout: PackedLayout, make: Callable[[], Any]) -> Any:
        """Of a layout known by its identity, which it keeps while it is remembered."""
        key = what, id(layout)
        if key not in self._kept:
            self._kept[key] = layout, make()
            while len(self._kept) > 2 * KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key][1]

    # ---- what all ranks must agree on ---------------------------------------------------------------------------

    def from_first(self, value: Any) -> Any:
        """`value` of rank 0."""
        found = [value]
        dist.broadcast_object_list(found, 0, group=self.host)
        return found[0]

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank."""
        found: list[Any] = [None] * self.split.ranks
        dist.all_gather_object(found, value, group=self.host)
        return found

    def check_same(self, given: Mapping[str, Any]) -> None:
        """ValueError on every rank where tensors or numbers differ between the ranks."""
        digests = {name: _digest(value) for name, value in given.items()}
        every = self.gather(digests)
        wrong = [name for name in digests if len({repr(one.get(name)) for one in every}) > 1]
        if wrong or len({tuple(one) for one in every}) > 1:
            what = " and ".join(wrong) or "arguments"
            raise ValueError(
                f"all {self.split.ranks} processes must be asked for the same pictures, and their {what} differ: give "
                "each the same arguments, and the same seed or generators with the same seeds"
            )

    # ---- the VAE ------------------------------------------------------------------------------------------------

    def each(self, fn: Callable[[Tensor], Tensor], pieces: Sequence[Tensor]) -> list[Tensor]:
        """`fn` of every piece, which the ranks share. An error of one is raised on all."""
        own: dict[int, Tensor] = {}
        error: Exception | None = None
        for k in range(self.rank, len(pieces), self.split.ranks):
            try:
                own[k] = fn(pieces[k]).contiguous()
            except Exception as wrong:
                error = wrong
                break
        shown = {k: (tuple(t.shape), t.dtype) for k, t in own.items()}
        told = self.gather((shown, None if error is None else str(error)))
        if error is not None:
            raise error
        if failed := [text for _, text in told if text is not None]:
            raise ValueError(failed[0])
        shapes = {k: shape for parts, _ in told for k, shape in parts.items()}
        found = []
        for k, piece in enumerate(pieces):
            shape, dtype = shapes[k]
            result = own[k] if k in own else piece.new_empty(shape, dtype=dtype)
            dist.broadcast(result, k % self.split.ranks, group=self.world)
            found.append(result)
        return found


def make_ranks(split: Split) -> Ranks:
    """Of processes that have joined (world.py); every one of them calls it. ValueError: they are fewer or more."""
    if dist.get_world_size() != split.ranks:
        raise ValueError(f"{split} must be the number of processes, {dist.get_world_size()}")
    host = dist.new_group(backend="gloo")
    assert host is not None and dist.group.WORLD is not None
    together = [list(range(g * split.ulysses, (g + 1) * split.ulysses)) for g in range(split.guidance)]
    group, _ = dist.new_subgroups_by_enumeration(together)
    return Ranks(split, dist.get_rank(), dist.group.WORLD, host, group)


def start_ranks(where: str, parallel: str | Mapping[str, int] | Split, transformer: Any, timeout: float) -> Ranks:
    """This process among those of a launcher, which every one of them calls for its transformer.

    Args:
        where: what is told to, for errors. parallel: see `parse_split`. timeout: see `join`.

    Raises:
        ValueError: there is no launcher, or the numbers do not fit its processes or the model.
    """
    known = dist.is_available() and dist.is_initialized()
    count = dist.get_world_size() if known else world_size()
    if count == 1 and not known:
        raise ValueError(
            f"{where}: parallel needs several processes, which make the same calls: start the script with "
            "torchrun --nproc-per-node 2"
        )
    split = parse_split(where, parallel, count, transformer.config.num_attention_heads)
    join(transformer.proj_out.weight.device, timeout)
    return make_ranks(split)


def _digest(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    bits = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return tuple(value.shape), hashlib.sha256(bits).hexdigest()


def _halves(layout: PackedLayout) -> tuple[tuple[int, int, PackedLayout] | None, ...]:
    """Samples of a batch for two groups, in order, with about half of its rows each: with guidance of all samples, a
    branch each. None: no sample is left for a group."""
    ends = list(accumulate(layout.joint_lens, initial=0))
    middle = min(range(len(ends)), key=lambda k: (abs(2 * ends[k] - ends[-1]), -k))
    return tuple(
        None if first == last else (first, last, _cut(layout, first, last))
        for first, last in ((0, middle), (middle, layout.samples))
    )


def _cut(layout: PackedLayout, first: int, last: int) -> PackedLayout:
    """The layout of some samples, from `first` on."""
    if last - first == layout.samples:
        return layout
    img, txt = (list(accumulate(lens, initial=0)) for lens in (layout.img_lens, layout.txt_lens))
    joint, target = (list(accumulate(lens, initial=0)) for lens in (layout.joint_lens, layout.target_lens))
    each = (len(layout.segments) - 1) // layout.samples
    targets = cu_targets = None
    if layout.targets is not None and layout.cu_targets is not None:
        targets = layout.targets[target[first] : target[last]] - img[first]
        cu_targets = layout.cu_targets[first : last + 1] - target[first]
    return PackedLayout(
        shapes=layout.shapes[first:last],
        img_lens=layout.img_lens[first:last],
        txt_lens=layout.txt_lens[first:last],
        joint_lens=layout.joint_lens[first:last],
        cu_img=layout.cu_img[first : last + 1] - img[first],
        cu_txt=layout.cu_txt[first : last + 1] - txt[first],
        cu_joint=layout.cu_joint[first : last + 1] - joint[first],
        img_rope=layout.img_rope[img[first] : img[last]],
        txt_rope=layout.txt_rope[txt[first] : txt[last]],
        segments=layout.segments[each * first : each * last + 1] - img[first],
        target_lens=layout.target_lens[first:last],
        targets=targets,
        cu_targets=cu_targets,
    )


def _samples(call: Call, first: int, last: int, layout: PackedLayout) -> Call:
    """The inputs of some samples of a batch."""
    img, txt = (list(accumulate(lens, initial=0)) for lens in (call.layout.img_lens, call.layout.txt_lens))
    img_rows, txt_rows = slice(img[first], img[last]), slice(txt[first], txt[last])

    def own(conditions: Tensor) -> Tensor:
        each = len(conditions) // call.layout.samples
        return conditions if len(conditions) == 1 else conditions[each * first : each * last]

    mod = call.modulation
    modulation = Modulation([own(t) for t in mod.img], [own(t) for t in mod.txt], own(mod.final))
    added = None if call.residuals is None else [r[img_rows] for r in call.residuals]
    return Call(call.img[img_rows], call.txt[txt_rows], layout, modulation, added)
