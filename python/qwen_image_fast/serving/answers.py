"""What becomes of a finished job: files, the answer of the API, the events of a stream."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from PIL import Image

from qwen_image_fast.serving.fields import echoed_quality
from qwen_image_fast.serving.jobs import COMPLETED, Job, Stored
from qwen_image_fast.serving.streams import COMMENT, PING, event, failure
from qwen_image_fast.serving.uploads import encode


async def finish(job: Job, about: dict[str, Any]) -> None:
    """Encode the pictures and make the answer; `about` goes into PNGs."""
    found = job.finished
    assert found is not None
    request, fields = job.task.request, job.fields
    description = {**request.model_dump(exclude={"images", "seed"}, exclude_none=True), **about}
    without = {name for name, other in request.needs.items() if getattr(request, other) is None}
    description = {name: value for name, value in description.items() if name not in without}
    data: list[dict[str, Any]] = []
    for k, (layers, seed) in enumerate(zip(found.images, found.seeds, strict=True)):
        for number, image in enumerate(layers):
            own = {**description, "seed": seed, **({"layer": number + 1} if len(layers) > 1 else {})}
            content = await asyncio.to_thread(encode, image, fields, own)
            entry: dict[str, Any] = {"seed": seed, **({"layer": number + 1} if len(layers) > 1 else {})}
            if found.prompts[min(k, len(found.prompts) - 1)] != fields.prompt:
                entry["revised_prompt"] = found.prompts[min(k, len(found.prompts) - 1)]
            if fields.response_format == "url":
                entry["url"] = f"/v1/images/{job.id}/content?variant={len(job.files)}"
            job.files.append(Stored(content))
            data.append(entry)
    first = found.images[0][0]
    job.answer = {
        "id": job.id, "created": int(time.time()), "data": data, "background": _background(first),
        "output_format": fields.output_format, "size": f"{first.width}x{first.height}",
        "quality": echoed_quality(fields), "usage": _usage(job),
        "timings": {name: round(seconds, 4) for name, seconds in found.seconds.items()},
    }  # fmt: skip


def with_pictures(job: Job, base: str) -> dict[str, Any]:
    """The answer as it is sent: pictures in base64, or addresses below `base`."""
    assert job.answer is not None
    data = []
    for entry, picture in zip(job.answer["data"], job.files):
        if "url" in entry:
            data.append({**entry, "url": base.rstrip("/") + entry["url"]})
        else:
            data.append({"b64_json": base64.b64encode(picture.read()).decode(), **entry})
    return {**job.answer, "data": data}


def _background(image: Image.Image) -> str:
    return "transparent" if image.mode == "RGBA" else "opaque"


def _usage(job: Job) -> dict[str, Any]:
    assert job.finished is not None
    text, image, output = job.finished.usage
    return {
        "input_tokens": text + image, "input_tokens_details": {"text_tokens": text, "image_tokens": image},
        "output_tokens": output, "total_tokens": text + image + output,
    }  # fmt: skip


def preview_png(preview: np.ndarray, fields: Any, size: tuple[int, int] | None) -> str:
    """In base64; at the size of the picture, or as small as it is."""
    image = Image.fromarray(preview)
    if size is not None:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return base64.b64encode(encode(image, fields, None)).decode()


async def stream(job: Job, prefix: str, position: Any) -> AsyncIterator[bytes]:
    """The events of a request: `prefix` is image_generation or image_edit. A client that reads slowly holds up nothing:
    it gets the previews that are there when it is ready for more."""
    fields, seen, told = job.fields, -1, (-1, "")
    sent: set[int] = set()
    size = job.task.request.size(job.task.opened)
    common = {
        "created_at": int(job.created), "size": f"{size[0]}x{size[1]}", "quality": echoed_quality(fields),
        "background": "opaque", "output_format": fields.output_format,
    }  # fmt: skip
    while not job.over:
        seen = job.changes
        if fields.partial_images:
            for index in sorted(job.previews.keys() - sent):
                sent.add(index)
                for k, preview in enumerate(job.previews.get(index, [])[:1] if not fields.progress else []):
                    shown = await asyncio.to_thread(preview_png, preview, fields, size)
                    yield event(f"{prefix}.partial_image", {**common, "b64_json": shown, "partial_image_index": index,
                                                            "index": k})  # fmt: skip
        if fields.progress and told != (job.step, job.status):
            told = (job.step, job.status)
            yield event(f"{prefix}.progress", await progress(job, position(job)))
        if not job.over and not await job.wait(seen, PING):
            yield COMMENT
    if job.status != COMPLETED or job.answer is None:
        assert job.error is not None
        yield failure(job.error.body)
        return
    answer = with_pictures(job, "")
    for index, entry in enumerate(answer["data"]):
        own = {name: value for name, value in entry.items() if name != "b64_json"}
        yield event(f"{prefix}.completed", {
            **common, "size": answer["size"], "background": answer["background"], "b64_json": entry["b64_json"],
            "usage": answer["usage"], "index": index, "id": job.id, **own,
        })  # fmt: skip


async def progress(job: Job, position: int | None) -> dict[str, Any]:
    """How far it is, with the latest small preview of each picture."""
    previews = list(job.previews.values())[-1] if job.previews else []
    small = [await asyncio.to_thread(preview_png, p, _PNG, None) for p in previews]
    return {"id": job.id, **{k: v for k, v in job.shown(position).items() if k in SHOWN}, "previews": small}


SHOWN = ("status", "step", "steps", "queue_position", "eta_s")


class _PNG:
    output_format, output_compression = "png", None


async def watch(job: Job, position: Any) -> AsyncIterator[bytes]:
    """The events of a job, for whoever looks on: it goes on without them."""
    told: Any = None
    while True:
        seen = job.changes
        if job.over:
            break
        if told != (job.step, job.status, position(job)):
            told = (job.step, job.status, position(job))
            yield event("job.progress", await progress(job, position(job)))
        if not await job.wait(seen, PING):
            yield COMMENT
    if job.error is not None:
        yield failure(job.error.body)
        return
    shown = job.shown(None)
    yield event("job.completed", {**shown, "result": with_pictures(job, "")})
