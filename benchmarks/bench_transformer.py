"""One step of the tiny transformer at 128 x 128 pixels, alone and as a pair for guidance.

Here calls cost more than arithmetic: this is what one step of a small model, or of a large one on a fast device, has
besides its matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import BASELINE, COMPILED, OURS, Bar, Case, Settings, compare, compiled, find, speedup

SUITE = "transformer"
GOAL_EAGER, GOAL_COMPILED = 1.6, 1.2
FORWARD = "ours, diffusers' call"
GRID = (8, 8)
# A prompt, and the negative prompt " " with the template's six closing tokens.
TEXT = (24, 6)


class StepPair:
    """Transformers with the same weights, and the tokens of one step: an image of `grid` tokens, and its references."""

    def __init__(self, device: str, grid: tuple[int, int] = GRID, references: int = 0, **config):
        from diffusers import QwenImageTransformer2DModel as Diffusers

        from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
        from qwen_image_fast.tiny import tiny_configs

        config = tiny_configs()["transformer"] | config
        with torch.device(device):
            self.ours = QwenImageTransformer2DModel(**config).eval()
        with torch.device("meta"):
            self.theirs = Diffusers(**config).eval()
        self.theirs.load_state_dict(self.ours.state_dict(), assign=True)
        self.theirs.pos_embed = type(self.theirs.pos_embed)(10000, list(config["axes_dims_rope"]), scale_rope=True)
        self.target = grid[0] * grid[1]
        self.shapes = ((1, *grid),) * (1 + references)
        self.img = torch.randn(1, self.target * len(self.shapes), config["in_channels"], device=device)
        self.texts = [torch.randn(1, n, config["joint_attention_dim"], device=device) for n in TEXT]
        self.timestep = torch.tensor([0.7], device=device)
        self.modulation = self.ours.modulation(self.timestep)

    def call(self, model, text: torch.Tensor) -> torch.Tensor:
        return model(
            hidden_states=self.img, encoder_hidden_states=text, timestep=self.timestep, img_shapes=[[*self.shapes]],
            return_dict=False,
        )[0][:, : self.target]  # fmt: skip

    def by_diffusers(self, model, texts) -> list[torch.Tensor]:
        """One call after another, as diffusers' loop does."""
        return [self.call(model, text) for text in texts]

    def by_ours(self, texts):
        """All branches packed; what is the same at every step (modulation vectors, embedded text) computed before."""
        from qwen_image_fast.models.packing import pack

        count = len(texts)
        layout = pack(
            (self.shapes,) * count, [t.shape[1] for t in texts], axes_dim=self.ours.config.axes_dims_rope,
            targets=[1] * count, device=self.img.device,
        )  # fmt: skip
        img = self.img[0].repeat(count, 1)
        txt = self.ours.embed_text(torch.cat([t[0] for t in texts]))
        return lambda: self.ours.forward_packed(img, txt, layout, self.modulation).chunk(count)


def cases(settings: Settings) -> Iterator[Case]:
    torch.manual_seed(0)
    with torch.inference_mode():
        pair = StepPair(settings.device)
        yield step_case(settings, pair, 1, "tiny step, one prompt")
        yield step_case(settings, pair, 2, "tiny step, CFG pair", goals={OURS: GOAL_EAGER})


def step_case(settings: Settings, pair: StepPair, branches: int, name: str, suite: str = SUITE, **fields) -> Case:
    texts = pair.texts[:branches]
    variants = {
        BASELINE: lambda: pair.by_diffusers(pair.theirs, texts),
        OURS: pair.by_ours(texts),
        FORWARD: lambda: pair.by_diffusers(pair.ours, texts),
    }
    if settings.compile:
        model = compiled(pair.theirs)
        variants[COMPILED] = lambda: pair.by_diffusers(model, texts)
    lengths = " and ".join(str(t.shape[1]) for t in texts)
    return compare(
        suite, f"{name}, {pair.img.shape[1]} image + {lengths} text tokens", variants, settings, tolerance=1e-4,
        tags={"branches": branches, "references": len(pair.shapes) - 1, "width": pair.ours.inner_dim},
        note="ours: packed branches, modulation vectors and embedded text computed before", **fields,
    )  # fmt: skip


def bars(measured: list[Case]) -> list[Bar]:
    case = find(measured, SUITE, branches=2)
    return [
        Bar("tiny step, CFG pair, over diffusers eager", GOAL_EAGER, speedup(case, OURS)),
        Bar("tiny step, CFG pair, over diffusers compiled", GOAL_COMPILED, speedup(case, OURS, COMPILED)),
    ]
