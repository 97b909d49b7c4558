"""One transformer block of the released size, in the middle of the model, float32.

Our block takes normalised streams and gives them back normalised for the next block: shifted by half a pass, the same
work as diffusers' block. diffusers computes the modulation vectors in every block of every step; ours are timed both
precomputed, as all our pipelines have them, and computed in place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.harness import BASELINE, COMPILED, OURS, Bar, Case, Settings, compare, compiled, find, speedup

SUITE = "block"
GOAL = 1.15
WITH_MODULATION = "ours with modulation"


class BlockPair:
    """A block of diffusers and ours with the same weight tensors, and the inputs of both.

    With `references`, the image rows are those of the generated image and of so many references of its size.
    """

    def __init__(
        self, device: str, heads: int, grid: tuple[int, int], txt: int, weights: dict | None = None,
        references: int = 0, dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
        from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock as Diffusers

        from qwen_image_fast.models.packing import pack
        from qwen_image_fast.models.transformer_modules import QwenImageTransformerBlock

        shapes = ((1, *grid),) * (1 + references)
        self.width, self.rows, self.txt = heads * 128, len(shapes) * grid[0] * grid[1], txt
        with torch.device("meta"):
            theirs = Diffusers(self.width, heads, 128)
            ours = QwenImageTransformerBlock(self.width, 128)
        self.weights = weights or random_weights(theirs.state_dict(), device, dtype)
        theirs.load_state_dict(self.weights, assign=True)
        ours.load_state_dict(self.weights, assign=True)
        self.theirs, self.ours = theirs.eval(), ours.eval()

        axes = (16, 56, 56)
        self.layout = pack((shapes,), [txt], axes_dim=axes, device=device)
        rope = QwenEmbedRope(10000, list(axes), scale_rope=True)
        self.freqs = rope([list(shapes)], max_txt_seq_len=txt, device=torch.device(device))
        self.img = torch.randn(1, self.rows, self.width, device=device, dtype=dtype)
        self.text = torch.randn(1, txt, self.width, device=device, dtype=dtype)
        self.temb = torch.randn(1, self.width, device=device, dtype=dtype)
        self.mods = self.modulation()

    def modulation(self) -> tuple:
        """The vectors of the image and the text stream."""
        from qwen_image_fast.models.transformer_block import BlockVectors

        mods = (self.ours.img_mod[1], self.ours.txt_mod[1])
        return tuple(BlockVectors(*mod(F.silu(self.temb)).split(self.width, dim=1)) for mod in mods)

    def run_diffusers(self, block):
        text, img = block(self.img, self.text, None, self.temb, self.freqs)
        return text[0], img[0]

    def run_ours(self, run_block, mods):
        """The streams enter as they leave the previous block: the first norm of both belongs to it."""
        from qwen_image_fast.models.transformer_block import Stream

        img_mod, txt_mod = mods
        img, txt = run_block(
            self.ours, Stream(self.img[0], self.img_normed), Stream(self.text[0], self.text_normed), self.layout,
            img_mod, txt_mod, img_mod[:2], txt_mod[:2], None, None,
        )  # fmt: skip
        return txt.x, img.x

    def normalise(self) -> None:
        from qwen_image_fast.ops import layer_norm_modulate

        self.img_normed = layer_norm_modulate(self.img[0], *self.mods[0][:2])
        self.text_normed = layer_norm_modulate(self.text[0], *self.mods[1][:2])

    @property
    def flops(self) -> int:
        """Matrix products of the block without modulation: 12 width^2 per token, and attention."""
        tokens = self.rows + self.txt
        return 2 * tokens * 12 * self.width**2 + 4 * tokens**2 * self.width

    def products(self) -> None:
        """The block's matrix products and attention alone: what remains if all else were free."""
        attn, width = self.ours.attn, self.width
        for x, names, mlp in (
            (self.img[0], ("to_q", "to_k", "to_v"), self.ours.img_mlp),
            (self.text[0], ("add_q_proj", "add_k_proj", "add_v_proj"), self.ours.txt_mlp),
        ):
            for name in names:
                getattr(attn, name)(x)
            mlp.net[2](mlp.net[0].proj(x))
        attn.to_out[0](self.img[0])
        attn.to_add_out(self.text[0])
        joint = torch.cat([self.text, self.img], 1).view(1, -1, width // 128, 128).transpose(1, 2)
        F.scaled_dot_product_attention(joint, joint, joint)


def random_weights(like: dict[str, torch.Tensor], device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Uniform with variance about 1 / fan-in, norms at one: drawing normal numbers would take longer than a run."""
    weights = {}
    for name, t in like.items():
        bound = (3 / t.shape[-1]) ** 0.5
        weights[name] = torch.empty(t.shape, device=device, dtype=dtype).uniform_(-bound, bound)
        if "norm" in name:
            weights[name].fill_(1.0)
    return weights


def cases(settings: Settings, grids=((16, 16), (16, 32), (32, 32)), heads: int = 24, txt: int = 64) -> Iterator[Case]:
    from qwen_image_fast.models.transformer_block import run_block

    torch.manual_seed(0)
    weights = None
    for grid in grids:
        pair = BlockPair(settings.device, heads, grid, txt, weights)
        weights = pair.weights
        with torch.no_grad():
            yield one_case(settings, pair, run_block, goals={OURS: GOAL} if pair.rows == 1024 else {})


def one_case(settings: Settings, pair: BlockPair, run_block, suite: str = SUITE, **fields) -> Case:
    pair.normalise()
    variants = {
        BASELINE: lambda: pair.run_diffusers(pair.theirs),
        OURS: lambda: pair.run_ours(run_block, pair.mods),
        WITH_MODULATION: lambda: pair.run_ours(run_block, pair.modulation()),
    }
    if settings.compile:
        block = compiled(pair.theirs)
        variants[COMPILED] = lambda: pair.run_diffusers(block)
    return compare(
        suite, f"block of width {pair.width}, {pair.rows} image + {pair.txt} text tokens", variants, settings,
        tolerance=1e-4, roof=pair.products, flops=pair.flops, memory=True,
        tags={"tokens": pair.rows, "width": pair.width},
        note="one middle block; roof: its matrix products and attention alone", **fields,
    )  # fmt: skip


def bars(measured: list[Case]) -> list[Bar]:
    case = find(measured, SUITE, tokens=1024, width=3072)
    return [Bar("block, 1024 image tokens, over diffusers eager", GOAL, speedup(case, OURS))]
