"""Modules of the transformer that a user replaced or gave other settings, stand-alone and accelerated."""

import copy

import pytest
import torch
from accelerate_harness import assert_same, inputs, run
from torch import nn

pytest.importorskip("diffusers")

from called_harness import CALL, latents

import qwen_image_fast


class Around(nn.Module):
    """A module of a user's, around the one in whose place it is."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, *args, **kwargs):
        x = self.own(*args, **kwargs)
        return x * 1.3 + 0.3 * x.roll(1, -1)


def replace(model, place, make):
    model.set_submodule(place, make(model.get_submodule(place)))


BLOCK = [
    "attn.norm_q", "attn.norm_added_k", "attn.to_q", "attn.to_out.0", "attn.to_out.1", "img_mod", "img_mod.0",
    "txt_mod", "txt_mod.1", "img_mlp", "img_mlp.net.0", "img_mlp.net.1", "txt_mlp", "txt_mlp.net.1", "txt_mlp.net.2",
]  # fmt: skip
PLACES = [
    *(f"transformer_blocks.0.{name}" for name in BLOCK),
    "img_in", "txt_in", "txt_norm", "proj_out", "norm_out.linear", "norm_out.silu",
    "time_text_embed.timestep_embedder", "time_text_embed.timestep_embedder.act",
    "time_text_embed.timestep_embedder.linear_1",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_another_module(both, place):
    theirs, ours = both
    plain = run(ours)
    accelerated = copy.deepcopy(theirs)
    qwen_image_fast.accelerate(accelerated)
    for model in (theirs, ours, accelerated):
        replace(model, place, Around)
    expected = run(theirs)
    assert (expected - plain).abs().max() > 2e-4 * plain.std()
    assert_same(run(ours), expected)
    assert_same(run(accelerated), expected)


@pytest.mark.parametrize("place", ["img_mlp", "txt_mod"])
def test_another_class_without_the_modules_below(both, place):
    for model in both:
        replace(model.transformer_blocks[0], place, lambda own: nn.Sequential(own, nn.Tanh()))
    assert_same(run(both[1]), run(both[0]))


@pytest.mark.parametrize("names", [["norm_q"], ["norm_added_k"], ["norm_q", "norm_k", "norm_added_q", "norm_added_k"]])
def test_another_epsilon(both, names):
    plain = run(both[1])
    for model in both:
        for name in names:
            getattr(model.transformer_blocks[0].attn, name).eps = 0.5
    expected = run(both[0])
    assert (expected - plain).abs().max() > 2e-4 * plain.std()
    assert_same(run(both[1]), expected)


def affine(model):
    norm = nn.LayerNorm(model.inner_dim, eps=1e-6)
    nn.init.constant_(norm.weight, 1.5)
    model.transformer_blocks[0].img_norm1 = norm


def other_positions(model):
    axes = list(model.config.axes_dims_rope)
    model.pos_embed = type(model.pos_embed)(theta=100, axes_dim=axes, scale_rope=True)


SETTINGS = {
    "epsilon": lambda model: setattr(model.transformer_blocks[0].txt_norm2, "eps", 0.3),
    "last epsilon": lambda model: setattr(model.norm_out.norm, "eps", 0.5),
    "weights of a norm": affine,
    "positions": other_positions,
    "form of GELU": lambda model: setattr(model.transformer_blocks[0].img_mlp.net[0], "approximate", "none"),
}


@pytest.mark.parametrize("change", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("order", ["before", "after"])
def test_other_settings_after_accelerate(both, change, order):
    theirs, ours = both[0], copy.deepcopy(both[0])
    plain = run(theirs)
    steps = [qwen_image_fast.accelerate, change]
    for step in steps if order == "after" else reversed(steps):
        step(ours)
    change(theirs)
    expected = run(theirs)
    assert not torch.equal(expected, plain)
    assert torch.equal(run(ours), expected)


def test_a_pipeline_sees_it_after_a_call(pipe):
    """Modulation vectors are tables by then."""
    plain = latents(pipe)
    embedder = pipe.transformer.time_text_embed.timestep_embedder
    for module, name in ((embedder, "act"), (pipe.transformer.norm_out, "silu")):
        own = getattr(module, name)
        setattr(module, name, nn.ReLU())
        changed = latents(pipe)
        assert not torch.equal(changed, plain)
        setattr(module, name, own)
        assert torch.equal(latents(pipe), plain)


def test_dropout(both):
    _, ours = both
    plain = run(ours)
    for block in ours.transformer_blocks:
        block.img_mlp.net[1].p = 0.5
    assert torch.equal(run(ours), plain)
    ours.train()
    given = inputs()
    first, second = (ours(**given).sample for _ in range(2))
    assert not torch.equal(first, second) and not torch.equal(first, plain)


def test_positions_stay(both):
    with pytest.raises(AttributeError, match="pos_embed must stay, as positions are part of the packed layout"):
        both[1].pos_embed = both[1].pos_embed


def test_autocast_leaves_nothing_behind(pipe):
    """Pictures under it, and after it those of before."""
    plain = latents(pipe)
    for guided in ({}, {"negative_prompt": " "}):
        with torch.autocast("cpu", torch.bfloat16):
            under = pipe(**CALL, **guided, output_type="pt").images
        assert under.isfinite().all()
    assert torch.equal(latents(pipe), plain)
