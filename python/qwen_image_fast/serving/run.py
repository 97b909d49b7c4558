"""A server as a process: it listens before the model is read, and ends without losing what it has begun."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from qwen_image_fast.serving.app import Server
from qwen_image_fast.serving.desk import Desk
from qwen_image_fast.serving.errors import ApiError
from qwen_image_fast.serving.guard import request_id
from qwen_image_fast.serving.settings import Settings


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. OSError, in a sentence, where the port is in use or not allowed."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host.strip("[]"), port))
        found.listen(512)
    except (OSError, OverflowError) as error:
        found.close()
        number = getattr(error, "errno", None)
        why = {
            errno.EADDRINUSE: f"port {port} of {host} is in use: give another --port, or end what uses it",
            errno.EACCES: f"port {port} may not be used: ports below 1024 are the system's; give another --port",
            errno.EADDRNOTAVAIL: f"{host} is no address of this machine",
        }.get(number or 0, f"{host}:{port} cannot be listened on: {error}")
        if isinstance(error, socket.gaierror):
            why = f"--host {host} is neither an address nor a name that is known here"
        raise OSError(why) from error
    return found


class _Uvicorn(uvicorn.Server):
    """Whose first signal lets work finish; the second ends the engine, and with it what it has begun; a third is
    uvicorn's, which waits for no client."""

    def __init__(self, config: uvicorn.Config, desk: Desk, on_end: Callable[[int], None]):
        super().__init__(config)
        self._desk, self._signals, self._on_end = desk, 0, on_end
        self._tasks: set[asyncio.Task] = set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 2:
            self.should_exit = self.force_exit = True
        else:
            heed = self._drain if self._signals == 1 else self._desk.abandon
            asyncio.get_running_loop().call_soon_threadsafe(heed)

    def _drain(self) -> None:
        self._on_end(len(self._desk.jobs))
        task = asyncio.get_running_loop().create_task(self._desk.drain())
        self._tasks.add(task)

        def ended(task: asyncio.Task) -> None:
            self.should_exit = True

        task.add_done_callback(ended)


class _Protocol(H11Protocol):
    """Whose own refusals are OpenAI's error too."""

    def send_400_response(self, msg: str) -> None:
        refused = ApiError(400, "the request is not HTTP/1.1, or its headers are larger than 64 KiB", "invalid_http")
        answer = refused.response()
        names = [*answer.raw_headers, (b"x-request-id", request_id().encode()), (b"connection", b"close")]
        parts = [h11.Response(status_code=400, headers=names), h11.Data(data=bytes(answer.body)), h11.EndOfMessage()]
        self.transport.write(b"".join(self.conn.send(part) or b"" for part in parts))
        self.transport.close()


def configuration(app: Any) -> uvicorn.Config:
    """How requests are read: by h11, which bounds the size of their headers, also where httptools is installed."""
    return uvicorn.Config(
        app, http=_Protocol, log_config=None, access_log=False, server_header=False, date_header=False, lifespan="on",
        timeout_graceful_shutdown=10, timeout_keep_alive=75,
    )  # fmt: skip


def log_end(requests: int) -> None:
    """A line of the log when the first signal has come."""
    logging.getLogger("qwen_image_fast.serving").info("ending", extra={"fields": {"requests": requests}})


def run(
    settings: Settings, sockets: list[socket.socket], on_ready: Callable[[], None] = lambda: None,
    on_end: Callable[[int], None] = log_end,
) -> None:  # fmt: skip
    """Serve until a signal comes; returns when all is answered.

    Args:
        on_ready: called whenever a model is loaded. on_end: called once, with the number of requests that are still to
            be answered, when the first signal has come.
    """
    server = Server(settings)
    server.desk.on_ready = on_ready
    uvicorn_server = _Uvicorn(configuration(server.app), server.desk, on_end)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    uvicorn_server.run(sockets=sockets)
