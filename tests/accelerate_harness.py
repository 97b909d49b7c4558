"""A small diffusers transformer, and how often the fast forward runs; for the tests of the drop-in."""

import diffusers
import torch

from qwen_image_fast.drop_in.transformer import TransformerForward

CONFIG = {
    "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


def small_transformer(**changes):
    torch.manual_seed(0)
    model = diffusers.QwenImageTransformer2DModel(**{**CONFIG, **changes}).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.dim() == 1 else p.shape[-1] ** -0.5)
    return model


def count_fast_forwards(monkeypatch):
    """The models whose fast forward ran, one entry per run."""
    calls = []
    original = TransformerForward.forward_packed

    def forward_packed(self, *args, **kwargs):
        calls.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(TransformerForward, "forward_packed", forward_packed)
    return calls


def inputs(dtype=torch.float32, **kwargs):
    torch.manual_seed(1)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return {
        "hidden_states": torch.randn(2, 12, 64, dtype=dtype),
        "encoder_hidden_states": torch.randn(2, 5, 24, dtype=dtype),
        "encoder_hidden_states_mask": mask, "timestep": torch.tensor([0.5, 0.5], dtype=dtype),
        "img_shapes": [[(1, 4, 3)]] * 2, **kwargs,
    }  # fmt: skip


def run(model, **kwargs):
    with torch.no_grad():
        return model(**inputs(**kwargs)).sample


def assert_same(got, expected):
    assert expected.std() > 0.05
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
