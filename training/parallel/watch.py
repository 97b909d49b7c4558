"""Ranks that die: the others say so and stop, instead of waiting in a collective operation for ever.

A thread of every rank counts up a number in the launcher's key-value store and looks at that of the next rank. A number
that stands still for `SILENCE` seconds, or a rank that says why it stops, ends all ranks with one sentence; each asks
for a few keys a second, whatever their number. This works for every backend, and where no agent watches the processes.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

STOPPED = "stopped"
# Seconds. The thread counts on while its rank computes or waits: one that does not is dead or cut off.
SILENCE = 30.0


class Watch:
    """Watches from `start` to `stop`.

    Args:
        last_checkpoint: a few words on what to resume from.
    """

    def __init__(self, rank: int, ranks: int, last_checkpoint: Callable[[], str]):
        self.rank, self.next, self.last_checkpoint = rank, (rank + 1) % ranks, last_checkpoint
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        client = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=SILENCE))
        self.store = dist.PrefixStore("watch", client)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """This rank is done: the others need not miss it."""
        self.over.set()
        self.thread.join()
        self.store.set(f"done/{self.rank}", "1")

    def failed(self, error: BaseException) -> str:
        """Tell the others that this rank stops; returns the sentence of the rank that was first."""
        self.over.set()
        try:
            if not self.store.check([STOPPED]):
                time.sleep(1.0)  # an error here may follow from a rank that is about to tell
            if not self.store.check([STOPPED]):
                self.store.set(STOPPED, f"rank {self.rank} stopped: {error}")
            return self.store.get(STOPPED).decode()
        except RuntimeError:  # the store is gone with its process
            return f"rank 0 or its launcher stopped, then rank {self.rank}: {error}"

    def _look(self) -> None:
        beats, seen, since = 0, b"", time.monotonic()
        while not self.over.wait(0.5):
            try:
                beats += 1
                self.store.set(f"beat/{self.rank}", str(beats))
                if self.store.check([STOPPED]):
                    # The main thread learns it from its failing operation; where that hangs, it ends here.
                    if not self.over.wait(5.0):
                        self._end(self.store.get(STOPPED).decode())
                    return
                if self.store.check([f"done/{self.next}"]):
                    since = time.monotonic()
                    continue
                beat = self.store.get(f"beat/{self.next}") if self.store.check([f"beat/{self.next}"]) else b""
                if beat != seen:
                    seen, since = beat, time.monotonic()
                elif time.monotonic() - since > SILENCE:
                    self.store.set(STOPPED, f"rank {self.next} has been silent for {SILENCE:.0f} s")
            except RuntimeError:
                if not self.over.wait(5.0):
                    self._end("rank 0 or its launcher stopped: the store of the run cannot be reached")
                return

    def _end(self, reason: str) -> None:
        print(f"Error: {sentence(reason, self.last_checkpoint())}", file=sys.stderr, flush=True)
        os._exit(1)


def sentence(reason: str, kept: str) -> str:
    return f"train: a rank of this run stopped, so all do ({reason}); {kept}; start the run again with --resume"
