"""Captions beside pictures as people's editors save them: UTF-8, also with its mark, UTF-16 and UTF-32 with theirs."""

from __future__ import annotations

import codecs
from pathlib import Path

# Those of UTF-32 first: the little-endian one begins as UTF-16's does.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"), (codecs.BOM_UTF8, "utf-8-sig"),
)  # fmt: skip


def decoded(content: bytes) -> str:
    """The text of a file, without its byte order mark and the white space around it.

    Raises:
        ValueError: it is not UTF-8, nor UTF-16 or UTF-32 with a byte order mark; "is not ..." goes on a sentence.
    """
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    # Of Latin letters UTF-16 has half of its bytes 0; a stray one is for whoever judges captions.
    if encoding == "utf-8" and 4 * content.count(0) > len(content):
        raise ValueError("is not UTF-8, perhaps UTF-16 without its byte order mark; save it as UTF-8")
    try:
        return content.decode(encoding).strip()
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8; save it as UTF-8") from error


def beside(path: Path, *suffixes: str) -> Path | None:
    """The file that is called as `path` with the first of these suffixes, in small letters or capitals, as cameras and
    Windows write them: `A.TXT` of `A.JPG`. None: there is none."""
    written = (form for suffix in suffixes for form in (suffix, suffix.upper(), f".{suffix[1:].title()}"))
    return next((file for form in written if (file := path.with_suffix(form)).exists()), None)
