"""The drop-in beside what else people do to a transformer: hooks, offloading, step caches, casting, compiling."""

import copy

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from accelerate_harness import assert_same, count_fast_forwards, run, small_transformer  # noqa: E402

from qwen_image_fast import accelerate, restore  # noqa: E402


@pytest.fixture
def theirs():
    return small_transformer()


@pytest.fixture
def ours(theirs):
    model = copy.deepcopy(theirs)
    accelerate(model)
    return model


@pytest.fixture
def packed(monkeypatch):
    return count_fast_forwards(monkeypatch)


@pytest.fixture(autouse=True)
def _attention_backend():
    """`set_attention_backend` also sets a process-wide default."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    before = registry._active_backend
    yield
    registry.set_active_backend(before)


# ---- hooks and choices of the user -----------------------------------------------------------------------------------


class OwnProcessor(torch.nn.Module):
    calls = 0

    def __call__(self, attn, hidden_states, encoder_hidden_states, *args, **kwargs):
        OwnProcessor.calls += 1
        return hidden_states, encoder_hidden_states


def own_processor(model):
    model.transformer_blocks[1].attn.set_processor(OwnProcessor())


def backend(model):
    model.set_attention_backend("_native_math")


def block_hook(model):
    model.transformer_blocks[1].register_forward_hook(lambda module, args, output: None)


def norm_hook(model):
    model.transformer_blocks[0].attn.norm_k.register_forward_pre_hook(lambda module, args: None)


def first_block_cache(model):
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))


def sequential_offload(model):
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))


def block_offload(model):
    cpu = torch.device("cpu")
    model.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)


def leaf_offload(model):
    cpu = torch.device("cpu")
    model.enable_group_offload(cpu, cpu, offload_type="leaf_level")


def other_norm(model):
    attn = model.transformer_blocks[0].attn
    weight, attn.norm_q = attn.norm_q.weight, torch.nn.RMSNorm(16, eps=1e-6)
    attn.norm_q.weight = weight


CHOICES = [own_processor, backend, block_hook, norm_hook, first_block_cache, sequential_offload, block_offload,
           leaf_offload, other_norm]  # fmt: skip


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("choice", CHOICES, ids=lambda f: f.__name__)
def test_choices(theirs, choice, order, packed):
    """diffusers' own forward runs, and the report says so."""
    ours = copy.deepcopy(theirs)
    if order == "after":
        accelerate(ours)
    for model in (theirs, ours):
        choice(model)
    if order == "before":
        report = accelerate(ours)
        assert report.replaced == [] and "as long as this is so, diffusers' own forward runs" in str(report)
    OwnProcessor.calls = 0
    results = []
    for model in (theirs, ours):
        with model.cache_context("cond"):
            results.append(run(model))
    assert_same(results[1], results[0])
    assert not packed
    assert OwnProcessor.calls == (2 if choice is own_processor else 0)


def test_choices_taken_back(theirs, ours, packed):
    first_block_cache(ours)
    ours.disable_cache()
    assert_same(run(ours), run(theirs))
    assert len(packed) == 1


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", ["accelerate", "diffusers", "both"])
def test_whole_model_hooks(theirs, order, kind, packed):
    """Offloading of the whole model wraps its forward; the fast forward runs inside of the wrapper."""
    import accelerate as hf
    from diffusers.hooks import HookRegistry, ModelHook

    class Hook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append("diffusers")
            return args, kwargs

    class HfHook(hf.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append("accelerate")
            return args, kwargs

    seen = []
    ours = copy.deepcopy(theirs)
    expected = run(theirs)
    if order == "after":
        accelerate(ours)
    if kind != "diffusers":
        hf.cpu_offload_with_hook(ours, torch.device("cpu"))
        hf.hooks.add_hook_to_module(ours, HfHook(), append=True)
    if kind != "accelerate":
        HookRegistry.check_if_exists_or_initialize(ours).register_hook(Hook(), "mine")
    hooks = {"both": ["diffusers", "accelerate"]}.get(kind, [kind])
    if order == "before":
        assert not accelerate(ours).left_alone
    assert_same(run(ours), expected)
    assert len(packed) == 1 and seen == hooks
    restore(ours)
    assert torch.equal(run(ours), expected)
    assert len(packed) == 1 and seen == 2 * hooks


def test_removed_hooks(theirs, packed):
    """accelerate's hooks leave the bound method of the old class behind."""
    import accelerate as hf

    sequential_offload(theirs)
    hf.hooks.remove_hook_from_module(theirs, recurse=True)
    ours = copy.deepcopy(theirs)
    assert not accelerate(ours).left_alone
    assert_same(run(ours), run(theirs))
    assert len(packed) == 1


def test_unknown_wrapper(theirs, packed):
    expected = run(theirs)
    forward = theirs.forward
    theirs.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert "replaced its forward" in str(accelerate(theirs))
    assert torch.equal(run(theirs), expected) and not packed


def test_layerwise_casting(theirs, packed):
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    for model in (theirs, ours):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert_same(run(ours), run(theirs))
    assert len(packed) == 1


def test_autocast(theirs, ours, packed):
    """The fast forward needs its norm weights in the type that is computed in."""
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(ours), run(theirs)) and not packed
        timestep = torch.tensor([0.3, 0.7])  # is rounded to the type that is computed in
        expected, got = (run(model.bfloat16(), timestep=timestep) for model in (theirs, ours))
    assert len(packed) == 1
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.1)


def test_attention_backend_context(theirs, ours, packed):
    from diffusers.models.attention_dispatch import attention_backend

    with attention_backend("_native_math"):
        assert torch.equal(run(ours), run(theirs)) and not packed


@pytest.mark.parametrize("order", ["before", "after"])
def test_compile(theirs, order, packed):
    torch._dynamo.reset()
    ours = copy.deepcopy(theirs)
    if order == "after":
        accelerate(ours)
    compiled = torch.compile(ours, backend="eager")
    if order == "before":
        accelerate(compiled)
    assert_same(run(compiled, encoder_hidden_states_mask=None), run(theirs, encoder_hidden_states_mask=None))
    assert packed
    del packed[:]
    OwnProcessor.calls = 0
    own_processor(ours)
    run(compiled)
    assert OwnProcessor.calls and not packed


def test_compiled_blocks(theirs, packed):
    ours = copy.deepcopy(theirs)
    ours.compile_repeated_blocks(backend="eager")
    assert "compile_repeated_blocks has no effect" in str(accelerate(ours))
    assert_same(run(ours), run(theirs))
    assert len(packed) == 1
