"""Editing inside a mask with an Edit-Plus model, 2509 or 2511: `QwenImageEditPlusInpaintPipeline`, not in diffusers."""

from __future__ import annotations

from qwen_image_fast.pipelines.conditions import CONDITION_AREA
from qwen_image_fast.pipelines.edit_inpaint import QwenImageEditInpaintPipeline


class QwenImageEditPlusInpaintPipeline(QwenImageEditInpaintPipeline):
    """`QwenImageEditInpaintPipeline` with the template and the pictures for Qwen2.5-VL of `QwenImageEditPlusPipeline`.

    An Edit-Plus model was trained on these; with Edit's it follows an instruction less often.
    """

    plus = True
    condition_area = CONDITION_AREA
