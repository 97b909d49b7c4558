"""What of a user's works as with diffusers: python -m tests.reference_api calls NAME, hooks NAME, or versions.

`calls` makes the public calls of calls.py on diffusers' objects, on accelerated and on stand-alone ones. `hooks` tries
every kind of hook at every module of diffusers' transformer (hooks.py). Both keep their counts under NAME: "before" was
counted with PYTHONPATH at an older tree. `versions` tries old and new diffusers (versions.py). The results are in
benchmarks/results/reference-api.json, and the tables in docs/drop_in.md are made from them.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "reference-api.json"
PAGE = ROOT / "docs" / "drop_in.md"


def calls_table(results: dict[str, Any]) -> str:
    """In Markdown."""
    counts = results["calls"]
    lines = [f"| as diffusers, of {results['names']} calls | {' | '.join(counts)} |", "|---|" + "---|" * len(counts)]
    for kind in next(iter(counts.values())):
        lines.append(f"| {kind} | {' | '.join(str(found[kind]) for found in counts.values())} |")
    return "\n".join(lines)


def hooks_table(results: dict[str, Any]) -> str:
    counts = results["hooks"]
    lines = [
        f"| seen, of {results['places']} modules | {' | '.join(counts)} |", "|---|" + "---|" * len(counts)
    ]  # fmt: skip
    for kind in next(iter(counts.values())):
        lines.append(f"| {kind} | {' | '.join(str(found[kind]) for found in counts.values())} |")
    return "\n".join(lines)


def versions_table(results: dict[str, Any]) -> str:
    lines = ["| diffusers | |", "|---|---|"]
    lines += [f"| {version} | {found['said']} |" for version, found in results["versions"].items()]
    return "\n".join(lines)


TABLES = {"calls": calls_table, "hooks": hooks_table, "versions": versions_table}


def write_page(results: dict[str, Any]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        before, rest = text.split(begin := f"<!-- {name}: {RESULTS.name} -->")
        text = f"{before}{begin}\n{table(results)}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    PAGE.write_text(text, encoding="utf-8")


def count_calls() -> dict[str, Any]:
    from tests.reference_api import calls

    counts = {}
    for kind, name in calls.KINDS.items():
        faults = calls.faults(kind)
        for call, fault in faults.items():
            print(f"{kind}: {call}: {fault}", flush=True)
        counts[name] = len(calls.CALLS) - len(faults)
    return {"names": len(calls.CALLS), "counts": counts}


def count_hooks() -> dict[str, Any]:
    from tests.reference_api import hooks

    places, faults = hooks.faults()
    for what, fault in faults.items():
        print(f"{what}: {fault}")
    wrong = [what.split(" ")[0] for what in faults]
    return {"places": places, "counts": {name: places - wrong.count(kind) for kind, name in hooks.KINDS.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=TABLES)
    parser.add_argument("name", nargs="?", default="now", help="what counts are kept under")
    chosen = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    logging.getLogger("qwen_image_fast").setLevel(logging.ERROR)
    found: dict[str, Any]
    if chosen.what == "versions":
        from tests.reference_api.versions import VERSIONS, try_version

        found = {}
        for version in VERSIONS:
            found[version] = try_version(version)
            print(version, found[version], flush=True)
    else:
        found = count_calls() if chosen.what == "calls" else count_hooks()
    results = {"calls": {}, "hooks": {}, "versions": {}}
    if RESULTS.is_file():
        results |= json.loads(RESULTS.read_text(encoding="utf-8"))
    if chosen.what == "versions":
        results["versions"] = found
    else:
        results["diffusers"] = metadata.version("diffusers")
        results[chosen.what][chosen.name] = found.pop("counts")
        results |= found
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if all(results[name] for name in TABLES):
        write_page(results)


if __name__ == "__main__":
    main()
