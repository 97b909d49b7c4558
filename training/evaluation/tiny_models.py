"""A model drawing, editing and reconstructing for TinyEval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from qwen_image_fast.pipelines.edit_plus import QwenImageEditPlusPipeline
from qwen_image_fast.pipelines.text_to_image import QwenImagePipeline
from qwen_image_fast.training.evaluation.tiny_cases import PICTURES, Asked, digest, edits, pictures
from qwen_image_fast.training.evaluation.tiny_eval import VAE, Judged, run_edits, run_pictures, run_vae
from qwen_image_fast.training.synthesis.sample import EditSample


@dataclass(frozen=True)
class TinyRun:
    """TinyEval of one model.

    Args:
        model: diffusers-layout folder, hub name, or tiny.
        tasks: of `tiny_eval.TASKS`. count: pictures of each.
        size: of the pictures, in pixels; sources of edits are enlarged to it, results are judged at 128.
        seed: picture i of a task gets seed + i. batch: pictures at a time. sampling: arguments of the pipeline.
    """

    model: str
    tasks: Sequence[str]
    count: int
    size: int
    seed: int
    batch: int
    sampling: dict[str, Any]

    def judged(self) -> list[Judged]:
        """Every picture of every task, with a bar."""
        asked, pairs = self._asked(), self._pairs()
        vae = self._right() if VAE in self.tasks else []
        editing = QwenImageEditPlusPipeline.from_pretrained(self.model) if pairs else None
        # One set of weights where both are needed; a folder without a vision tower can still draw.
        drawing = QwenImagePipeline.from_pipe(editing) if editing else QwenImagePipeline.from_pretrained(self.model)
        found: list[Judged] = []
        with tqdm(total=len(asked) + len(pairs) + len(vae), unit="picture") as bar:
            for task in self.tasks:
                own = [one for one in asked if one.task == task]
                ours = [pair for pair in pairs if f"edit {pair.kind}" == task]
                runs = run_pictures(self._drawn_by(drawing), own, self.batch)
                for results in (runs, run_edits(self._edited_by(editing), ours, self.batch)):
                    for one in results:
                        found.append(one)
                        bar.update()
            reconstruct = lambda asked, first: through(drawing.vae, [one.right for one in asked])  # noqa: E731
            for one in run_vae(reconstruct, vae, self.batch):
                found.append(one)
                bar.update()
        return found

    def settings(self) -> dict[str, Any]:
        """What a result depends on besides the model; `prompts` is a hash of all of them."""
        sampling = {"steps": self.sampling["num_inference_steps"], "guidance": self.sampling["true_cfg_scale"]}
        prompts = digest([*self._asked(), *self._right()] if VAE in self.tasks else self._asked(), self._pairs())
        return {"prompts": prompts, "count": self.count, "size": self.size, **sampling, "seed": self.seed}

    def _asked(self) -> list[Asked]:
        return [one for task in self.tasks if task in PICTURES for one in pictures(task, self.count)]

    def _pairs(self) -> list[EditSample]:
        kinds = [task.removeprefix("edit ") for task in self.tasks if task.startswith("edit ")]
        return [pair for kind in kinds for pair in edits(kind, self.count)]

    def _right(self) -> list[Asked]:
        """As many right pictures of every task."""
        return [one for task in PICTURES for one in pictures(task, max(1, self.count // len(PICTURES)))]

    def _drawn_by(self, pipe: Any):
        def draw(asked: Sequence[Asked], first: int) -> list[np.ndarray]:
            made = pipe(
                [one.prompt for one in asked], seed=self.seed + first, height=self.size, width=self.size,
                output_type="np", progress=False, **self.sampling,
            )  # fmt: skip
            return [_bytes(image) for image in made.images]

        return draw

    def _edited_by(self, pipe: Any):
        def edit(pairs: Sequence[EditSample], first: int) -> list[np.ndarray]:
            sources = [Image.fromarray(pair.source) for pair in pairs]
            if self.size != sources[0].width:
                sources = [s.resize((self.size, self.size), Image.Resampling.BICUBIC) for s in sources]
            made = pipe(
                image=[[source] for source in sources], prompt=[pair.instruction for pair in pairs],
                seed=self.seed + first, height=self.size, width=self.size, output_type="np", progress=False,
                **self.sampling,
            )  # fmt: skip
            return [_bytes(image) for image in made.images]

        return edit


def through(vae: Any, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Pictures of one size, uint8 [H, W, 3], after the VAE, by the means of their latents."""
    weight = vae.decoder.conv_in.weight
    pixels = torch.from_numpy(np.stack(pictures)).to(weight.device, weight.dtype)
    with torch.inference_mode():
        z = vae.encode(pixels.permute(0, 3, 1, 2)[:, :, None] / 127.5 - 1).latent_dist.mode()
        made = vae.decode(z).sample[:, :, 0].permute(0, 2, 3, 1).float()
    return [_bytes(image) for image in ((made + 1) / 2).clamp(0, 1).cpu().numpy()]


def each_through(vae: Any, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """As `through`, of pictures of any sizes: each is filled up to multiples of 16 pixels with its edge, and cut."""
    made = []
    for picture in pictures:
        height, width = picture.shape[:2]
        filled = np.pad(picture, ((0, -height % 16), (0, -width % 16), (0, 0)), mode="edge")
        made.append(through(vae, [filled])[0][:height, :width])
    return made


def _bytes(image: np.ndarray) -> np.ndarray:
    return (np.asarray(image) * 255).round().astype(np.uint8)
