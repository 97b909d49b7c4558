"""The page at `/`: files of the package, read once, and nothing from elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from qwen_image_fast.serving.errors import ApiError

PAGE = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def routes() -> list[BaseRoute]:
    """`/`, and `/page/{name}` of the files that are there now: a name is looked up, never opened."""
    files = {path.name: path.read_bytes() for path in PAGE.iterdir() if path.suffix in TYPES}
    tags = {name: f'"{hashlib.sha256(content).hexdigest()[:16]}"' for name, content in files.items()}

    def answer(request: Request, name: str) -> Response:
        # Asked again each time, so that a page never runs with scripts of another version.
        headers = {"etag": tags[name], "cache-control": "no-cache"}
        if tags[name] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(files[name], media_type=TYPES[Path(name).suffix], headers=headers)

    async def index(request: Request) -> Response:
        return answer(request, "index.html")

    async def file(request: Request) -> Response:
        if (name := request.path_params["name"]) not in files:
            raise ApiError(404, f"there is no /page/{name[:100]}", "not_found")
        return answer(request, name)

    handlers: list[tuple[str, Callable[..., Any]]] = [("/", index), ("/page/{name}", file)]
    return [Route(path, handler) for path, handler in handlers]
