"""The fields of the images API: OpenAI's, and extensions under the names that other servers share.

Unknown fields are refused by name: what is silently ignored elsewhere here is either done or said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from qwen_image_fast.request_fields import RequestError, about, parse_size, sentence
from qwen_image_fast.serving.errors import ApiError, invalid
from qwen_image_fast.serving.settings import Limits

OF_REQUEST = {"cfg": "true_cfg_scale", "steps": "num_inference_steps", "images": "n", "width": "size",
              "height": "size", "mask": "mask", "count": "layers", "control": "image", "net": "controlnet",
              "scale": "control_scale"}  # fmt: skip
# Shares of the model's own steps.
QUALITIES = {"low": 0.3, "medium": 0.6, "standard": 1.0, "high": 1.0, "hd": 1.0, "auto": 1.0}


class Fields(BaseModel):
    """What all endpoints take."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    prompt: str = about(..., "What to make or to do.")
    model: str | None = about(None, "One of /v1/models.")
    n: int = about(1, "Pictures, with seeds one after another.", ge=1, le=10)
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] = about("auto", "Share of the steps.")
    response_format: Literal["b64_json", "url"] = about("b64_json", "How pictures come back.")
    output_format: Literal["png", "jpeg", "webp"] = about("png", "Their format.")
    output_compression: int | None = about(None, "Quality of jpeg and webp.", ge=0, le=100)
    size: str = about("auto", "WIDTHxHEIGHT, or 16:9 and the like.")
    background: Literal["auto", "opaque", "transparent"] = about("auto", "Transparent: of layers alone.")
    moderation: Literal["auto", "low"] = about("auto", "Without effect: nothing is moderated.")
    style: Literal["vivid", "natural"] | None = about(None, "Without effect.")
    stream: bool = about(False, "Server-sent events instead of one answer.")
    partial_images: int = about(0, "Previews in a stream.", ge=0, le=3)
    user: str | None = about(None, "Whose it is, for fairness.")
    # Extensions.
    negative_prompt: str | None = about(None, "What to lead away from; needs guidance.")
    num_inference_steps: int | None = about(None, "Denoising steps.", ge=1, le=1000)
    true_cfg_scale: float | None = about(None, "Guidance scale; 1: none.", ge=1, le=100, allow_inf_nan=False)
    seed: int | None = about(None, "Of picture one.", ge=0, le=2**62)
    lora: list[dict[str, Any]] = about([], "Registered LoRAs: [{name, scale}].")
    lightning: Literal[4, 8] | None = about(None, "Schedule of 4 or 8 steps.")
    progress: bool = about(False, "An event for each step in a stream.")
    priority: int = about(0, "Above 0 sooner, below later.", ge=-4, le=4)
    timeout: float | None = about(None, "Seconds until it must be done.", gt=0, le=86400, allow_inf_nan=False)

    endpoint: ClassVar[str] = "generations"


class Generation(Fields):
    """POST /v1/images/generations."""

    max_sequence_length: int | None = about(None, "Tokens of the prompt that are kept.", ge=1, le=1024)


class Edit(Fields):
    """POST /v1/images/edits."""

    input_fidelity: Literal["high", "low"] | None = about(None, "Without effect: references are seen as they are.")
    strength: float | None = about(None, "With a mask: share of the steps that is taken.", gt=0, le=1)
    layers: int | None = about(None, "Of a Layered model: how many layers.", ge=1, le=100)
    resolution: Literal[640, 1024] | None = about(None, "Of layers: they have about its square in pixels.")
    controlnet: str | None = about(None, "A registered ControlNet, to which the pictures are controls.")
    control_scale: float | None = about(None, "Its weight.", ge=0, le=10, allow_inf_nan=False)

    endpoint: ClassVar[str] = "edits"


class Variation(Fields):
    """POST /v1/images/variations."""

    prompt: str = about("A variation of the picture.", "What the picture shows.")
    strength: float | None = about(None, "Share of the steps that is taken.", gt=0, le=1)

    endpoint: ClassVar[str] = "variations"


NO_EFFECT = {
    "guidance_scale": "this model is not guidance-distilled; true_cfg_scale guides it",
    "mask_image": "the mask is called mask, a PNG that is transparent where the picture may change",
    "file": "pictures are called image, or images in JSON",
    "width": "give size, such as 1024x768",
    "height": "give size, such as 1024x768",
}


