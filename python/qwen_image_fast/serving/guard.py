"""What stands before every route: who may ask, from where, how much, and an id for each request."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_image_fast.serving.errors import ApiError
from qwen_image_fast.serving.metrics import Metrics
from qwen_image_fast.serving.settings import ApiKey, Settings, host_name

logger = logging.getLogger("qwen_image_fast.serving")
OPEN = ("/health", "/healthz", "/readyz")  # answered without a key
STATIC = ("/", "/page/")  # the page, which asks for a key itself
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}  # fmt: skip


def request_id() -> str:
    return f"req_{secrets.token_hex(12)}"


class Bucket:
    """So many requests a minute, as many at once at most."""

    def __init__(self, per_minute: float):
        self.per_second, self.most = per_minute / 60, max(1.0, per_minute)
        self.left, self.since = self.most, time.monotonic()

    def take(self) -> float:
        """0, or the seconds until there is one again."""
        now = time.monotonic()
        self.left, self.since = min(self.most, self.left + (now - self.since) * self.per_second), now
        if self.left >= 1:
            self.left -= 1
            return 0.0
        return (1 - self.left) / self.per_second


class Guard:
    """ASGI middleware around the app."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics):
        self.app, self.settings, self.metrics = app, settings, metrics
        self._buckets: dict[str, Bucket] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, id = time.perf_counter(), request_id()
        headers, state = Headers(scope=scope), scope.setdefault("state", {})
        state["request_id"], state["log"] = id, {}
        status, started = 0, False
        origin = headers.get("origin")

        async def answer(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                own = MutableHeaders(scope=message)
                own["x-request-id"] = id
                for name, value in HEADERS.items():
                    own.setdefault(name, value)
                if origin in self.settings.origins:
                    own["access-control-allow-origin"] = origin
                    own["access-control-expose-headers"] = "x-request-id, retry-after"
                    own.add_vary_header("origin")
            await send(message)

        try:
            self._check(scope, headers, state)
            if scope["method"] == "OPTIONS" and origin in self.settings.origins:
                await _preflight(answer)
            else:
                await self.app(scope, _limited(receive, headers, self.settings), answer)
        except ApiError as error:
            if not started:
                await error.response()(scope, receive, answer)
        except ClientDisconnect:  # before its body was whole: nobody is there to be answered
            status = 499
        except Exception as error:
            logger.exception("a request failed", extra={"fields": {"request_id": id}})
            if not started:
                failed = ApiError(500, f"the server failed: {type(error).__name__}", "internal_error", retry=False)
                await failed.response()(scope, receive, answer)
        self._log(scope, state, status, time.perf_counter() - began)

    def _check(self, scope: Scope, headers: Headers, state: MutableMapping[str, Any]) -> None:
        settings, path = self.settings, scope["path"]
        host = headers.get("host", "")
        if not settings.may_be_asked_as(host):
            raise ApiError(403, f"this server is not asked as {host_name(host)[:100]}; --allow-host names more",
                           "host_not_allowed")  # fmt: skip
        origin = headers.get("origin")
        same = origin is not None and origin.partition("://")[2].lower() == host.lower()
        elsewhere = (origin is not None and not same) or headers.get("sec-fetch-site") in ("cross-site", "same-site")
        # A link to the page, followed by a person; a frame or a script has another destination.
        followed = path == STATIC[0] and origin is None and headers.get("sec-fetch-dest") == "document"
        if elsewhere and not followed and origin not in settings.origins:
            raise ApiError(403, "pages elsewhere may not ask this server; --cors-origin names those that may",
                           "origin_not_allowed")  # fmt: skip
        state["key"] = None
        if settings.keys and path not in OPEN and path != STATIC[0] and not path.startswith(STATIC[1]):
            key = settings.key_of(headers.get("authorization"))
            if key is None and scope["method"] != "OPTIONS":
                raise ApiError(401, "give a key of this server: Authorization: Bearer KEY", "invalid_api_key")
            state["key"] = key
            if key is not None:
                self._count(key, scope["method"])

    def _count(self, key: ApiKey, method: str) -> None:
        if key.per_minute is not None and method == "POST":
            wait = self._buckets.setdefault(key.name, Bucket(key.per_minute)).take()
            if wait:
                self.metrics.rejected.labels("per_minute").inc()
                raise ApiError(429, f"this key has {key.per_minute:g} requests a minute", "rate_limit_exceeded",
                               retry_after=wait)  # fmt: skip

    def _log(self, scope: Scope, state: MutableMapping[str, Any], status: int, seconds: float) -> None:
        endpoint = getattr(scope.get("route"), "path", "other")
        status = state.get("status", status)
        self.metrics.requests.labels(endpoint, str(status)).inc()
        self.metrics.request_seconds.labels(endpoint).observe(seconds)
        if endpoint in (*OPEN, "/metrics") and status < 400:
            return
        key: ApiKey | None = state.get("key")
        found = {"request_id": state["request_id"], "method": scope["method"], "endpoint": endpoint, "status": status,
                 "seconds": round(seconds, 4), "key": None if key is None else key.name, **state["log"]}  # fmt: skip
        logger.info("request", extra={"fields": {name: v for name, v in found.items() if v is not None}})


def _limited(receive: Receive, headers: Headers, settings: Settings) -> Receive:
    """The body as long as it is not larger than its kind may be."""
    is_form = headers.get("content-type", "").lower().startswith("multipart/")
    largest = settings.limits.form_bytes if is_form else settings.limits.json_bytes
    too_large = ApiError(413, f"the body must have at most {largest} bytes", "too_large")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > largest:
        raise too_large
    read = 0

    async def limited() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > largest:
            raise too_large
        return message

    return limited


async def _preflight(send: Send) -> None:
    headers = [
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (b"access-control-max-age", b"600"),
        (b"access-control-allow-headers", b"authorization, content-type, prefer, x-request-timeout-s"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
