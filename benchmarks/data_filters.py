"""Precision and recall of the data filters on planted defects, their rate, and their peak memory.

python -m benchmarks.data_filters --records 1000. Clean records are random crops of scikit-image's photographs; one in
three has one defect. Filters that need a downloaded model are not measured.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import io
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFilter

from qwen_image_fast.training.data.pipeline import run_filters
from qwen_image_fast.training.data.recipe import FilterRecipe, SourceRecipe
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.data.shards import write_shards
from qwen_image_fast.training.synthesis.photos import find_photos, open_photo

EXPECTED = {
    "truncated": "broken_file", "repeated": "exact_duplicate", "re-encoded": "near_duplicate", "turned": "rotation",
    "blurred": "clarity", "dark": "luma", "bright": "luma", "oversaturated": "saturation", "plain": "rgb_entropy",
    "noisy": "texture", "refused": "invalid_caption", "compressed": "image_quality", "bordered": "border",
}  # fmt: skip


def corpus(count: int, seed: int = 0) -> Iterator[Record]:
    """Records whose `metadata["defect"]` says what is wrong, "" for none."""
    rng = np.random.default_rng(seed)
    photos = [open_photo(path) for path, _, _ in find_photos(None)]
    last = None
    for number in range(count):
        defect = str(rng.choice(list(EXPECTED))) if last and rng.random() < 1 / 3 else ""
        photo = photos[4 if defect == "oversaturated" else rng.integers(len(photos))]  # 4: a colourful one
        record = _record(_crop(photo, rng), defect, last, number, rng)
        if not defect:
            last = record
        yield record


def _crop(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    share = rng.uniform(0.55, 0.85)
    width, height = round(photo.width * share), round(photo.height * share)
    left, top = rng.integers(photo.width - width + 1), rng.integers(photo.height - height + 1)
    crop = photo.crop((left, top, left + width, top + height)).rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC)
    inner = crop.crop((width // 5, height // 5, width * 4 // 5, height * 4 // 5))
    scale = 288 / min(inner.size)
    # Enlarging would blur it: the crop is sharpened back to what a camera gives.
    large = inner.resize((round(inner.width * scale), round(inner.height * scale)), Image.Resampling.LANCZOS)
    large = large.filter(ImageFilter.UnsharpMask(2, 120, 0)) if scale > 1 else large
    return large.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else large


def _record(image: Image.Image, defect: str, last: Record | None, number: int, rng: np.random.Generator) -> Record:
    caption, exif, quality = f"a photograph, number {number} of many", Image.Exif(), 92
    if defect == "blurred":
        image = image.filter(ImageFilter.GaussianBlur(3))
    elif defect in ("dark", "bright"):
        offset = 0 if defect == "dark" else 240
        image = image.point(lambda value: offset + value // 17)
    elif defect == "oversaturated":
        hue, saturation, value = image.convert("HSV").split()
        image = Image.merge("HSV", (hue, saturation.point(lambda s: 250), value)).convert("RGB")
    elif defect == "plain":
        ground = Image.new("RGB", (512, 512), "#3080c0")
        ground.paste(image.resize((96, 96)), tuple(int(v) for v in rng.integers(0, 400, 2)))
        image = ground
    elif defect == "noisy":
        pixels = np.asarray(image, np.float32)
        image = Image.fromarray(np.clip(pixels + rng.normal(0, 60, pixels.shape), 0, 255).astype(np.uint8))
    elif defect == "bordered":
        ImageDraw.Draw(image).rectangle((0, 0, image.width - 1, image.height - 1), outline="black", width=16)
    elif defect == "turned":
        exif[0x0112] = int(rng.choice([3, 6, 8]))
    elif defect == "refused":
        caption = "I'm sorry, but I can't describe this picture."
    elif defect == "compressed":
        quality = 5
    elif defect == "re-encoded" and last:
        image, quality = Image.open(io.BytesIO(last.image)), 60
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


def measure(count: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        defects: list[str] = []

        def noted() -> Iterator[Record]:
            for record in corpus(count):
                defects.append(str(record.metadata["defect"]))
                yield dataclasses.replace(record, metadata={})

        write_shards(noted(), folder / "in")
        recipe = FilterRecipe(sources=[SourceRecipe(str(folder / "in"))], stages=[1, 2, 3, 5, 6, 7])
        recipe.without = ["nsfw", "refined_resolution", "codes"]
        start = time.perf_counter()
        run_filters(recipe, folder / "out")
        rate = count / (time.perf_counter() - start)
        found = pq.read_table(folder / "out" / "audit.parquet", columns=["filter"]).column(0).to_pylist()
    pairs = collections.Counter(zip(defects, found, strict=True))
    table = {}
    for wanted in dict.fromkeys(EXPECTED.values()):
        planted = [defect for defect, one in EXPECTED.items() if one == wanted]
        right = sum(pairs[defect, wanted] for defect in planted)
        table[wanted] = (right, sum(f == wanted for f in found), sum(d in planted for d in defects))
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"table": table, "rate": rate, "memory": kib / 1024, "pairs": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1000)
    result = measure(parser.parse_args().records)
    print("| filter | precision | recall | planted |\n|---|---|---|---|")
    for name, (right, found, planted) in result["table"].items():
        print(f"| {name} | {right / max(1, found):.3f} | {right / max(1, planted):.3f} | {planted} |")
    print(f"\n{result['rate']:.0f} records a second, peak memory {result['memory']:.0f} MiB")
    for (defect, found), number in sorted(result["pairs"].items(), key=str):
        if EXPECTED.get(defect) != found:
            print(f"{number:6} {defect or 'clean'} -> {found or 'kept'}")


if __name__ == "__main__":
    main()
