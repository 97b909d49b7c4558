"""Rewriting prompts before they are encoded, by a language model of your choice; off unless you set it.

    pipe.prompt_enhancer = OpenAIEnhancer("http://localhost:8000/v1", "qwen-vl-max")

The Qwen-Image models were trained on long captions, and short prompts gain from being written out like them; for edits
the instruction is made unambiguous with the pictures in view (Qwen-Image report, arXiv 2508.02324, sections 3.3, 5.2).
An enhancer is any callable `(prompt, pictures) -> prompt`; `pictures` are the RGB references, none for text to image.
Those here show a picture of more than a megapixel at about one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from qwen_image_fast.chat import Chat, ChatEndpoint, LocalChat
from qwen_image_fast.pipelines.images import shrink

SHOWN_AREA = 1024 * 1024  # pixels: a photograph of 12 megapixels would be tens of megabytes in a request
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


def _ask(chat: Chat, prompt: str, pictures: Sequence[Image.Image]) -> str:
    return chat(instruction_for(pictures), prompt, [shrink(picture, SHOWN_AREA) for picture in pictures])


class OpenAIEnhancer:
    """Any endpoint with OpenAI's chat completions.

    Args:
        base_url: up to and with the version, "http://localhost:8000/v1". model: its name there.
        api_key: sent as a bearer token. timeout: seconds. options: further fields of the request (temperature, seed).
    """

    def __init__(self, base_url: str, model: str, *, api_key: str | None = None, timeout: float = 60.0, **options):
        self._chat = ChatEndpoint(
            base_url, model, api_key=api_key, timeout=timeout, options=options, who="OpenAIEnhancer"
        )

    def __call__(self, prompt: str, pictures: Sequence[Image.Image] = ()) -> str:
        """The enhanced prompt.

        Raises:
            ConnectionError: the endpoint was not reached or refused. ValueError: its answer holds no text.
        """
        return _ask(self._chat, prompt, pictures)


class LocalEnhancer:
    """A transformers chat model; it reads prompts and, with `processor`, pictures.

    Args:
        model: with `generate`. tokenizer: with a chat template. processor: of a vision-language model; without one
            pictures are not shown. max_new_tokens: of the answer. options: further arguments of `generate`.
    """

    def __init__(self, model: Any, tokenizer: Any, processor: Any = None, *, max_new_tokens: int = 300, **options):
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, **options}
        self._chat = LocalChat(model, tokenizer, processor, options=options, who="LocalEnhancer")

    def __call__(self, prompt: str, pictures: Sequence[Image.Image] = ()) -> str:
        """The enhanced prompt; ValueError where the model answers nothing."""
        return _ask(self._chat, prompt, pictures)