def parse(kind: type[Fields], values: Mapping[str, Any], *, form: bool) -> Fields:
    """Checked fields. `form`: all values are texts, as in multipart/form-data.

    Raises:
        ApiError: a field is unknown or wrong; it is named.
    """
    given = {name: value for name, value in values.items() if value is not None}
    for name in given.keys() - kind.model_fields.keys():
        if name in NO_EFFECT:
            raise invalid(f"there is no {name}: {NO_EFFECT[name]}", name, "unknown_parameter")
    for name in ("lightning", "resolution"):  # of which a choice of numbers is read as texts
        if form and str(given.get(name)).isdecimal():
            given[name] = int(given[name])
    if form and isinstance(given.get("lora"), str):
        try:
            given["lora"] = json.loads(given["lora"])
        except ValueError:
            raise invalid('lora must be a JSON list such as [{"name": "style", "scale": 0.8}]', "lora") from None
    try:
        return kind.model_validate(given, strict=not form)
    except ValidationError as error:
        first = error.errors()[0]
        about_field = str(first["loc"][0]) if first["loc"] else None
        code = {"extra_forbidden": "unknown_parameter", "missing": "missing_parameter"}.get(first["type"])
        text = str(sentence(error, kind.model_fields, f"/v1/images/{kind.endpoint}"))
        raise invalid(text, about_field, code or "invalid_value") from error


def loras(given: list[dict[str, Any]], registered: list[str]) -> dict[str, float]:
    """Weights by name; only names of this server, never files."""
    found: dict[str, float] = {}
    for entry in given:
        if unknown := entry.keys() - {"name", "scale"}:
            raise invalid(f"a lora has a name and a scale, got {', '.join(sorted(unknown))}", "lora")
        name, scale = entry.get("name"), entry.get("scale", 1.0)
        if not isinstance(name, str) or isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise invalid("a lora must have a name, a text, and may have a scale, a number", "lora")
        if not -100 <= scale <= 100:
            raise invalid(f"the scale of a lora must be a number, -100 to 100, got {scale}", "lora")
        if name not in registered:
            there = ", ".join(registered) or "none"
            raise ApiError(404, f"there is no LoRA {name[:100]}; registered are: {there}", "lora_not_found", "lora")
        if name in found:
            raise invalid(f"the lora {name} must be given once", "lora")
        found[name] = float(scale)
    return found


def steps_of(fields: Fields, usual: int) -> int | None:
    """What `quality` makes of the model's usual steps; None: nothing, the fields say it."""
    given = [name for name in ("num_inference_steps", "lightning") if getattr(fields, name) is not None]
    if given:
        if fields.quality not in ("auto",):
            raise invalid(f"give either quality or {given[0]}, got both", "quality")
        return fields.num_inference_steps
    return max(1, round(usual * QUALITIES[fields.quality]))


def echoed_quality(fields: Fields) -> str:
    """In the answer there are three."""
    return fields.quality if fields.quality in ("low", "medium") else "high"


def check_size(fields: Fields, limits: Limits, usual: tuple[int, int], any_side: bool) -> dict[str, int]:
    """Width and height of `size`; nothing for auto. `any_side`: they need not be multiples of 16."""
    if fields.size == "auto":
        return {}
    try:
        width, height = parse_size(fields.size, usual)
    except RequestError as error:
        raise invalid(str(error), "size", "invalid_size") from error
    if min(width, height) < 1:
        raise invalid(f"size must have sides of at least 16, got {width}x{height}", "size", "invalid_size")
    if max(width, height) > limits.ratio_out * min(width, height):
        ratio = f"1:{limits.ratio_out:g} to {limits.ratio_out:g}:1"
        raise invalid(f"size must have a ratio of {ratio}, got {width}x{height}", "size", "invalid_size")
    if width * height > limits.pixels_out:
        raise invalid(
            f"size must have at most {limits.pixels_out} pixels, got {width}x{height}, which is {width * height}",
            "size", "invalid_size",
        )  # fmt: skip
    for name, side in (("width", width), ("height", height)):
        if not any_side and (side < 16 or side % 16):
            near = max(16, round(side / 16) * 16)
            raise invalid(
                f"the {name} in size must be a multiple of 16, got {side}; try {near}", "size", "invalid_size"
            )
    return {"width": width, "height": height}


def check_together(fields: Fields, background: bool) -> None:
    """What no field can check alone. `background`: the request becomes a job, which others may watch."""
    if not fields.prompt.strip():
        raise invalid("the prompt is empty", "prompt")
    if len(fields.prompt) > 32000:
        raise invalid(f"prompt must have at most 32000 characters, got {len(fields.prompt)}", "prompt")
    if fields.output_compression is not None and fields.output_format == "png":
        raise invalid("output_compression has no effect on png: ask for jpeg or webp", "output_compression")
    if background and fields.stream:
        raise invalid("stream has no effect on a job in the background, whose events are at poll_url/events", "stream")
    if not fields.stream:
        if fields.partial_images:
            raise invalid("partial_images has no effect without stream", "partial_images")
        if fields.progress and not background:
            raise invalid("progress has no effect without stream, or Prefer: respond-async", "progress")
    elif fields.response_format == "url":
        raise invalid("response_format must be b64_json in a stream", "response_format")


def named(error: RequestError) -> ApiError:
    """An error of the request's description, in the names of this API."""
    names: list[str] = []

    def name(field: str) -> str:
        names.append(OF_REQUEST.get(field, field))
        return names[-1]

    text = error.named(name)
    return invalid(text, names[0] if names else None)
