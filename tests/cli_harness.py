"""What tests of the command share."""

import re
from pathlib import Path

from PIL import Image


def pictures():
    return sorted(p.name for p in Path().iterdir() if p.suffix == ".png" or ".tmp" in p.name)


def pixels(name):
    with Image.open(name) as image:
        return image.tobytes()


def said(result):
    """Standard error without the lines of progress."""
    lines = result.stderr.splitlines(keepends=True)
    return "".join(line for line in lines if not re.search(r", \d+:\d\d(, about \S+ left)?\n$", line))


def refused(result, code, text):
    """One sentence with our mark, the code, and nothing written."""
    assert result.exit_code == code, result.output
    assert said(result).startswith("error: ") and said(result).count("\n") == 1, result.stderr
    assert text in result.stderr
    assert pictures() == []
