"""The HTTP server: OpenAI's images API, jobs, health, metrics.

A thin layer: what is asked is read by intake.py, what is answered is written by answers.py, and between is the desk.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from qwen_image_fast import __version__
from qwen_image_fast.serving import answers, fields, static
from qwen_image_fast.serving.desk import Desk
from qwen_image_fast.serving.errors import ApiError, invalid
from qwen_image_fast.serving.guard import Guard
from qwen_image_fast.serving.intake import Intake
from qwen_image_fast.serving.jobs import COMPLETED, Job
from qwen_image_fast.serving.metrics import Metrics
from qwen_image_fast.serving.process import EngineProcess
from qwen_image_fast.serving.settings import Settings
from qwen_image_fast.serving.streams import EventStream, unless_gone

CREATED = 1754265600  # when Qwen-Image was released


class Server:
    """The routes around one desk; `app` is the ASGI application.

    Args:
        start: what starts an engine. ready_first: the application has started once the model is loaded, for a server
            around it that sends requests from then on.
    """

    def __init__(
        self,
        settings: Settings,
        start: Callable[..., Any] = EngineProcess,
        more: list[BaseRoute] | None = None,
        ready_first: bool = False,
    ):
        self.ready_first = ready_first
        self.settings, self.metrics = settings, Metrics()
        self.desk = Desk(settings, self.metrics, self._finish, start)
        self.intake = Intake(self.desk)
        kinds: dict[str, type[fields.Fields]] = {
            "generations": fields.Generation,
            "edits": fields.Edit,
            "variations": fields.Variation,
        }
        routes: list[BaseRoute] = [
            *(
                Route(f"/v1/images/{name}", _queried(self._making(kind)), methods=["POST"])
                for name, kind in kinds.items()
            ),
            Route("/v1/images/{id}/content", _queried(self.content, "variant")),
            Route("/v1/jobs/{id}", _queried(self.job), methods=["GET", "DELETE"]),
            Route("/v1/jobs/{id}/events", _queried(self.events)),
            Route("/v1/models", _queried(self.models)),
            Route("/v1/models/{id:path}", _queried(self.models)),
            Route("/health", self.health),
            Route("/healthz", self.health),
            Route("/readyz", self.ready),
            Route("/metrics", self.numbers),
            *static.routes(),
            *(more or []),
        ]
        handlers: Any = {HTTPException: _refused, ApiError: _said}
        inner = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=handlers)
        inner.router.redirect_slashes = False  # an address that is not there has OpenAI's error, not a 307
        self.app = Guard(inner, settings, self.metrics)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.desk.begin()
        while self.ready_first and not self.desk.is_ready:
            if self.desk.gave_up:
                await self.desk.end()
                raise RuntimeError(self.desk.why)
            await asyncio.sleep(0.1)
        yield
        await self.desk.end()

    async def _finish(self, job: Job) -> None:
        await answers.finish(job, {"version": __version__, "device": self.settings.model.device})

    # ---- pictures -----------------------------------------------------------------------------------------------

    def _making(self, kind: type[fields.Fields]) -> Callable[[Request], Any]:
        async def make(request: Request) -> Response:
            return await self._make(request, kind)

        return make

    async def _make(self, request: Request, kind: type[fields.Fields]) -> Response:
        job = await self.intake.job(request, kind, request.state.key)
        asked = job.task.request
        width, height = asked.size(job.task.opened)
        request.state.log.update(
            id=job.id,
            kind=asked.kind,
            size=f"{width}x{height}",
            steps=asked.steps,
            n=asked.each,
            stream=job.fields.stream,
        )
        if self.settings.log_prompts:
            request.state.log["prompt"] = asked.prompt
        self.desk.submit(job)
        if "respond-async" in request.headers.get("prefer", ""):  # which intake.py has checked
            shown = job.shown(self.desk.position(job))
            return JSONResponse(shown, 202, {"location": shown["poll_url"], "preference-applied": "respond-async"})

        def gone() -> None:
            request.state.status = 499  # nobody is there to read another
            self.desk.cancel(job.id, "disconnected")

        if job.fields.stream:
            prefix = "image_edit" if kind is fields.Edit else "image_generation"
            return EventStream(answers.stream(job, prefix, self.desk.position), gone)
        if not await unless_gone(request, _over(job)):
            gone()
            return Response(status_code=499)
        if job.error is not None:
            raise job.error
        request.state.log.update(images=len(job.files))
        return JSONResponse(answers.with_pictures(job, str(request.base_url)))

    async def content(self, request: Request) -> Response:
        """One picture of a finished job, as a file."""
        job = self._own(request)
        variant = request.query_params.get("variant", "0")
        if job.status != COMPLETED:
            later = "has none yet" if not job.over else "has none"
            raise ApiError(404, f"there is no picture: {job.id} is {job.status} and {later}", "not_found")
        if not variant.isdecimal() or int(variant) >= len(job.files):
            text = f"variant must be 0 to {len(job.files) - 1}, the pictures of {job.id}, got {variant[:100]}"
            raise ApiError(404, text, "not_found", "variant")
        kind = job.fields.output_format
        return Response(
            job.files[int(variant)].read(), media_type=f"image/{kind}", headers={"cache-control": "private"}
        )

    # ---- jobs ---------------------------------------------------------------------------------------------------

    def _own(self, request: Request) -> Job:
        job = self.desk.find(request.path_params["id"])
        if request.state.key is not None and job.owner != request.state.key.name:
            raise ApiError(404, f"there is no job {request.path_params['id'][:100]}", "not_found")
        return job

    async def job(self, request: Request) -> Response:
        job = self._own(request)
        if request.method == "DELETE":
            if not self.desk.cancel(job.id, "asked"):
                raise ApiError(409, f"{job.id} is {job.status} and cannot be cancelled", "not_cancellable", retry=False)
            await _over(job)
        shown = job.shown(self.desk.position(job))
        if job.status == COMPLETED:
            shown["result"] = answers.with_pictures(job, str(request.base_url))
        return JSONResponse(shown)

    async def events(self, request: Request) -> Response:
        return EventStream(answers.watch(self._own(request), self.desk.position), lambda: None)

    # ---- the server ---------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        model = self.settings.model
        names = [model.name, *model.names]
        if (id := request.path_params.get("id")) is not None and id not in names:
            raise ApiError(404, f"there is no model {id[:100]}; this server has {', '.join(names)}", "model_not_found")
        found = [
            {"id": name, "object": "model", "created": CREATED, "owned_by": "qwen-image-fast", "shutdown_date": None}
            for name in names
        ]
        if id is not None:
            return JSONResponse(found[names.index(id)])
        desk = self.desk
        about = {
            "class": desk.model_class,
            "defaults": desk.generation.model_dump(exclude_none=True),
            "schedules": desk.schedules,
            "loras": desk.loras,
            "controlnets": desk.controlnets,
        }
        return JSONResponse({"object": "list", "data": found, "about": about})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        self.desk.check_open()
        return JSONResponse({"status": "ready", "queued": sum(j.status == "queued" for j in self.desk.jobs.values())})

    async def numbers(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _queried(answer: Callable[[Request], Any], *names: str) -> Callable[[Request], Any]:
    """A route whose address may have these parameters; any other is refused by name."""

    async def asked(request: Request) -> Response:
        for name in request.query_params:
            if name not in names:
                where = "; fields are in the body" if request.method == "POST" else ""
                raise invalid(f"{request.url.path[:200]} has no parameter {name[:100]}{where}", name[:100],
                              "unknown_parameter")  # fmt: skip
        return await answer(request)

    return asked


async def _over(job: Job) -> None:
    while not job.over:
        await job.wait(job.changes)


async def _refused(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, no such method."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    text = {404: f"there is no {path}", 405: f"{path} cannot be asked with {request.method}"}.get(error.status_code)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(error.status_code, text or str(error.detail), code).response()


async def _said(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()
