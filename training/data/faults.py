"""Errors of libraries as sentences of an audit."""

from __future__ import annotations

import re

_OBJECT = re.compile(r"\s*<[\w.]+ object at 0x[0-9a-fA-F]+>|\s+at 0x[0-9a-fA-F]+")


def sentence(error: BaseException) -> str:
    """What an error says, without the addresses of objects, which are others in every run."""
    return _OBJECT.sub("", str(error)).strip() or type(error).__name__
