"""Which pictures training never sees: chosen by the hash of their bytes, so that copies fall on the same side.

The pictures of a source are sorted by their hash, which has nothing to do with their names or order, and the first are
held out: adding a picture moves at most one other across, and a source read twice is split alike.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from qwen_image_fast.training.sources.look import Seen

# Nobody waits for more at each validation.
MOST_HELD = 256


def held_out(seen: Sequence[Seen], share: float, total: int) -> frozenset[str]:
    """Hashes of the pictures that are held out: `share` of `total` examples, rounded down, at most 256, never all."""
    usable = {s.ids[0] for s in seen if not s.fault}
    count = min(int(total * share + 1e-9), MOST_HELD, len(usable) - 1)
    return frozenset(sorted(usable)[: max(count, 0)])


def places_of(seen: Sequence[Seen], held: Collection[str]) -> tuple[list[int], set[int]]:
    """Places of the examples whose target is held out, one for each picture in the order of their hashes, and of all
    that must not be trained on, since they have a picture that is."""
    first: dict[str, int] = {}
    for s in seen:
        if s.ids[0] in held and not s.fault:
            first.setdefault(s.ids[0], s.place)
    return [first[name] for name in sorted(first)], {s.place for s in seen if not held.isdisjoint(s.ids)}
