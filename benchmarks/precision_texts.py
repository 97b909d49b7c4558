"""What 8 and 4 bits cost in read texts: the same captions drawn by the tiny model in bfloat16, int8 and int4, one run.

    OMP_NUM_THREADS=1 python -m benchmarks.precision_texts [--count 100] [--out RESULTS.json]

Captions are held out, with one text of up to six letters, at 128 px and 20 steps, as `quantize tiny --pictures` draws
them; everything between the quantised layers is bfloat16 in all three. Pictures are read by the evaluation's OCR
(`pip install '.[evaluate]'`) and compared with those in bfloat16. Bars: texts read exactly, and words right, within 1
point of bfloat16 in 8 bits and within 3 in 4.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import processor_name
from qwen_image_fast import QwenImagePipeline, build_info
from qwen_image_fast.files import atomic_write
from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
from qwen_image_fast.quantize_report import psnr
from qwen_image_fast.training.evaluation.cases import held_out_cases
from qwen_image_fast.training.evaluation.evaluate_text import Result, drawn_by, evaluate, summary
from qwen_image_fast.training.evaluation.ocr import Reader
from qwen_image_fast.training.synthesis.recipe import tiny

SIDE, STEPS = 128, 20
EXACT = "bfloat16"
BARS = {"int8": 0.01, "int4": 0.03}  # share of captions, or of words, that may be lost
METRICS = ("exact", "word_accuracy")


def draw(count: int) -> dict[str, Sequence[Result]]:
    """The captions, drawn and read, by precision."""
    recipe, reader = tiny(SIDE, ("en",), max_letters=6, max_lines=1), Reader()
    cases = held_out_cases(recipe, count)
    pipe = QwenImagePipeline.from_pretrained(SHIPPED, torch_dtype=torch.bfloat16)
    by = drawn_by(pipe, seed=0, height=SIDE, width=SIDE, num_inference_steps=STEPS, true_cfg_scale=1.0)
    found: dict[str, Sequence[Result]] = {EXACT: list(evaluate(by, cases, recipe, reader))}
    for name in BARS:
        pipe.transformer = QwenImageTransformer2DModel.from_pretrained(
            SHIPPED, subfolder="transformer", torch_dtype=torch.bfloat16, precision=name
        )
        found[name] = list(evaluate(by, cases, recipe, reader))
    return found


def compared(found: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """Of each precision what was read, captions that only it or only bfloat16 drew right, PSNR, and whether its bar is
    reached."""
    kept = ("exact", "word_accuracy", "ned", "colour_accuracy")
    read = {name: {key: summary(results)["en"][key] for key in kept} for name, results in found.items()}
    report: dict[str, Any] = {EXACT: {"read": read[EXACT]}}
    for name, bar in BARS.items():
        pairs = list(zip(found[EXACT], found[name]))
        values = sorted(psnr(a.image, b.image) for a, b in pairs)
        right = [(a.score.exact, b.score.exact) for a, b in pairs]
        lost = {metric: round(read[EXACT][metric] - read[name][metric], 6) for metric in METRICS}
        report[name] = {
            "read": read[name],
            "psnr": {"median": values[len(values) // 2], "least": values[0]},
            "right_only_here": right.count((False, True)), "right_only_in_bfloat16": right.count((True, False)),
            "lost": lost, "bar": bar, "reached": max(lost.values()) <= bar,
        }  # fmt: skip
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    weights = SHIPPED / "transformer" / "diffusion_pytorch_model.safetensors"
    report = {
        "date": datetime.now(UTC).date().isoformat(), "cpu": processor_name(), "units": build_info()["int8_units"],
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(), "captions": given.count,
        "by_precision": compared(draw(given.count)),
    }  # fmt: skip
    text = json.dumps(report, indent=1) + "\n"
    print(text)
    if given.out is not None:
        atomic_write(given.out, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
