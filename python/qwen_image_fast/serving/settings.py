"""What a server may be told: where it listens, what it serves, what it refuses. Imports no torch."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qwen_image_fast.parallel.split import Split

MEGABYTE = 2**20
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")


class ApiKey(BaseModel):
    """A key that may be used: its name, for fairness and logs; most priority and requests a minute it may ask for."""

    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(min_length=1)]
    key: Annotated[str, Field(min_length=16)]
    priority: Annotated[int, Field(ge=-4, le=4)] = 0
    per_minute: Annotated[float | None, Field(gt=0)] = None


class Model(BaseModel):
    """What an engine serves. loras, controlnets: sources by the name that requests give."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    name: str
    names: list[str] = []  # others under which requests may ask for it
    loras: dict[str, str] = {}
    controlnets: dict[str, str] = {}
    transformer: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    precision: Literal["int8", "int4"] | None = None  # of the transformer's large layers
    threads: Annotated[int | None, Field(ge=1)] = None
    wave_tokens: Annotated[int, Field(ge=64)] = 2048
    vae_tiling: bool = False
    # Processes that make each picture together, with a GPU each (parallel/split.py).
    guidance: Annotated[int, Field(ge=1, le=2)] = 1
    ulysses: Annotated[int, Field(ge=1)] = 1

    @property
    def split(self) -> Split:
        return Split(self.guidance, self.ulysses)


class Limits(BaseModel):
    """Beyond which requests are refused, before anything is decoded or begun. Bytes, pixels and seconds."""

    model_config = ConfigDict(extra="forbid")
    wait: Annotated[float, Field(gt=0)] = 60.0  # of a request, about, before it is done
    queued: Annotated[int, Field(ge=1)] = 1000
    queued_bytes: Annotated[int, Field(ge=1)] = 512 * MEGABYTE  # of opened pictures
    json_bytes: Annotated[int, Field(ge=1)] = 32 * MEGABYTE
    form_bytes: Annotated[int, Field(ge=1)] = 100 * MEGABYTE
    file_bytes: Annotated[int, Field(ge=1)] = 50 * MEGABYTE
    files: Annotated[int, Field(ge=1)] = 17  # 16 pictures and a mask
    fields: Annotated[int, Field(ge=1)] = 32
    pixels_in: Annotated[int, Field(ge=1)] = 64_000_000
    side_in: Annotated[int, Field(ge=1)] = 16384
    pixels_out: Annotated[int, Field(ge=256)] = 3840 * 2160
    ratio_out: Annotated[float, Field(ge=1)] = 3.0
    decode_seconds: Annotated[float, Field(gt=0)] = 30.0
    drain: Annotated[float, Field(ge=0)] = 120.0
    store_bytes: Annotated[int, Field(ge=1)] = 512 * MEGABYTE
    store_seconds: Annotated[float, Field(gt=0)] = 600.0


class Settings(BaseModel):
    """Of a server. hosts: names under which it may be asked, beside the loopback's and the one it listens on; origins:
    of pages elsewhere that may ask it; url_hosts: from which pictures are fetched, none by default."""

    model_config = ConfigDict(extra="forbid")
    model: Model
    limits: Limits = Limits()
    host: str = "127.0.0.1"
    port: int = 8000
    keys: list[ApiKey] = []
    hosts: list[str] = []
    origins: list[str] = []
    url_hosts: list[str] = []
    log_prompts: bool = False
    store_folder: Path | None = None  # of results; None: in memory

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.host)

    def key_of(self, header: str | None) -> ApiKey | None:
        """The key of an `Authorization` header, compared in constant time."""
        scheme, _, given = (header or "").partition(" ")
        found = None
        digest = hashlib.sha256(given.strip().encode()).digest()
        for key in self.keys:
            same = hmac.compare_digest(hashlib.sha256(key.key.encode()).digest(), digest)
            found = key if same and scheme.lower() == "bearer" else found
        return found

    def may_be_asked_as(self, host: str) -> bool:
        """Whether a `Host` header is one of this server's. A page elsewhere can make its own name point here; it cannot
        send another name, nor a number, nor a key."""
        name = host_name(host)
        if self.keys or name in (*LOOPBACK, self.host.lower(), *(h.lower() for h in self.hosts)):
            return True
        return not self.is_loopback and _is_address(name)


def host_name(header: str) -> str:
    """Of a `Host` header, without the port."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[: header.find("]") + 1]
    return header.rpartition(":")[0] if header.count(":") == 1 else header


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    return _is_address(host) and ipaddress.ip_address(host.strip("[]")).is_loopback


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def read_keys(path: Path) -> list[ApiKey]:
    """A JSON list of keys: [{"name": "studio", "key": "...", "priority": 0, "per_minute": 60}].

    Raises:
        FileNotFoundError: no such file. ValueError: it is not such a list, in one sentence.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        keys = [ApiKey.model_validate(entry) for entry in found] if isinstance(found, list) else []
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: a key's {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except ValueError as error:
        raise ValueError(f"{path} must hold a JSON list of keys, each with a name and a key: {error}") from error
    if not keys:
        raise ValueError(f"{path} must hold a JSON list of keys, each with a name and a key of at least 16 characters")
    for name, values in (("name", [k.name for k in keys]), ("key", [k.key for k in keys])):
        if len(set(values)) < len(values):
            raise ValueError(f"{path}: every {name} must be there once")
    return keys


def named_sources(given: list[str], what: str) -> Mapping[str, str]:
    """Of "name=source"; a source alone is named by its file. what: LoRA or ControlNet."""
    found: dict[str, str] = {}
    for entry in given:
        name, equals, source = entry.partition("=")
        if equals and not (name and source):
            raise ValueError(f"a {what} must be NAME={'FILE' if what == 'LoRA' else 'FOLDER'}, got {entry}")
        name = name if source else Path(entry).stem
        if name in found:
            raise ValueError(f"the {what} name {name} must be given once; NAME=FILE gives another")
        found[name] = source or entry
    return found
