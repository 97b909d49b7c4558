"""The numeric filters of stages 1 and 2 on decoded pictures of 512 x 512: our kernel, numpy, OpenCV.

python -m benchmarks.data_rates --out results.json. Rounds are interleaved; a speed-up is the median of the ratios
within rounds. OpenCV computes the same sums with its own functions; its results are compared with ours first. The
processor time tells what a quiet machine would give. Decoding a JPEG of quality 92, which comes before, is beside them.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from benchmarks.harness import processor_name
from qwen_image_fast import build_info
from qwen_image_fast.ops import reference
from qwen_image_fast.training.data.filters import curation, quality
from qwen_image_fast.training.data.filters.duplicates import perceptual_hash
from qwen_image_fast.training.data.filters.picture import Picture
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.synthesis.photos import find_photos, open_photo

FILTERS = (
    curation.Resolution(256), curation.AspectRatio(high=3), quality.Clarity(0.4), quality.Luma(0.06, 0.93),
    quality.Saturation(high=0.9), quality.RgbEntropy(2.5), quality.Texture(high=16),
)  # fmt: skip


def measured(rgb: np.ndarray) -> list[float]:
    """The scores of the filters and the perceptual hash, as `data filter` computes them after decoding."""
    picture = Picture(Record(b"-"))
    picture.__dict__["rgb"] = rgb
    scores = [one.judge(picture).score or 0.0 for one in FILTERS]
    return [*scores, perceptual_hash(picture.luma)]


def by_numpy(rgb: np.ndarray) -> list[float]:
    with reference():  # here, as the threads of a pool do not have the choice of the thread that made it
        return measured(rgb)


def by_opencv(rgb: np.ndarray) -> list[float]:
    height, width = rgb.shape[:2]
    y = cv2.transform(rgb.astype(np.float32), np.array([[0.299, 0.587, 0.114]], np.float32))
    down, across = cv2.absdiff(y[1:], y[:-1]), cv2.absdiff(y[:, 1:], y[:, :-1])
    gradient = cv2.norm(down, cv2.NORM_L2SQR) / down.size + cv2.norm(across, cv2.NORM_L2SQR) / across.size
    laplacian = cv2.Laplacian(y, cv2.CV_32F)[1:-1, 1:-1]
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    noise = cv2.filter2D(y, cv2.CV_32F, kernel)[1:-1, 1:-1]
    saturation = cv2.split(cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV))[1]
    entropy = 0.0
    for channel in range(3):
        shares = cv2.calcHist([rgb], [channel], None, [256], [0, 256]).ravel() / y.size
        entropy -= float((shares * np.log2(np.where(shares > 0, shares, 1))).sum()) / 3
    clarity = cv2.norm(laplacian, cv2.NORM_L2SQR) / laplacian.size / gradient
    texture = math.sqrt(math.pi / 2) / 6 * cv2.norm(noise, cv2.NORM_L1) / noise.size
    return [
        min(height, width), max(height, width) / min(height, width), clarity, cv2.mean(y)[0] / 255,
        cv2.mean(saturation)[0] / 255, entropy, texture, perceptual_hash(y),
    ]  # fmt: skip


def _jpeg(rgb: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "JPEG", quality=92)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    chosen = parser.parse_args()
    cv2.setNumThreads(1)
    pictures = [
        np.asarray(open_photo(path).resize((512, 512), Image.Resampling.LANCZOS)) for path, _, _ in find_photos(None)
    ]
    for rgb in pictures:
        np.testing.assert_allclose(by_opencv(rgb)[:-1], measured(rgb)[:-1], rtol=2e-2, atol=4e-3)
    files = [_jpeg(rgb) for rgb in pictures] * 6
    pictures *= 6
    variants: dict[str, Callable[[np.ndarray], list[float]]] = {
        "ours": measured, "numpy": by_numpy, "opencv": by_opencv,
    }  # fmt: skip
    cpu: dict[str, list[float]] = {name: [] for name in (*variants, "decoding")}
    seconds: dict[str, dict[int, list[float]]] = {name: {1: [], 2: []} for name in variants}
    for _ in range(chosen.rounds):
        start_cpu = time.process_time()
        for file in files:
            _ = Picture(Record(file)).rgb
        cpu["decoding"].append((time.process_time() - start_cpu) / len(files))
        for threads in (1, 2):
            with ThreadPoolExecutor(threads) as pool:
                for name, function in variants.items():
                    start, start_cpu = time.perf_counter(), time.process_time()
                    list(pool.map(function, pictures))
                    seconds[name][threads].append((time.perf_counter() - start) / len(pictures))
                    cpu[name].append((time.process_time() - start_cpu) / len(pictures))
    result = {
        "date": f"{datetime.date.today()}", "cpu": processor_name(), "kernels": build_info()["cpu_in_use"],
        "load_average": round(os.getloadavg()[1], 1), "pictures": len(pictures), "rounds": chosen.rounds,
        "pictures_per_second": {
            name: {f"{threads} threads": round(1 / statistics.median(found)) for threads, found in by.items()}
            for name, by in seconds.items()
        },
        "cpu_milliseconds_per_picture": {name: round(1e3 * statistics.median(one), 3) for name, one in cpu.items()},
        "times_ours": {
            name: {
                f"{threads} threads": round(
                    statistics.median(a / b for a, b in zip(found, seconds["ours"][threads], strict=True)), 2
                )
                for threads, found in by.items()
            }
            for name, by in seconds.items()
        },
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
