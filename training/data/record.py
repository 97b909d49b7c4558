"""The one type that every stage of the data pipeline takes and gives."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

CATEGORIES = ("Nature", "Design", "People", "Synthetic")
CAPTION_SETS = ("raw", "recaption", "fused")


@dataclass(frozen=True)
class Record:
    """A picture with what is known about it.

    Attributes:
        image: the encoded file, as found; empty where it could not be read.
        captions: by kind: `raw` from the source, `recaption` from a captioner, `fused` from both (report, section 3.2).
        source, licence: where it comes from and what may be done with it.
        category: of the report's taxonomy (section 3.1), or "" where unknown.
        metadata: anything else, of types that JSON has. `node` is the place in the taxonomy of stage 7.
        origin: where it was read, such as `photos/cat.png` or `a.tar:00012`; names it in the audit.
        fault: a sentence where it could not be read whole; the first filter rejects it with that.

    Raises:
        ValueError: the category is not of the taxonomy, or a caption is not text.
    """

    image: bytes
    captions: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    licence: str = ""
    category: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""
    fault: str = ""

    def __post_init__(self) -> None:
        if self.category and self.category not in CATEGORIES:
            raise ValueError(f"the category must be one of {', '.join(CATEGORIES)}, got {self.category!r}")
        for kind, text in self.captions.items():
            if not isinstance(text, str):
                raise ValueError(f"the caption {kind} must be text, got {type(text).__name__}")

    @cached_property
    def id(self) -> str:
        """sha256 of the image's bytes in hexadecimal: the same wherever and whenever it is read."""
        return hashlib.sha256(self.image).hexdigest()

    @property
    def caption(self) -> str:
        """That of `metadata["caption_set"]`, which `data filter` draws, else the best there is: fused, else recaption,
        else raw, else the first; "" where there is none."""
        for kind in (self.metadata.get("caption_set"), *reversed(CAPTION_SETS)):
            if isinstance(kind, str) and kind in self.captions:
                return self.captions[kind]
        return next(iter(self.captions.values()), "")

    def described(self) -> dict[str, Any]:
        """Everything but the picture, for a JSON file; `record_of` reads it back."""
        return {
            "id": self.id,
            "captions": dict(self.captions),
            "source": self.source,
            "licence": self.licence,
            "category": self.category,
            "metadata": dict(self.metadata),
            "origin": self.origin,
        }


def record_of(image: bytes, fields: Mapping[str, Any], origin: str, defaults: Mapping[str, str]) -> Record:
    """A record from the fields of a JSON object or a table row; what does not fit becomes its fault.

    Args:
        image: the encoded file.
        fields: `captions`, `caption` or `text` (see `captions_of`), `source`, `licence` or `license`, `category`,
            `metadata`; every other field joins the metadata. `id` and `origin` of an earlier run are dropped.
        origin: where it was read.
        defaults: `source`, `licence` and `category` where the fields have none.
    """
    rest = {name: value for name, value in fields.items() if value is not None and name not in ("id", "origin")}
    try:
        captions, weights = captions_of(rest)
        if weights:
            rest["caption_weights"] = weights
        licence = rest.pop("license", "")
        known = {
            "source": _taken(rest, "source", "", str) or defaults.get("source", ""),
            "licence": _taken(rest, "licence", licence, str) or defaults.get("licence", ""),
            "category": _taken(rest, "category", "", str) or defaults.get("category", ""),
        }
        metadata = {**_taken(rest, "metadata", {}, Mapping), **rest}
        json.dumps([captions, metadata], ensure_ascii=False).encode()  # lone surrogates and dates cannot be stored
        return Record(image, captions, metadata=metadata, origin=origin, **known)
    except (ValueError, TypeError) as error:
        return Record(image, source=defaults.get("source", ""), origin=origin, fault=str(error))


def captions_of(fields: dict[str, Any]) -> tuple[dict[str, str], dict[str, float]]:
    """Captions by kind, and the weights of those that have one; taken out of `fields`.

    `captions`: an object by kind, or a list of texts or of {text, weight}, whose kinds are then "1", "2", ...
    `caption`, or in its absence `text` where there are no captions: the raw one, or such a list.

    Raises:
        ValueError: they are something else.
    """
    given = fields.pop("captions", None)
    single = fields.pop("caption", None)
    if single is None and not given:
        single = fields.pop("text", None)
    if isinstance(single, list) and not given:
        given, single = single, None
    captions: dict[str, str] = {}
    weights: dict[str, float] = {}
    if isinstance(given, list):
        for number, entry in enumerate(given, 1):
            text = entry.get("text") if isinstance(entry, Mapping) else entry
            captions[str(number)] = text
            if isinstance(entry, Mapping) and "weight" in entry:
                weights[str(number)] = _weight(entry["weight"])
    elif isinstance(given, Mapping):
        captions = {str(kind): text for kind, text in given.items() if text is not None}
    elif given is not None:
        raise ValueError(f"the field captions must be an object or a list, got {given!r:.80}")
    if single is not None:
        captions["raw"] = single
    return captions, weights


def _weight(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"the weight of a caption must be a number of at least 0, got {value!r:.80}")
    return float(value)


def _taken(fields: dict[str, Any], name: str, default: Any, kind: type) -> Any:
    value = fields.pop(name, default)
    if not isinstance(value, kind):
        raise ValueError(f"the field {name} must be {'text' if kind is str else 'an object'}, got {value!r:.80}")
    return value
