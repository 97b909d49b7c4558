"""The stand-alone transformer with every module called: for hooks, caches, processors, adapters and moving weights."""

import copy
import logging

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

import diffusers
from accelerate_harness import assert_same, inputs, run
from called_harness import latents, pair
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

import qwen_image_fast
from qwen_image_fast.graphs import StepGraphs

CPU = torch.device("cpu")


# ---- hooks -----------------------------------------------------------------------------------------------------------

# Modules that the packed forward does not call, by their names in a block; the rest by that in the model.
PLACES = [
    "attn", "attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k", "attn.to_q", "attn.to_add_out",
    "img_mod", "img_mod.0", "img_mod.1", "txt_mod", "txt_mod.0", "img_mlp", "img_mlp.net.0", "img_mlp.net.1", "txt_mlp",
    "txt_mlp.net.1", "txt_mlp.net.2", "attn.to_out.1",
]  # fmt: skip
PLACES = [
    *(f"transformer_blocks.0.{place}" for place in PLACES),
    "transformer_blocks.0",
    "norm_out",
    "norm_out.linear",
    "norm_out.silu",
    "time_text_embed.timestep_embedder.act",
    "proj_out",
    "txt_norm",
]


def changed(x):
    """Otherwise than by a factor or a constant, which norms undo."""
    return tuple(map(changed, x)) if isinstance(x, tuple) else x * 1.3 + 0.3 * x.roll(1, -1)


def before(module, args, kwargs):
    """Other hidden states, which attention and blocks get by name."""
    if not kwargs:
        return (changed(args[0]), *args[1:]), kwargs
    return args, {name: changed(x) if name.endswith("hidden_states") else x for name, x in kwargs.items()}


def hang(model, place, kind):
    module = model.get_submodule(place)
    if kind == "hook":
        return module.register_forward_hook(lambda m, args, output: changed(output)).remove
    if kind == "pre-hook":
        return module.register_forward_pre_hook(before, with_kwargs=True).remove
    own = module.forward
    module.forward = lambda *args, **kwargs: changed(own(*args, **kwargs))
    return lambda: vars(module).pop("forward")


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "forward"])
@pytest.mark.parametrize("place", PLACES)
def test_hooks(both, place, kind):
    theirs, ours = both
    plain = run(ours)
    removes = [hang(model, place, kind) for model in both]
    expected = run(theirs)
    assert (expected - plain).abs().max() > 2e-4 * plain.std()
    assert_same(run(ours), expected)
    for remove in removes:
        remove()
    assert torch.equal(run(ours), plain)


@pytest.mark.parametrize("place", ["attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp.net.2"])
@pytest.mark.parametrize("pipeline", [False, True], ids=["model", "pipeline"])
def test_hooks_on_what_reaches_nothing(both, pipe, place, pipeline):
    """In the last block, whose text stream ends there."""
    model = pipe.transformer if pipeline else both[1]
    compute = (lambda: latents(pipe)) if pipeline else (lambda: run(model))
    plain, seen = compute(), []
    hook = model.transformer_blocks[-1].get_submodule(place).register_forward_hook(lambda *_: seen.append(place))
    assert_same(compute(), plain)
    assert len(seen) == (4 if pipeline else 1)
    hook.remove()
    assert torch.equal(compute(), plain) and len(seen) == (4 if pipeline else 1)


def test_a_pipeline_says_that_it_passes_the_model_itself_by(pipe, caplog):
    said = "hooks on the transformer itself do not run in a pipeline"
    latents(pipe)
    assert said not in caplog.text
    pipe.transformer.register_forward_hook(lambda *_: None)
    for _ in range(2):
        latents(pipe)
    assert caplog.text.count(said) == 1


@pytest.mark.parametrize("place", ["attn.norm_q", "txt_mod", "img_mlp.net.0"])
def test_backward_hooks(both, place):
    for model in both:
        model.transformer_blocks[0].get_submodule(place).register_full_backward_hook(lambda m, i, o: changed(i))
        model(**inputs()).sample.square().mean().backward()
    got = dict(both[1].named_parameters())
    for name, p in both[0].named_parameters():
        if p.grad is not None and p.grad.any():
            bound = 1e-4 * float(p.grad.abs().max())
            torch.testing.assert_close(got[name].grad, p.grad, rtol=1e-3, atol=bound, msg=name)


def watched(model):
    """A hook that changes nothing, where only the called form runs it."""
    model.transformer_blocks[0].attn.register_forward_hook(lambda m, args, output: None)
    return model


