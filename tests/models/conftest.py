import pytest
import torch

import qwen_image_fast


@pytest.fixture
def both():
    """diffusers' transformer and the stand-alone one, of the same weights."""
    from called_harness import pair

    return pair()


@pytest.fixture
def pipe(tiny_folder):
    return qwen_image_fast.QwenImagePipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)
