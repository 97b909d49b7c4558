"""A CLIP of transformers: directions of pictures and texts, and CVTG-2K's CLIPScore."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from qwen_image_fast.training.evaluation.bench.items import Item, Question, picture_key
from qwen_image_fast.training.evaluation.bench.model_folders import (
    check_readable,
    config_of,
    folder_name,
    read_on_device,
)

if TYPE_CHECKING:
    import torch

_WHAT = "a folder with a CLIP of transformers"
_DEPICTS = "A photo depicts {}"


class Clip:
    """The two towers of a folder, read when they are first asked, in float32, on the GPU where there is one.

    Args:
        path: a folder with CLIPModel: config, model.safetensors or its shards, tokenizer and preprocessor_config.json.
            The benchmarks' authors take OpenAI's ViT-L/14.

    Raises:
        ValueError: it is none, or its weights are pickles. OSError, when first asked: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        path = path.expanduser()
        kind = config_of(path, "--clip", _WHAT).get("model_type")
        if kind != "clip":
            raise ValueError(f"evaluate bench: --clip must be {_WHAT}, got {kind} in {path}")
        check_readable(path, "--clip")
        self.name = folder_name(path)
        self._path = path
        self._parts: tuple[Any, Any] | None = None
        self._one_at_a_time = threading.Lock()

    def pictures(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """float32 [pictures, width], of length 1 each."""
        model, processor = self._loaded()
        return self._direction(model.get_image_features, processor(images=[*pictures], return_tensors="pt"))

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """float32 [texts, width], of length 1 each; a text is cut where CLIP's context ends, after 77 tokens."""
        model, processor = self._loaded()
        longest = model.config.text_config.max_position_embeddings
        words = processor(text=[*texts], return_tensors="pt", padding=True, truncation=True, max_length=longest)
        return self._direction(model.get_text_features, words)

    def _loaded(self) -> tuple[Any, Any]:
        with self._one_at_a_time:
            if self._parts is None:
                from transformers import CLIPModel, CLIPProcessor

                self._parts = read_on_device(self._path, "CLIP", CLIPModel, CLIPProcessor)
            return self._parts

    def _direction(self, features: Any, inputs: Any) -> torch.Tensor:
        import torch

        model, _ = self._loaded()
        with torch.inference_mode():
            found = features(**inputs.to(model.device))
        found = found if isinstance(found, torch.Tensor) else found.pooler_output  # of transformers before 5, and since
        return torch.nn.functional.normalize(found, dim=-1).cpu()


def clip_score(cosine: float) -> float:
    """2.5 max(cosine, 0) (Hessel et al., arXiv 2104.08718), the CLIPScore of CVTG-2K: 0.80 is a cosine of 0.32."""
    return 2.5 * max(cosine, 0.0)


def ask_clip_score(item: Item, number: int, picture: Path) -> list[Question]:
    """How near a picture is to "A photo depicts " and its prompt, as CVTG-2K and the paper of CLIPScore ask."""
    key, text = f"{picture_key(item, number)}.clip", _DEPICTS.format(item.prompt)
    return [Question(key, "", text, (picture,), lambda said: clip_score(float(said)))]
