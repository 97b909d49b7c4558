"""Latent caches, captions in one batch, and LoRA files that PEFT and diffusers read."""

import json

import numpy as np
import pytest
import torch
from trainer_helpers import small_recipe, small_transformer, start, weights

import qwen_image_fast
from qwen_image_fast.models.lora import adapters_of
from qwen_image_fast.models.lora_files import parse_lora, read_lora
from qwen_image_fast.models.lora_keys import component_config, split_components
from qwen_image_fast.models.text_encoder import T2I_DROP, T2I_TEMPLATE, encode_prompts
from qwen_image_fast.tensor_files import read_metadata
from qwen_image_fast.training.batches.batches import FlowBatches, RawSample
from qwen_image_fast.training.batches.latents import LatentCache, encode_images
from qwen_image_fast.training.lora import PEFT_WEIGHTS, WEIGHTS, add_lora, load_lora, lora_state, save_lora
from qwen_image_fast.training.producer.encode import encode_captions
from qwen_image_fast.training.randomness import normal
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.flow import LoraRecipe
from qwen_image_fast.training.run import cache_latents
from qwen_image_fast.training.tasks.flow import FlowTask


def test_captions_in_one_batch_equal_captions_alone(folder, tmp_path):
    task = FlowTask(small_recipe(folder), tmp_path)
    captions = ["", "red square", "a longer caption, by far"]
    with torch.no_grad():
        rows = encode_captions(task.text_encoder, task.pipe.tokenizer, captions, T2I_TEMPLATE, T2I_DROP, 256)
        expected = encode_prompts(task.text_encoder, task.pipe.tokenizer, captions, max_sequence_length=256)
    for a, b in zip(rows, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_is_longer_than_the_limit_is_said_once(folder, tmp_path, caplog):
    """A caption is cut; an edit's instruction is not, as no pipeline cuts it."""
    task = FlowTask(small_recipe(folder, data__tasks={"ti2i": 1.0}), tmp_path)
    picture = np.zeros((32, 32, 3), np.uint8)

    def states(images, limit):
        raw = RawSample(0, "t2i", "make it red and round", images, [], images[1:], torch.zeros(0), 0.0)
        with torch.no_grad():
            (found,) = task.encoders.texts([raw], limit)
        said = list(caplog.messages)
        caplog.clear()
        return found, said

    whole, nothing = states([picture], 256)
    cut, said = states([picture], 3)
    assert not nothing and len(cut) == 3 < len(whole)
    assert len(said) == 1 and said[0].startswith("the caption 'make it red and round' is cut: its last ")
    whole, nothing = states([picture, picture], 256)
    same, said = states([picture, picture], 3)
    assert not nothing and torch.equal(whole, same)
    assert len(said) == 1 and "tokens, more than model.max_text_tokens, 3: an edit's is not cut" in said[0]
    assert states([picture, picture], 3)[1] == []


def test_training_from_a_cache(folder, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({
        "device": "cpu", "batch": 4, "steps": 2, "model": {"folder": str(folder)}, "log": {"validation_samples": 2},
        "data": {"source": "squares", "options": {"size": 32}, "buckets": [[32, 32]], "tasks": {"t2i": 1, "ti2i": 1}},
    }))  # fmt: skip
    cache_latents(path, (), tmp_path / "cache", 12)
    cache = LatentCache(tmp_path / "cache")
    assert len(cache) == 14  # two for validation
    recipe = small_recipe(folder, data__cache=str(tmp_path / "cache"), data__tasks={"t2i": 0.5, "recon": 0.5}, batch=10)
    run = start(recipe, tmp_path / "run")
    fresh = small_recipe(folder, data__tasks={"t2i": 1.0, "ti2i": 1.0})
    live = FlowTask(fresh, tmp_path / "live")
    for i in range(12):
        cached, expected = cache.read(i), live.maker.content(0, i)
        assert cached.text == expected.caption
        for a, b in zip(cached.latents, encode_images(live.pipe.vae, expected.images), strict=True):
            np.testing.assert_allclose(a, b.numpy(), rtol=2e-3, atol=2e-3)
        for a, b in zip(cached.pixels, expected.images, strict=True):
            np.testing.assert_array_equal(a, b)
    batch = run.task.maker.batch(0, 0)  # of the twelve
    assert len({tuple(raw.images[0][0, :4]) for raw in batch}) > 1
    assert {raw.task for raw in batch} >= {"ti2i"}
    run.train_step([batch])


def test_workers_write_the_same_cache(folder, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({
        "device": "cpu", "model": {"folder": str(folder)},
        "data": {"source": "squares", "options": {"size": 32}, "buckets": [[32, 32]], "tasks": {"t2i": 1, "ti2i": 1}},
    }))  # fmt: skip
    for name, changes in (("alone", ()), ("workers", ("producers.backend=processes", "producers.count=2"))):
        cache_latents(path, changes, tmp_path / name, 70)
    for file in ("tokens.raw", "pixels.raw", "index.jsonl"):
        assert (tmp_path / "alone" / file).read_bytes() == (tmp_path / "workers" / file).read_bytes()


def test_a_cache_that_was_interrupted_goes_on(folder, tmp_path, monkeypatch, capsys):
    """The files of a call that was not; what there is beyond the last whole span is made again."""
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({
        "device": "cpu", "model": {"folder": str(folder)}, "log": {"validation_samples": 2},
        "data": {"source": "squares", "options": {"size": 32}, "buckets": [[32, 32]], "tasks": {"t2i": 1, "ti2i": 1}},
    }))  # fmt: skip
    cache_latents(path, (), tmp_path / "whole", 150)
    drawn, made = FlowBatches.to_cache, []

    def until_140(self, index, count):
        made.append(index)
        if len(made) == 140:
            raise KeyboardInterrupt
        return drawn(self, index, count)

    monkeypatch.setattr(FlowBatches, "to_cache", until_140)
    with pytest.raises(KeyboardInterrupt):
        cache_latents(path, (), tmp_path / "cache", 150)
    with pytest.raises(FileNotFoundError, match="finished latent cache"):
        LatentCache(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"begun with another recipe \(seed: 0 -> 1\): give the same again"):
        cache_latents(path, ("seed=1",), tmp_path / "cache", 150)
    for name in ("index.jsonl", "tokens.raw", "unfinished.jsonl"):  # as a kill in the middle of a line leaves them
        with open(tmp_path / "cache" / name, "ab") as file:
            file.write(b'{"caption": "half')
    made.clear()
    capsys.readouterr()
    cache_latents(path, ("optimizer.lr=1e-3",), tmp_path / "cache", 150)  # on which no sample depends
    assert made == list(range(128, 152)) and "128 samples are there" in capsys.readouterr().err
    for file in ("tokens.raw", "pixels.raw", "index.jsonl", "cache.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cache" / file).read_bytes()
    assert not (tmp_path / "cache" / "unfinished.jsonl").exists()


