"""What a captioner says about a picture: one question, one JSON answer, checked and, where that is safe, repaired.

Report, section 3.3 (arXiv 2508.02324): a single call gives the caption and its metadata, and every visible text is
transcribed in its own language.
"""

from __future__ import annotations

import dataclasses
import json
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

SYSTEM = "You describe pictures for the training of an image generation model. You answer with one JSON object alone."
CAPTION = """one detailed paragraph: subjects with their number, attributes and places, setting, light, viewpoint, \
style. Only what can be seen. Quote every visible text word for word, in its own language, inside quotation marks."""
_PROMPT = """Look at the picture and answer with one JSON object with exactly these fields, in this order:
"caption": in %s, %s
"image_type": such as photograph, poster, user interface, painting, slide.
"image_style": such as realistic, flat, watercolour, 3D.
"watermarks": a list of the watermarks, each as its text or a description; [] where there are none.
"abnormal_element": true where there is a QR code, a bar code, a mosaic or blur over a part, or a border, else false.
"texts": a list of every other visible text, verbatim, never translated; [] where there is none."""


def prompt_for(language: str = "English", caption: str = CAPTION) -> str:
    """The question. language: of the caption; caption: what it should be."""
    return _PROMPT % (language, caption)


PROMPT = prompt_for()

_LONGEST_CAPTION = 20_000
_NAMES = {
    "type": "image_type", "style": "image_style", "watermark": "watermarks", "watermark_list": "watermarks",
    "abnormal_elements": "abnormal_element", "text": "texts", "visible_text": "texts", "visible_texts": "texts",
}  # fmt: skip
_YES_NO = {"yes": True, "true": True, "no": False, "false": False, "none": False, "": False}
_NOTHING = ("", "none", "no", "n/a", "null")


@dataclass(frozen=True)
class Annotation:
    """caption, image_type, image_style; watermarks: each as its text or a description; abnormal_element: whether there
    is a code, a mosaic, a blur or a border; texts: every other visible text, verbatim."""

    caption: str
    image_type: str
    image_style: str
    watermarks: list[str]
    abnormal_element: bool
    texts: list[str]


class InvalidAnnotation(ValueError):
    """A sentence about why an answer cannot be used."""


def read_annotation(answer: str) -> tuple[Annotation, list[str]]:
    """The annotation in an answer, and what had to be repaired: words around it, a cut-off end, names, types.

    A cut-off answer loses its last, incomplete value: half a caption or half a word is worse than none. Nothing is made
    up: an answer that then lacks a field is rejected.

    Raises:
        InvalidAnnotation: there is no object, a field is missing, or a value means nothing for its field.
    """
    repairs: list[str] = []
    values = _object(answer, repairs)
    fields: dict[str, Any] = {}
    for name, value in values.items():
        plain = re.sub(r"[\s-]+", "_", name.strip().lower())
        plain = _NAMES.get(plain, plain)
        if plain != name:
            repairs.append(f"the field {name!r} is {plain!r}")
        fields[plain] = value
    wanted = dataclasses.fields(Annotation)
    missing = [field.name for field in wanted if field.name not in fields]
    if missing:
        raise InvalidAnnotation(f"the answer lacks {', '.join(missing)}{_because(repairs)}")
    made: dict[str, Any] = {
        name: _text(fields[name], name, repairs) for name in ("caption", "image_type", "image_style")
    }
    made |= {name: _list(fields[name], name, repairs) for name in ("watermarks", "texts")}
    made["abnormal_element"] = _yes_no(fields["abnormal_element"], repairs)
    if not made["caption"]:
        raise InvalidAnnotation("the caption is empty")
    if len(made["caption"]) > _LONGEST_CAPTION:
        raise InvalidAnnotation(f"the caption has {len(made['caption'])} characters, more than {_LONGEST_CAPTION}")
    return Annotation(**made), repairs


def _because(repairs: list[str]) -> str:
    return ": it was cut off" if _CUT in repairs else ""


_CUT = "the answer was cut off: its last value is dropped"


def _object(answer: str, repairs: list[str]) -> dict[str, Any]:
    text = re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL)
    start = text.find("{")
    if start < 0:
        raise InvalidAnnotation(f"the answer has no JSON object: {answer.strip()[:80]!r}")
    text, cut = _balanced(text[start:])
    if cut:
        repairs.append(_CUT)
    elif answer.strip() != text:
        repairs.append("there were words or a fence around the JSON")
    plain = _without_trailing_commas(text)
    if plain != text and not cut:
        repairs.append("commas at the end of lists are dropped")
    try:
        return json.loads(plain, strict=False)
    except (ValueError, RecursionError) as error:
        raise InvalidAnnotation(f"the answer's JSON cannot be read: {error}: {plain[:80]!r}") from error


def _balanced(text: str) -> tuple[str, bool]:
    """The object that text begins with; where its end is missing, up to its last comma, closed; and whether it was."""
    closers: list[str] = []
    inside = escaped = False
    last: tuple[int, list[str]] | None = None
    for place, character in enumerate(text):
        if inside:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                inside = False
        elif character == '"':
            inside = True
        elif character in "{[":
            closers.append("}" if character == "{" else "]")
        elif character in "}]":
            if not closers or closers.pop() != character:
                break
            if not closers:
                return text[: place + 1], False
        elif character == ",":
            last = place, list(closers)
    if last is None:
        raise InvalidAnnotation(f"the answer breaks off before its first value is whole: {text[:80]!r}")
    return text[: last[0]] + "".join(reversed(last[1])), True


def _without_trailing_commas(text: str) -> str:
    strings_or_commas = re.compile(r'"(?:[^"\\]|\\.)*"|,(?=\s*[}\]])', re.DOTALL)
    return strings_or_commas.sub(lambda found: found.group() if found.group() != "," else "", text)


def _text(value: Any, name: str, repairs: list[str]) -> str:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        repairs.append(f"{name} was a list")
        value = ", ".join(value)
    if not isinstance(value, str):
        raise InvalidAnnotation(f"{name} must be a text, got {value!r:.80}")
    plain = "".join(c for c in value if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))
    if plain != value:
        repairs.append(f"{name} had control characters")
    return plain.strip()


def _list(value: Any, name: str, repairs: list[str]) -> list[str]:
    if value is None or (isinstance(value, str) and value.strip().lower() in _NOTHING):
        repairs.append(f"{name} was {value!r}")
        return []
    if isinstance(value, str):
        repairs.append(f"{name} was one text")
        value = [value]
    if not isinstance(value, list):
        raise InvalidAnnotation(f"{name} must be a list of texts, got {value!r:.80}")
    texts = []
    for part in value:
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            repairs.append(f"{name} held objects")
            part = part["text"]
        texts.append(_text(part, name, repairs))
    return [text for text in texts if text]


def _yes_no(value: Any, repairs: list[str]) -> bool:
    if isinstance(value, bool):
        return value
    plain = value.strip().lower() if isinstance(value, str) else value
    if isinstance(plain, str) and plain in _YES_NO:
        repairs.append(f"abnormal_element was {value!r}")
        return _YES_NO[plain]
    raise InvalidAnnotation(f"abnormal_element must be true or false, got {value!r:.80}")
