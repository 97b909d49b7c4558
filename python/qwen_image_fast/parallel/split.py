"""Into how many parts a forward is split. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FORM = "'auto', or guidance=N and ulysses=N, such as 'guidance=2,ulysses=2'"


@dataclass(frozen=True)
class Split:
    """guidance: groups that the samples of a packed batch are shared among, so that the two branches of guidance are
    computed at once: 1 or 2. ulysses: ranks of a group, which share its tokens, and in attention its heads.

    rank = group * ulysses + place: the ranks of a group, which talk most, are neighbours.
    """

    guidance: int = 1
    ulysses: int = 1

    @property
    def ranks(self) -> int:
        return self.guidance * self.ulysses

    def __str__(self) -> str:
        return f"guidance {self.guidance} x ulysses {self.ulysses}"


def parse_split(where: str, given: str | Mapping[str, int] | Split, ranks: int | None, heads: int | None) -> Split:
    """Of "auto", "guidance=2,ulysses=2" or such a mapping; what is not named is 1.

    Args:
        where: what is told, for errors. ranks: how many there are; None: as many as it asks for, and no "auto".
        heads: of the transformer's attention, which the ranks of a group share; None: not known yet.

    Raises:
        ValueError: it is neither, or does not fit.
    """
    if isinstance(given, Split):
        found = given
    elif given == "auto" and ranks is not None:
        found = _automatic(where, ranks, heads)
    else:
        found = Split(**_numbers(where, given))
    if found.guidance not in (1, 2):
        raise ValueError(f"{where}: guidance must be 1 or 2, the branches of guidance, got {found.guidance}")
    if found.ulysses < 1:
        raise ValueError(f"{where}: ulysses must be at least 1, got {found.ulysses}")
    if heads is not None and heads % found.ulysses:
        raise ValueError(f"{where}: ulysses must divide the {heads} attention heads, got {found.ulysses}")
    if ranks is not None and found.ranks != ranks:
        raise ValueError(
            f"{where}: guidance x ulysses must be the number of processes, {ranks}, got {found.guidance} x "
            f"{found.ulysses}; start {found.ranks} with torchrun --nproc-per-node {found.ranks}"
        )
    return found


def _automatic(where: str, ranks: int, heads: int | None) -> Split:
    """The branches of guidance first: they exchange least."""
    guidance = 2 if ranks % 2 == 0 else 1
    for found in (Split(guidance, ranks // guidance), Split(1, ranks)):
        if heads is None or heads % found.ulysses == 0:
            return found
    raise ValueError(f"{where}: {ranks} processes cannot share {heads} attention heads; start another number")


def _numbers(where: str, given: str | Mapping[str, int]) -> dict[str, int]:
    wrong = ValueError(f"{where} must be {FORM}, got {given!r}")
    if isinstance(given, str):
        pairs = [part.partition("=") for part in given.split(",")]
        given = {name.strip(): int(n) if n.strip().isdigit() else -1 for name, _, n in pairs}
        if -1 in given.values() or len(given) != len(pairs):
            raise wrong
    if not isinstance(given, Mapping) or not given or set(given) - {"guidance", "ulysses"}:
        raise wrong
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in given.values()):
        raise wrong
    return dict(given)
