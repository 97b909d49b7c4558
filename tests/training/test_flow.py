"""The rectified-flow loss on packed batches, and the batches themselves."""

import numpy as np
import pytest
import torch
from trainer_helpers import small_recipe, small_transformer

from qwen_image_fast import reference
from qwen_image_fast.training import randomness
from qwen_image_fast.training.batches.batches import FlowBatches, choose
from qwen_image_fast.training.batches.noise import noise_level, weight_at
from qwen_image_fast.training.randomness import epoch_position, generator, normal
from qwen_image_fast.training.recipe.data import DataRecipe
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.flow import SigmaRecipe
from qwen_image_fast.training.sources.buckets import fit, nearest_bucket
from qwen_image_fast.training.sources.make import make_source
from qwen_image_fast.training.sources.squares import Squares
from qwen_image_fast.training.tasks.flow import FlowSample, flow_losses
from qwen_image_fast.training.trainable import freeze_dead


def sample(i, shape=(1, 2, 2), references=(), sigma=0.3):
    def tokens(name, s):
        return normal((s[0] * s[1] * s[2], 64), i, name)

    return FlowSample(
        tokens("x0", shape), shape, tokens("eps", shape), sigma,
        [tokens(f"ref{k}", s) for k, s in enumerate(references)], list(references),
    )  # fmt: skip


