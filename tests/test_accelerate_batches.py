"""Batches of several prompts with several images each under the drop-in, against diffusers' runs of one prompt each."""

import numpy as np
import pytest
import torch
from PIL import Image

diffusers = pytest.importorskip("diffusers")

from test_accelerate import LONG, SHORT, SIZE, assert_same, copy_of, picture  # noqa: E402

from qwen_image_fast.drop_in.accelerate import accelerate, restore  # noqa: E402


@pytest.fixture(scope="module")
def plain(tiny_folder):
    return diffusers.QwenImagePipeline.from_pretrained(tiny_folder)


@pytest.mark.parametrize(
    ("name", "given"), [("", "none"), ("Img2Img", "pictures"), ("Img2Img", "latents"), ("Inpaint", "pictures")]
)
def test_every_prompt_has_its_own_picture_and_mask(plain, name, given):
    """Of several images of several prompts, where diffusers mixes them up: as its runs of one prompt each."""
    cls = getattr(diffusers, f"QwenImage{name}Pipeline")
    theirs, ours = copy_of(plain, cls), copy_of(plain, cls)
    accelerate(ours)
    pictures = [picture(), Image.new("RGB", (48, 64), "orange")]
    if given == "latents":
        pictures = [torch.randn(1, 16, 8, 6, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    white = [np.zeros((64, 48), np.uint8) for _ in range(2)]
    white[0][:32], white[1][:, 24:] = 255, 255
    masks = [Image.fromarray(mask) for mask in white]

    def run(pipe, prompts):
        """Two images for each of these, from the generators that they have in the whole batch."""
        call = {"prompt": [(SHORT, LONG)[i] for i in prompts], "strength": 0.6, "output_type": "latent", **SIZE}
        images = [pictures[i] for i in prompts]
        call["image"] = torch.cat(images) if given == "latents" else images
        if given == "none":
            del call["image"], call["strength"]
        call |= {"mask_image": [masks[i] for i in prompts]} if name == "Inpaint" else {}
        generator = [torch.Generator().manual_seed(2 * i + k) for i in prompts for k in range(2)]
        return pipe(num_inference_steps=3, num_images_per_prompt=2, generator=generator, **call).images

    expected = torch.cat([run(theirs, [i]) for i in range(2)])
    assert_same(run(ours, [0, 1]), expected)
    assert ((run(theirs, [0, 1]) - expected).abs().amax((1, 2)) > 0.1)[1:3].all()  # diffusers' own
    restore(ours)
    assert torch.equal(run(ours, [0, 1]), run(theirs, [0, 1]))
