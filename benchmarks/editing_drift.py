"""Whether a picture moves, grows or fades when it is edited again and again: the tiny model, six colours in a row.

    python -m benchmarks.editing_drift

Each edit starts from the picture that the last one made, at its exact size. Measured against the first picture: how far
the text has moved (phase correlation of what is not ground, in pixels) and how much has changed away from the text
(PSNR). The same pictures also go as often through the VAE alone. Writes
benchmarks/results/<date>-<processor>-editing-drift.json and docs/images/editing-drift.png.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from skimage.registration import phase_cross_correlation
from tqdm import tqdm

from benchmarks.harness import describe_machine, slug
from qwen_image_fast import QwenImageEditPlusPipeline, QwenImagePipeline
from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.pipelines.images import pad_to_multiple, to_tensor
from qwen_image_fast.pipelines.latents import to_output

ROOT = Path(__file__).resolve().parent.parent
# A word and the size that the drawn picture is cut to; two of them are no multiple of 16.
PICTURES = (("HELLO", (128, 128)), ("RIVER", (121, 93)), ("CLOUD", (128, 112)), ("STONE", (117, 128)))
COLOURS = ("blue", "green", "purple", "black", "orange", "red")
CALL: dict[str, Any] = {"num_inference_steps": 20, "true_cfg_scale": 1.0, "progress": False}
MARGIN = 4  # pixels around the text that count as part of it


def ink(picture: Image.Image) -> np.ndarray:
    """How far each pixel is from the ground's colour, in [0, 1] of the farthest."""
    pixels = np.asarray(picture, dtype=float)
    distance = np.abs(pixels - np.median(pixels.reshape(-1, 3), axis=0)).max(-1)
    return distance * (distance > 40) / distance.max()


def compare(first: Image.Image, later: Image.Image) -> dict[str, float]:
    before = ink(first)
    rows, columns = np.nonzero(before)
    away = np.ones(before.shape, dtype=bool)
    away[max(0, rows.min() - MARGIN) : rows.max() + MARGIN + 1,
         max(0, columns.min() - MARGIN) : columns.max() + MARGIN + 1] = False  # fmt: skip
    shift = phase_cross_correlation(before, ink(later), upsample_factor=50, normalization=None)[0]
    error = (np.asarray(first, dtype=float) - np.asarray(later, dtype=float))[away]
    return {"down": -shift[0], "right": -shift[1], "psnr_away": float(10 * np.log10(255**2 / np.square(error).mean()))}


def through_the_vae(vae: Any, picture: Image.Image) -> Image.Image:
    pixels = to_tensor(pad_to_multiple(picture)).to(vae.dtype)
    decoded = vae.decode(vae.encode(pixels).latent_dist.mode(), return_dict=False)[0][0, :, 0]
    return to_output(decoded[:, : picture.height, : picture.width], "pil")


@torch.inference_mode()
def main() -> None:
    editor = QwenImageEditPlusPipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)
    drawer = QwenImagePipeline(**{name: getattr(editor, name) for name in QwenImagePipeline.parts})
    machine, records, rows = describe_machine("cpu"), [], []
    for word, size in tqdm(PICTURES, desc="pictures", unit="picture"):
        prompt = f'"{word}" in red on a white ground'
        first = drawer(prompt, height=128, width=128, seed=3, **CALL).images[0].crop((0, 0, *size))
        edited, coded, row = first, first, [first]
        for number, colour in enumerate(COLOURS):
            edited = editor(edited, f"make it {colour}", seed=number, **CALL).images[0]
            coded = through_the_vae(editor.vae, coded)
            assert edited.size == coded.size == size
            row.append(edited)
            record = {"word": word, "size": size, "edits": number + 1, "colour": colour}
            records.append({**record, "edited": compare(first, edited), "vae_alone": compare(first, coded)})
        rows.append(row)
    report = {"date": datetime.date.today().isoformat(), "machine": machine, "call": CALL, "edits": records}
    name = f"{report['date']}-{slug(machine['device'])}-editing-drift.json"
    (ROOT / "benchmarks" / "results" / name).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sheet = Image.new("RGB", (132 * len(rows[0]), 132 * len(rows)), "lightgrey")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (132 * x, 132 * y))
    sheet.quantize(256).save(ROOT / "docs" / "images" / "editing-drift.png", optimize=True)
    for kind in ("edited", "vae_alone"):
        moved = [max(abs(r[kind]["down"]), abs(r[kind]["right"])) for r in records]
        away = [r[kind]["psnr_away"] for r in records]
        print(f"{kind}: moved at most {max(moved):.2f} pixels, at least {min(away):.1f} dB away from the text")


if __name__ == "__main__":
    main()
