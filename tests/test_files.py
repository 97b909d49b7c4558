"""Files that appear whole, and names that belong to one process."""

import errno
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import qwen_image_fast
from qwen_image_fast.files import claimed, numbered, write_new
from qwen_image_fast.output_files import OutputFiles
from qwen_image_fast.png_metadata import read_parameters

spawn = multiprocessing.get_context("spawn")
PARAMETERS = {
    "model": "tiny", "prompt": "a cat", "negative_prompt": " ", "width": 8, "height": 8, "steps": 1, "cfg": 1.0,
    "max_sequence_length": 8, "dtype": "float32", "lightning": None,
}  # fmt: skip


def _write_five(folder, start, own, links):
    if not links:
        os.link = no_links
    files = OutputFiles(folder, False, 5)  # all look before any writes
    start.wait()
    for i in range(5):
        own.put((str(files.write(Image.new("RGB", (8, 8)), {**PARAMETERS, "seed": 5 * os.getpid() + i})), os.getpid()))


def no_links(*args):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_six_processes_get_six_times_five_names(tmp_path, links):
    start, own = spawn.Barrier(6), spawn.Queue()
    processes = [spawn.Process(target=_write_five, args=(tmp_path, start, own, links)) for _ in range(6)]
    for process in processes:
        process.start()
    announced = dict(own.get(timeout=120) for _ in range(30))
    for process in processes:
        process.join()
    assert len(announced) == 30 == len(list(tmp_path.iterdir()))
    for name, owner in announced.items():
        assert read_parameters(name)["seed"] // 5 == owner


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_name_taken_at_the_last_moment(tmp_path, monkeypatch, links):
    """Between the look and the write: another's file stays, and ours gets the next name."""
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "x.png"
    monkeypatch.setattr(Path, "exists", lambda self: path.write_text("theirs") is None)  # and then it is there
    assert write_new(numbered(path), lambda file: file.write(b"ours")) == tmp_path / "x-0001.png"
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"x.png": "theirs", "x-0001.png": "ours"}


def test_interrupted(tmp_path):
    def half(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_new(numbered(tmp_path / "x"), half)
    assert not list(tmp_path.iterdir())


def test_a_folder_belongs_to_one_process(tmp_path):
    """A second one is refused while the first lives, however that ends, and where a result is."""
    run = tmp_path / "run"
    code = f"from qwen_image_fast.files import claimed\nwith claimed({str(run)!r}): print(1, flush=True); input()"
    env = {**os.environ, "PYTHONPATH": str(Path(qwen_image_fast.__file__).parents[1])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], env=env, **pipes) as first:
        assert first.stdout.read(1) == b"1"
        with pytest.raises(FileExistsError, match="another process is writing to .*run; wait"), claimed(run):
            pass
        first.kill()
    with claimed(run, "result.json"):
        (run / "result.json").write_text("{}")
    with pytest.raises(FileExistsError, match="already has a finished result.json"), claimed(run, "result.json"):
        pass
    with claimed(run):
        pass


def test_a_folder_in_which_nothing_came_to_be_is_not_left(tmp_path):
    with pytest.raises(ValueError), claimed(tmp_path / "a" / "b"):
        raise ValueError
    assert not (tmp_path / "a" / "b").exists()
