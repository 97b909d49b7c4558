"""What all kinds of requests have in common; the kinds themselves are in request.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from qwen_image_fast.files import not_text
from qwen_image_fast.request_fields import LARGEST, Files, Loras, RequestError, about, argument_of, tokens_of

EDITING = tuple(f"QwenImageEdit{name}Pipeline" for name in ("Plus", "", "Inpaint", "PlusInpaint"))
DRAWING = (
    "QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline", "QwenImageControlNetPipeline",
    "QwenImageControlNetInpaintPipeline", *EDITING,
)  # fmt: skip
Opened = Mapping[str, Any]  # by field: the opened picture, or the list of them

MODEL = "Folder or hub name"
TINY = f"{MODEL}; tiny: the model that comes with the package."
TINY_EDITS = f"{TINY[:-1]}; tiny-vision: that for tasks of vision."
ONE_SIDE = "Of the result; default: that of the last picture, or what keeps its ratio."
WEIGHT = "The weights' type; auto: bfloat16 on a GPU or in 8 bits, else float32."
FILE = "in a file: GGUF, ComfyUI's and others"
LORA = "A LoRA: its file, folder or hub name (owner/name/file.safetensors), =WEIGHT; several times."


class Request(BaseModel):
    """What all kinds have in common."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    kind: str
    prompt: str = about(..., "What the picture shows.", argument="prompt")
    model: str = about("Qwen/Qwen-Image", TINY)
    negative_prompt: str = about(" ", "What to lead away from; needs guidance.", argument="negative_prompt")
    cfg: float = about(4.0, "Guidance scale; 1: none.", argument="true_cfg_scale", ge=1, le=100, allow_inf_nan=False)
    steps: int = about(50, "Denoising steps.", argument="num_inference_steps", ge=1, le=1000)
    seed: int | None = about(
        None, "Of picture one; each further one has the next. Without: a new one.", argument="seed", ge=0, le=2**62
    )
    lora: Loras = about([], LORA)
    transformer: str | None = about(None, f"The transformer's weights, {FILE}.")
    text_encoder: Files = about(None, "The text encoder's, too; llama.cpp's vision tower is a second file.")
    vae: str | None = about(None, "The VAE's, too.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = about("auto", WEIGHT)
    precision: Literal["int8", "int4"] | None = about(None, "The transformer in 8 or 4 bits: an approximation.")

    # The pipelines of model_index.json that it can be made with, what it does with them, and one that can.
    models: ClassVar[Sequence[str]] = DRAWING
    purpose: ClassVar[str] = "draw"
    # Fields without effect unless another is given.
    needs: ClassVar[Mapping[str, str]] = {}
    # Fields with pictures that it cannot do without.
    inputs: ClassVar[Sequence[str]] = ()

    @model_validator(mode="before")
    @classmethod
    def _no_truth_values(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Which pydantic would take for the number 1; nor bytes that the command line's encoding could not read."""
        for name in ("prompt", "negative_prompt"):
            if isinstance(values.get(name), str) and not_text(values[name]):
                raise RequestError(f"the {{{name}}} is not text: half of a surrogate pair; in a shell LC_ALL=C.UTF-8")
        for name, field in cls.model_fields.items():
            if isinstance(values.get(name), bool) and field.annotation is not bool:
                raise RequestError(f"{{{name}}} must not be a truth value, got {values[name]}")
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Request:
        self.check()
        return self

    def check(self) -> None:
        """What no field can check alone. Raises RequestError."""
        self.check_model()
        if not self.prompt.strip():
            raise RequestError("the {prompt} is empty")

    def check_model(self) -> None:
        if not self.model.strip():
            raise RequestError("the {model} is empty: give a folder or a hub name such as Qwen/Qwen-Image")

    def pipeline(self, model_class: str) -> str:
        """The class of the pipeline that makes it from a model whose index names `model_class`, or RequestError."""
        if model_class not in self.models:
            raise RequestError(
                f"{{model}} must hold a {' or '.join(self.models)} to {self.purpose}, {self.model} holds a "
                f"{model_class}; one that can is {type(self).model_fields['model'].default}"
            )
        return "QwenImagePipeline"

    def size(self, opened: Opened) -> tuple[int, int]:
        """Width and height of the result."""
        raise NotImplementedError

    @property
    def each(self) -> int:
        """Pictures for a prompt."""
        return getattr(self, "images", 1)

    @property
    def steps_taken(self) -> int:
        """The steps that are taken, with a strength below one not all."""
        starts = getattr(self, "mask", None) or self.kind == "image_to_image"
        strength = getattr(self, "strength", 1.0) if starts else 1.0
        return self.steps - int(max(self.steps - min(self.steps * strength, self.steps), 0))

    def parts(self, opened: Opened) -> list[int]:
        """Image tokens of all that goes through every step for one picture: the result, and what stands beside it."""
        return [tokens_of(*self.size(opened))]

    def tokens(self, opened: Opened) -> int:
        """Of them together."""
        return sum(self.parts(opened))

    def call(self, opened: Opened) -> dict[str, Any]:
        """The arguments of the pipeline's call."""
        arguments = {}
        for name, field in type(self).model_fields.items():
            value, argument = opened.get(name, getattr(self, name)), argument_of(field)
            if argument and value is not None and (name != "negative_prompt" or self.cfg > 1):
                arguments[argument] = value
        if "width" in type(self).model_fields:
            arguments["width"], arguments["height"] = self.size(opened)
        return arguments


class Prompted(Request):
    max_sequence_length: int = about(
        512, "Tokens of the prompt that are kept.", argument="max_sequence_length", ge=1, le=1024, unit="tokens"
    )


class Counted(Request):
    images: int = about(
        1, "Pictures for each prompt, computed together.", argument="num_images_per_prompt", ge=1, le=1000
    )
    lightning: Literal[4, 8] | None = about(None, "Schedule of 4 or 8 steps, for weights or a LoRA of Lightning.")


class Resized(Counted):
    """The result has the size of the last picture, or any other."""

    width: int | None = about(None, ONE_SIDE, argument="width", ge=1, le=LARGEST, unit="pixels")
    height: int | None = about(None, ONE_SIDE, argument="height", ge=1, le=LARGEST, unit="pixels")

    def size(self, opened: Opened) -> tuple[int, int]:
        picture = opened["image"][-1] if isinstance(opened["image"], list) else opened["image"]
        scale = (self.width or 0) / picture.width or (self.height or 0) / picture.height or 1
        scaled = [max(1, round(side * scale)) for side in picture.size]
        return self.width or scaled[0], self.height or scaled[1]
