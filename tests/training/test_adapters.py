"""Adapters of every kind on any layers: their formulas, their files elsewhere, dropout, and training that goes on."""

import math

import pytest
import torch
import torch.nn.functional as F
from trainer_helpers import log_of, small_recipe, small_transformer, start, weights

from qwen_image_fast.models.lora import adapters_of
from qwen_image_fast.models.lora_files import parse_lora, read_lora
from qwen_image_fast.models.lora_keys import component_config, split_components
from qwen_image_fast.training.adapters import (
    AdapterLinear,
    DoraLinear,
    LokrLinear,
    divided,
    draw_kept,
    without_adapters,
)
from qwen_image_fast.training.lora import PEFT_WEIGHTS, WEIGHTS, add_lora, load_lora, lora_state, save_lora
from qwen_image_fast.training.randomness import normal
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.flow import LoraRecipe

MIXED = {"targets": ["attention", "mlp"], "ranks": {"mlp": 2}, "alphas": {"to_v": 3.0}}
KINDS = {
    "lora": LoraRecipe(rank=4, alpha=6.0, **MIXED),
    "rank-stabilised": LoraRecipe(rank=4, alpha=6.0, rank_stabilised=True, **MIXED),
    "dora": LoraRecipe(rank=4, alpha=6.0, kind="dora", **MIXED),
    "lokr": LoraRecipe(rank=2, alpha=3.0, kind="lokr", targets=["attention", "mlp"], ranks={"to_v": 100}),
    "lokr by factor": LoraRecipe(rank=2, alpha=3.0, kind="lokr", factor=4, targets=["attention"]),
}


def with_random_parts(model):
    for name, tensor in lora_state(model).items():
        drawn = 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
        tensor.copy_(tensor + drawn if "magnitude" in name else drawn)


def outputs(model, **more):
    x, txt = (normal(shape, 0, "input") for shape in ((1, 4, 64), (1, 5, 128)))
    with torch.no_grad():
        return model(x, txt, *more.values(), timestep=torch.tensor([0.5]), img_shapes=[[(1, 2, 2)]]).sample


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", [WEIGHTS, PEFT_WEIGHTS, "ourselves"])
def test_files_give_what_training_had(tmp_path, kind, reader):
    recipe, model = KINDS[kind], small_transformer()
    plain = outputs(model)
    add_lora(model, recipe, seed=3)
    torch.testing.assert_close(outputs(model), plain, rtol=1e-5, atol=1e-5)
    with_random_parts(model)
    expected = outputs(model)
    assert (expected - plain).abs().max() > 0.01
    save_lora(model, tmp_path, recipe)
    other = small_transformer()
    if reader == "ourselves":
        add_lora(other, recipe)
        load_lora(other, tmp_path)
    else:
        state, config = read_lora(tmp_path, f"{reader}.safetensors")
        own, _ = split_components(state)
        adapters_of(other).add("a", parse_lora(own, other, component_config(config, "transformer")))
    torch.testing.assert_close(outputs(other), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "rank-stabilised", "dora", "lokr"])
@pytest.mark.parametrize("reader", ["diffusers", "peft"])
def test_other_libraries_read_them(tmp_path, kind, reader):
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    if (reader, kind) == ("diffusers", "lokr"):
        pytest.skip("diffusers reads no LoKr")
    recipe, ours = KINDS[kind], small_transformer()
    theirs = diffusers.QwenImageTransformer2DModel(**ours.config)
    theirs.load_state_dict(ours.state_dict())
    add_lora(ours, recipe)
    with_random_parts(ours)
    save_lora(ours, tmp_path, recipe)
    if reader == "peft":
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path)
    else:
        state = diffusers.QwenImagePipeline.lora_state_dict(tmp_path, weight_name="pytorch_lora_weights.safetensors")
        diffusers.QwenImagePipeline.load_lora_into_transformer(state, theirs)
    x, txt = (normal(shape, 0, "input") for shape in ((1, 4, 64), (1, 5, 128)))
    with torch.no_grad():
        mask = torch.ones(1, 5, dtype=torch.int64)
        made = theirs(x, txt, mask, timestep=torch.tensor([0.5]), img_shapes=[[(1, 2, 2)]]).sample
    torch.testing.assert_close(outputs(ours), made, rtol=1e-4, atol=1e-4)


