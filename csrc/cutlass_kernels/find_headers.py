"""Print the folder of CUTLASS's headers, for CMake and for the compile check: `python find_headers.py [CACHE]`.

The package `nvidia-cutlass` where it is installed, without importing it; else its wheel, of the version in
constraints.txt, downloaded with pip and unpacked into CACHE. Its own dependencies, which only its Python side needs,
are not installed. A build without CUDA never runs this.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
INCLUDE = "cutlass_library/source/include/"
MARK = "cutlass/cutlass.h"


def installed() -> Path | None:
    found = importlib.util.find_spec("cutlass_library")
    for folder in (found.submodule_search_locations or []) if found else []:
        if (Path(folder).parent / INCLUDE / MARK).exists():
            return Path(folder).parent / INCLUDE
    return None


def version() -> str:
    return re.search(r"^nvidia-cutlass==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]


def download(cache: Path) -> Path:
    target = cache / f"cutlass-{version()}"
    if (target / INCLUDE / MARK).exists():
        return target / INCLUDE
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        # An isolated build hides the environment's packages, pip among them, behind PYTHONPATH.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*command, "-d", folder, f"nvidia-cutlass=={version()}"], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(
                f"CUTLASS's headers were not found and could not be downloaded: install them with `pip install "
                f"--no-deps nvidia-cutlass=={version()}`, or name their folder with QIF_CUTLASS_INCLUDE\n{done.stderr}"
            )
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(f"{folder}/unpacked", [n for n in archive.namelist() if n.startswith(INCLUDE)])
        if not target.exists():
            os.replace(f"{folder}/unpacked", target)
    return target / INCLUDE


if __name__ == "__main__":
    print(installed() or download(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build"))
