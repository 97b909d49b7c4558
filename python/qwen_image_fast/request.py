"""What a picture is made with: one description for the command line, for what a PNG carries, and for a server.

A kind of request is a pydantic model, whose fields have limits, units and a sentence of help. From it follow the
options of the command line (cli/options.py), the parameters in a PNG (png_metadata.py) and the pipeline's call. A field
may be given under the name of the pipeline's argument too. Imports no torch. docs/request.md lists all fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import ValidationError

from qwen_image_fast.folders import PACKAGED
from qwen_image_fast.model_defaults import Generation
from qwen_image_fast.request_base import EDITING, MODEL, TINY_EDITS, Counted, Opened, Prompted, Request, Resized
from qwen_image_fast.request_fields import (
    LARGEST,
    OnePicture,
    Pictures,
    RequestError,
    about,
    argument_of,
    check_multiples,
    parse_size,
    sentence,
    tokens_of,
)


class Text(Prompted, Counted):
    """A picture from a prompt."""

    kind: Literal["text"] = "text"
    width: int = about(1328, "Of the picture, a multiple of 16.", argument="width", ge=16, le=LARGEST, unit="pixels")
    height: int = about(1328, "Of the picture, a multiple of 16.", argument="height", ge=16, le=LARGEST, unit="pixels")

    def check(self) -> None:
        super().check()
        check_multiples(self.width, self.height)

    def size(self, opened: Opened) -> tuple[int, int]:
        return self.width, self.height


class ImageToImage(Prompted, Resized):
    """A picture changed as a whole, from its noised self."""

    kind: Literal["image_to_image"] = "image_to_image"
    image: OnePicture = about(..., "Start from this picture.", argument="image")
    strength: float = about(
        0.6, "Share of the steps that is taken; 1: nothing of the picture is left.", argument="strength", gt=0, le=1
    )
    inputs: ClassVar[Sequence[str]] = ("image",)

    def pipeline(self, model_class: str) -> str:
        super().pipeline(model_class)
        return "QwenImageImg2ImgPipeline"


class Inpaint(ImageToImage):
    """A picture changed where a mask is white."""

    kind: Literal["inpaint"] = "inpaint"  # type: ignore[assignment]
    mask: OnePicture = about(..., "Change only what is white in this picture.", argument="mask_image")
    inputs: ClassVar[Sequence[str]] = ("image", "mask")

    def pipeline(self, model_class: str) -> str:
        super().pipeline(model_class)
        return "QwenImageInpaintPipeline"


class Edit(Resized):
    """Pictures changed by an instruction."""

    kind: Literal["edit"] = "edit"
    prompt: str = about(..., "What to do.", argument="prompt")
    image: Pictures = about(..., "A picture; several times for several references.", argument="image", min_length=1)
    mask: OnePicture | None = about(None, "Change only what is white in this picture.", argument="mask_image")
    strength: float = about(1.0, "With a mask: share of the steps that is taken.", argument="strength", gt=0, le=1)
    megapixel: bool = about(False, "Resize to about a megapixel, as diffusers.")
    model: str = about("Qwen/Qwen-Image-Edit-2511", TINY_EDITS)

    models: ClassVar[Sequence[str]] = EDITING
    purpose: ClassVar[str] = "edit"
    needs: ClassVar[Mapping[str, str]] = {"strength": "mask"}
    inputs: ClassVar[Sequence[str]] = ("image",)

    def check(self) -> None:
        super().check()
        if self.mask is not None and len(self.image) > 1:
            raise RequestError(f"{{image}} must be given once with a {{mask}}, got {len(self.image)}")

    def pipeline(self, model_class: str) -> str:
        super().pipeline(model_class)
        if self.mask is not None:
            return f"QwenImageEdit{'Plus' if 'Plus' in model_class else ''}InpaintPipeline"
        if model_class == "QwenImageEditPipeline" and len(self.image) > 1:
            raise RequestError(f"{{image}} must be given once for {self.model}, got {len(self.image)}")
        return "QwenImageEditPipeline" if model_class == "QwenImageEditPipeline" else "QwenImageEditPlusPipeline"

    def parts(self, opened: Opened) -> list[int]:
        pictures = [self.size(opened), *(picture.size for picture in opened["image"])]
        return [4096 if self.megapixel else tokens_of(*size) for size in pictures]

    def call(self, opened: Opened) -> dict[str, Any]:
        arguments = {**super().call(opened), "preserve_size": not self.megapixel}
        if len(self.image) == 1:
            arguments["image"] = opened["image"][0]
        if self.mask is None:
            del arguments["strength"]
        if self.megapixel and self.width is None and self.height is None:
            del arguments["width"], arguments["height"]
        return arguments


class ControlNet(Prompted, Counted):
    """A picture led by control pictures, or inpainted by a ControlNet."""

    kind: Literal["controlnet"] = "controlnet"
    control: Pictures = about(
        ..., "Edges, depth, a pose ...; with a mask the picture itself; several times.", argument="control_image",
        min_length=1,
    )  # fmt: skip
    net: str = about("InstantX/Qwen-Image-ControlNet-Union", f"The ControlNet: {MODEL.lower()}.")
    scale: float = about(
        1.0, "Weight of the control.", argument="controlnet_conditioning_scale", ge=0, le=10, allow_inf_nan=False
    )
    mask: OnePicture | None = about(None, "Inpainting: make anew what is white in it.", argument="control_mask")
    width: int | None = about(
        None, "Multiple of 16; default: that of the control.", argument="width", ge=16, le=LARGEST, unit="pixels"
    )
    height: int | None = about(
        None, "Multiple of 16; default: that of the control.", argument="height", ge=16, le=LARGEST, unit="pixels"
    )
    model: str = about("Qwen/Qwen-Image", f"{MODEL}.")

    inputs: ClassVar[Sequence[str]] = ("control",)

    def check(self) -> None:
        super().check()
        if self.mask is not None and len(self.control) > 1:
            raise RequestError(f"{{control}} must be given once with a {{mask}}, got {len(self.control)}")
        check_multiples(self.width or 16, self.height or 16)

    def pipeline(self, model_class: str) -> str:
        super().pipeline(model_class)
        if self.model in PACKAGED and self.net == type(self).model_fields["net"].default:
            what = f"there is no ControlNet for {self.model}"
            raise RequestError(what + ": name a {model} such as Qwen/Qwen-Image, or a {net}")
        return "QwenImageControlNetPipeline" if self.mask is None else "QwenImageControlNetInpaintPipeline"

    def size(self, opened: Opened) -> tuple[int, int]:
        width, height = (max(16, side // 16 * 16) for side in opened["control"][0].size)
        return self.width or width, self.height or height

    def call(self, opened: Opened) -> dict[str, Any]:
        arguments = super().call(opened)
        if len(self.control) == 1:
            arguments["control_image"] = opened["control"][0]
        return arguments


class Layers(Prompted):
    """A picture taken apart into transparent layers."""

    kind: Literal["layers"] = "layers"
    prompt: str = about("", "Caption of the picture; without one, the model writes it.", argument="prompt")
    image: OnePicture = about(..., "The picture to take apart.", argument="image")
    count: int = about(4, "Layers, back to front.", argument="layers", ge=1, le=100)
    resolution: Literal[640, 1024] = about(
        640, "The layers have about its square in pixels.", argument="resolution", unit="pixels"
    )
    exact: bool = about(False, "Keep the picture's size instead.", argument="preserve_size")
    model: str = about("Qwen/Qwen-Image-Layered", f"{MODEL}.")

    models: ClassVar[Sequence[str]] = ("QwenImageLayeredPipeline",)
    purpose: ClassVar[str] = "take pictures apart"
    inputs: ClassVar[Sequence[str]] = ("image",)

    def check(self) -> None:
        self.check_model()  # the prompt may be empty
        if self.text_encoder:
            raise RequestError("{text_encoder} must be the model's own, which writes the caption")

    def pipeline(self, model_class: str) -> str:
        super().pipeline(model_class)
        return "QwenImageLayeredPipeline"

    def size(self, opened: Opened) -> tuple[int, int]:
        width, height = opened["image"].size
        scale = 1.0 if self.exact else (self.resolution**2 / (width * height)) ** 0.5
        return round(width * scale), round(height * scale)

    def parts(self, opened: Opened) -> list[int]:
        return [tokens_of(*self.size(opened))] * (self.count + 2)


AnyRequest = Text | ImageToImage | Inpaint | Edit | ControlNet | Layers
KINDS: dict[str, type[Request]] = {
    cls.model_fields["kind"].default: cls for cls in (Text, ImageToImage, Inpaint, Edit, ControlNet, Layers)
}


def make(
    kind: str,
    given: Mapping[str, Any],
    stored: Mapping[str, Any] | None = None,
    generation: Generation | None = None,
) -> Request:
    """The request of this kind: of defaults, the model's, stored values, Lightning's and given ones, the last wins.

    Args:
        given: values by the names of the fields, or of the pipelines' arguments; `size`, such as 1664x928 or 16:9, for
            width and height. None is not given.
        stored: the same of a picture that is repeated. What has no effect there is no error.
        generation: defaults of the model.

    Raises:
        RequestError: a value is wrong, unknown or would have no effect.
    """
    fields, usual = KINDS[kind].model_fields, (generation or Generation()).model_dump(exclude_none=True)
    defaults = {n: f.default for n, f in fields.items() if not f.is_required() and f.default is not None}
    defaults |= {name: value for name, value in usual.items() if name in defaults}
    sides = tuple(int({"width": 1328, "height": 1328, **usual}[name]) for name in ("width", "height"))
    given, stored = (_named(fields, values, sides) for values in (given, stored or {}))  # type: ignore[arg-type]
    if "width" in given or "height" in given:
        stored = {name: value for name, value in stored.items() if name not in ("width", "height")}
    presets = {"steps": given["lightning"], "cfg": 1.0} if given.get("lightning") is not None else {}
    chosen = {**defaults, **stored, **presets, **given}
    for name, other in KINDS[kind].needs.items():
        if name in given and chosen.get(other) is None:
            raise RequestError(f"{{{name}}} has no effect without a {{{other}}}")
    try:
        request = KINDS[kind].model_validate(chosen)
    except ValidationError as error:
        raise sentence(error, fields, kind) from error
    if "negative_prompt" in given and request.cfg <= 1:
        raise RequestError(
            f"{{negative_prompt}} has no effect without guidance, a {{cfg}} above 1; it is {request.cfg:g}, 4 is usual"
        )
    return request


def _named(fields: Mapping[str, Any], values: Mapping[str, Any], usual: tuple[int, int]) -> dict[str, Any]:
    """Values that are given, by the names of their fields."""
    values = {name: value for name, value in values.items() if value is not None}
    for name, field in fields.items():
        argument = argument_of(field)
        if argument in values and argument != name:
            if name in values:
                raise RequestError(f"{{{name}}} and {argument} are the same: give one of them")
            values[name] = values.pop(argument)
    if "size" in values and "width" in fields:
        if "width" in values or "height" in values:
            raise RequestError("give either {size} or {width} and {height}, got both")
        values["width"], values["height"] = parse_size(str(values.pop("size")), usual)
    return values
