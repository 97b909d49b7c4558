"""Asking a language model about pictures: any endpoint with OpenAI's chat completions, or a model of transformers.

Both are called as `chat(system, prompt, pictures)` and answer with a text.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

Chat = Callable[[str, str, Sequence[Image.Image]], str]
_LONGEST_ANSWER = 16 * 2**20


class EndpointError(ConnectionError):
    """The endpoint was not reached, was too slow, or refused.

    Attributes:
        status: of HTTP; None where there was no answer.
        retry_after: seconds that the endpoint asks to wait; None where it does not say.
    """

    def __init__(self, sentence: str, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(sentence)
        self.status, self.retry_after = status, retry_after


class NoText(ValueError):
    """The model answered without a text."""


class NoCompletion(EndpointError, NoText):
    """What the endpoint answered is no chat completion: a page of HTML, no choices, no text."""


class ChatEndpoint:
    """Any endpoint with OpenAI's chat completions.

    Args:
        base_url: up to and with the version, "http://localhost:8000/v1". model: its name there.
        api_key: sent as a bearer token. timeout: seconds until the whole answer must be here.
        options: further fields of the request (temperature, seed, max_tokens).
        who: begins the sentences of errors.
    """

    def __init__(
        self, base_url: str, model: str, *, api_key: str | None = None, timeout: float = 60.0,
        options: dict[str, Any] | None = None, who: str = "ChatEndpoint",
    ) -> None:  # fmt: skip
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"{who}: base_url must begin with http:// or https://, got {base_url!r}")
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model, self.api_key, self.timeout = model, api_key, timeout
        self.options, self.who = options or {}, who

    def __call__(self, system: str, prompt: str, pictures: Sequence[Image.Image | bytes] = ()) -> str:
        """The answer.

        Args:
            pictures: those that are bytes of a JPEG are sent as they are, the others as PNG.

        Raises:
            EndpointError: the endpoint was not reached, took longer than `timeout`, or refused; `NoCompletion`, which
                is a `NoText` too: its answer is no chat completion or holds no text.
        """
        content: Any = prompt
        if pictures:
            shown = [{"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in pictures]
            content = [*shown, {"type": "text", "text": prompt}]
        messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        body = json.dumps({"model": self.model, "messages": messages, **self.options}).encode()
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        answer = self._sent(urllib.request.Request(self.url, body, headers))
        try:
            text = json.loads(answer)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            begins = answer[:60].decode("utf-8", "replace")
            what = f"{self.who}: {self.url} must answer with a chat completion, got {begins!r}"
            raise NoCompletion(what) from error
        try:
            return checked(self.who, text)
        except ValueError as error:
            raise NoCompletion(str(error)) from error

    def _sent(self, request: urllib.request.Request) -> bytes:
        end = time.monotonic() + self.timeout
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                # The socket's timeout is of each read; an endpoint that trickles must not take forever.
                answer = b""
                while part := response.read1(2**16):
                    answer += part
                    if time.monotonic() > end:
                        raise TimeoutError(f"no whole answer within {self.timeout:g} s")
                    if len(answer) > _LONGEST_ANSWER:
                        raise ConnectionError(f"the answer is longer than {_LONGEST_ANSWER} bytes")
                return answer
        except (OSError, http.client.HTTPException) as error:
            status = error.code if isinstance(error, urllib.error.HTTPError) else None
            wait = error.headers.get("Retry-After", "") if isinstance(error, urllib.error.HTTPError) else ""
            sentence = f"{self.who}: {self.url} could not answer: {error}"
            raise EndpointError(sentence, status, float(wait) if wait.isdecimal() else None) from error


class LocalChat:
    """A transformers chat model; it reads prompts and, with `processor`, pictures.

    Args:
        model: with `generate`. tokenizer: with a chat template. processor: of a vision-language model; without one
            pictures are not shown. options: arguments of `generate`. who: begins the sentences of errors.
    """

    def __init__(
        self, model: Any, tokenizer: Any, processor: Any = None, *, options: dict[str, Any], who: str = "LocalChat"
    ) -> None:
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.options, self.who = options, who

    def __call__(self, system: str, prompt: str, pictures: Sequence[Image.Image] = ()) -> str:
        """The answer; `NoText` where the model answers nothing."""
        user: Any = prompt
        if pictures and self.processor is not None:
            user = [*({"type": "image"} for _ in pictures), {"type": "text", "text": prompt}]
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        source = self.tokenizer if self.processor is None else self.processor
        text = source.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        images = {"images": list(pictures)} if pictures and self.processor is not None else {}
        inputs = source(text=[text], return_tensors="pt", **images)
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        answer = self.model.generate(**inputs, **self.options)[0, inputs["input_ids"].shape[1] :]
        return checked(self.who, self.tokenizer.decode(answer, skip_special_tokens=True))


def checked(who: str, text: Any) -> str:
    """A text without the space around it; `NoText`, a ValueError, where it is none."""
    if not isinstance(text, str) or not text.strip():
        raise NoText(f"{who}: the answer must be a text, got {text!r}")
    return text.strip()


def _data_url(picture: Image.Image | bytes) -> str:
    if isinstance(picture, bytes):
        return "data:image/jpeg;base64," + base64.b64encode(picture).decode()
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
