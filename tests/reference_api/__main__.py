"""What of a user's works as with diffusers: python -m tests.reference_api calls, hooks, versions or diffusers-tests.

`calls` makes the public calls of calls.py on diffusers' objects, on accelerated and on stand-alone ones. `hooks` tries
every kind of hook at every module of diffusers' transformer (hooks.py). `diffusers-tests --snapshot DIR` runs its own
tests from a folder (diffusers_tests.py); with `--kept DIR` a stopped run goes on where it was. Their counts are kept as
`--column`, "now" if it is not given; `--package DIR --column before` counts with the package of an older tree, which
stands in its folder python. `versions` tries old and new diffusers and transformers (versions.py). The results are in
benchmarks/results/reference-api.json, and the tables in docs/drop_in.md are made from them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "reference-api.json"
PAGE = ROOT / "docs" / "drop_in.md"
COLUMNS = ("before", "now")


def counts_table(what: str, found: dict[str, Any]) -> str:
    """In Markdown, a column for every tree that was counted."""
    columns = {name: found["counts"][name] for name in COLUMNS if name in found["counts"]}
    lines = [f"| {what.format(found['of'])} | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for kind in columns["now"]:
        lines.append(f"| {kind} | {' | '.join(str(counts.get(kind, '')) for counts in columns.values())} |")
    return "\n".join(lines)


def tests_table(found: dict[str, Any]) -> str:
    """A row for every class of tests, and a last one for all."""
    counts = found["counts"]
    pairs = [(kind, column) for kind in counts["now"] for column in COLUMNS if column in counts]
    columns = [found["of"], *(counts[column][kind] for kind, column in pairs)]
    names = ["pass with diffusers' classes", *(f"{kind}, {column}" for kind, column in pairs)]
    lines = [f"| tests | {' | '.join(names)} |", "|---|" + "---|" * len(columns)]
    for cls in found["of"]:
        lines.append(f"| `{cls}` | {' | '.join(str(column[cls]) for column in columns)} |")
    return "\n".join([*lines, f"| all | {' | '.join(str(sum(column.values())) for column in columns)} |"])


def versions_table(found: dict[str, Any]) -> str:
    packages = ("diffusers", "transformers", "torch")
    lines = [f"| {' | '.join(packages)} | |", "|---|---|---|---|"]
    for row in found.values():
        lines.append(f"| {' | '.join(row['versions'][name] for name in packages)} | {row['said']} |")
    return "\n".join(lines)


TABLES = {
    "calls": lambda found: counts_table("as diffusers, of {} calls", found),
    "hooks": lambda found: counts_table("seen, of {} modules", found),
    "versions": versions_table,
    "diffusers-tests": tests_table,
}


def write_page(results: dict[str, Any]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        before, rest = text.split(begin := f"<!-- {name}: {RESULTS.name} -->")
        text = f"{before}{begin}\n{table(results[name])}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    PAGE.write_text(text, encoding="utf-8")


def merged(old: dict[str, Any], column: str, found: dict[str, Any]) -> dict[str, Any]:
    """With the counts of the other columns, unless they are of other calls; the rest is that of "now"."""
    if old.get("of") != found["of"]:
        old = {}
    rest = {**old, **found} if column == "now" else {**found, **old}
    return {**rest, "counts": {**old.get("counts", {}), column: found["counts"]}}


def count_calls() -> dict[str, Any]:
    from tests.reference_api import calls

    counts = dict.fromkeys(calls.KINDS.values(), len(calls.CALLS))
    for of in calls.ROWS:
        for kind, name in calls.KINDS.items():
            faults = calls.faults(kind, [of])
            counts[name] -= len(faults)
            for call, fault in faults.items():
                print(f"{kind}: {call}: {fault}", flush=True)
        print(f"{of}: done", flush=True)
    return {"of": len(calls.CALLS), "counts": counts}


def count_hooks() -> dict[str, Any]:
    from tests.reference_api import hooks

    places, faults = hooks.faults()
    for what, fault in faults.items():
        print(f"{what}: {fault}")
    wrong = [what.split(" ")[0] for what in faults]
    return {"of": places, "counts": {name: places - wrong.count(kind) for kind, name in hooks.KINDS.items()}}


def try_versions() -> dict[str, Any]:
    from tests.reference_api.versions import ROWS, try_row

    found = {}
    for name, pins in ROWS.items():
        found[name] = try_row(pins)
        print(name, found[name], flush=True)
    return found


def count_diffusers_tests(snapshot: Path, kept: Path | None, column: str) -> dict[str, Any]:
    from tests.reference_api.diffusers_tests import count

    if kept is not None:
        return count(snapshot.resolve(), kept.resolve(), column)
    with tempfile.TemporaryDirectory() as folder:
        return count(snapshot.resolve(), Path(folder), column)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=TABLES)
    parser.add_argument("--column", choices=COLUMNS, default="now", help="what counts are kept as")
    parser.add_argument("--package", type=Path, help="the folder that holds qwen_image_fast, of an older tree")
    parser.add_argument("--snapshot", type=Path, help="the folder of diffusers' tests, outside of this repository")
    parser.add_argument("--kept", type=Path, help="a folder where the outcome of every one of them is kept")
    chosen = parser.parse_args()
    if (chosen.what == "diffusers-tests") != (chosen.snapshot is not None):
        parser.error("diffusers-tests needs --snapshot, and nothing else takes it")
    if chosen.kept is not None and chosen.snapshot is None:
        parser.error("--kept is for diffusers-tests")
    if chosen.package is not None:
        sys.path.insert(0, str(chosen.package))
        os.environ["PYTHONPATH"] = str(chosen.package)
    sys.path.insert(0, str(ROOT / "tests"))
    logging.getLogger("qwen_image_fast").setLevel(logging.ERROR)
    if chosen.what == "versions":
        found = try_versions()
    elif chosen.what == "diffusers-tests":
        found = count_diffusers_tests(chosen.snapshot, chosen.kept, chosen.column)
    else:
        found = count_calls() if chosen.what == "calls" else count_hooks()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    if chosen.what != "versions":
        results["diffusers"] = metadata.version("diffusers")
        found = merged(results.get(chosen.what, {}), chosen.column, found)
    results[chosen.what] = found
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if TABLES.keys() <= results.keys():
        write_page(results)


if __name__ == "__main__":
    main()
