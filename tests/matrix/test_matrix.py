"""What `make matrix` left is what the declarations and the page say; nothing is installed here."""

import ast
import itertools
import json
from pathlib import Path

import pytest
from tests.matrix.__main__ import PAGE, RESULTS, failures, oldest, rows, table

from qwen_image_fast.drop_in.accelerate import OLDEST_DIFFUSERS

RUN = json.loads(RESULTS.read_text())


def test_rows_cover_every_pair_and_four_torches():
    floor, found = oldest(), rows()
    assert found["oldest"] == floor and {"torch", "numpy", "typer", "peft", "tensorboard"} <= floor.keys()
    pairs = {tuple(row.get(p) == floor[p] for p in ("transformers", "diffusers")) for row in found.values()}
    assert pairs == set(itertools.product((True, False), repeat=2))
    assert len({row.get("torch") for row in found.values()}) == 4
    assert ".".join(map(str, OLDEST_DIFFUSERS)) == floor["diffusers"]


def test_results_are_of_these_rows_and_good():
    assert {"oldest"} <= RUN["rows"].keys() <= rows().keys()
    for name, row in RUN["rows"].items():  # a package that came later was not asked for
        assert row["asked"].items() <= rows()[name].items() and {"torch", "diffusers"} & row["asked"].keys(), name
    assert failures(RUN) == []
    for row in RUN["rows"].values():
        assert list(row["checks"]) == ["picture", "edit", "drop-in", "training step", "doctor"]
        for package, version in row["asked"].items():
            assert row["versions"].get(package, version).split("+")[0].startswith(version)


def test_the_page_is_made_from_them():
    assert table(RUN) in PAGE.read_text()


@pytest.mark.parametrize(
    ("row", "cell", "failure"),
    [
        ({"failed": "exit code 1 of pip ..."}, "| a: exit code 1 of pip ... | | | |", "a: exit code 1 of pip ..."),
        (
            {"versions": {"torch": "1", "transformers": "2", "diffusers": "3"},
             "checks": {"edit": {"passed": False, "said": "KeyError: 4"}}},
            "| 1 | 2 | 3 | ✗ KeyError: 4 |", "a, edit: KeyError: 4",
        ),
    ],
)  # fmt: skip
def test_what_fails_is_told(row, cell, failure):
    good = {"versions": {"torch": "1", "transformers": "2", "diffusers": "3"}, "checks": {"edit": {"passed": True}}}
    results = {"date": "d", "python": "p", "machine": "m", "rows": {"b": good, "a": row}}
    assert cell in table(results).splitlines() and "| 1 | 2 | 3 | ✓ |" in table(results)
    assert failures(results) == [failure]


def test_the_checks_need_nothing_of_the_tree():
    tree = ast.parse(Path(__file__).with_name("checks.py").read_text())
    names = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert not [name for name in names if name.split(".")[0] in ("tests", "benchmarks")]
