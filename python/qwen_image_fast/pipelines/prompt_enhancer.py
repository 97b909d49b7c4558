"""Rewriting prompts before they are encoded, by a language model of your choice; off unless you set it.

    pipe.prompt_enhancer = OpenAIEnhancer("http://localhost:8000/v1", "qwen-vl-max")

The Qwen-Image models were trained on long captions, and short prompts gain from being written out like them; for edits
the instruction is made unambiguous with the pictures in view (Qwen-Image report, arXiv 2508.02324, sections 3.3, 5.2).
An enhancer is any callable `(prompt, pictures) -> prompt`; `pictures` are the RGB references, none for text to image.
"""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

PromptEnhancer = Callable[[str, Sequence[Image.Image]], str]

REWRITE = (
    "You write captions for an image generation model. Rewrite the user's request as one vivid, concrete caption of at "
    "most 150 words: name the subjects with their number, colours, materials and places, the setting, light, viewpoint "
    "and style. Keep every fact, name and number of the request, add nothing that contradicts it, and keep its "
    "language. Text that shall appear in the picture stays word for word inside quotation marks. Answer with the "
    "caption alone."
)
POLISH = (
    "You make instructions for an image editing model precise. Look at the pictures and rewrite the user's instruction "
    "in one or two short sentences: say which object changes, where it is, and what it becomes, and that everything "
    "else, above all faces and identities, stays as it is. Do not invent further changes, and keep the instruction's "
    "language. Text that shall appear stays word for word inside quotation marks. Several pictures are Picture 1, "
    "Picture 2 and so on. Answer with the instruction alone."
)


def instruction_for(pictures: Sequence[Image.Image]) -> str:
    """What the language model is told to do: rewrite a prompt, or with pictures polish an edit."""
    return POLISH if pictures else REWRITE


class OpenAIEnhancer:
    """Any endpoint with OpenAI's chat completions.

    Args:
        base_url: up to and with the version, "http://localhost:8000/v1". model: its name there.
        api_key: sent as a bearer token. timeout: seconds. options: further fields of the request (temperature, seed).
    """

    def __init__(self, base_url: str, model: str, *, api_key: str | None = None, timeout: float = 60.0, **options):
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"OpenAIEnhancer: base_url must begin with http:// or https://, got {base_url!r}")
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model, self.api_key, self.timeout, self.options = model, api_key, timeout, options

    def __call__(self, prompt: str, pictures: Sequence[Image.Image] = ()) -> str:
        """The enhanced prompt.

        Raises:
            ConnectionError: the endpoint was not reached or refused. ValueError: its answer holds no text.
        """
        content: Any = prompt
        if pictures:
            shown = [{"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in pictures]
            content = [*shown, {"type": "text", "text": prompt}]
        messages = [{"role": "system", "content": instruction_for(pictures)}, {"role": "user", "content": content}]
        body = json.dumps({"model": self.model, "messages": messages, **self.options}).encode()
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(self.url, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                answer = response.read()
        except (urllib.error.URLError, OSError) as error:
            raise ConnectionError(f"OpenAIEnhancer: {self.url} could not enhance the prompt: {error}") from error
        try:
            text = json.loads(answer)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"OpenAIEnhancer: {self.url} must answer with a chat completion") from error
        return _checked("OpenAIEnhancer", text)


class LocalEnhancer:
    """A transformers chat model; it reads prompts and, with `processor`, pictures.

    Args:
        model: with `generate`. tokenizer: with a chat template. processor: of a vision-language model; without one
            pictures are not shown. max_new_tokens: of the answer. options: further arguments of `generate`.
    """

    def __init__(self, model: Any, tokenizer: Any, processor: Any = None, *, max_new_tokens: int = 300, **options):
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.options = {"max_new_tokens": max_new_tokens, "do_sample": False, **options}

    def __call__(self, prompt: str, pictures: Sequence[Image.Image] = ()) -> str:
        """The enhanced prompt; ValueError where the model answers nothing."""
        user: Any = prompt
        if pictures and self.processor is not None:
            user = [*({"type": "image"} for _ in pictures), {"type": "text", "text": prompt}]
        messages = [{"role": "system", "content": instruction_for(pictures)}, {"role": "user", "content": user}]
        source = self.tokenizer if self.processor is None else self.processor
        text = source.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        images = {"images": list(pictures)} if pictures and self.processor is not None else {}
        inputs = source(text=[text], return_tensors="pt", **images)
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        answer = self.model.generate(**inputs, **self.options)[0, inputs["input_ids"].shape[1] :]
        return _checked("LocalEnhancer", self.tokenizer.decode(answer, skip_special_tokens=True))


def _checked(who: str, text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{who}: the answer must be a text, got {text!r}")
    return text.strip()


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
