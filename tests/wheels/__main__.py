"""The wheels of dist/ where they must run: `make wheels-check`, or python -m tests.wheels [--root FOLDER --place NAME].

In a new environment of its Python each wheel is installed beside torch and makes a picture, an edit, a picture by
diffusers and a training step, and `doctor` runs (tests/matrix/checks.py). Where `--torch` is not given for a Python,
only the compiled module is loaded, alone: it needs neither torch nor a GPU's driver. `--root` is a folder with another
Linux, such as tests/wheels/debian11.sh makes, in which everything runs by chroot. Results go to
benchmarks/results/wheels.json, row by row, and the table in docs/install.md is made from them.
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
import time
from pathlib import Path
from typing import Any

from tests.matrix.__main__ import failures, write_page

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "wheels.json"
PAGE = ROOT / "docs" / "install.md"
BEGIN = "<!-- from benchmarks/results/wheels.json -->"
ALONE = """
import importlib.util, json, sysconfig
from pathlib import Path
(file,) = Path(sysconfig.get_path("purelib"), "qwen_image_fast").glob("_C.*")
spec = importlib.util.spec_from_file_location("qwen_image_fast._C", file)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.build_info()["version"])
"""
GLIBC = "import platform; print(platform.libc_ver()[1])"


class Place:
    """This machine, or a folder with another Linux: where commands run, and what files are called there."""

    def __init__(self, name: str, root: Path | None) -> None:
        self.name, self.root = name, root
        self.folder = (root or ROOT / "build") / "wheels-check"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def path(self, file: Path) -> str:
        return str(file) if self.root is None else f"/{file.relative_to(self.root)}"

    def run(self, *command: str) -> str:
        """Its output; CalledProcessError with what it wrote to stderr."""
        prefix = [] if self.root is None else ["chroot", str(self.root), "env", "-C", "/"]
        # Not from the tree: its package would be imported in place of the wheel's.
        where = None if self.root else self.folder
        return subprocess.run([*prefix, *command], capture_output=True, text=True, check=True, cwd=where).stdout.strip()


def try_wheel(wheel: Path, python: str, place: Place, torch: str | None) -> dict[str, Any]:
    """What it said, or why it failed."""
    mine = Path(shutil.copy(wheel, place.folder))
    checks = Path(shutil.copy(ROOT / "tests" / "matrix" / "checks.py", place.folder))
    folder = place.folder / "venv"
    inside = f"{place.path(folder)}/bin/python"
    row: dict[str, Any] = {"wheel": wheel.name, "megabytes": round(wheel.stat().st_size / 1e6, 1), "place": place.name}
    try:
        row["glibc"] = place.run(python, "-c", GLIBC)
        place.run(python, "-m", "venv", place.path(folder))
        pip = (inside, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-cache-dir")
        if torch is None:
            place.run(*pip, "--no-deps", place.path(mine))
            return {
                **row,
                "checks": {"compiled module alone": {"passed": True, "said": place.run(inside, "-c", ALONE)}},
            }
        place.run(*pip, torch)
        begin = time.monotonic()
        place.run(*pip, place.path(mine), torch)
        row["seconds of pip install"] = round(time.monotonic() - begin)
        command = (
            "generate",
            '"HI" in red on a white ground',
            "--model",
            "tiny",
            "-o",
            place.path(place.folder / "hi.png"),
        )
        place.run(inside, "-m", "qwen_image_fast", *command)
        row["seconds from pip install to the first picture"] = round(time.monotonic() - begin)
        place.run(*pip, f"{place.path(mine)}[diffusers,train]", torch)
        result = place.folder / "result.json"
        place.run(inside, place.path(checks), place.path(result))
        return {**row, **json.loads(result.read_text())}
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout or "").strip().splitlines()[-1:]
        return {
            **row,
            "failed": f"exit code {error.returncode} of {' '.join(map(str, error.cmd[:4]))} ...: {''.join(said)}",
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = ["| place | glibc | wheel | MB | torch | what ran |", "|---|---|---|---|---|---|"]
    for row in results["rows"].values():
        said = row.get("failed") or ", ".join(
            f"{name} {'✓' if check['passed'] else '✗ ' + check['said']}" for name, check in row["checks"].items()
        )
        seconds = row.get("seconds from pip install to the first picture")
        said += f"; the first picture {seconds} s after `pip install`" if seconds else ""
        said += f", {row['seconds of pip install']} of them its own" if "seconds of pip install" in row else ""
        torch = row.get("versions", {}).get("torch", "none")
        wheel = re.sub(r"^qwen_image_fast-|\.whl$", "", row["wheel"])
        lines.append(f"| {row['place']} | {row.get('glibc', '')} | {wheel} | {row['megabytes']} | {torch} | {said} |")
    return "\n".join([f"{results['date']}, {results['machine']}:", "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="*", type=Path, help="default: those in dist/")
    parser.add_argument(
        "--python", nargs="+", default=[], help="Pythons to try them with; default: those that are found"
    )
    parser.add_argument("--torch", nargs="*", default=[], help="TAG=REQUIREMENT, such as cp311=torch==2.13.0")
    parser.add_argument("--root", type=Path, help="a folder with another Linux")
    parser.add_argument("--place", help="what to call it; default: this machine's system")
    parser.add_argument("--table", action="store_true", help="only write docs/install.md anew")
    chosen = parser.parse_args()
    results: dict[str, Any] = {"rows": {}}
    if RESULTS.is_file():
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
    if chosen.table:
        write_page(PAGE, BEGIN, table(results))
        return
    sys.path.insert(0, str(ROOT / "packaging"))
    from build_wheels import pythons  # type: ignore[import-not-found]

    named = {} if chosen.root else {tag: str(python) for tag, python in pythons().items()}
    for given in chosen.python:
        tag, _, python = given.rpartition("=")
        if not tag:
            parser.error(f"--python must be TAG=PROGRAM, such as cp311=/opt/python/bin/python3.11, got {given}")
        named[tag] = python
    torch = {}
    for given in chosen.torch:
        tag, _, requirement = given.partition("=")
        if not re.fullmatch(r"cp\d+t?", tag) or not requirement:
            parser.error(f"--torch must be TAG=REQUIREMENT, such as cp311=torch==2.13.0, got {given}")
        torch[tag] = requirement
    system = (
        platform.freedesktop_os_release()["PRETTY_NAME"] if hasattr(platform, "freedesktop_os_release") else "Linux"
    )
    place = Place(chosen.place or system, chosen.root)
    tried = 0
    for wheel in chosen.wheels or sorted((ROOT / "dist").glob("*.whl")):
        tag = wheel.name.split("-")[2]
        tag += "t" if wheel.name.split("-")[3].endswith("t") else ""
        if tag not in named:
            print(f"{wheel.name}: no Python for it, not tried", flush=True)
            continue
        tried += 1
        row = try_wheel(wheel, named[tag], place, torch.get(tag))
        print(f"{wheel.name}: {row.get('failed') or ', '.join(row['checks'])}", flush=True)
        rows = {**results["rows"], f"{place.name}, {wheel.name}": row}
        results = {
            **results,
            "date": f"{datetime.date.today()}",
            "machine": f"{platform.machine()}",
            "rows": dict(sorted(rows.items())),
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        write_page(PAGE, BEGIN, table(results))
    bad = failures(results)
    print(
        "\n".join(["failed:", *bad])
        if bad
        else "every check passed"
        if tried
        else "nothing was tried: make wheels first"
    )
    sys.exit(bool(bad) or not tried)


if __name__ == "__main__":
    main()
