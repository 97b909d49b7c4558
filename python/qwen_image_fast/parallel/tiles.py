"""Tiles of the VAE by several processes of which one alone has the image: it sends them, and the others follow.

They go through pipes of their own, and by no collective operation: those of the transformer go on at the same time,
from another thread, and collectives must have one order on all ranks.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from qwen_image_fast.parallel.leader import GroupLost


class TileLeader:
    """Stands in for `Ranks` in the VAE of rank 0. connections: to the others, which `follow_tiles`."""

    def __init__(self, connections: Sequence[Connection]):
        self._connections = connections

    def each(self, fn: Callable[[Tensor], Tensor], pieces: Sequence[Tensor]) -> list[Tensor]:
        """`fn`, a method of the VAE, of every piece: `Ranks.each`. An error of one is raised once all have answered.

        GroupLost: one of the others is gone.
        """
        ranks = 1 + len(self._connections)
        shares = [range(rank, len(pieces), ranks) for rank in range(ranks)]
        name = getattr(fn, "__name__", "")
        try:
            for connection, share in zip(self._connections, shares[1:]):
                connection.send_bytes(pickle.dumps((name, [_on_host(pieces[k]) for k in share])))
            found = dict(zip(shares[0], _answer(fn, [pieces[k] for k in shares[0]])))
            errors = [result for result in found.values() if isinstance(result, Exception)]
            for connection, share in zip(self._connections, shares[1:]):
                results = pickle.loads(connection.recv_bytes())
                errors += [result for result in results if isinstance(result, Exception)]
                found |= zip(share, results)
        except (EOFError, OSError) as gone:
            raise GroupLost("a process that shares the tiles of the VAE is gone") from gone
        if errors:
            raise errors[0]
        return [found[k].to(piece.device) for k, piece in enumerate(pieces)]


def follow_tiles(vae: Any, connection: Connection) -> None:
    """Compute the leader's tiles until it is gone."""
    device = next(vae.parameters()).device
    while True:
        try:
            name, pieces = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        results = _answer(getattr(vae, name), [piece.to(device) for piece in pieces])
        told = [_told(result) if isinstance(result, Exception) else _on_host(result) for result in results]
        try:
            connection.send_bytes(pickle.dumps(told))
        except OSError:
            return


def _answer(fn: Callable[[Tensor], Tensor], pieces: Sequence[Tensor]) -> list[Any]:
    """Results, the last of which is an error where one came; none is computed after it."""
    results: list[Any] = []
    for piece in pieces:
        try:
            results.append(fn(piece))
        except Exception as error:
            return [*results, error]
    return results


def _on_host(tensor: Tensor) -> Tensor:
    """In memory of its own: a view would be pickled with all that it is a view of."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _told(error: Exception) -> Exception:
    """An error that another process can read, of the kind that its handler asks for."""
    for kind in (torch.OutOfMemoryError, MemoryError, ValueError):
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")