@pytest.mark.parametrize(
    "changes, call",
    [
        ({}, {"img_shapes": [[(1, 4, 3)], [(1, 3, 3)]]}),
        ({"zero_cond_t": True}, {"img_shapes": [[(1, 2, 3), (1, 3, 2)]] * 2, "timestep": torch.tensor([0.3, 0.6])}),
        ({"use_additional_t_cond": True, "use_layer3d_rope": True},
         {"img_shapes": [[(1, 2, 3)] * 2] * 2, "additional_t_cond": torch.tensor([0, 1])}),
        ({}, {"controlnet_block_samples": [torch.full((2, 12, 32), 0.3)]}),
    ],
    ids=["sizes", "references", "layers", "residuals"],
)  # fmt: skip
def test_it_is_the_same_mathematics(changes, call):
    _, ours = pair(**changes)
    expected = run(ours, **call)
    assert_same(run(watched(ours), **call), expected)


def test_gradients_and_checkpointing(both):
    _, ours = both
    found = []
    for prepare in (lambda m: m, watched, lambda m: watched(m).enable_gradient_checkpointing() or m):
        model = prepare(copy.deepcopy(ours)).train()
        model(**inputs()).sample.square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()})
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        for name, grad in found[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-3, atol=1e-5)


def test_pictures(pipe):
    """Of several sizes of text at once, whose modulation comes from a table of all steps."""
    call = {"prompt": ["a red cat", '"HI" in blue'], "seed": [3, 4], "negative_prompt": " ", "true_cfg_scale": 3.0}
    plain = latents(pipe, **call)
    watched(pipe.transformer)
    assert_same(latents(pipe, **call), plain)
    assert pipe.transformer.modulation_tables.freed is False


# ---- caches ----------------------------------------------------------------------------------------------------------

CACHES = {
    "first block": lambda: diffusers.FirstBlockCacheConfig(threshold=1.0),
    "magnitudes": lambda: diffusers.hooks.MagCacheConfig(
        threshold=1.0, max_skip_steps=3, num_inference_steps=4, retention_ratio=0.1, mag_ratios=[1.0] * 4
    ),
    "pyramid": lambda: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "Taylor": lambda: diffusers.hooks.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32
    ),
}


@pytest.mark.parametrize("config", CACHES.values(), ids=CACHES.keys())
def test_caches(both, config):
    """Three steps of two contexts: what is computed and what is taken from a step before is as in diffusers."""
    found = []
    for model in both:
        plain = run(model)
        model.enable_cache(config())
        assert model.is_cache_enabled
        with pytest.raises(ValueError, match="Caching has already been enabled"):
            model.enable_cache(config())
        steps = []
        with torch.no_grad():
            for step in range(3):
                for name in ("cond", "uncond"):
                    given = inputs()
                    given["hidden_states"] = given["hidden_states"] * (1 + 0.02 * step) + (name == "cond")
                    with model.cache_context(name):
                        steps.append(model(**given).sample)
        model._reset_stateful_cache()
        model.disable_cache()
        assert torch.equal(run(model), plain) and not model.is_cache_enabled
        found.append(steps)
    for theirs, ours in zip(*found):
        assert_same(ours, theirs)


@pytest.mark.parametrize("config", CACHES.values(), ids=CACHES.keys())
def test_caches_in_a_pipeline(pipe, config):
    """A call forgets what another cached; something is taken from a step before."""
    call = {"negative_prompt": " ", "true_cfg_scale": 3.0}
    plain = latents(pipe, **call)
    seen = []
    pipe.transformer.transformer_blocks[1].attn.to_q.register_forward_hook(
        lambda *_: seen.append(pipe.current_timestep)
    )
    given = config()
    if hasattr(given, "threshold"):
        given.threshold = 100.0
    if hasattr(given, "current_timestep_callback"):
        given.current_timestep_callback = lambda: pipe.current_timestep
    pipe.transformer.enable_cache(given)
    first = latents(pipe, **call)
    assert 0 < len(seen) < 4 and all(timestep > 0 for timestep in seen)
    latents(pipe, **call, seed=5)
    assert torch.equal(latents(pipe, **call), first) and not torch.equal(first, plain)
    pipe.transformer.disable_cache()
    assert torch.equal(latents(pipe, **call), plain)


def test_a_cache_that_never_skips_changes_nothing(pipe):
    plain = latents(pipe)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
    assert_same(latents(pipe), plain)


def test_other_caches_are_refused(both):
    config = diffusers.FasterCacheConfig(current_timestep_callback=lambda: 500)
    with pytest.raises(ValueError, match="config must be one of FirstBlockCacheConfig, .* got FasterCacheConfig"):
        both[1].enable_cache(config)
    assert not both[1].is_cache_enabled


