"""Write the table that chooses the kernels of the linear layers from results of gpu-check.

    python -m benchmarks.linear_table

A kernel enters where it was measured to be at least 2 % faster than cuBLASLt with what follows it, and where its
result agrees.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from benchmarks.gpu_status import results
from qwen_image_fast.ops._linear import TABLE

LEAST_GAIN = 1.02
TOLERANCE = 0.03  # of the largest value, bfloat16


def faster(records: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """{"linear_gelu 3072 -> 12288": {"1024": "cutlass large", ...}} of one GPU; "torch" where a kernel loses again."""
    cases = defaultdict(list)
    for r in (r for r in records if "torch" in r["ms"]):  # not those in 8 bits
        cases[f"{r['op']} {r['depth']} -> {r['columns']}", max(r["rows"])].append(r)
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for (case, rows), group in sorted(cases.items()):
        total = {
            kernel: sum(r["ms"][kernel] for r in group)
            for kernel in group[0]["ms"]
            if all(kernel in r["ms"] and r["difference"].get(kernel, 0.0) <= TOLERANCE for r in group)
        }
        best = min(total, key=total.__getitem__)
        found[case][str(rows)] = best if total["torch"] >= LEAST_GAIN * total[best] else "torch"
    return {case: rows for case, rows in found.items() if set(rows.values()) != {"torch"}}


def table(about: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest results of each architecture."""
    newest: dict[str, dict[str, Any]] = {}
    for r in found:
        if r.get("gemms"):
            newest.setdefault("sm_" + r["architecture"].rstrip("af"), r)
    return {
        "about": about,
        "measured_by": [f"{r['date']}, {r['gpu']}, torch {r['torch']}" for r in newest.values()],
        "faster": {architecture: faster(r["gemms"]) for architecture, r in newest.items()},
    }


def main() -> None:
    about = json.loads(TABLE.read_text(encoding="utf-8"))["about"]
    TABLE.write_text(json.dumps(table(about, results()), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
