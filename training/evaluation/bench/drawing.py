"""A model drawing or editing for a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from qwen_image_fast.training.evaluation.bench.run import Draw


def drawn_by(model: str, editing: bool, size: int, **sampling: Any) -> Draw:
    """The model as a `Draw`: pictures of size x size from prompts, or edits of the size of their source."""
    if editing:
        from qwen_image_fast.pipelines.edit_plus import QwenImageEditPlusPipeline

        pipe: Any = QwenImageEditPlusPipeline.from_pretrained(model)
    else:
        from qwen_image_fast.pipelines.text_to_image import QwenImagePipeline

        pipe = QwenImagePipeline.from_pretrained(model)

    def draw(prompts: Sequence[str], sources: Sequence[Path | None], seeds: Sequence[int]) -> list[Image.Image]:
        given: dict[str, Any] = {"height": size, "width": size}
        if editing:
            given = {"image": [[Image.open(source).convert("RGB")] for source in sources if source is not None]}
        made = pipe(prompt=list(prompts), seed=list(seeds), output_type="pil", progress=False, **given, **sampling)
        return list(made.images)

    return draw
