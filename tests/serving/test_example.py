import runpy
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def ink(path):
    with Image.open(path) as image:
        found = np.asarray(image.convert("RGB"), dtype=int).reshape(-1, 3)
    return found[found.min(1) < 128].mean(0)


def test_the_example_of_a_client(running, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ask_the_server.py", "--url", f"{running.url}/v1"])
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "ask_the_server.py"), run_name="__main__")
    assert capsys.readouterr().out.split() == ["preview-0.png", "preview-1.png", "answer.png", "edited.png"]
    assert ink("answer.png").argmax() == 0 and ink("edited.png").argmax() == 2
