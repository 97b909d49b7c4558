"""Several processes that know of each other, as a launcher without an agent would start them."""

import os
import socket
import subprocess
import sys


def launch(command, ranks=2):
    """Start `ranks` processes of a command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(
            [sys.executable, *command], env={**os.environ, **shared, "RANK": str(r), "LOCAL_RANK": str(r)}, **pipes
        )
        for r in range(ranks)
    ]


def finish(processes, timeout=400):
    """(exit code, output, errors) of each."""
    try:
        outputs = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, *output) for p, output in zip(processes, outputs)]