def test_dora_has_the_norms_of_its_magnitudes():
    layer = torch.nn.Linear(12, 8)
    adapter = DoraLinear(layer, 3, 0.7)
    with torch.no_grad():
        adapter.reset(0, "x")
        adapter.lora_B.weight.normal_(generator=torch.Generator().manual_seed(0))
        adapter.lora_magnitude_vector.uniform_(1, 2, generator=torch.Generator().manual_seed(1))
    changed = layer.weight + 0.7 * adapter.lora_B.weight @ adapter.lora_A.weight
    merged = adapter.lora_magnitude_vector[:, None] * changed / changed.norm(dim=1, keepdim=True)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(adapter(x), F.linear(x, merged, layer.bias))
    # The gradient takes the norm as a constant.
    adapter(x).square().sum().backward()
    norm = changed.norm(dim=1, keepdim=True).detach()
    b = adapter.lora_B.weight.detach().clone().requires_grad_()
    summed = layer.weight + 0.7 * b @ adapter.lora_A.weight
    again = F.linear(x, adapter.lora_magnitude_vector[:, None] * summed / norm, layer.bias)
    torch.testing.assert_close(adapter.lora_B.weight.grad, torch.autograd.grad(again.square().sum(), b)[0])


@pytest.mark.parametrize("rank, factor, shapes", [(2, 0, [(4, 3), (6, 2), (2, 4)]), (9, 0, [(4, 3), (6, 4)]),
                                                  (2, 2, [(2, 2), (12, 2), (2, 6)])])  # fmt: skip
def test_lokr_is_a_kronecker_product(rank, factor, shapes):
    layer = torch.nn.Linear(12, 24)
    adapter = LokrLinear(layer, rank, 0.5, factor)
    assert [tuple(t.shape) for t in adapter.tensors().values()] == shapes
    with torch.no_grad():
        for tensor in adapter.tensors().values():
            tensor.normal_(generator=torch.Generator().manual_seed(tensor.numel()))
    first, *second = adapter.tensors().values()
    whole = second[0] @ second[1] if len(second) == 2 else second[0]
    scale = 0.5 if len(second) == 2 else 1.0
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(adapter(x), layer(x) + scale * F.linear(x, torch.kron(first, whole)))


def test_divisors():
    assert divided(3072, 0) == (48, 64) and divided(3072, 8) == (8, 384) and divided(7, 3) == (1, 7)


