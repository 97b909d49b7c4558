"""Fields of requests: their types, what their values may be, said in sentences, and sizes as users write them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from qwen_image_fast.folders import nearest

LARGEST = 8192  # pixels of a side
# The sizes that Qwen-Image was tuned for, from the table in its README.
RATIOS = {
    "1:1": (1328, 1328),
    "16:9": (1664, 928),
    "9:16": (928, 1664),
    "4:3": (1472, 1104),
    "3:4": (1104, 1472),
    "3:2": (1584, 1056),
    "2:3": (1056, 1584),
}


class RequestError(ValueError):
    """A sentence about a request, with fields' names in braces, for the command line as for JSON."""

    def __init__(self, template: str) -> None:
        super().__init__(re.sub(r"\{(\w+)\}", r"\1", template))
        self.template = template

    def named(self, name: Callable[[str], str]) -> str:
        """The sentence with other names of the fields, such as `--steps`."""
        return re.sub(r"\{(\w+)\}", lambda match: name(match[1]), self.template)


def about(default: Any, text: str, *, unit: str = "", argument: str | None = None, **limits) -> Any:
    """A field: `...` where it must be given; `argument`: of the pipelines' calls, which also names the field."""
    extra = {"unit": unit} if unit else {}
    return Field(default, description=text, json_schema_extra={**extra, "argument": argument}, **limits)


def _picture(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _lora(value: Any) -> Any:
    """ "style.safetensors=0.8"; a name may hold an = itself."""
    if not isinstance(value, str):
        return value
    name, _, scale = value.rpartition("=")
    try:
        return {"name": name or value, "scale": float(scale) if name else 1.0}
    except ValueError:
        return {"name": value}


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, (str, Mapping)) else value


class InputPicture(BaseModel):
    """A picture that goes in: its file, and the file's SHA-256, by which a picture that has changed is known."""

    model_config = ConfigDict(extra="forbid")
    path: str
    sha256: str | None = None


class Lora(BaseModel):
    """A LoRA's file, folder or hub name (owner/name/file.safetensors), its weight, and the SHA-256 of what is here."""

    model_config = ConfigDict(extra="forbid")
    name: str
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    sha256: str | None = None


OnePicture = Annotated[InputPicture, BeforeValidator(_picture)]
Pictures = Annotated[list[OnePicture], BeforeValidator(_listed)]
Files = Annotated[list[str] | None, BeforeValidator(_listed)]
Loras = Annotated[list[Annotated[Lora, BeforeValidator(_lora)]], BeforeValidator(_listed)]


def argument_of(field: FieldInfo) -> str | None:
    """The name of a field among the arguments of the pipelines' calls."""
    extra = field.json_schema_extra
    return str(extra["argument"]) if isinstance(extra, dict) and extra.get("argument") else None


def has_pictures(annotation: Any) -> bool:
    """Whether a field's type is a picture, or a list of them."""
    return annotation is InputPicture or any(has_pictures(part) for part in get_args(annotation))


def unit_of(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    return str(extra.get("unit", "")) if isinstance(extra, dict) else ""


def plain_type(field: FieldInfo) -> Any:
    """The type without None: int, float, bool, str, a Literal or something with pictures."""
    kinds = get_args(field.annotation)
    return next(kind for kind in kinds if kind is not type(None)) if type(None) in kinds else field.annotation


def limits(field: FieldInfo) -> tuple[str, float | None, float | None]:
    """The lowest and the highest value, and both as text: "1 to 1024", "at least 1", "more than 0 and at most 1"."""
    low: Any = None
    high: Any = None
    texts, step = {}, ""
    for rule in field.metadata:
        if isinstance(rule, (annotated_types.Ge, annotated_types.Gt)):
            low = rule.ge if isinstance(rule, annotated_types.Ge) else rule.gt
            texts["low"] = f"at least {low}" if isinstance(rule, annotated_types.Ge) else f"more than {low}"
        elif isinstance(rule, annotated_types.Le):
            high = rule.le
            texts["high"] = f"at most {high}"
        elif isinstance(rule, annotated_types.MultipleOf):
            step = f", a multiple of {rule.multiple_of}"
    if set(texts) == {"low", "high"} and texts["low"].startswith("at least"):
        return f"{low} to {high}{step}", low, high
    return " and ".join(texts.values()) + step, low, high


def rule(field: FieldInfo) -> str:
    """What a value must be: "an integer, 1 to 1024", "4 or 8"."""
    kind = plain_type(field)
    if get_origin(kind) is Literal:
        *most, last = map(str, get_args(kind))
        return f"{', '.join(most)} or {last}" if most else last
    if kind is bool:
        return "true or false"
    text = {int: "an integer", float: "a number", str: "a text", list[str]: "files"}.get(kind, "LoRAs")
    text = "a picture's file" if has_pictures(kind) else text
    return ", ".join(filter(None, [text, limits(field)[0]]))


def sentence(error: ValidationError, fields: dict[str, FieldInfo], kind: str) -> RequestError:
    """The first of pydantic's errors as one sentence."""
    first = error.errors()[0]
    name, value = str(first["loc"][0]) if first["loc"] else "", first["input"]
    if isinstance(cause := first.get("ctx", {}).get("error"), RequestError):
        return cause
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        return RequestError(f"there is no {name} for {kind}{nearest(name, fields)}")
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return RequestError(f"{{{name}}} must be given for {kind}")
    got = f"{value!r}" if isinstance(value, str) else f"{value}"
    if name not in fields or len(first["loc"]) > 1:
        return RequestError(f"{{{name}}} could not be read: {first['msg']}, got {got}")
    return RequestError(f"{{{name}}} must be {rule(fields[name])}, got {got}")


def check_multiples(width: int, height: int) -> None:
    """Sides of text to image."""
    for name, side in (("width", width), ("height", height)):
        if side % 16:
            near = max(16, round(side / 16) * 16)
            raise RequestError(f"{{{name}}} must be a multiple of 16 pixels, got {side}; try {near}")


def tokens_of(width: int, height: int) -> int:
    """Tokens of the latents of a picture."""
    return -(-width // 16) * -(-height // 16)


def parse_size(text: str, usual: tuple[int, int]) -> tuple[int, int]:
    """Width and height of "1664x928", or of "16:9" with about as many pixels as the model's usual size."""
    if match := re.fullmatch(r"(\d+)\s*[xX×]\s*(\d+)", text.strip()):
        return int(match[1]), int(match[2])
    if text not in RATIOS:
        raise RequestError(f"{{size}} must be WIDTHxHEIGHT or one of {', '.join(RATIOS)}, got {text}")
    if usual == RATIOS["1:1"]:
        return RATIOS[text]
    wide, high = map(int, text.split(":"))
    unit = math.sqrt(usual[0] * usual[1] / (wide * high))
    return max(16, round(wide * unit / 16) * 16), max(16, round(high * unit / 16) * 16)
