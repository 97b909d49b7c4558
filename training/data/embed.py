"""Vectors of length 1 of records and of what they are looked for by: of captions, or of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from qwen_image_fast.folders import local_folder, resolve_folder

from .filters.picture import BrokenImage, Picture
from .record import Record

if TYPE_CHECKING:
    from .recipe import RetrieveRecipe

_BATCH = 32


class Embedder(Protocol):
    """What makes vectors: float32 [items, width], of length 1."""

    def records(self, records: Sequence[Record]) -> tuple[list[np.ndarray | None], list[str]]:
        """Of each record its vector, or None and a sentence why there is none; else the sentence is empty."""

    def queries(self, texts: Sequence[str], pictures: Sequence[Path]) -> np.ndarray:
        """Of texts, then of the pictures in files; ValueError where one cannot be decoded."""


class CaptionEmbedder:
    """Captions by the text encoder of a pipeline: the mean of its states over the tokens of a text.

    Args:
        model: the folder of a pipeline, its hub name, or tiny.

    Raises:
        FileNotFoundError: there is no text encoder.
    """

    def __init__(self, model: str):
        import torch
        from transformers import AutoTokenizer

        from qwen_image_fast.models.text_encoder import load_text_encoder

        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        folder = resolve_folder(model)
        try:
            self._model = load_text_encoder(folder / "text_encoder", torch_dtype=dtype, device=device, vision=False)
            self._tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"retrieve: there is no text encoder in {model}: give the folder of a Qwen-Image pipeline as `model`, "
                f"or the model of `by: pictures` ({error})"
            ) from error

    def records(self, records: Sequence[Record]) -> tuple[list[np.ndarray | None], list[str]]:
        reasons = [record.fault or ("" if record.caption.strip() else "it has no caption") for record in records]
        return _where(reasons, self._vectors([one.caption for one, why in zip(records, reasons) if not why])), reasons

    def queries(self, texts: Sequence[str], pictures: Sequence[Path]) -> np.ndarray:
        return self._vectors(texts)

    def _vectors(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        from qwen_image_fast.models.text_encoder import encode_prompts

        rows = []
        with torch.inference_mode():
            for start in range(0, len(texts), _BATCH):
                some = list(texts[start : start + _BATCH])
                states = encode_prompts(self._model, self._tokenizer, some, max_sequence_length=1024)
                rows += [state.double().mean(0).cpu().numpy() for state in states]
        return of_length_one(np.array(rows).reshape(len(texts), -1))


class PictureEmbedder:
    """Pictures by a model of transformers that sees pictures and reads texts, such as SigLIP 2 or Chinese-CLIP.

    Args:
        model: its folder or hub name. max_pixels: larger pictures are not decoded.

    Raises:
        FileNotFoundError: there is no such model.
    """

    def __init__(self, model: str, max_pixels: int):
        from .filters.captions import ClipScorer

        self._max_pixels = max_pixels
        try:
            self._model = ClipScorer(str(resolve_folder(model)))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"retrieve: there is no model of pictures and texts in {model}: give the folder of a SigLIP 2 or a "
                "Chinese-CLIP as `model`, or choose `by: captions`"
            ) from error

    def records(self, records: Sequence[Record]) -> tuple[list[np.ndarray | None], list[str]]:
        reasons, rows = [], []
        for start in range(0, len(records), _BATCH):
            pictures, why = [], []
            for record in records[start : start + _BATCH]:
                try:
                    pictures.append(Picture(record, self._max_pixels).work)
                    why.append("")
                except BrokenImage as error:
                    why.append(str(error))
            reasons += why
            rows += _where(why, self._model.pictures(pictures) if pictures else np.empty((0, 0), np.float32))
        return rows, reasons

    def queries(self, texts: Sequence[str], pictures: Sequence[Path]) -> np.ndarray:
        rows = [self._model.texts([text]) for text in texts]  # one at a time: their lengths may not be alike
        for path in pictures:
            try:
                rows.append(self._model.pictures([Picture(Record(path.read_bytes()), self._max_pixels).work]))
            except BrokenImage as error:
                raise ValueError(f"retrieve: {path} is to be looked for, but {error}") from error
        return np.concatenate(rows)


def embedder_of(recipe: RetrieveRecipe) -> Embedder:
    """That of a recipe. Errors as of the classes."""
    if recipe.by == "captions":
        return CaptionEmbedder(recipe.model)
    return PictureEmbedder(recipe.model, recipe.max_pixels)


def check_model(recipe: RetrieveRecipe) -> None:
    """FileNotFoundError, before anything is read, where `model` is neither a folder nor a name of the hub."""
    local_folder(recipe.model)


def of_length_one(rows: np.ndarray) -> np.ndarray:
    """float32; rows of zeros stay."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.maximum(length, 1e-12)).astype(np.float32)


def _where(reasons: Sequence[str], vectors: np.ndarray) -> list[np.ndarray | None]:
    rows = iter(vectors)
    return [None if why else next(rows) for why in reasons]
