"""From the body of a request to a job: fields, pictures, LoRAs, all checked before the engine hears of them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from qwen_image_fast.request import KINDS, make
from qwen_image_fast.request_fields import RequestError
from qwen_image_fast.serving import fields as api
from qwen_image_fast.serving.desk import Desk
from qwen_image_fast.serving.errors import ApiError, invalid
from qwen_image_fast.serving.fetch import fetch
from qwen_image_fast.serving.jobs import Job, new_id
from qwen_image_fast.serving.messages import Task
from qwen_image_fast.serving.settings import ApiKey
from qwen_image_fast.serving.uploads import from_data_url, open_mask, open_picture

MULTIPART, JSON = "multipart/form-data", "application/json"
PICTURES = 16
WHAT = {"text": "pictures from a prompt", "edit": "edits by this model", "image_to_image": "variations",
        "inpaint": "masks of this model", "layers": "layers", "controlnet": "controls"}  # fmt: skip
Contents = list[tuple[str, bytes]]  # names of fields, and bytes


class Intake:
    """Reads requests for one desk."""

    def __init__(self, desk: Desk):
        self.desk, self.settings, self.limits = desk, desk.settings, desk.settings.limits
        self._decoding = asyncio.Semaphore(2)

    async def job(self, request: Request, kind: type[api.Fields], key: ApiKey | None) -> Job:
        """A job that may be submitted. ApiError: what is wrong."""
        self.desk.check_open()
        values, pictures, mask, form = await self._body(request, kind)
        fields = api.parse(kind, values, form=form)
        if (header := request.headers.get("x-request-timeout-s")) is not None:
            if fields.timeout is not None and fields.timeout != _number(header):
                got = f"got {fields.timeout:g} and {header}"
                raise invalid(f"give either timeout or the header x-request-timeout-s, {got}", "timeout")
            fields = api.parse(kind, {**values, "timeout": _number(header)}, form=form)
        background = "respond-async" in request.headers.get("prefer", "")
        api.check_together(fields, background)
        self._check_model(fields.model)
        if key is not None and fields.priority > key.priority:
            raise ApiError(403, f"this key has priorities up to {key.priority}, got {fields.priority}", "priority",
                           "priority")  # fmt: skip
        try:
            async with self._decoding:
                opened = await asyncio.wait_for(
                    asyncio.to_thread(self._open, kind, pictures, mask), self.limits.decode_seconds
                )
        except asyncio.TimeoutError:
            raise invalid(
                f"the pictures could not be decoded within {self.limits.decode_seconds:g} s", "image", "invalid_image"
            ) from None
        task = self._task(kind, fields, opened, [content for _, content in pictures])
        if kind is api.Generation or "width" in type(task.request).model_fields:
            width, height = task.request.size(task.opened)
            api.check_size(fields.model_copy(update={"size": f"{width}x{height}"}), self.limits, (width, height), True)
        self.desk.check_memory(task.request, task.opened)
        owner = "" if key is None else key.name
        client = request.client.host if request.client else ""
        task.tenant = owner or fields.user or client
        size = sum(p.width * p.height * 3 for p in _pictures(task.opened))
        kept = background or fields.response_format == "url"
        return Job(task, fields, self.desk.cost(task.request, task.opened), owner, size, kept)

    # ---- bodies -------------------------------------------------------------------------------------------------

    async def _body(
        self, request: Request, kind: type[api.Fields]
    ) -> tuple[dict[str, Any], Contents, bytes | None, bool]:
        """Values, pictures, mask, and whether values are texts."""
        given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if given == JSON and kind is not api.Variation:
            return *await self._json(request, kind), False
        if given == MULTIPART and kind is not api.Generation:
            return *await self._form(request), True
        usual = JSON if kind is api.Generation else MULTIPART if kind is api.Variation else f"{MULTIPART} or {JSON}"
        raise ApiError(415, f"content-type must be {usual}, got {given[:100] or 'none'}", "unsupported_media_type")

    async def _json(self, request: Request, kind: type[api.Fields]) -> tuple[dict[str, Any], Contents, bytes | None]:
        try:
            values = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise invalid(f"the body is not JSON: {error}", None, "invalid_json") from None
        if not isinstance(values, dict):
            raise invalid(f"the body must be a JSON object, got a {type(values).__name__}", None, "invalid_json")
        if kind is not api.Edit:
            return values, [], None
        images, mask = values.pop("images", None), values.pop("mask", None)
        if not isinstance(images, list) or not 1 <= len(images) <= PICTURES:
            raise invalid(f"images must be a list of 1 to {PICTURES} pictures", "images", "missing_parameter")
        contents = [(f"images[{k}]", await self._referred(f"images[{k}]", one)) for k, one in enumerate(images)]
        return values, contents, None if mask is None else await self._referred("mask", mask)

    async def _referred(self, name: str, one: Any) -> bytes:
        """A picture of {"image_url": ...}."""
        if not isinstance(one, Mapping) or len(one) != 1 or not isinstance(one.get("image_url"), str):
            if isinstance(one, Mapping) and "file_id" in one:
                raise invalid(f"{name}: file_id is not there, as there are no files here; send image_url", name)
            raise invalid(f'{name} must be {{"image_url": "data:image/png;base64,..."}}', name)
        url = one["image_url"]
        if url.startswith("data:"):
            return from_data_url(name, url, self.limits)
        return await asyncio.to_thread(fetch, name, url, self.settings.url_hosts, self.limits.file_bytes)

    async def _form(self, request: Request) -> tuple[dict[str, Any], Contents, bytes | None]:
        values: dict[str, Any] = {}
        pictures: Contents = []
        mask = None
        limits = self.limits
        try:
            async with request.form(max_files=limits.files, max_fields=limits.fields, max_part_size=2**20) as form:
                for name, value in form.multi_items():
                    if name in ("image", "image[]", "mask"):
                        if not isinstance(value, UploadFile):
                            raise invalid(f"{name} must be a file", name.removesuffix("[]"))
                        if value.size is not None and value.size > limits.file_bytes:
                            raise ApiError(
                                413, f"{name} must have at most {limits.file_bytes} bytes", "too_large", name
                            )
                        content = await value.read()
                        if name == "mask":
                            if mask is not None:
                                raise invalid("mask must be given once", "mask")
                            mask = content
                        else:
                            pictures.append((f"image[{len(pictures)}]", content))
                    elif isinstance(value, UploadFile):
                        raise invalid(f"there is no file {name[:100]}: pictures are image, image[] and mask", name,
                                      "unknown_parameter")  # fmt: skip
                    elif name in values:
                        raise invalid(f"{name[:100]} must be given once", name)
                    else:
                        values[name] = value
        except HTTPException as error:  # starlette's, of a damaged form and of its limits
            too_many = "Too many" in str(error.detail) or "exceeded" in str(error.detail)
            files = "Too many files" in str(error.detail)
            why = f"it may have {PICTURES} pictures and a mask" if files else error.detail
            raise ApiError(413 if too_many else 400, f"the form could not be read: {why}",
                           "too_large" if too_many else "invalid_form") from error  # fmt: skip
        if not pictures:
            raise invalid("image must be given: a PNG, JPEG or WebP file", "image", "missing_parameter")
        if len(pictures) > PICTURES:
            raise invalid(f"image must be given {PICTURES} times at most, got {len(pictures)}", "image")
        return values, pictures, mask

    # ---- what is asked ------------------------------------------------------------------------------------------

    def _check_model(self, name: str | None) -> None:
        model = self.settings.model
        if name is not None and name not in (model.name, *model.names):
            there = ", ".join((model.name, *model.names))
            raise ApiError(404, f"there is no model {name[:100]}; this server has {there}", "model_not_found", "model")

    def _open(self, kind: type[api.Fields], pictures: Contents, mask: bytes | None) -> dict[str, Any]:
        layered = self.desk.model_class == "QwenImageLayeredPipeline"
        opened: dict[str, Any] = {}
        if pictures:
            opened["image"] = [open_picture(n, c, self.limits, transparent=layered) for n, c in pictures]
        if mask is not None:
            opened["mask"] = open_mask(mask, opened["image"][0], self.limits)
        return opened

    def _task(
        self, kind: type[api.Fields], fields: api.Fields, opened: dict[str, Any], contents: list[bytes]
    ) -> Task:  # fmt: skip
        """The request's description, by request.py, under the model's defaults."""
        desk, model, usual = self.desk, self.settings.model, self.desk.generation
        wanted = self._kind(kind, fields, opened)
        any_side = wanted not in ("text", "controlnet")
        limits = api.check_size(fields, self.limits, (usual.width or 1328, usual.height or 1328), any_side)
        if wanted == "layers":
            if fields.size != "auto":
                raise invalid("size has no effect on layers; resolution has", "size")
            limits = {}
        if fields.background == "transparent" and wanted != "layers":
            raise invalid("background must be auto or opaque: this model makes no transparent pictures", "background")
        steps = api.steps_of(fields, usual.steps or KINDS[wanted].model_fields["steps"].default)
        # Where there are none but Lightning's schedules, one of them is usual.
        asked = fields.num_inference_steps or getattr(fields, "lightning", None) or fields.quality != "auto"
        usual_fast = None if asked else next((s["lightning"] for s in desk.schedules if "lightning" in s), None)
        steps = None if usual_fast else steps
        weights = api.loras(fields.lora, desk.loras)
        given: dict[str, Any] = {
            **limits, "prompt": fields.prompt, "model": model.name, "negative_prompt": fields.negative_prompt,
            "steps": steps, "cfg": fields.true_cfg_scale,
            "seed": random.SystemRandom().randrange(2**31) if fields.seed is None else fields.seed,
            "lora": [{"name": name, "scale": scale} for name, scale in weights.items()] or None,
            "dtype": model.dtype, "precision": model.precision,
        }  # fmt: skip
        for name in ("strength", "lightning", "max_sequence_length", "resolution", "layers"):
            value, own = getattr(fields, name, None), "count" if name == "layers" else name
            if name == "lightning" and usual_fast and own in KINDS[wanted].model_fields:
                value = usual_fast
            if value is not None and own not in KINDS[wanted].model_fields:
                raise invalid(f"{name} has no effect on {WHAT[wanted]}", name)
            given[own] = value
        if wanted != "layers":
            given["images"] = fields.n
        elif fields.n != 1:
            raise invalid(f"n must be 1 for layers, got {fields.n}: layers is their number", "n")
        elif fields.output_format == "jpeg":
            raise invalid("output_format must be png or webp for layers: they are transparent", "output_format")
        if wanted == "controlnet":
            given |= {"net": fields.controlnet, "scale": fields.control_scale}  # type: ignore[attr-defined]
        if wanted in ("image_to_image", "inpaint", "layers") and len(opened["image"]) > 1:
            raise invalid(f"image must be given once here, got {len(opened['image'])}", "image")
        shown = [{"path": f"image[{k}]", "sha256": hashlib.sha256(c).hexdigest()} for k, c in enumerate(contents)]
        if "image" in opened:
            several, name = wanted in ("edit", "controlnet"), "control" if wanted == "controlnet" else "image"
            found = opened.pop("image")
            given[name], opened[name] = (shown, found) if several else (shown[0], found[0])
        if "mask" in opened:
            given["mask"] = {"path": "mask"}
        try:
            request = make(wanted, given, generation=usual)
            request.pipeline(desk.model_class)
        except RequestError as error:
            raise api.named(error) from error
        return Task(
            new_id(), request, opened, weights, fields.priority, previews=fields.partial_images,
            every_step=fields.progress,
        )  # fmt: skip

    def _kind(self, kind: type[api.Fields], fields: api.Fields, opened: dict[str, Any]) -> str:
        if kind is api.Generation:
            return "text"
        if kind is api.Variation:
            return "image_to_image"
        name, scale = getattr(fields, "controlnet", None), getattr(fields, "control_scale", None)
        if name is not None:
            if name not in self.desk.controlnets:
                there = ", ".join(self.desk.controlnets) or "none"
                raise ApiError(404, f"there is no ControlNet {name[:100]}; registered are: {there}",
                               "controlnet_not_found", "controlnet")  # fmt: skip
            return "controlnet"
        if scale is not None:
            raise invalid("control_scale has no effect without controlnet", "control_scale")
        if self.desk.model_class == "QwenImageLayeredPipeline":
            return "layers"
        if self.desk.model_class == "QwenImagePipeline" and "mask" in opened:
            return "inpaint"
        return "edit"


def _pictures(opened: Mapping[str, Any]) -> list[Image.Image]:
    return [p for value in opened.values() for p in (value if isinstance(value, list) else [value])]


def _number(text: str) -> float:
    if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text):
        raise invalid(f"x-request-timeout-s must be a number of seconds, got {text[:50]}", "timeout")
    return float(text)
