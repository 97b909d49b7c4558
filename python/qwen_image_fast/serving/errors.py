"""Errors as OpenAI's API has them: a status and one object, on every path."""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import JSONResponse

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A sentence for the client, the status, and which field it is about.

    retry_after: seconds; capped at 120, beyond which OpenAI's client does not wait. retry: whether it should be tried
    again as it is; None: as the client thinks.
    """

    def __init__(
        self,
        status: int,
        sentence: str,
        code: str | None = None,
        param: str | None = None,
        *,
        retry_after: float | None = None,
        retry: bool | None = None,
    ):
        super().__init__(sentence)
        self.status, self.sentence, self.code, self.param = status, sentence, code, param
        self.retry_after = None if retry_after is None else min(120, max(1, math.ceil(retry_after)))
        self.retry = retry

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.sentence, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        found = {}
        if self.retry_after is not None:
            found["retry-after"] = str(self.retry_after)
        if self.retry is not None:
            found["x-should-retry"] = str(self.retry).lower()
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def invalid(sentence: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    return ApiError(400, sentence, code, param)


def of_failure(kind: str, sentence: str) -> ApiError:
    """Of an engine's `Failed`."""
    if kind == "invalid":
        return invalid(sentence, code="invalid_request")
    if kind == "memory":
        return ApiError(500, f"out of memory, a smaller picture needs less: {sentence}", "out_of_memory", retry=False)
    if kind == "crashed":
        return ApiError(500, sentence, "engine_crashed", retry=True)
    return ApiError(500, sentence, "generation_failed", retry=False)


def of_cancelled(reason: str) -> ApiError:
    """Of an engine's `Cancelled`."""
    if reason == "deadline":
        return ApiError(504, "the time that the request gave was over", "deadline_exceeded", retry=False)
    if reason == "drain":
        return ApiError(503, "the server ends and did not finish in time", "draining", retry_after=30)
    return ApiError(409, "the job was cancelled", "cancelled")
