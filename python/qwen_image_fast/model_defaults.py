"""What a model makes best: defaults of a request's fields that a model's folder says, or that released models have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qwen_image_fast.folders import read_json
from qwen_image_fast.request_fields import LARGEST, sentence


class Generation(BaseModel):
    """What a model makes best: defaults of the fields of these names, of the kinds that always have them."""

    model_config = ConfigDict(extra="forbid")
    width: Annotated[int | None, Field(ge=16, le=LARGEST, multiple_of=16)] = None
    height: Annotated[int | None, Field(ge=16, le=LARGEST, multiple_of=16)] = None
    steps: Annotated[int | None, Field(ge=1, le=1000)] = None
    cfg: Annotated[float | None, Field(ge=0, le=100, allow_inf_nan=False)] = None
    negative_prompt: str | None = None


GENERATION_FILE = "generation.json"
# Of released models, by the class of their pipeline, from their READMEs; of others those of the fields.
RELEASED = {
    "QwenImageEditPlusPipeline": Generation(width=1024, height=1024, steps=40),
    "QwenImageEditPipeline": Generation(width=1024, height=1024),
}


def model_class(folder: Path, name: str) -> str:
    """The class that the index of a pipeline's folder names; `name`: what the user calls it.

    Raises:
        FileNotFoundError: there is no index. ValueError: it is damaged.
    """
    if not (folder / "model_index.json").is_file():
        alone = folder / "diffusion_pytorch_model.safetensors"
        hint = f"; a transformer alone goes with a pipeline's folder: --transformer {alone}" if alone.is_file() else ""
        raise FileNotFoundError(f"{name} is not a pipeline's folder: it has no model_index.json{hint}")
    return str(read_json(folder / "model_index.json").get("_class_name"))


def generation_of(folder: Path, model_class: str) -> Generation:
    """The model's defaults: of its `generation.json`, else of the released models. ValueError: the file is wrong."""
    path = folder / GENERATION_FILE
    if not path.is_file():
        return RELEASED.get(model_class, Generation())
    try:
        return Generation.model_validate(read_json(path))
    except ValidationError as error:
        raise ValueError(f"{path}: {sentence(error, Generation.model_fields, 'a model')}") from error
