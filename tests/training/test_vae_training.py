"""Training the VAE: an initialisation that does not collapse, the decoder alone, and the latents' statistics."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trainer_helpers import small_recipe

from qwen_image_fast import AutoencoderKLQwenImage
from qwen_image_fast.tiny import tiny_configs
from qwen_image_fast.training.batches.latents import encode_images
from qwen_image_fast.training.engine.trainer import Trainer
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.sources.sample import Sample
from qwen_image_fast.training.tasks.vae import VaeTask, balance, edge_loss, initialise


def recipe(**changes):
    return small_recipe("", **{
        "kind": "vae", "model": None, "base_dim": 4, "statistics": 32, "batch": 8, "steps": 3, "crop": 16,
        "optimizer__lr": 2.5e-3, "optimizer__schedule": "cosine", "optimizer__ema": 0.5, **changes,
    })  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    task = VaeTask(recipe(steps=25, log__validate_every=25, log__sample_every=25, log__every=5))
    trainer = Trainer(task.recipe, task, folder)
    trainer.run()
    return trainer, folder


def test_the_initialisation_keeps_images_apart():
    """torch's own gives a narrow VAE that maps every image to nearly the same one."""
    spreads = []
    for ours in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vae = AutoencoderKLQwenImage(**{**tiny_configs()["vae"], "base_dim": 8})
        if ours:
            initialise(vae, 0)
        x = torch.rand(6, 3, 1, 32, 32, generator=torch.Generator().manual_seed(0)).round() * 2 - 1
        with torch.no_grad():
            made = vae.decoder(vae.post_quant_conv(vae.encode(x).latent_dist.mode()[:, :, 0]))
        spreads.append(made.std(0).mean().item())
    assert spreads[1] > 0.05
    assert spreads[1] > 10 * spreads[0]


def test_initial_weights_are_the_formula():
    vae = AutoencoderKLQwenImage(**{**tiny_configs()["vae"], "base_dim": 16})
    initialise(vae, 0)
    block = vae.decoder.mid_block.resnets[0]
    fan_in = block.conv1.weight.shape[1] * 9
    for conv, gain in ((block.conv1, 1.6), (block.conv2, 0.8)):
        assert not conv.weight[:, :, :-1].any()
        assert conv.weight[:, :, -1].std().item() == pytest.approx(gain / fan_in**0.5, rel=0.05)


def test_it_learns_and_writes_its_own_statistics(run):
    trainer, folder = run
    vae = AutoencoderKLQwenImage.from_pretrained(folder / "model")
    images, _ = trainer.task.maker.images(5, range(32))
    tokens = torch.stack(encode_images(vae, images)).unflatten(-1, (16, 4)).transpose(1, 2).flatten(2)
    assert tokens.mean((0, 2)).abs().max() < 0.5
    assert (tokens.std((0, 2)) - 1).abs().max() < 0.5
    with torch.no_grad():
        first = VaeTask(recipe()).validate()["validation_psnr"]
        with trainer.ema.swapped(trainer.parameters):
            assert trainer.task.validate()["validation_psnr"] > first + 3
    assert (folder / "samples" / "step-00000025-0.png").exists()


def test_an_exported_vae_draws_its_mean(run):
    """Nothing trains the log-variance, so that the export says: certain. The means are the trained ones."""
    trainer, folder = run
    vae = AutoencoderKLQwenImage.from_pretrained(folder / "model")
    pixels = torch.rand(1, 3, 1, 32, 32) * 2 - 1
    with torch.no_grad(), trainer.ema.swapped(trainer.parameters):
        expected = trainer.task.vae.encode(pixels).latent_dist
        got = vae.encode(pixels).latent_dist
    assert (got.logvar == -20).all() and not (expected.logvar == -20).any()
    torch.testing.assert_close(got.mean, expected.mean, rtol=0, atol=1e-6)
    assert (got.sample() - got.mean).abs().max() < 1e-3


def test_the_temporal_taps_stay_zero(run):
    conv = run[0].task.vae.decoder.mid_block.resnets[0].conv1
    assert not conv.weight[:, :, :-1].any()


def test_decoder_tuning_leaves_the_encoder(run, tmp_path):
    _, folder = run
    task = VaeTask(recipe(mode="decoder", folder=str(folder / "model"), loss__perceptual=0.5, loss__latent_noise=0.0))
    before = {n: p.detach().clone() for n, p in task.vae.named_parameters()}
    trainer = Trainer(task.recipe, task, tmp_path)
    trainer.run()
    changed = {n for n, p in task.vae.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(n.startswith("decoder.") for n in changed)
    after = AutoencoderKLQwenImage.from_pretrained(tmp_path / "model")
    assert after.config == AutoencoderKLQwenImage.from_pretrained(folder / "model").config
    assert {"perceptual", "balance", "psnr"} <= trainer.train_step([task.maker.batch(9, 0)]).keys()


def test_pictures_after_edits_come_by_the_share_of_their_task():
    """An edit of the source is taken whole: what it makes, not what it starts from."""

    class Source:
        def sample(self, seed, index):
            return Sample(np.zeros((16, 16, 3), np.uint8), "")

        def edit(self, seed, index):
            return Sample(np.full((16, 16, 3), 255, np.uint8), "", (np.zeros((16, 16, 3), np.uint8),))

    def shares(tasks):
        task = VaeTask(recipe(data__tasks=tasks, data__buckets=[[16, 16]]), Source())
        images, _ = task.maker.images(0, range(200))
        return np.mean([image.mean() for image in images]) / 255

    assert shares({"t2i": 1.0}) == 0 and shares({"ti2i": 1.0}) == 1
    assert shares({"t2i": 0.4, "ti2i": 0.6}) == pytest.approx(0.6, abs=0.1)


def test_a_source_without_edits_is_refused_for_them():
    task = VaeTask(recipe(data__source="squares", data__tasks={"ti2i": 1.0}))
    task.maker.source = SimpleNamespace(sample=None)
    with pytest.raises(RecipeError, match=r"data.tasks must not have ti2i: the source squares has no edits"):
        task.maker.images(0, range(2))


def test_the_balance_equalises_gradients():
    last = torch.ones(4, requires_grad=True)
    weight = balance((3 * last).sum(), (6 * last).sum(), last, 0.5)
    assert weight.item() == pytest.approx(0.25)
    assert not weight.requires_grad


def test_the_edge_loss_sees_edges_not_levels():
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert edge_loss(x, x) == 0
    flat = torch.zeros(1, 3, 16, 16)
    step = flat.clone()
    step[..., 8:] = 1
    assert edge_loss(step, flat) > 0.05
    inner = edge_loss(flat + 0.5, flat)  # only the Laplacian's inside counts: a constant has none
    assert inner == 0
