"""diffusers' own tests, from a folder outside of this repository, with its classes and with both of ours.

The folder has diffusers' tests as its repository has them, or copies of them by hand. Each kind of classes runs in
processes of its own (swapped.py), one after another until every test has an outcome. A test counts that passes with
diffusers' classes.

This file is also the plugin of pytest that keeps the outcomes: `--outcomes FILE` gets a line of JSON when a test begins
and when it ends, and what has ended there already is not run again. A test that takes longer than `--limit` ends its
process.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KINDS = {"accelerated": "after `accelerate`", "stand-alone": "stand-alone"}
LIMIT = 600.0  # seconds for a test


def read(file: Path) -> dict[str, dict[str, Any]]:
    """The last that a file says of every test."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return {told["test"]: told for told in map(json.loads, lines)}


# ---- within pytest ---------------------------------------------------------------------------------------------------


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--outcomes", type=Path, required=True)
    parser.addoption("--limit", type=float, default=LIMIT)


def pytest_configure(config: Any) -> None:
    config.pluginmanager.register(Outcomes(config.getoption("--outcomes"), config.getoption("--limit")))


class Outcomes:
    """Written as they come, so that a process that ends early loses no more than the test it was in."""

    def __init__(self, file: Path, limit: float) -> None:
        self.file, self.limit = file, limit

    def write(self, test: str, outcome: str, **more: Any) -> None:
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"test": test, "outcome": outcome, **more}) + "\n")

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        done = {test for test, told in read(self.file).items() if told["outcome"] != "began"}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        self.write(item.nodeid, "began")
        self.began = time.monotonic()
        faulthandler.dump_traceback_later(self.limit, exit=True, file=sys.__stderr__)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test without an error has one call; one that skips or fails before it, or after it, is told by that."""
        if report.when == "call" or report.outcome != "passed":
            outcome = f"{report.outcome}, as expected to fail" if hasattr(report, "wasxfail") else report.outcome
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message if crash is not None else str(report.longrepr or "")
            if isinstance(report.longrepr, tuple):  # of one that is skipped: file, line and why
                said = report.longrepr[2]
            seconds = round(time.monotonic() - self.began, 1)
            self.write(report.nodeid, outcome, said=said[:300], seconds=seconds)


# ---- around it -------------------------------------------------------------------------------------------------------


def outcomes(snapshot: Path, file: Path, *options: str, limit: float = LIMIT) -> dict[str, dict[str, Any]]:
    """Of every test of a folder, by its name, kept in a file; those that it has already are not run again.

    RuntimeError where pytest could not collect them.
    """
    # not ROOT itself: diffusers' folder has a package of the name tests
    paths = [HERE, ROOT / "tests" / "pipelines", *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "--rootdir", snapshot,
        "-p", "diffusers_tests", "--outcomes", file, "--limit", limit, *options, snapshot,
    ]  # fmt: skip
    while True:
        run = subprocess.run(list(map(str, command)), cwd=snapshot, env=env, capture_output=True, text=True)
        found = read(file)
        unfinished = [test for test, told in found.items() if told["outcome"] == "began"]
        if not unfinished:
            if run.returncode in (0, 1) or (run.returncode == 5 and found):  # 5: there were none, or none is left
                return found
            raise RuntimeError(f"pytest ended with {run.returncode}: {(run.stdout + run.stderr)[-2000:]}")
        # faulthandler ends it with 1
        why = f"ran past {limit:g} s" if run.returncode == 1 else f"ended the process with {run.returncode}"
        with file.open("a", encoding="utf-8") as lines:
            lines.writelines(json.dumps({"test": test, "outcome": why}) + "\n" for test in unfinished)


def count(snapshot: Path, kept: Path, column: str) -> dict[str, Any]:
    """How many tests pass with diffusers' classes and with ours, and what came of those that end otherwise.

    Outcomes are kept in a folder, those of diffusers' classes for all columns.
    """
    kept.mkdir(parents=True, exist_ok=True)
    found = {}
    for classes in ("diffusers", *KINDS):
        file = kept / (f"{column}-{classes}.jsonl" if classes in KINDS else f"{classes}.jsonl")
        found[classes] = outcomes(snapshot, file, "-p", "swapped", "--classes", classes)
        print(f"{classes}: done", flush=True)
    theirs = found.pop("diffusers")
    passing = [test for test, told in theirs.items() if told["outcome"] == "passed"]
    counts, other = {}, {}
    for classes, name in KINDS.items():
        ours = {test: found[classes].get(test, {"outcome": "not run"}) for test in theirs}
        passed = by_class(test for test in passing if ours[test]["outcome"] == "passed")
        counts[name] = {cls: passed.get(cls, 0) for cls in by_class(passing)}
        differ = {test: ours[test] for test, told in theirs.items() if ours[test]["outcome"] != told["outcome"]}
        other[name] = {test: in_a_line(told) for test, told in differ.items()}
    return {"of": by_class(passing), "run": len(theirs), "counts": counts, "other outcome": other}


def in_a_line(told: dict[str, Any]) -> str:
    """An outcome and what was said, without folders of this machine."""
    said = re.sub(r"(?<![\w.])/[\w./-]*/", "", told.get("said", "")).splitlines()
    return f"{told['outcome']}: {said[0][:160]}" if said else told["outcome"]


def by_class(tests: Iterable[str]) -> dict[str, int]:
    """How many there are of each class, or of each file where they are in none."""
    return dict(Counter(test.split("[")[0].split("::")[-2].removesuffix(".py").split("/")[-1] for test in tests))
