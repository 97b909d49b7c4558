"""What making a picture takes of memory beside the weights, from sizes alone. Imports no torch.

Counted is what lives at the same time: while noise is removed, `TENSORS` tensors of [rows, width] and the modulation
vectors of all steps; while the VAE decodes, one picture after another, its activations. The larger of both is the peak,
on top of the transformed weights that the VAE makes at the first picture and keeps. A plan (weights/plan.py) counts the
same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from qwen_image_fast.sizes import gb

TENSORS = 12  # of [rows, width] at the same time in a block
# Full-resolution images of a strip's height alive at once in the VAE: six (a block's input, its rows with those kept
# from before, the same of the hidden image, its result and the next), and what malloc keeps in pieces of other sizes;
# measured.
STRIP_IMAGES = 20
# Bytes of workspaces and of what libraries keep, whatever the image.
OVERHEAD = 64 << 20
# A tile of the VAE, in latent rows and columns (`enable_tiling` in models/vae.py), and images alive at once beside it:
# the tiles, which overlap by a quarter, their rows, and what they are joined to.
TILE, TILED_IMAGES = 32, 4
# Images of the middle block alive at once in its attention: input, norm, q, k, v, result, its projection; and one more.
MIDDLE_IMAGES = 8


def denoising_bytes(width: int, blocks: int, itemsize: int, rows: int, steps: int) -> int:
    """Of a transformer of `width` on `rows` rows of all samples and branches together."""
    return itemsize * width * (TENSORS * rows + steps * 12 * blocks)


def decoding_bytes(vae: Mapping[str, Any], height: int, width: int, itemsize: int, rows: int | None = None) -> int:
    """Of one picture, in strips of `rows` rows of the latent; None: as a whole. Counted are the activations, the image
    and its copy.

    Args:
        vae: its configuration. height, width: of the latent.
    """
    scale = 2 ** (len(vae["dim_mult"]) - 1)
    middle = height * width * vae["base_dim"] * vae["dim_mult"][-1]
    image = 2 * vae["input_channels"] * scale * height * scale * width
    # Each resolution keeps some rows of each layer; its rows are half as long as those of the one before, and up to
    # twice as wide, so all resolutions keep about the same.
    kept = 4 * (vae["num_res_blocks"] + 1) * scale * width * vae["base_dim"] * len(vae["dim_mult"])
    per_row = STRIP_IMAGES * vae["base_dim"] * scale * scale * width
    rows = height if rows is None else rows
    return OVERHEAD + itemsize * max(MIDDLE_IMAGES * middle, 2 * middle + image + kept + rows * per_row)


class PictureMemory(NamedTuple):
    """What decides how much a model takes. vae: of its configuration; strips: it decodes by strips of its own choice,
    which take little; tiles: by `enable_tiling`; kept: bytes of transformed weights that the VAE has yet to make."""

    width: int
    blocks: int
    itemsize: int
    vae: dict[str, Any]
    strips: bool = False
    tiles: bool = False
    kept: int = 0

    @classmethod
    def of(
        cls,
        transformer: Mapping[str, Any],
        vae: Mapping[str, Any],
        itemsize: int,
        strips: bool = False,
        tiles: bool = False,
        kept: int = 0,
    ):
        """Of two configurations, and of the bytes of a value."""
        names = {"base_dim": 96, "dim_mult": (1, 2, 4, 4), "num_res_blocks": 2, "input_channels": 3}
        width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
        return cls(
            width,
            transformer["num_layers"],
            itemsize,
            {n: vae.get(n, usual) for n, usual in names.items()},
            strips,
            tiles,
            kept,
        )

    def needed(self, size: tuple[int, int], rows: int, steps: int) -> int:
        """Bytes. size: width and height of the largest picture. rows: of all samples and branches that go together."""
        width, height = (-(-side // 16) * 2 for side in size)
        strip = 1 if self.strips else None
        if self.tiles:
            decoding = decoding_bytes(self.vae, min(height, TILE), min(width, TILE), self.itemsize)
            decoding += TILED_IMAGES * self.itemsize * self.vae["input_channels"] * size[0] * size[1]
        else:
            decoding = decoding_bytes(self.vae, height, width, self.itemsize, strip)
        return self.kept + max(denoising_bytes(self.width, self.blocks, self.itemsize, rows, steps), decoding)

    def largest(self, free: int, size: tuple[int, int], rows: int, steps: int) -> int:
        """Side of the largest square picture, in pixels, for which `free` bytes are enough; 0: none. `rows` are those
        of `size`, of which other sizes have more or fewer."""
        area = size[0] * size[1]
        side = 16
        while self.needed((side, side), -(-rows * side * side // area), steps) <= free:
            side += 16
        return side - 16

    def sentence(self, free: int, size: tuple[int, int], rows: int, steps: int, where: str) -> str | None:
        """What is said where `free` bytes are not enough; None where they are. where: such as "this machine"."""
        needed = self.needed(size, rows, steps)
        if needed <= free:
            return None
        side = self.largest(free, size, rows, steps)
        fits = f"{side}x{side} would fit" if side else "no size fits"
        return (
            f"a picture of {size[0]}x{size[1]} takes about {gb(needed)} beside the model, and {where} has {gb(free)} "
            f"free: {fits}"
        )
