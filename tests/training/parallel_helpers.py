"""Runs of several processes with gloo."""

import json
from pathlib import Path

import yaml
from several_processes import finish, launch

HERE = Path(__file__).parent


def write_recipe(tree, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return str(path)


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