def test_layers_by_pattern_with_ranks_and_alphas():
    def ranks(**fields):
        model = small_transformer()
        names = add_lora(model, LoraRecipe(rank=4, alpha=8.0, **fields))
        return {n.replace("transformer_blocks.", ""): (m.rank, m.scale) for n, m in model.named_modules()
                if isinstance(m, AdapterLinear) and n in names}  # fmt: skip

    attention = [f"{k}.attn.{name}" for k in (0, 1) for name in ("to_q", "to_k", "to_v", "to_out.0")]
    assert sorted(ranks(targets=["attention"])) == sorted(attention)
    assert set(ranks(targets=["1.attn.to_*"])) == {
        "1.attn.to_q", "1.attn.to_k", "1.attn.to_v", "1.attn.to_out.0", "1.attn.to_add_out"
    }  # fmt: skip
    everything = ranks(targets=["all"], ranks={"text": 2, "txt_mod.1": 1}, alphas={"mlp": 1.0})
    assert len(everything) == 2 * 14
    assert everything["0.img_mlp.net.2"] == (4, 0.25) and everything["0.attn.add_q_proj"] == (2, 4.0)
    assert everything["1.txt_mod.1"] == (1, 8.0) and everything["1.img_mod.1"] == (4, 2.0)
    assert ranks(targets=["to_q"], rank_stabilised=True)["0.attn.to_q"] == (4, 8 / math.sqrt(4))
    for fields, message in (
        ({"targets": ["to_x"]}, "lora.targets must be attention, mlp, .*, got 'to_x'; there are .*add_q_proj"),
        ({"targets": ["mlp"], "ranks": {"to_q": 2}}, "lora.ranks must be .*, got 'to_q'; there are img_mlp.net.0.proj"),
        ({"targets": ["mlp"], "alphas": {"text": 2}}, "lora.alphas must be .*, got 'text'"),
        ({"targets": ["to_q"], "ranks": {"to_q": 99}}, "lora.rank must be at most 32, .*to_q, got 99"),
        ({"targets": ["to_q"], "kind": "lokr", "dropout": 0.5}, "lora.dropout needs lora.rank below 4 for the LoKr of"),
    ):
        with pytest.raises(RecipeError, match=message):
            ranks(**fields)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_a_run_with_dropout_goes_on_bit_by_bit(folder, tmp_path, kind, checkpointing):
    rank = 2 if kind == "lokr" else 8
    recipe = small_recipe(
        folder, steps=4, checkpoint__every=2, lora__rank=rank, lora__kind=kind, lora__dropout=0.4, accumulate=2,
        lora__targets=["attention", "mlp", "text"], model__train_text_encoder=False, log__validate_every=1,
        model__gradient_checkpointing=checkpointing,
    )  # fmt: skip
    whole = start(recipe, tmp_path / "whole")
    whole.run()
    stopped = start(recipe, tmp_path / "stopped")
    step = stopped.train_step
    stopped.train_step = lambda batches: step(batches) if stopped.step < 3 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        stopped.run()
    resumed = start(recipe, tmp_path / "stopped", resume=True)
    resumed.run()
    assert all(torch.equal(w, weights(resumed)[n]) for n, w in weights(whole).items())
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "stopped")
    assert log_of(tmp_path / "whole", "validation_loss") == log_of(tmp_path / "stopped", "validation_loss")


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_what_is_to_be_kept_is_taught_by_the_model_without_adapters(folder, tmp_path, kind):
    """Before a step the loss of such samples is 0, of others it is not; later the base is still their target."""
    parts = [{"name": "own", "source": "squares", "options": {"size": 32}},
             {"name": "kept", "source": "squares", "options": {"size": 64}, "keep": True}]  # fmt: skip
    recipe = small_recipe(folder, batch=8, data__mixture=parts, lora__rank=4, lora__kind=kind,
                          log__validation_samples=4, model__train_text_encoder=False)  # fmt: skip
    task = start(recipe, tmp_path / "run").task
    batch = task.maker.batch(0, 0)
    keep = torch.tensor([raw.keep for raw in batch])
    assert 0 < keep.sum() < 8 and not any(raw.keep for raw in task.maker.validation())
    losses = task.loss(batch).per_sample
    assert losses[keep].max() < 1e-6 < 0.1 < losses[~keep].min()
    with_random_parts(task.transformer)
    changed = task.loss(batch).per_sample
    assert changed[keep].min() > 1e-6
    own = task.transformer.transformer_blocks[0].attn.to_q
    with without_adapters(task.transformer):
        assert torch.equal(own(x := torch.randn(3, own.base.in_features)), own.base(x))
    assert not torch.equal(own(x), own.base(x))


def test_dropout_leaves_parts_out_in_training_alone():
    model = small_transformer()
    add_lora(model, LoraRecipe(rank=32, alpha=32.0))
    with_random_parts(model)
    plain = outputs(model)
    draw_kept(model, 0.5, 0, 7)
    kept = [m.kept for m in model.modules() if isinstance(m, AdapterLinear)]
    assert {value for k in kept for value in k.tolist()} == {0.0, 2.0} and len({tuple(k.tolist()) for k in kept}) > 4
    assert torch.equal(outputs(model), plain)  # without gradients nothing is left out
    x = normal((1, 4, 64), 0, "input")
    trained = model(x, normal((1, 5, 128), 0, "input"), timestep=torch.tensor([0.5]), img_shapes=[[(1, 2, 2)]]).sample
    assert (trained - plain).abs().max() > 1e-3
    draw_kept(model, 0.5, 0, 7)
    assert all(
        torch.equal(a, m.kept) for a, m in zip(kept, (m for m in model.modules() if isinstance(m, AdapterLinear)))
    )
    draw_kept(model, 0.5, 0, None)
    assert all(m.kept is None for m in model.modules() if isinstance(m, AdapterLinear))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora__kind": "loha"}, "lora.kind must be of lora, dora, lokr, got 'loha'"),
        ({"lora__dropout": 1.0}, r"lora.dropout must be in \[0, 1\)"),
        ({"lora__factor": 4}, "lora.factor must be 0 unless lora.kind is lokr"),
        ({"lora__ranks": {"mlp": 0}}, "lora.ranks.mlp must be at least 1"),
        (
            {"lora__rank": 0, "data__mixture": [{"source": "squares", "keep": True}]},
            r"data.mixture.keep must be false but for adapters \(lora.rank above 0\) of kind flow",
        ),
    ],
)
def test_what_cannot_be(folder, changes, message):
    with pytest.raises(RecipeError, match=message):
        small_recipe(folder, **{"lora__rank": 2, "model__train_text_encoder": False, **changes})
