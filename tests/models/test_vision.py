"""Pictures for Qwen2.5-VL against transformers' processor and positions."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_image_fast import tiny
from qwen_image_fast.models.vision import VisionProcessor, encode_pictures, look, picture_positions

try:  # the slow image processor, which needs no torchvision; its name in transformers 5
    from transformers import Qwen2VLImageProcessorPil as Reference
except ImportError:
    from transformers import Qwen2VLImageProcessor as Reference


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    from qwen_image_fast.models.text_encoder import load_text_encoder

    folder = tmp_path_factory.mktemp("encoder")
    tiny._write_text_encoder(folder, seed=0)
    return load_text_encoder(folder)


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(56, 84), (61, 37), (20, 20), (300, 30), (64, 640)], ids=str)
@pytest.mark.parametrize("limits", [{}, {"min_pixels": 56 * 56, "max_pixels": 84 * 84}], ids=["default", "small"])
def test_patches_equal_transformers(size, limits):
    image = picture(*size)
    expected = Reference(**limits)(image, return_tensors="pt")
    patches, grid = VisionProcessor(**limits)(image)
    assert [list(grid)] == expected["image_grid_thw"].tolist()
    torch.testing.assert_close(patches, expected["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [
    {"min_pixels": 3136, "max_pixels": 12845056},
    {"size": {"shortest_edge": 3136, "longest_edge": 12845056}},
])  # fmt: skip
def test_configuration(config, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**config, "patch_size": 14, "do_resize": True}))
    processor = VisionProcessor.from_pretrained(tmp_path)
    assert (processor.min_pixels, processor.max_pixels) == (3136, 12845056)
    processor.save_pretrained(tmp_path)
    assert VisionProcessor.from_pretrained(tmp_path) == processor == VisionProcessor.of(processor)
    assert VisionProcessor.of(Reference(**processor_limits(processor))) == processor


def processor_limits(processor):
    return {"min_pixels": processor.min_pixels, "max_pixels": processor.max_pixels}


@pytest.mark.parametrize("grids", [[], [(1, 4, 6)], [(1, 8, 4), (1, 2, 2)]])
def test_positions_equal_transformers(encoder, grids):
    image_id = encoder.config.image_token_id
    tokens = [5, 6]
    for _, h, w in grids:
        tokens += [7, *[image_id] * (h * w // 4), 8]
    tokens += [9]
    ids = torch.tensor([tokens])
    kinds = (ids == image_id).int()
    expected, _ = encoder.get_rope_index(ids, kinds, image_grid_thw=torch.tensor(grids).view(-1, 3))
    assert torch.equal(picture_positions(tokens, grids, image_id, 2), expected[:, 0])
    assert picture_positions(tokens, [], image_id, 2).tolist() == [list(range(len(tokens)))] * 3


def test_states_equal_transformers_and_batches_equal_single_runs(encoder):
    tokenizer, processor = tiny.tiny_tokenizer(), VisionProcessor()
    pad = "<|vision_start|><|image_pad|><|vision_end|>"
    images = [[picture(60, 60)], [], [picture(60, 90, 1), picture(100, 40, 2)], [picture(64, 64, 3)]]
    prompts = [pad * len(own) + text for own, text in zip(images, ["red", "a house", "both", "dog"])]
    with torch.no_grad():
        seen = look(encoder, [image for own in images for image in own], processor)
        split = [seen[:1], [], seen[1:3], seen[3:]]
        rows = encode_pictures(encoder, tokenizer, prompts, split, drop=1)
        for a, b in zip(rows, encode_pictures(encoder, tokenizer, prompts, split, drop=1, one_batch=True), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        for prompt, own, row in zip(prompts, images, rows):
            (alone,) = encode_pictures(encoder, tokenizer, [prompt], [look(encoder, own, processor)], drop=1)
            torch.testing.assert_close(row, alone, rtol=0, atol=1e-5)
            pictures = [processor(image) for image in own]
            tokens = "".join(
                piece + "<|image_pad|>" * (0 if k == len(own) else grid_tokens(pictures[k][1]))
                for k, piece in enumerate(prompt.split("<|image_pad|>"))
            )
            ids = torch.tensor(tokenizer([tokens])["input_ids"])
            vision = {
                "pixel_values": torch.cat([p for p, _ in pictures]),
                "image_grid_thw": torch.tensor([g for _, g in pictures]),
            } if own else {}  # fmt: skip
            kinds = (ids == encoder.config.image_token_id).int()
            expected = encoder(input_ids=ids, mm_token_type_ids=kinds, **vision, use_cache=False).last_hidden_state
            torch.testing.assert_close(row, expected[0, 1:], rtol=0, atol=1e-5)


def grid_tokens(grid):
    return grid[1] * grid[2] // 4


def test_the_tower_runs_once_for_a_picture_that_is_shared(encoder):
    image, rows = picture(56, 56), []
    handle = encoder.visual.patch_embed.register_forward_hook(lambda m, a, y: rows.append(len(y)))
    first, second = look(encoder, [image, image], VisionProcessor())
    handle.remove()
    assert first is second and rows == [16]


def test_errors(encoder):
    with pytest.raises(ValueError, match="prompt must hold one <|image_pad|> for each of its 0 pictures, got 1"):
        encode_pictures(encoder, tiny.tiny_tokenizer(), ["<|image_pad|>"], [[]], drop=0)
    bare = type("Encoder", (), {"visual": None})()
    assert look(bare, [], VisionProcessor()) == []
    with pytest.raises(ValueError, match="text_encoder must have its vision tower, got one loaded without it"):
        look(bare, [picture(56, 56)], VisionProcessor())
    with pytest.raises(ValueError, match="image must have an aspect ratio of at most 200, got 3x900 pixels"):
        VisionProcessor()(picture(3, 900))
