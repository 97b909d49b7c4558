"""Precision and recall of the data filters on planted defects, their rate, and their peak memory.

python -m benchmarks.data_filters --records 20000 --out results.json. Clean records are random crops of scikit-image's
photographs under a random smooth light, so that thousands of nine photographs do not look alike; one in three has one
defect. Filters that need a downloaded model are not measured. The peak is that of the filtering process alone.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import io
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tqdm import tqdm

from benchmarks.harness import processor_name
from qwen_image_fast.training.data.pipeline import run_filters
from qwen_image_fast.training.data.recipe import FilterRecipe, SourceRecipe
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.data.shards import write_shards
from qwen_image_fast.training.synthesis.photos import find_photos, open_photo

SIDE = 160
EXPECTED = {
    "truncated": "broken_file", "repeated": "exact_duplicate", "re-encoded": "near_duplicate", "turned": "rotation",
    "blurred": "clarity", "dark": "luma", "bright": "luma", "oversaturated": "saturation", "plain": "rgb_entropy",
    "noisy": "texture", "refused": "invalid_caption", "compressed": "image_quality", "bordered": "border",
    "watermarked": "watermark", "named": "invalid_caption",
    "marked up": "invalid_caption", "repeating": "invalid_caption",
    # Before the picture that they are copies of, which must stay.
    "blurred first": "clarity", "smaller first": "near_duplicate",
}  # fmt: skip
_THEN = {"blurred first": "sharp after its blur", "smaller first": "larger after its copy"}


def corpus(count: int, seed: int = 1) -> Iterator[Record]:
    """Records whose `metadata["defect"]` says what is wrong, "" for none."""
    rng = np.random.default_rng(seed)
    photos = [open_photo(path) for path, _, _ in find_photos(None)]
    last, better = None, None
    for number in range(count):
        defect = str(rng.choice(list(EXPECTED))) if last and rng.random() < 1 / 3 else ""
        photo = photos[4 if defect == "oversaturated" else rng.integers(len(photos))]  # 4: a colourful one
        if better is not None:
            picture, defect, better = better[0], better[1], None
        elif defect in _THEN:
            picture = crop(photo, rng, SIDE * 5 // 4 if defect == "smaller first" else SIDE)
            better = picture, _THEN[defect]
        else:
            picture = crop(photo, rng, SIDE)
        record = _record(picture, defect, last, number, rng)
        if not defect:
            last = record
        yield record


def crop(photo: Image.Image, rng: np.random.Generator, side: int) -> Image.Image:
    share = rng.uniform(0.55, 0.85)
    width, height = round(photo.width * share), round(photo.height * share)
    left, top = rng.integers(photo.width - width + 1), rng.integers(photo.height - height + 1)
    scale = side / min(width, height)
    size = round(width * scale), round(height * scale)
    small = photo.resize(size, Image.Resampling.LANCZOS, (left, top, left + width, top + height), reducing_gap=2)
    if rng.random() < 0.5:
        small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    light = Image.fromarray(rng.uniform(0.35, 1.0, (6, 6)).astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    lit = np.asarray(small, np.float32) * np.asarray(light)[..., None]
    return Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8))


def _watermarked(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    size = int(rng.integers(14, 20))
    font, word = ImageFont.load_default(size), str(rng.choice(["SAMPLE", "STOCK", "photo.example", "PREVIEW"]))
    across, down = int(font.getlength(word)) + int(rng.integers(6, 16)), size + int(rng.integers(14, 30))
    layer = Image.new("L", image.size, 0)
    for top in range(-down, image.height, down):
        for left in range(-across, image.width, across):
            ImageDraw.Draw(layer).text((left, top), word, font=font, fill=255)
    strength = rng.uniform(0.4, 0.6)
    return Image.composite(Image.new("RGB", image.size, "white"), image, layer.point(lambda v: int(v * strength)))


def _record(image: Image.Image, defect: str, last: Record | None, number: int, rng: np.random.Generator) -> Record:
    caption, exif, quality = f"a photograph, number {number} of many", Image.Exif(), 92
    if defect in ("blurred", "blurred first"):
        image = image.filter(ImageFilter.GaussianBlur(3))
    elif defect == "smaller first":
        image = image.resize((image.width * 4 // 5, image.height * 4 // 5), Image.Resampling.LANCZOS)
    elif defect in ("dark", "bright"):
        offset = 0 if defect == "dark" else 240
        image = image.point(lambda value: offset + value // 17)
    elif defect == "oversaturated":
        hue, saturation, value = image.convert("HSV").split()
        image = Image.merge("HSV", (hue, saturation.point(lambda s: 250), value)).convert("RGB")
    elif defect == "plain":
        ground = Image.new("RGB", (SIDE, SIDE), tuple(int(v) for v in rng.integers(60, 200, 3)))
        ground.paste(image.resize((SIDE // 5, SIDE // 5)), tuple(int(v) for v in rng.integers(0, SIDE * 4 // 5, 2)))
        image = ground
    elif defect == "noisy":
        pixels = np.asarray(image, np.float32)
        image = Image.fromarray(np.clip(pixels + rng.normal(0, 60, pixels.shape), 0, 255).astype(np.uint8))
    elif defect == "bordered":
        ImageDraw.Draw(image).rectangle((0, 0, image.width - 1, image.height - 1), outline="black", width=SIDE // 16)
    elif defect == "turned":
        exif[0x0112] = int(rng.choice([3, 6, 8]))
    elif defect == "watermarked":
        image = _watermarked(image, rng)
    elif defect == "named":
        caption = f"https://photos.example/{number}/view.html?size=large"
    elif defect == "marked up":
        caption = f"<p>a photograph, number {number}</p> of many"
    elif defect == "repeating":
        caption = f"buy now {number} " * 20
    elif defect == "refused":
        caption = "I'm sorry, but I can't describe this picture."
    elif defect == "compressed":
        quality = 5
    elif defect == "re-encoded" and last:
        image, quality = (
            Image.open(io.BytesIO(last.image)),
            int(rng.integers(75, 90)),
        )  # not so low that it goes for its blocks
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, exif=exif)
    content = file.getvalue()
    if defect == "truncated":
        content = content[: len(content) // 2]
    elif defect == "repeated" and last:
        content = last.image
    return Record(
        content, {"raw": caption}, "planted", category="Nature", metadata={"defect": defect}, origin=str(number)
    )


def measure(count: int, folder: Path) -> dict[str, Any]:
    """Write a corpus and filter it in a process of its own."""
    defects: list[str] = []

    def noted() -> Iterator[Record]:
        for record in tqdm(corpus(count), total=count, unit="record", mininterval=10):
            defects.append(str(record.metadata["defect"]))
            yield dataclasses.replace(record, metadata={})

    write_shards(noted(), folder / "in")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds, memory = pool.apply(_filter, (folder,))
    found = pq.read_table(folder / "out" / "audit.parquet", columns=["filter"]).column(0).to_pylist()
    pairs = collections.Counter(zip(defects, found, strict=True))
    table = {}
    for wanted in dict.fromkeys(EXPECTED.values()):
        planted = [defect for defect, one in EXPECTED.items() if one == wanted]
        right = sum(pairs[defect, wanted] for defect in planted)
        hits, there = sum(f == wanted for f in found), sum(d in planted for d in defects)
        table[wanted] = {
            "precision": right / max(1, hits), "recall": right / max(1, there), "planted": there, "found": hits,
        }  # fmt: skip
    wrong = [
        {"planted": defect or "nothing", "found": one or "nothing", "records": number}
        for (defect, one), number in pairs.most_common()
        if EXPECTED.get(defect) != one
    ]
    return {
        "records": count, "side": SIDE, "records_per_second": count / seconds, "peak_mib": memory, "filters": table,
        "wrong": wrong,
    }  # fmt: skip


def recipe_of(source: Path) -> FilterRecipe:
    """Limits for pictures of SIDE."""
    recipe = FilterRecipe(sources=[SourceRecipe(str(source))], stages=[1, 2, 3, 5, 6, 7])
    recipe.without = ["nsfw", "refined_resolution", "codes"]
    # The photographs are three times as large: reduced to SIDE they are sharper, and their files smaller.
    recipe.curation.min_side, recipe.curation.min_bytes, recipe.quality.min_clarity = SIDE, 500, 0.9
    recipe.quality.max_saturation = 0.9  # of the photographs one is of a red cup
    recipe.refinement.max_watermark = 15.5  # the smaller the picture, the fewer shifts to stand out of
    return recipe


def _filter(folder: Path) -> tuple[float, float]:
    start = time.perf_counter()
    run_filters(recipe_of(folder / "in"), folder / "out")
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, nargs="+", default=[1000], help="of each run")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    chosen = parser.parse_args()
    runs = []
    for count in chosen.records:
        with tempfile.TemporaryDirectory() as name:
            runs.append(measure(count, Path(name)))
        print("| filter | precision | recall | planted |\n|---|---|---|---|")
        for name, one in runs[-1]["filters"].items():
            print(f"| {name} | {one['precision']:.3f} | {one['recall']:.3f} | {one['planted']} |")
        print(f"\n{runs[-1]['records_per_second']:.0f} records a second, peak memory {runs[-1]['peak_mib']:.0f} MiB")
        for one in runs[-1]["wrong"]:
            print(f"{one['records']:6} {one['planted']} -> {one['found']}")
        if chosen.out:
            result = {"date": f"{datetime.date.today()}", "cpu": processor_name(), "runs": runs}
            chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
