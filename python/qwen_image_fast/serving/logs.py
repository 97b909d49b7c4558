"""One JSON object for each line of the log: who, what, how long. No prompts unless they are asked for."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        found = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            found["error"] = self.formatException(record.exc_info)
        return json.dumps(found, ensure_ascii=False, default=str)


class _Lines(logging.StreamHandler):
    def __init__(self, around: Callable[[], AbstractContextManager]) -> None:
        super().__init__()
        self._around = around

    def emit(self, record: logging.LogRecord) -> None:
        with self._around():
            super().emit(record)


def to_stderr(level: int = logging.INFO, around: Callable[[], AbstractContextManager] = nullcontext) -> None:
    """Of this package's server, and warnings of uvicorn's. around: what each line is written within."""
    handler = _Lines(around)
    handler.setFormatter(JsonLines())
    for name, least in (("qwen_image_fast.serving", level), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(least)
        logger.propagate = False
