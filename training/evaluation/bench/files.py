"""Reading the prompts of benchmarks as their authors' repositories have them, with one sentence for a wrong file."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen_image_fast.folders import nearest_file


class WrongPrompts(ValueError):
    """The path has no prompts of this benchmark."""


def wrong(title: str, path: Path, what: str) -> WrongPrompts:
    got = f"got {path}" if path.exists() else f"there is no {path}{nearest_file(path)}"
    return WrongPrompts(f"evaluate bench: --prompts of {title} must be {what}, {got}")


def json_lines(title: str, path: Path, needed: Iterable[str]) -> list[dict[str, Any]]:
    """The records of a file of JSON lines, each with the fields `needed`."""
    what = f"JSON lines with {', '.join(needed)}"
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        records = [json.loads(line) for line in lines]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise wrong(title, path, what) from error
    return checked(title, path, records, needed, what)


def json_file(title: str, path: Path, what: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise wrong(title, path, what) from error


def table(title: str, path: Path, needed: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of a CSV file with a head."""
    what = f"a CSV file with the columns {', '.join(needed)}"
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            records: list[dict[str, Any]] = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise wrong(title, path, what) from error
    return checked(title, path, records, needed, what)


def checked(title: str, path: Path, records: list[Any], needed: Iterable[str], what: str) -> list[dict[str, Any]]:
    """The records, each of which must have the fields; none at all is wrong as well."""
    names = set(needed)
    if not records or not all(isinstance(r, Mapping) and names <= set(r) for r in records):
        raise wrong(title, path, what)
    return records


def safe(text: str) -> str:
    """A name for files, of letters, digits and `-`."""
    return re.sub(r"[^0-9A-Za-z]+", "-", text).strip("-")
