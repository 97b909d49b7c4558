"""Stage 3, alignment: captions that say nothing, too little or too much, or something else than the picture."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from .base import Filter, Measure, Verdict
from .picture import Picture

_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_WORD = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]|[^\W\u3400-\u9fff\uf900-\ufaff]+")
_REFUSALS = re.compile(
    r"^\s*(i['’]?m (very )?sorry|sorry[,，]|i (can(no|['’])t|am (unable|not able) to)|as an ai\b|unfortunately, i\b)"
    r"|^\s*(抱歉|对不起|很抱歉|我(无法|不能)|作为(一个|一名)?(ai|人工智能))",
    re.IGNORECASE,
)
_ADDRESS = re.compile(
    r"^\s*((https?://|www\.)\S+|\S+\.(jpe?g|png|gif|webp|bmp|tiff?)|(img|dsc|image)[-_ ]?\d+)\s*$", re.I
)
_MARKUP = re.compile(r"</?(a|b|br|div|img|li|p|script|span|td|tr)\b[^>]*>", re.I)


def words(text: str) -> list[str]:
    """The words of a text; every Han character is one."""
    return _WORD.findall(text)


def has_han(text: str) -> bool:
    return _HAN.search(text) is not None


class TokenLength(Measure):
    """Tokens of the caption: of a tokenizer where the recipe names one, else words and Han characters.

    Args:
        low, high: limits.
        tokenizer: folder or hub name of a Hugging Face tokenizer; "": count words.
    """

    name, stage = "token_length", 3
    too_low, too_high = "the caption is too short", "the caption is too long"

    def __init__(self, low: float, high: float, tokenizer: str = ""):
        super().__init__(low, high)
        self._tokenizer = None
        if tokenizer:
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(tokenizer))
            except (OSError, ValueError) as error:
                raise FileNotFoundError(
                    f"token_length: there is no tokenizer in {tokenizer}: give a Hugging Face folder or hub name as "
                    "`captions.tokenizer`, or leave it empty to count words"
                ) from error

    def score(self, picture: Picture) -> float:
        caption = picture.record.caption
        return float(len(words(caption) if self._tokenizer is None else self._tokenizer(caption)["input_ids"]))


class InvalidCaption(Filter):
    """Rejects captions that are empty, a refusal, an address or file name, markup, control characters or repetition.

    Score: the share of words that are different from all before, 0 to 1; None for an empty caption.

    Args:
        low: smallest share, of captions of 20 words or more.
    """

    name, stage = "invalid_caption", 3

    def __init__(self, low: float):
        self._low = low

    def judge(self, picture: Picture) -> Verdict:
        caption = picture.record.caption
        found = words(caption.lower())
        if not found:
            return Verdict(None, "the caption has no words")
        score = len(set(found)) / len(found)
        if any(unicodedata.category(c) == "Cc" and c not in "\n\r\t" for c in caption):
            return Verdict(score, "the caption has control characters")
        for pattern, what in ((_REFUSALS, "a refusal"), (_ADDRESS, "an address or the name of a file")):
            if pattern.search(caption):
                return Verdict(score, f"the caption is {what}: {caption.strip()[:60]!r}")
        if match := _MARKUP.search(caption):
            return Verdict(score, f"the caption has markup: {match.group()[:40]!r}")
        if len(found) >= 20 and score < self._low:
            return Verdict(
                score, f"the caption repeats itself: {score:.2f} of its words are new, less than {self._low:g}"
            )
        return Verdict(score)


CHINESE_CLIP_TOKENS = 52  # the context of its authors' tokenizer (github.com/OFA-Sys/Chinese-CLIP)


class Scorer(Protocol):
    """Anything that says how well a text fits an image of uint8 [height, width, 3]; larger is better."""

    def __call__(self, image: np.ndarray, text: str) -> float: ...


class ClipScorer:
    """Cosine of the image's and the text's embedding, by any model of transformers with `get_image_features`.

    Chinese-CLIP and SigLIP 2 are such models.

    Args:
        path: the folder of the model, or its hub name.

    Raises:
        FileNotFoundError: there is no model.
    """

    def __init__(self, path: str):
        import torch
        from transformers import AutoModel, AutoProcessor

        try:
            model = AutoModel.from_pretrained(path, use_safetensors=True).eval()
            self._model = model.to("cuda" if torch.cuda.is_available() else "cpu")
            self._processor = AutoProcessor.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"alignment: there is no model in {path or 'an empty path'}: give the Hugging Face folder of a "
                "Chinese-CLIP as `captions.chinese_clip` or of a SigLIP 2 as `captions.siglip`, or add alignment to "
                "the recipe's `without`"
            ) from error

    def __call__(self, image: np.ndarray, text: str) -> float:
        import torch

        inputs = self._processor(images=np.ascontiguousarray(image), **self._words([text]))
        with torch.inference_mode():
            output = self._model(**inputs.to(self._model.device))
        return float(torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)[0])

    def pictures(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [images, width], the embeddings of images of one call, of length 1."""
        inputs = self._processor(images=[np.ascontiguousarray(image) for image in images], return_tensors="pt")
        return self._features(self._model.get_image_features, inputs)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, width], as `pictures`."""
        return self._features(self._model.get_text_features, self._processor(**self._words(texts)))

    def _features(self, function: Callable[..., Any], inputs: Any) -> np.ndarray:
        import torch

        with torch.inference_mode():
            found = function(**inputs.to(self._model.device))
        found = found if isinstance(found, torch.Tensor) else found.pooler_output  # of transformers before 5, and since
        return torch.nn.functional.normalize(found.float(), dim=-1).cpu().numpy()

    def _words(self, texts: Sequence[str]) -> dict[str, Any]:
        """Texts as in training, which not every tokenizer knows. Chinese-CLIP saw 52 tokens, but has places for more.
        SigLIP saw small letters, padded to the full length without a mask; it pools the last place."""
        config = self._model.config
        longest, mask = config.text_config.max_position_embeddings, True
        if config.model_type == "chinese_clip":
            longest = min(longest, CHINESE_CLIP_TOKENS)
        elif config.model_type in ("siglip", "siglip2"):
            texts, mask = [text.lower() for text in texts], False
        return {
            "text": [*texts], "return_tensors": "pt", "padding": "max_length", "truncation": True,
            "max_length": longest, "return_attention_mask": mask,
        }  # fmt: skip


class Alignment(Measure):
    """How well the raw caption fits the picture: by one scorer for captions with Han characters, one for the others.

    As in the report, only raw captions are measured, and of sets only the raw one. None where there is no raw caption
    or no scorer for it.

    Args:
        low: smallest score.
        chinese, other: the scorers.
    """

    name, stage = "alignment", 3
    too_low = "the caption does not fit the picture"

    def __init__(self, low: float, chinese: Scorer | None, other: Scorer | None):
        super().__init__(low)
        self._chinese, self._other = chinese, other

    def score(self, picture: Picture) -> float | None:
        record = picture.record
        caption = record.captions.get("raw", "") if record.metadata.get("caption_set", "raw") == "raw" else ""
        scorer = self._chinese if has_han(caption) else self._other
        return None if scorer is None or not caption else scorer(picture.work, caption)


def clip_scorer(path: str) -> ClipScorer | None:
    """The scorer of a folder, or None for an empty path."""
    return ClipScorer(os.path.expanduser(path)) if path else None
