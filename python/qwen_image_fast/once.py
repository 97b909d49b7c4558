"""Warnings that are said once."""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary

_KEPT = 1024  # sentences of an owner; then it forgets, and may say one again
_said: WeakKeyDictionary[object, set[str]] = WeakKeyDictionary()


def warn_once(logger: logging.Logger, owner: object, message: str, *args: object) -> None:
    """`logger.warning(message, *args)`, unless that sentence was said for `owner` before.

    `owner`: what the sentence is about, a pipeline or a model; the logger itself where there is nothing that lives on.
    """
    said = _said.setdefault(owner, set())
    if (sentence := message % args) in said:
        return
    if len(said) >= _KEPT:
        said.clear()
    said.add(sentence)
    logger.warning("%s", sentence)
