"""Stage 3: each record in one of three sets, by the caption that it is trained with (report, section 3.2).

The report splits captions into raw, recaption and fused ones and prints no shares; those are the recipe's.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping

from .parts import Part, read_part
from .recipe import FilterRecipe
from .record import Record


def read_in_sets(part: Part, recipe: FilterRecipe) -> Iterator[Record]:
    """`parts.read_part`, each record with the caption of its set: what the filters judge is what is written."""
    for record in read_part(part, recipe.sources[part.source]):
        yield in_set(record, recipe.captions.sets, recipe.seed)


def in_set(record: Record, shares: Mapping[str, float], seed: int = 0) -> Record:
    """The record with `metadata["caption_set"]`, drawn by a hash of its bytes among the sets that it can be in.

    A fused caption that it lacks is made of its raw one and its recaption, in this order. Records of the category
    Synthetic, which skip stage 3, and those without any such caption stay as they are.
    """
    captions = {kind: text for kind, text in record.captions.items() if text.strip()}
    if "raw" in captions and "recaption" in captions:
        captions.setdefault("fused", f"{captions['raw'].strip()} {captions['recaption'].strip()}")
    fitting = {kind: share for kind, share in shares.items() if share and kind in captions}
    if not fitting or record.category == "Synthetic":
        return record
    digest = hashlib.blake2b(f"{seed} {record.id}".encode(), digest_size=8).digest()
    ends = list(itertools.accumulate(fitting.values()))
    place = bisect.bisect(ends, int.from_bytes(digest, "big") / 2**64 * ends[-1], hi=len(ends) - 1)
    kind = list(fitting)[place]
    added = {"fused": captions["fused"]} if kind == "fused" else {}
    return dataclasses.replace(
        record, captions={**record.captions, **added}, metadata={**record.metadata, "caption_set": kind}
    )