def test_a_cache_without_pixels_serves_no_reconstruction(folder, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({
        "device": "cpu", "batch": 2, "model": {"folder": str(folder)}, "log": {"validation_samples": 1},
        "data": {"source": "squares", "options": {"size": 32}, "buckets": [[32, 32]]},
    }))  # fmt: skip
    cache_latents(path, (), tmp_path / "cache", 4)
    recipe = small_recipe(folder, data__cache=str(tmp_path / "cache"), data__tasks={"recon": 1.0})
    with pytest.raises(RecipeError, match="it lacks references' pixels"):
        FlowTask(recipe, tmp_path / "run").maker.batch(0, 0)


def test_an_unfinished_cache_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="data.cache must be a finished latent cache"):
        LatentCache(tmp_path)


def with_random_b(model):
    for name, tensor in lora_state(model).items():
        if ".lora_B." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))


def test_an_adapter_starts_without_effect_and_only_it_trains(folder, tmp_path):
    recipe = small_recipe(folder, lora__rank=4, model__train_text_encoder=False, steps=2)
    run = start(recipe, tmp_path)
    assert all(".lora_" in name for name in run.parameters)
    assert not any(t.any() for n, t in lora_state(run.task.transformer).items() if ".lora_B." in n)
    before = weights(run)
    run.run()
    assert all(not torch.equal(w, before[n]) for n, w in weights(run).items() if "lora_B" in n and "blocks.0" in n)
    other = small_transformer()
    add_lora(other, recipe.lora)
    load_lora(other, tmp_path / "model")
    assert torch.equal(lora_state(other)["transformer_blocks.0.attn.to_q.lora_A.weight"],
                       run.ema.average["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"])  # fmt: skip
    with pytest.raises(
        RecipeError, match="lora.targets must be attention, .* ends of names of linear layers, .*got 'to_x'"
    ):
        add_lora(small_transformer(), LoraRecipe(4, targets=["to_x"]))


@pytest.mark.parametrize("reader", ["diffusers", "peft", WEIGHTS, PEFT_WEIGHTS])
def test_others_read_the_files(tmp_path, reader):
    """And our own pipelines both of them."""
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    ours = small_transformer()
    library = diffusers if reader in ("diffusers", "peft") else qwen_image_fast
    theirs = library.QwenImageTransformer2DModel(**ours.config)
    theirs.load_state_dict(ours.state_dict())
    x, txt = (normal(shape, 0, "input") for shape in ((1, 4, 64), (1, 5, 128)))
    arguments = {"timestep": torch.tensor([0.5]), "img_shapes": [[(1, 2, 2)]]}
    with torch.no_grad():
        plain = ours(x, txt, None, **arguments).sample
    lora = LoraRecipe(rank=4, alpha=6.0)
    add_lora(ours, lora)
    with_random_b(ours)
    save_lora(ours, tmp_path, lora, tasks=["ti2i", "t2i"])
    for name in (WEIGHTS, PEFT_WEIGHTS):
        assert read_metadata(tmp_path / f"{name}.safetensors")["qwen_image_fast.tasks"] == "t2i ti2i"
    if reader == "peft":
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path)
    elif library is qwen_image_fast:
        state, config = read_lora(tmp_path, f"{reader}.safetensors")
        own, _ = split_components(state)
        adapters_of(theirs).add("a", parse_lora(own, theirs, component_config(config, "transformer")))
    else:
        state = diffusers.QwenImagePipeline.lora_state_dict(tmp_path, weight_name="pytorch_lora_weights.safetensors")
        diffusers.QwenImagePipeline.load_lora_into_transformer(state, theirs)
    with torch.no_grad():
        a = ours(x, txt, None, **arguments).sample
        b = theirs(x, txt, torch.ones(1, 5, dtype=torch.int64), **arguments).sample
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert (a - plain).abs().max() > 0.01
