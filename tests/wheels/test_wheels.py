"""Wheels: what the compiled module asks of Linux, which Pythons are found, what is refused; what was tried."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from tests.matrix.__main__ import failures
from tests.wheels.__main__ import PAGE, RESULTS, table

import qwen_image_fast
from qwen_image_fast import _C

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "packaging"))
import build_wheels as wheels  # noqa: E402

# Of manylinux_2_28: glibc's own, and what GCC 8's libstdc++ has.
FLOOR = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}


@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")
@pytest.mark.skipif("GNU" not in _C.build_info()["compiler"] and sys.platform != "linux", reason="needs GCC on Linux")
def test_the_module_asks_for_nothing_newer_than_the_floor():
    said = subprocess.run(["objdump", "-T", _C.__file__], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"\((GLIBC|GLIBCXX|CXXABI)_([\d.]+)\) *(\S+)", said)
    assert {"GLIBC", "GLIBCXX"} <= {kind for kind, _, _ in found}
    newer = [(n, k, v) for k, v, n in found if tuple(map(int, v.split("."))) > FLOOR[k]]
    assert newer == [], newer
    libraries = subprocess.run(["objdump", "-p", _C.__file__], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED +(\S+)", libraries))
    known = {f"lib{name}" for name in ("gomp.so.1", "stdc++.so.6", "m.so.6", "gcc_s.so.1", "c.so.6")}
    known |= {f"lib{name}" for name in ("pthread.so.0", "dl.so.2", "rt.so.1")}
    assert not needed - known - {n for n in needed if n.startswith("ld-linux")}, (
        needed
    )  # no torch, no libcuda, no cudart


def test_errors_cross_the_module_as_before():
    """The exceptions' own functions are among those that old_glibc.cpp stands in for."""
    for _ in range(3):
        with pytest.raises(ValueError, match="set_isa: name must be one this CPU has"):
            _C.set_isa("none")


def test_pythons_are_found_by_what_they_are(tmp_path):
    tag = f"cp3{sys.version_info[1]}"
    assert wheels.tag_of(Path(sys.executable)) == tag
    assert tag in wheels.pythons()
    other = tmp_path / "python3.12"
    other.write_text("#!/bin/sh\necho pypy 3.12\n")
    other.chmod(0o755)
    assert wheels.tag_of(other) is None and wheels.tag_of(Path(shutil.which("false"))) is None


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("q-1-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", 5, None),
        ("q-1-cp312-cp312-manylinux_2_28_x86_64.whl", 5, None),
        ("q-1-cp312-cp312-manylinux_2_34_x86_64.whl", 5, "needs a newer Linux than glibc 2.28"),
        ("q-1-cp312-cp312-linux_x86_64.whl", 5, "needs a newer Linux than glibc 2.28"),
        ("q-1-cp312-cp312-manylinux_2_28_x86_64.whl", 101 * 10**6, "has 101.0 MB, more than the 100 MB"),
    ],
)
def test_wheels_that_are_refused(tmp_path, name, size, says):
    with (tmp_path / name).open("wb") as file:
        file.truncate(size)
    if says is None:
        assert wheels.checked(tmp_path / name) == "0.0 MB"
    else:
        with pytest.raises(SystemExit, match=says):
            wheels.checked(tmp_path / name)


def test_a_local_version_goes_into_the_sources_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "BUILD", tmp_path)
    file = tmp_path / "q-0.1.0" / "python" / "qwen_image_fast" / "__init__.py"
    file.parent.mkdir(parents=True)
    file.write_text('"""x"""\n__version__ = "0.1.0"\n')
    with tarfile.open(tmp_path / "q.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "q-0.1.0", "q-0.1.0")
    top = wheels.sources(tmp_path / "q.tar.gz", "cu130")
    assert '__version__ = "0.1.0+cu130"' in (top / "python/qwen_image_fast/__init__.py").read_text()
    assert (
        '__version__ = "0.1.0"\n'
        in (wheels.sources(tmp_path / "q.tar.gz", "") / "python/qwen_image_fast/__init__.py").read_text()
    )


def test_what_was_compiled_of_other_sources_is_forgotten(tmp_path):
    top, kernels = tmp_path / "top", tmp_path / "kernels"
    for file in ("CMakeLists.txt", "csrc/a.cpp", "cmake/b.cmake"):
        (top / file).parent.mkdir(parents=True, exist_ok=True)
        (top / file).write_text("1")
    wheels.forget(kernels, top)
    (kernels / "object").touch()
    wheels.forget(kernels, top)
    assert (kernels / "object").exists()
    (top / "csrc" / "a.cpp").write_text("2")
    wheels.forget(kernels, top)
    assert not (kernels / "object").exists()


def test_a_system_without_openmp_is_told_what_to_install(monkeypatch):
    def missing(name):
        if name == "torch":
            return None
        raise ImportError("libgomp.so.1: cannot open shared object file: No such file or directory", name=name)

    monkeypatch.setattr(qwen_image_fast, "import_module", missing)
    with pytest.raises(
        ImportError, match="needs OpenMP's runtime libgomp.so.1, which neither torch nor this system has"
    ):
        qwen_image_fast.__getattr__("_C")


def test_the_results_are_good_and_on_the_page():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert failures(results) == [] and table(results) in PAGE.read_text(encoding="utf-8")
    places = {row["place"] for row in results["rows"].values()}
    assert "Debian 11" in places and {row["glibc"] for row in results["rows"].values()} >= {"2.31"}


def test_what_was_built_is_small_enough_and_on_the_page():
    builds = json.loads(RESULTS.read_text(encoding="utf-8"))["builds"]
    page = PAGE.read_text(encoding="utf-8")
    assert builds["+cu130"]["architectures"] == wheels.ARCHITECTURES
    for build in builds.values():
        largest = max(build["megabytes"].values())
        assert largest * 1e6 < wheels.LARGEST and f"{largest:.1f} MB" in page
