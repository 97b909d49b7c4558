"""Numbers of bytes as people write them. Imports no torch."""

from __future__ import annotations

import re

GB = 10**9
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(limit: int | str, name: str = "memory_limit") -> int:
    """Bytes from a number or "4GB", "512 MiB".

    Raises:
        ValueError: neither, not positive, or a small number without a unit.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", limit.upper()) if isinstance(limit, str) else None
    if found and not found[2] and float(found[1]) < 10**6:
        raise ValueError(f"{name} must have a unit, such as {found[1]}GB, got {limit!r}, which would be bytes")
    if found:
        limit = int(float(found[1]) * _UNITS[found[2] or ""])
    if not isinstance(limit, int) or isinstance(limit, bool) or limit <= 0:
        raise ValueError(f"{name} must be a positive number of bytes or a string like '4GB', got {limit!r}")
    return limit


def gb(size: float) -> str:
    return f"{size / GB:.1f} GB" if size >= 0.1 * GB else f"{size / 10**6:.1f} MB"
