"""Prompts and masks as people bring them."""

import pytest
from PIL import Image

from qwen_image_fast.cli.errors import CommandError
from qwen_image_fast.cli.inputs import _check_mask, prompts_of


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_prompts_by_any_line_end(tmp_path, end):
    (tmp_path / "p.txt").write_bytes(f"a cat{end}# no{end}{end} 一只猫 ".encode())
    assert prompts_of(tmp_path / "p.txt") == ["a cat", "一只猫"]


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"a\0b")
    with pytest.raises(CommandError, match="p.txt is not a file of text: it holds a character NUL"):
        prompts_of(tmp_path / "p.txt")


@pytest.mark.parametrize("alpha", [0, 255])
def test_a_mask_with_transparency_says_how_it_is_read(alpha):
    mask, notes = Image.new("RGBA", (16, 16), "white"), []
    mask.paste((255, 255, 255, alpha), (0, 0, 8, 8))
    _check_mask({"mask": mask, "image": Image.new("RGB", (16, 16))}, notes.append)
    said = ["what is clear in --mask stays as it is; in the server's API, as in OpenAI's, it is what changes"]
    assert notes == (said if alpha == 0 else [])
