"""Images to latents, on the fly or once into a memory-mapped file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qwen_image_fast.checkpoint import json_bytes, read_json
from qwen_image_fast.files import atomic_write
from qwen_image_fast.models.rope import ImageShape
from qwen_image_fast.pipelines.latents import pack_latents
from qwen_image_fast.training.recipe.fields import differences
from qwen_image_fast.training.worker_pool import worker_pool

TOKENS, PIXELS, INDEX, META = "tokens.raw", "pixels.raw", "index.jsonl", "cache.json"
JOURNAL = "unfinished.jsonl"  # of a cache that is being written: what it is made of, then a line for each span


@torch.no_grad()
def encode_images(vae: Any, images: Sequence[np.ndarray]) -> list[Tensor]:
    """(mean of the VAE's distribution - latents_mean) / latents_std as packed tokens, [tokens, 4 * z_dim] float32.

    Args:
        images: uint8 [H, W, 3], sides multiples of 16; those of one size go through the VAE together.
    """
    weight = next(vae.parameters())
    mean, std = (
        torch.tensor(values, device=weight.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    by_size: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        by_size.setdefault(image.shape, []).append(i)
    out: dict[int, Tensor] = {}
    for places in by_size.values():
        z = vae.encode(to_pixels([images[i] for i in places], weight)).latent_dist.mode().float()
        out.update(zip(places, pack_latents((z - mean) / std)))
    return [out[i] for i in range(len(images))]


def to_pixels(images: Sequence[np.ndarray], like: Tensor) -> Tensor:
    """uint8 [H, W, 3] images of one size -> [B, 3, 1, H, W] in [-1, 1], type and device of `like`."""
    stacked = torch.from_numpy(np.stack(images)).to(like.device)
    return stacked.permute(0, 3, 1, 2).unsqueeze(2).to(like.dtype) / 127.5 - 1


class Made(NamedTuple):
    """A sample to be encoded: text, target and references, their shapes; (origin, reason) of those it stands for; what
    each token of the target counts, if not all alike."""

    text: str
    images: list[np.ndarray]
    shapes: list[ImageShape]
    rejected: list[tuple[str, str]]
    token_weights: np.ndarray | None = None


@dataclass
class Begun:
    """What an earlier, interrupted `write_cache` has left: its samples, and how far its files go (rows of tokens, bytes
    of pixels and of the index); (origin, reason) of what was left out."""

    samples: int = 0
    rows: int = 0
    pixels: int = 0
    index: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)


def begin_cache(folder: Path, channels: int, made_of: Mapping[str, Any]) -> Begun:
    """Begin a cache in `folder`, or find how far the same one has come.

    Args:
        channels: of its tokens. made_of: all that its samples depend on, as JSON has it.

    Raises:
        ValueError: another cache was begun there, or its files are shorter than they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    journal = folder / JOURNAL
    # What follows the last line's end was cut off.
    whole = journal.read_text(encoding="utf-8").split("\n")[:-1] if journal.is_file() else []
    if not whole:
        for name in (TOKENS, PIXELS, INDEX):
            (folder / name).write_bytes(b"")
        atomic_write(journal, lambda file: file.write(_line(made_of)))
        return Begun()
    before, *spans = (json.loads(line) for line in whole)
    remedy = f"give the same again to go on, another --out, or remove {folder}"
    if changes := differences(before, json.loads(_line(made_of))):
        raise ValueError(f"cache-latents: {folder} was begun with another recipe ({'; '.join(changes)}): {remedy}")
    begun = Begun(rejected=[(origin, reason) for span in spans for origin, reason in span.pop("rejected")])
    if spans:
        begun = Begun(**spans[-1], rejected=begun.rejected)
    for name, size in ((TOKENS, 2 * channels * begun.rows), (PIXELS, begun.pixels), (INDEX, begun.index)):
        if (folder / name).stat().st_size < size:
            raise ValueError(f"cache-latents: {folder / name} is shorter than it was: remove {folder}")
        os.truncate(folder / name, size)
    atomic_write(journal, lambda file: file.write("".join(f"{line}\n" for line in whole).encode()))
    return begun


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def write_cache(
    folder: Path,
    vae: Any,
    samples: Callable[[int], Made],
    count: int,
    begun: Begun,
    batch: int = 64,
    pixels: bool = False,
    workers: int = 0,
    progress: Callable[[int], Any] = lambda done: None,
    rejected: Callable[[str, str], Any] = lambda origin, reason: None,
    held_out: int = 0,
) -> None:
    """Encode samples 0 ... count - 1 into `folder`, of which the last `held_out` are for validation.

    All tokens lie one after another in one float16 file, with `pixels` all images in a uint8 file beside it, for a
    condition encoder that looks at them; `index.jsonl` has a line for each sample with its text and the rows and shape
    of each image. `cache.json` is written last: a folder without it is not a cache. `begun`: of `begin_cache`; what is
    there is not made again, and the files are those of a call that was never interrupted. `workers`: processes that
    draw and encode, one thread each, on a copy of the VAE; 0: this one. The file is the same. `rejected` is called for
    every sample that another one stands for.
    """
    for origin, reason in begun.rejected:
        rejected(origin, reason)
    with (
        open(folder / TOKENS, "ab") as tokens,
        open(folder / PIXELS, "ab") as stored,
        open(folder / INDEX, "ab") as index,
        open(folder / JOURNAL, "ab") as journal,
    ):
        spans = [range(start, min(start + batch, count)) for start in range(begun.samples, count, batch)]
        for span, (group, latents) in zip(spans, _encoded(vae, samples, spans, workers)):
            encoded = iter(latents)
            left_out = [why for made in group for why in made.rejected]
            for origin, reason in left_out:
                rejected(origin, reason)
            for made in group:
                record: dict[str, Any] = {"caption": made.text, "images": [], "pixels": []}
                if made.token_weights is not None:
                    record["weights"] = [round(float(weight), 3) for weight in made.token_weights]
                for image, shape in zip(made.images, made.shapes):
                    value = next(encoded)
                    tokens.write(value.tobytes())
                    record["images"].append([begun.rows, *shape])
                    begun.rows += len(value)
                    if pixels:
                        stored.write(image.tobytes())
                        record["pixels"].append([begun.pixels, *image.shape[:2]])
                        begun.pixels += image.size
                begun.index += index.write(_line(record))
            begun.samples = span.stop
            for file in (tokens, stored, index):
                file.flush()
            journal.write(_line({**{name: vars(begun)[name] for name in ("samples", "rows", "pixels", "index")},
                                 "rejected": left_out}))  # fmt: skip
            journal.flush()
            progress(span.stop)
    meta = {
        "samples": count, "rows": begun.rows, "channels": 4 * vae.config.z_dim, "pixels": begun.pixels,
        "held_out": held_out,
    }  # fmt: skip
    atomic_write(folder / META, lambda file: file.write(json_bytes(meta)))
    (folder / JOURNAL).unlink()


def _encoded(
    vae: Any, samples: Callable[[int], Made], spans: list[range], workers: int
) -> Iterator[tuple[list[Made], list[np.ndarray]]]:
    """For each span in order: its samples, and the latents of all their images, float16."""
    if not workers:
        yield from (_encode_span(vae, samples, span) for span in spans)
        return
    with worker_pool(workers, _start_worker, vae, samples) as pool:
        yield from pool.map(_encode_in_worker, spans)


def _encode_span(vae: Any, samples: Callable[[int], Made], span: range) -> tuple[list[Made], list[np.ndarray]]:
    group = [samples(i) for i in span]
    latents = encode_images(vae, [image for made in group for image in made.images])
    return group, [value.to("cpu", torch.float16).numpy() for value in latents]


# Of the process: a pool starts its workers for one cache alone, and has no other way to hand them what all tasks need.
_worker: tuple[Any, Callable[[int], Made]]


def _start_worker(vae: Any, samples: Callable[[int], Made]) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = vae, samples


def _encode_in_worker(span: range) -> tuple[list[Made], list[np.ndarray]]:
    return _encode_span(*_worker, span)


@dataclass
class Cached:
    """text; latents of target and references, [tokens, channels] float32; their (frames, height, width) in tokens;
    their pixels, uint8 [H, W, 3], or none; what each token of the target counts."""

    text: str
    latents: list[np.ndarray]
    shapes: list[ImageShape]
    pixels: list[np.ndarray]
    token_weights: np.ndarray | None = None


class LatentCache:
    """Reads a cache; the tokens stay in the file until they are asked for, and processes share its pages.

    Raises:
        FileNotFoundError: the folder has no finished cache. ValueError: it is damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        if not (self.folder / META).is_file():
            raise FileNotFoundError(f"data.cache must be a finished latent cache, {self.folder} has no {META}")
        self.meta = read_json(self.folder / META)
        try:
            self.records = [json.loads(line) for line in (self.folder / INDEX).read_text(encoding="utf-8").splitlines()]
            if len(self.records) != self.meta["samples"]:
                raise ValueError(f"{INDEX} has {len(self.records)} of {self.meta['samples']} samples")
            self._open()
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"data.cache: {self.folder} is damaged ({error}); write it again") from error

    def _open(self) -> None:
        shape = (self.meta["rows"], self.meta["channels"])
        self.tokens = np.memmap(self.folder / TOKENS, dtype=np.float16, mode="r", shape=shape)
        self.pixels = None
        if self.meta["pixels"]:
            self.pixels = np.memmap(self.folder / PIXELS, dtype=np.uint8, mode="r", shape=(self.meta["pixels"],))

    def __len__(self) -> int:
        return len(self.records)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tokens": None, "pixels": None}  # a worker process maps the file itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def read(self, place: int) -> Cached:
        record = self.records[place]
        shapes = [(f, h, w) for _, f, h, w in record["images"]]
        latents = [
            np.asarray(self.tokens[start : start + f * h * w], dtype=np.float32) for start, f, h, w in record["images"]
        ]
        pixels = []
        if self.pixels is not None:
            pixels = [
                np.array(self.pixels[start : start + 3 * h * w]).reshape(h, w, 3) for start, h, w in record["pixels"]
            ]
        weights = np.array(record["weights"], np.float32) if "weights" in record else None
        return Cached(record["caption"], latents, shapes, pixels, weights)