# ---- attention processors --------------------------------------------------------------------------------------------


class Weaker(nn.Module):
    """A processor of a user's own, which is a module: of it diffusers finds no names of arguments."""

    def forward(self, attn, hidden_states, encoder_hidden_states, attention_mask):
        return attn.to_out[0](0.5 * hidden_states), attn.to_add_out(encoder_hidden_states)


class Half(QwenDoubleStreamAttnProcessor2_0):
    """Another, which names its arguments and does what diffusers' does."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, encoder_hidden_states_mask=None, attention_mask=None,
        image_rotary_emb=None,
    ):  # fmt: skip
        given = encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb
        return tuple(0.5 * stream for stream in super().__call__(attn, hidden_states, *given))


def test_processors(both):
    """On one block, then on all, and then as before; of samples whose sizes and texts differ."""
    plain = run(both[1])
    for model in both:
        names = list(model.attn_processors)
        own = model.attn_processors
        model.set_attn_processor({**own, names[0]: Half()})
    assert names == [f"transformer_blocks.{i}.attn.processor" for i in range(2)]
    assert_same(run(both[1]), run(both[0]))
    for processor in (Half(), Weaker()):
        for model in both:
            model.set_attn_processor(processor)
        assert_same(run(both[1]), run(both[0]))
    both[1].set_attn_processor(own)
    assert torch.equal(run(both[1]), plain)
    with pytest.raises(ValueError, match="the number of processors must be that of the attention layers, 2, .* got 1"):
        both[1].set_attn_processor({names[0]: Weaker()})
    with pytest.raises(TypeError, match="set_processor: processor must be callable, got int 3"):
        both[1].set_attn_processor(3)
    assert torch.equal(run(both[1]), plain)


def test_fusing_is_said_to_do_nothing(both, caplog):
    with caplog.at_level(logging.WARNING):
        both[1].fuse_qkv_projections(), both[1].unfuse_qkv_projections()
    assert "fuse_qkv_projections has no effect: projections run together" in caplog.text


# ---- weights that move -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [
    {"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"},
], ids=["blocks", "leaves"])  # fmt: skip
def test_offloading_in_a_pipeline(pipe, how, tmp_path):
    """From files, so that a weight which is read outside of its module would be none."""
    plain = latents(pipe)
    pipe.transformer.enable_group_offload(CPU, CPU, offload_to_disk_path=tmp_path, **how)
    assert list(tmp_path.glob("*.safetensors"))
    for _ in range(2):
        assert_same(latents(pipe), plain)
    with pytest.raises(ValueError, match="load_lora_weights: weights must stay where they are, and hooks move"):
        pipe.load_lora_weights({})


@pytest.mark.parametrize("names", [None, ("none",)], ids=["by default", "proj_out too"])
def test_casting(pipe, names):
    plain = latents(pipe)
    pipe.transformer.enable_layerwise_casting(torch.bfloat16, skip_modules_pattern=names)
    assert pipe.transformer.dtype == torch.float32 and pipe.transformer.img_in.weight.dtype == torch.bfloat16
    got = latents(pipe)
    assert got.dtype == torch.float32 and 0 < (got - plain).abs().max() < 0.2 * plain.std()


def test_what_cannot_move(tiny_folder):
    whole = qwen_image_fast.QwenImageTransformer2DModel.from_pretrained(tiny_folder / "transformer", precision="int8")
    for call in (
        lambda: whole.enable_layerwise_casting(),
        lambda: whole.enable_group_offload(CPU, offload_type="leaf_level"),
    ):
        with pytest.raises(ValueError, match="layers must be floating point, got some in 8 bits"):
            call()


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_compiled_blocks(both):
    torch.compiler.reset()
    plain = run(both[1])
    both[1].compile_repeated_blocks(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        assert_same(run(both[1]), plain)


def test_the_table_of_positions(both):
    for changes in ({}, {"use_layer3d_rope": True}):
        theirs, ours = pair(**changes)
        shapes = [[(1, 4, 3), (1, 3, 5), (1, 2, 2)]]
        for got, expected in zip(*(m.pos_embed(shapes, max_txt_seq_len=7, device=CPU) for m in (ours, theirs))):
            torch.testing.assert_close(got, expected)


def test_graphs_refuse(pipe):
    pipe.transformer.enable_cache(CACHES["first block"]())
    with pytest.raises(ValueError, match="CUDA graphs: no step cache, attention processor or hook may be on the trans"):
        StepGraphs().start(pipe.transformer)