def mixed():
    """0, 1 and 2 references; different sizes, levels and text lengths."""
    samples = [
        sample(0, (1, 2, 2), (), 0.2),
        sample(1, (1, 2, 4), ((1, 2, 4),), 0.5),
        sample(2, (1, 4, 2), ((1, 2, 2), (1, 1, 3)), 0.9),
    ]
    return samples, [normal((n, 128), n, "txt") for n in (5, 3, 8)]


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_a_mixed_batch_is_the_mean_of_its_samples_alone(zero_cond_t):
    model = small_transformer(zero_cond_t=zero_cond_t).double()
    samples, texts = mixed()
    together = flow_losses(model, samples, texts)
    alone = torch.cat([flow_losses(model, [s], [t]) for s, t in zip(samples, texts)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)


def test_the_loss_is_its_formula():
    """On diffusers' signature, unpacked: mean of (v - (eps - x0))^2 over the target tokens, references after them."""
    model = small_transformer()
    samples, texts = mixed()
    for s, text, loss in zip(samples, texts, flow_losses(model, samples, texts)):
        noisy = (1 - s.sigma) * s.target + s.sigma * s.noise
        img = torch.cat([noisy, *s.references])[None]
        out = model(img, text[None], None, torch.tensor([s.sigma]), [[s.shape, *s.reference_shapes]]).sample
        expected = (out[0, : len(s.target)] - (s.noise - s.target)).square().mean()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def gradients(model, dtype, fused):
    model = model.to(dtype)
    freeze_dead(model)
    samples, texts = mixed()
    if fused:
        flow_losses(model, samples, texts).mean().backward()
    else:
        with reference():
            flow_losses(model, samples, texts).mean().backward()
    return {n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradients_of_the_fused_path_obey_the_twice_rule():
    """Error against float64 at most twice the references' own error, over all weights: in RMS and for each in max."""
    truth = gradients(small_transformer(), torch.float64, fused=False)
    ours = gradients(small_transformer(), torch.float32, fused=True)
    theirs = gradients(small_transformer(), torch.float32, fused=False)
    assert truth.keys() == ours.keys() == theirs.keys()

    def scaled(grads):
        # A weight's error in units of its gradients' size.
        return {n: (g - truth[n]) / truth[n].square().mean().sqrt().clamp_min(1e-12) for n, g in grads.items()}

    def rms(errors):
        return torch.cat([e.flatten() for e in errors.values()]).square().mean().sqrt()

    def largest(errors):
        return max(e.abs().max() for e in errors.values())

    a, b = scaled(ours), scaled(theirs)
    assert rms(a) <= 2 * rms(b)
    assert largest(a) <= 2 * largest(b)


def test_the_frozen_weights_are_exactly_those_without_gradient():
    model = small_transformer()
    dead = {f"transformer_blocks.1.{n}" for n in freeze_dead(small_transformer())}
    samples, texts = mixed()
    flow_losses(model, samples, texts).sum().backward()
    idle = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle == dead
    assert "transformer_blocks.1.attn.to_add_out.weight" in dead


def test_logit_normal_levels():
    rng = generator(0, "test")
    draws = np.array([noise_level(rng, SigmaRecipe(mean=0.5, std=2.0), 64) for _ in range(20000)])
    logit = np.log(draws / (1 - draws))
    assert abs(logit.mean() - 0.5) < 0.05
    assert abs(logit.std() - 2.0) < 0.05


def test_noise_levels_by_name_and_weights():
    def levels(**fields):
        recipe = SigmaRecipe(**fields)
        recipe.check()
        rng = generator(0, "test")
        return np.array([noise_level(rng, recipe, 4096) for _ in range(8000)])

    uniform = np.sort(levels(name="uniform"))
    assert np.abs(uniform - np.linspace(0, 1, 8000)).max() < 0.02
    np.testing.assert_allclose(np.sort(levels(name="shifted", shift=3.0)), 3 * uniform / (1 + 2 * uniform))
    shift = np.exp(0.5 + 0.4 * (4096 - 256) / 7936)  # of the released scheduler
    np.testing.assert_allclose(np.sort(levels(name="resolution")), shift * uniform / (1 + (shift - 1) * uniform))
    assert noise_level(generator(0, "a"), SigmaRecipe("resolution"), 256) < noise_level(
        generator(0, "a"), SigmaRecipe("resolution"), 8192
    )
    recipe = SigmaRecipe(weighting="min-snr", gamma=4.0)
    for sigma in (0.1, 1 / 3, 0.5, 0.9, 1.0):
        expected = min(((1 - sigma) / sigma) ** 2, 4.0) * sigma**2
        assert abs(weight_at(sigma, recipe) - expected) < 1e-12 and weight_at(sigma, SigmaRecipe()) == 1.0
    for fields, message in (
        ({"name": "normal"}, "sigma.name must be of logit-normal, uniform, shifted, resolution, got 'normal'"),
        ({"name": "uniform", "mean": 0.8}, "sigma.mean must be left out where sigma.name is uniform"),
        ({"shift": 3.0}, "sigma.shift must be left out where sigma.name is logit-normal"),
        ({"gamma": 3.0}, "sigma.gamma must be left out without min-snr"),
    ):
        with pytest.raises(RecipeError, match=message):
            levels(**fields)


def test_random_numbers_depend_on_every_part_and_on_nothing_else():
    base = normal((8,), 0, "noise", step=1, sample=2)
    assert torch.equal(base, normal((8,), 0, "noise", step=1, sample=2))
    for other in (
        normal((8,), 1, "noise", step=1, sample=2), normal((8,), 0, "sigma", step=1, sample=2),
        normal((8,), 0, "noise", step=2, sample=2), normal((8,), 0, "noise", step=1, sample=3),
    ):  # fmt: skip
        assert not torch.equal(base, other)
    order = [epoch_position(0, i, 10) for i in range(30)]
    assert [sorted(order[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert order[:10] != order[10:20]


def test_data_sets_drawn_from_in_turn_are_permuted_once_an_epoch(monkeypatch):
    made = []
    monkeypatch.setattr(randomness, "generator", lambda *a, **k: made.append((a, k)) or generator(*a, **k))
    alone = {n: [epoch_position(99, i, n) for i in range(2 * n)] for n in (10, 7)}
    randomness._permutation.cache_clear()
    made.clear()
    drawn = [(epoch_position(99, i, 10), epoch_position(99, i, 7)) for i in range(14)]
    assert len(made) == 4 and [list(d) for d in zip(*drawn)] == [alone[10][:14], alone[7][:14]]


def batches(**changes):
    return FlowBatches(small_recipe("", **changes), Squares(32), 64)


def test_text_is_dropped_sample_by_sample_and_always_the_same_way():
    maker = batches(data__text_dropout=0.5, batch=64)
    first, again = maker.batch(3, 0), batches(data__text_dropout=0.5, batch=64).batch(3, 0)
    dropped = [raw.caption == "" for raw in first]
    assert dropped == [raw.caption == "" for raw in again]
    assert 16 < sum(dropped) < 48
    kept = batches(data__text_dropout=0.0, batch=64).batch(3, 0)
    for a, b in zip(first, kept):  # nothing else changes
        assert torch.equal(a.noise, b.noise) and a.sigma == b.sigma
        assert a.caption in ("", b.caption)


def test_micro_batches_hold_the_samples_of_the_large_batch():
    whole = batches(batch=8).batch(5, 0)
    parts = [raw for micro in (0, 1) for raw in batches(batch=4, accumulate=2).batch(5, micro)]
    for a, b in zip(whole, parts):
        assert (a.index, a.caption, a.sigma) == (b.index, b.caption, b.sigma)
        assert torch.equal(a.noise, b.noise)


def test_the_mixture_of_tasks():
    shares = {"t2i": 0.5, "ti2i": 0.3, "recon": 0.2}
    maker = batches(data__tasks=shares)
    counts = dict.fromkeys(shares, 0)
    for i in range(1000):
        task, _, images, *_ = maker.content(0, i)
        counts[task] += 1
        assert len(images) == (1 if task == "t2i" else 2)
        if task == "recon":
            assert np.array_equal(images[0], images[1])
    for task, share in shares.items():
        assert abs(counts[task] / 1000 - share) < 0.06

    class NoEdits:
        sample = Squares(32).sample

    with pytest.raises(RecipeError, match="data.tasks must not have ti2i: the source squares has no edits"):
        FlowBatches(maker.recipe, NoEdits(), 64).batch(0, 0)


def test_buckets_go_by_aspect_ratio():
    buckets = [[64, 64], [48, 80], [80, 48]]
    assert nearest_bucket(100, 100, buckets) == (64, 64)
    assert nearest_bucket(100, 160, buckets) == (48, 80)
    assert nearest_bucket(300, 100, buckets) == (80, 48)
    assert nearest_bucket(100, 100, [[32, 32], [128, 128]]) == (128, 128)
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 40:60] = 255
    cut = fit(image, (32, 32))
    assert cut.shape == (32, 32, 3) and cut[:, 14:18].min() > 200


def test_synthesis_is_a_source_of_images_and_edits():
    source = make_source(DataRecipe(source="synthesis", options={"preset": "tiny", "size": 64}))
    made, again = source.sample(3, 5), source.sample(3, 5)
    assert made.image.shape == (64, 64, 3) and made.caption == again.caption
    assert np.array_equal(made.image, again.image)
    edit = source.edit(3, 5)
    assert edit.caption and edit.references[0].shape == edit.image.shape
    for data, sentence in (
        (
            DataRecipe(source="nowhere"),
            "data.source must be squares, .* shards with index.parquet, a table .*, got 'nowhere'",
        ),
        (DataRecipe(source="squares", options={"sice": 3}), "data.options must fit the source squares: .*sice"),
        (DataRecipe(source="synthesis", options={"preset": "x"}), "data.options.preset must be tiny or empty, got 'x'"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            make_source(data)


def test_the_order_of_the_tasks_decides_nothing():
    weights = {"recon": 0.2, "ti2i": 0.5, "t2i": 0.3}
    drawn = [choose(generator(0, "task", sample=i), weights) for i in range(200)]
    assert drawn == [choose(generator(0, "task", sample=i), dict(sorted(weights.items()))) for i in range(200)]
    assert {task: drawn.count(task) for task in weights} == pytest.approx(
        {t: 200 * w for t, w in weights.items()}, abs=20
    )
