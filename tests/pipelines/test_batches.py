"""Batches in bfloat16 that mix sizes and prompts: each image as made alone, whatever its neighbours are.

In float32 the tests of each pipeline hold it to 2e-5.
"""

import pytest
import torch
from reference import picture
from test_controlnet import nets
from test_layered import models, rgba
from test_start import white_box

import qwen_image_fast

SIZES = [(48, 32), (17, 50)]
PROMPTS = ["a cat", "two dogs by the sea, in the evening"]
MASKED = {"image": picture, "mask_image": lambda width, height, seed: white_box(width, height)}
BATCHES = {
    "QwenImagePipeline": {"width": [48, 32], "height": [32, 64]},
    "QwenImageEditPipeline": {"image": picture},
    "QwenImageEditPlusPipeline": {"image": lambda *size: [picture(*size)] * (3 - size[0] // 16)},  # none and two
    "QwenImageImg2ImgPipeline": {"image": picture},
    "QwenImageInpaintPipeline": MASKED,
    "QwenImageEditInpaintPipeline": MASKED,
    "QwenImageLayeredPipeline": {"image": rgba},
    "QwenImageControlNetInpaintPipeline": {
        "control_image": picture,
        "control_mask": MASKED["mask_image"],
        "width": [48, 32],
        "height": [32, 64],
    },
    "QwenImageControlNetPipeline": {"control_image": picture, "width": [48, 32], "height": [32, 64]},
}


@pytest.mark.parametrize("name", BATCHES)
def test_images_equal_those_made_alone(edit_folder, name):
    parts = {}
    if "Layered" in name:
        parts = {key: ours for key, (ours, _) in models(torch.bfloat16).items()}
    elif "ControlNet" in name:
        parts = {"controlnet": nets(extra=4 if "Inpaint" in name else 0, dtype=torch.bfloat16)[0]}
    cls = getattr(qwen_image_fast, name)
    pipe = cls.from_pretrained(edit_folder, torch_dtype=torch.bfloat16, **parts)
    shared = {"negative_prompt": "bad", "num_inference_steps": 2, "output_type": "latent", "progress": False}
    shared |= {"layers": 2, "preserve_size": True} if "Layered" in name else {}
    shared |= {"height": 32, "width": 48} if "EditPlus" in name else {}

    def call(seeds, prompts, pictures, rows):
        """The samples of these rows."""
        given = {
            key: [value(*SIZES[i], pictures[i]) if callable(value) else value[i] for i in rows]
            for key, value in BATCHES[name].items()
        }
        return pipe(prompt=[prompts[i] for i in rows], seed=[seeds[i] for i in rows], **given, **shared).images

    batch = call([5, 6], PROMPTS, [0, 1], [0, 1])
    for i in range(2):
        alone = call([5, 6], PROMPTS, [0, 1], [i])[0]
        torch.testing.assert_close(batch[i], alone, rtol=0, atol=0.06)
    other = call([5, 8], [PROMPTS[0], PROMPTS[1].replace("dogs", "cats")], [0, 9], [0, 1])
    assert torch.equal(other[0], batch[0]) and not torch.equal(other[1], batch[1])
