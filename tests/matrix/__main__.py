"""The package with old and new versions of what it needs: `make matrix`, or python -m tests.matrix [--only NAME].

For each row of `rows` an environment under build/matrix is made, the wheel and the row's versions are installed with
pip, and `checks.py` runs there; then the environment is removed. Results go to benchmarks/results/matrix.json, row by
row, and the table in docs/versions.md is made from them. On Linux pip's usual index has torch with CUDA, 3 to 6 GB a
row; `--torch-index` may name one that has it without.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "matrix"
RESULTS = ROOT / "benchmarks" / "results" / "matrix.json"
PAGE = ROOT / "docs" / "versions.md"
EXTRAS = ("diffusers", "train")
BEGIN, END = "<!-- from benchmarks/results/matrix.json -->", "<!-- end -->"


def oldest() -> dict[str, str]:
    """The oldest version that pyproject.toml allows of each package, of those that the extras need too."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = [text.split("\ndependencies = [")[1].split("]")[0]]
    lists += [re.search(rf"^{extra} = \[(.*)\]$", text, re.M)[1] for extra in EXTRAS]  # type: ignore[index]
    return dict(re.findall(r'"([\w-]+)>=([\w.]+)"', " ".join(lists)))


def rows() -> dict[str, dict[str, str]]:
    """Of each package the version; those that are not named are the newest that fit.

    Every pair of oldest and newest transformers and diffusers, with the oldest torch, two between, and the torch of
    all other tests.
    """
    floor = oldest()
    tested = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert tested
    return {
        "oldest": floor,
        "new transformers": {"torch": "2.7.1", "diffusers": floor["diffusers"]},
        "new diffusers": {"torch": "2.10.0", "transformers": floor["transformers"]},
        "newest": {"torch": tested[1]},
    }


def try_row(name: str, pins: dict[str, str], wheel: Path, torch_index: str | None, keep: bool) -> dict[str, Any]:
    """Versions and checks, or why the environment could not be made."""
    folder = BUILD / name.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-cache-dir", "--no-compile"]
    torch = f"torch=={pins['torch']}" if "torch" in pins else "torch"
    result = BUILD / "result.json"
    result.unlink(missing_ok=True)
    try:
        subprocess.run([*pip, *(["--index-url", torch_index] if torch_index else []), torch], check=True)
        others = [f"{package}=={version}" for package, version in pins.items() if package != "torch"]
        subprocess.run([*pip, f"{wheel}[{','.join(EXTRAS)}]", torch, *others], check=True)
        with tempfile.TemporaryDirectory() as elsewhere:  # where no package of the tree can be imported
            checks = Path(shutil.copy(Path(__file__).with_name("checks.py"), elsewhere))
            subprocess.run([python, "-P", checks, result] if sys.version_info >= (3, 11) else [python, checks, result],
                           cwd=elsewhere, check=True)  # fmt: skip
        return {"asked": pins, **json.loads(result.read_text())}
    except subprocess.CalledProcessError as error:
        return {"asked": pins, "failed": f"exit code {error.returncode} of {' '.join(map(str, error.cmd[:6]))} ..."}
    finally:
        if not keep:
            shutil.rmtree(folder)


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    checks = list(dict.fromkeys(c for row in results["rows"].values() for c in row.get("checks", {})))
    packages = ["torch", "transformers", "diffusers"]
    lines = [f"| {' | '.join([*packages, *checks])} |", "|" + "---|" * (len(packages) + len(checks))]
    for name, row in results["rows"].items():
        if "failed" in row:
            lines.append(f"| {name}: {row['failed']} |" + " |" * (len(packages) + len(checks) - 1))
            continue
        said = ["✓" if row["checks"][c]["passed"] else f"✗ {row['checks'][c]['said']}" for c in checks]
        lines.append(f"| {' | '.join([*(row['versions'][p] for p in packages), *said])} |")
    first = f"{results['date']}, Python {results['python']}, {results['machine']}:"
    return "\n".join([first, "", *lines])


def failures(results: dict[str, Any]) -> list[str]:
    """Of all rows."""
    found = []
    for name, row in results["rows"].items():
        found += [f"{name}: {row['failed']}"] if "failed" in row else []
        found += [f"{name}, {c}: {v['said']}" for c, v in row.get("checks", {}).items() if not v["passed"]]
    return found


def write_page(page: Path, begin: str, table: str) -> None:
    """Put a table between the line `begin` and the next `END` of a page."""
    before, rest = page.read_text(encoding="utf-8").split(begin)
    page.write_text(f"{before}{begin}\n{table}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def build_wheel() -> Path:
    folder = BUILD / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "-w", folder, ROOT], check=True)
    return next(folder.glob("*.whl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=rows(), default=list(rows()), help="rows; others are kept")
    parser.add_argument("--wheel", type=Path, help="of this tree; without it, it is built")
    parser.add_argument("--torch-index", help="where torch comes from")
    parser.add_argument("--keep", action="store_true", help="leave the environments")
    parser.add_argument("--table", action="store_true", help="only write docs/versions.md anew")
    chosen = parser.parse_args()
    results: dict[str, Any] = {"rows": {}}
    if RESULTS.is_file():
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
    if chosen.table:
        write_page(PAGE, BEGIN, table(results))
        return
    BUILD.mkdir(parents=True, exist_ok=True)
    wheel = (chosen.wheel or build_wheel()).resolve()
    for name in chosen.only:
        print(f"{name}: {rows()[name]}", flush=True)
        found = try_row(name, rows()[name], wheel, chosen.torch_index, chosen.keep)
        kept = {**results["rows"], name: found}
        results = {
            "date": f"{datetime.date.today()}", "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}", "rows": {n: kept[n] for n in rows() if n in kept},
        }  # fmt: skip
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        write_page(PAGE, BEGIN, table(results))
    bad = failures(results)
    print("\n".join(["failed:", *bad]) if bad else "every check passed")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
