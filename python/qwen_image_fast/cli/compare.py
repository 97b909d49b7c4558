"""Pictures side by side, for `--compare`."""

from __future__ import annotations

from PIL import Image

from qwen_image_fast.pictures import to_rgba


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Pictures in a row, in the height of the last one, transparency over a checkerboard of light greys."""
    from PIL import Image

    height = pictures[-1].height
    scaled = [to_rgba("picture", p).resize((max(1, round(p.width * height / p.height)), height)) for p in pictures]
    row = Image.new("RGBA", (sum(p.width for p in scaled) + 8 * (len(scaled) - 1), height), "white")
    left = 0
    for picture in scaled:
        board = Image.new("L", (-(-picture.width // 8), -(-height // 8)))
        board.putdata([255 if (x + y) % 2 else 208 for y in range(board.height) for x in range(board.width)])
        ground = board.resize((board.width * 8, board.height * 8), Image.Resampling.NEAREST)
        ground = ground.crop((0, 0, *picture.size)).convert("RGBA")
        row.paste(Image.alpha_composite(ground, picture), (left, 0))
        left += picture.width + 8
    return row.convert("RGB")
