"""Runs of several processes with gloo, as a launcher without an agent would start them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent


def write_recipe(tree, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return str(path)


def launch(command, ranks=2):
    """Start `ranks` processes of a command, which know of each other."""
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


def run_jobs(jobs, ranks=2):
    """Runs one after another in one group of processes; per rank what each job printed."""
    found = []
    for code, out, errors in finish(launch([str(HERE / "parallel_worker.py"), json.dumps(jobs)], ranks)):
        assert code == 0, errors[-4000:]
        found.append([json.loads(line) for line in out.splitlines() if line.startswith("{")])
    return found


def losses(folder, key="loss"):
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]
