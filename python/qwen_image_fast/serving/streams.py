"""Server-sent events, and clients that go away: whoever leaves frees what it held within a step."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

PING = 15.0  # seconds without an event, after which a comment keeps proxies from closing the connection


def event(kind: str, data: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()


def failure(error: dict[str, Any]) -> bytes:
    """As OpenAI's client raises it."""
    return f"event: error\ndata: {json.dumps(error)}\n\n".encode()


COMMENT = b": ping\n\n"


class EventStream(Response):
    """Sends what `events` gives; `gone` is called where the client leaves before its end."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], gone: Callable[[], Any], headers: dict[str, str] | None = None):
        self._events, self._gone = events, gone
        super().__init__(None, 200, {**(headers or {}), "cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait([sending, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                self._gone()
            else:
                sending.result()
        except (OSError, RuntimeError):  # closed in the middle of a write
            self._gone()
        finally:
            for task in (sending, leaving):
                task.cancel()

    async def _send(self, send: Send) -> None:
        async for part in self._events:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, waiting: Any) -> bool:
    """Await something; False where the client leaves first, and it is then cancelled."""
    task, leaving = asyncio.ensure_future(waiting), asyncio.create_task(_left(request.receive))
    try:
        await asyncio.wait([task, leaving], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        return False
    finally:
        for one in (task, leaving):
            one.cancel()
