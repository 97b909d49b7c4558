"""Calls of a transformer that diffusers takes: the drop-in and the stand-alone model give the same, or a sentence."""

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from accelerate_harness import CONFIG, assert_same, count_fast_forwards, inputs, run, small_transformer

import qwen_image_fast
from qwen_image_fast import accelerate
from qwen_image_fast.drop_in.transformer import with_lengths

CPU = torch.device("cpu")


@pytest.fixture
def theirs():
    return small_transformer()


@pytest.fixture(params=["accelerated", "stand-alone"])
def ours(request, theirs):
    return made(request.param, theirs)


@pytest.fixture
def fast(theirs):
    return made("accelerated", theirs)


@pytest.fixture
def alone(theirs):
    return made("stand-alone", theirs)


@pytest.fixture
def packed(monkeypatch):
    return count_fast_forwards(monkeypatch)


def made(kind, theirs):
    if kind == "stand-alone":
        model = qwen_image_fast.QwenImageTransformer2DModel(**CONFIG).eval()
        model.load_state_dict(theirs.state_dict())
        return model
    model = copy.deepcopy(theirs)
    accelerate(model)
    return model


def numbers(kind):
    return [(kind(1), kind(4), kind(3))]


GIVEN = inputs()
PICTURE, TEXT = GIVEN["hidden_states"][:1], GIVEN["encoder_hidden_states"][:1]
CALLS = {
    "text in bfloat16": {"encoder_hidden_states": GIVEN["encoder_hidden_states"].bfloat16()},
    "one text": {"encoder_hidden_states": TEXT, "encoder_hidden_states_mask": None},
    "one picture": {"hidden_states": PICTURE},
    "one of both, two noise levels": {
        "hidden_states": PICTURE, "encoder_hidden_states": TEXT, "encoder_hidden_states_mask": None,
        "timestep": torch.tensor([0.3, 0.6]),
    },
    "one noise level": {"timestep": torch.tensor([0.3])},
    "shapes of numpy": {"img_shapes": [numbers(np.int64)] * 2},
    "shapes of numpy without lists": {"img_shapes": numbers(np.int32) * 2},
    "a mask of floats": {"encoder_hidden_states_mask": GIVEN["encoder_hidden_states_mask"].float()},
    "no attention_kwargs": {"attention_kwargs": {}},
}  # fmt: skip


@pytest.mark.parametrize("change", CALLS.values(), ids=CALLS.keys())
def test_call(theirs, ours, change, packed):
    assert_same(run(ours, **change), run(theirs, **change))
    assert len(packed) == 1


def test_samples_that_do_not_fit(ours):
    for change in ({"encoder_hidden_states": torch.randn(3, 5, 24)}, {"timestep": torch.tensor([0.1, 0.2, 0.3])}):
        with pytest.raises(ValueError, match="must have one batch size, or one sample for all, got 2, . and"):
            run(ours, **change, encoder_hidden_states_mask=None)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("way", ["in place", "through .data", "through numpy"])
def test_a_mask_that_was_written_to(theirs, ours, mode, way, packed):
    def twice(model):
        with mode():
            values = np.ones((2, 5), dtype=np.int64)
            given = inputs(encoder_hidden_states_mask=torch.from_numpy(values))
            mask = given["encoder_hidden_states_mask"] = given["encoder_hidden_states_mask"].clone()
            if way == "through numpy":
                mask = given["encoder_hidden_states_mask"] = torch.from_numpy(values)
            first = model(**given).sample
            {"in place": mask, "through .data": mask.data, "through numpy": values}[way][0, 2:] = 0
            return first, model(**given).sample, model(**given).sample

    expected, got = twice(theirs), twice(ours)
    assert (expected[0] - expected[1]).abs().max() > 0.1
    for a, b in zip(got, expected):
        assert_same(a, b)
    assert len(packed) == 3


# ---- training --------------------------------------------------------------------------------------------------------


def test_dropout(theirs, fast, packed):
    results = []
    for model in (theirs, fast):
        for layer in model.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.5
        assert_same(run(fast), run(theirs))  # no effect outside of training
        model.train()
        results.append([])
        for seed in (0, 1):
            torch.manual_seed(seed)
            given = inputs()
            torch.manual_seed(seed)
            with torch.no_grad():
                results[-1].append(model(**given).sample)
        model.eval()
    assert not torch.allclose(*results[0], atol=0.1)
    assert all(map(torch.equal, *results)) and len(packed) == 2


@pytest.mark.parametrize("place", ["attn.to_out.1", "img_mlp.net.1", "txt_mlp.net.1"])
def test_one_dropout(theirs, fast, place, packed):
    layer = fast.get_submodule(f"transformer_blocks.1.{place}")
    layer.p = 0.1
    fast.train()
    run(fast)
    layer.eval()  # frozen on its own
    run(fast)
    assert len(packed) == 1


def test_every_parameter_that_has_a_gradient_there_has_one(theirs, ours, packed):
    """DistributedDataParallel waits for all; those of the last block's text queries are zero."""
    for model in (theirs, ours):
        model.train()
        model(**inputs()).sample.square().mean().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys() and len(packed) == 1
    zero = {name for name, grad in expected.items() if not grad.any()}
    assert zero == {name for name, grad in got.items() if not grad.any()}
    assert {"transformer_blocks.1.attn.add_q_proj.weight", "transformer_blocks.1.attn.norm_added_q.weight"} <= zero


# The group's last reference waits for its threads and holds the interpreter's lock, for which one of
# them may still wait, just after the last reduction: it goes with the process.
kept: list[torch.nn.Module] = []


def test_distributed_lora(fast, tmp_path, packed):
    """Three steps by one process: what is not ready after the first would be an error of the second."""
    peft = pytest.importorskip("peft")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        fast.requires_grad_(False)
        names = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"]
        fast.add_adapter(peft.LoraConfig(r=2, target_modules=names))
        model = torch.nn.parallel.DistributedDataParallel(fast)
        kept.append(model)
        for _ in range(3):
            model(**inputs()).sample.square().mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len(packed) == 3 and all(p.grad is not None for p in fast.parameters() if p.requires_grad)


def test_autocast(theirs, alone):
    """A float32 model that computes in bfloat16, forward and backward, as close to float32 as diffusers' is."""
    exact = run(theirs)
    with torch.autocast("cpu", torch.bfloat16):
        errors = [(run(model).float() - exact).abs().max() for model in (theirs, alone)]
        sample = alone(**inputs()).sample
        assert sample.dtype == torch.bfloat16
        sample.float().square().mean().backward()
    assert 0 < errors[1] < 2 * errors[0]
    grads = [p.grad for name, p in alone.named_parameters() if "norm_q" in name]
    assert all(g.dtype == torch.float32 and g.abs().max() > 0 for g in grads)


# ---- transformations -------------------------------------------------------------------------------------------------


def test_one_graph_with_a_mask(theirs, fast):
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    assert_same(run(compiled), run(theirs))


@pytest.mark.parametrize("mask", [True, False])
def test_export(theirs, fast, mask):
    given = {**inputs(), "return_dict": False} | ({} if mask else {"encoder_hidden_states_mask": None})
    with torch.no_grad():
        got = torch.export.export(fast, (), given, strict=False).module()(**given)[0]
        assert_same(got, theirs(**given)[0])


def test_torch_func(theirs, fast, alone, packed):
    def product(model):
        given = inputs()
        x = given.pop("hidden_states")
        _, pull = torch.func.vjp(lambda x: model(x, **given).sample, x)
        return pull(torch.ones(2, 12, 64))[0].detach()

    assert_same(product(fast), product(theirs))
    assert not packed
    with pytest.raises(NotImplementedError, match="run them under `with qwen_image_fast.reference"):
        product(alone)
    with qwen_image_fast.reference():
        assert_same(product(alone), product(theirs))


# ---- old calls, offloading -------------------------------------------------------------------------------------------


def test_calls_by_position_of_older_versions():
    """Before 0.39 `txt_seq_lens` stood before `guidance`."""
    seen = []
    forward = with_lengths(lambda self, *args, **kwargs: seen.append((args, kwargs)))
    forward("model", 1, 2, 3, 4, 5, None, 6, {"scale": 1}, None, None, False)
    forward("model", 1, txt_seq_lens=[7], return_dict=False)
    forward("model", 1, 2, 3, 4, 5, [7])
    kept = {"controlnet_block_samples": None, "additional_t_cond": None}
    assert seen == [
        ((1, 2, 3, 4, 5), {"guidance": 6, "attention_kwargs": {"scale": 1}, **kept, "return_dict": False}),
        ((1,), {"txt_seq_lens": [7], "return_dict": False}),
        ((1, 2, 3, 4, 5), {"txt_seq_lens": [7]}),
    ]


def test_arguments_that_only_diffusers_knows(theirs, fast, packed, caplog):
    """They go to its own forward, which says whether it takes them."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'txt_seq_lens'"):
        run(fast, txt_seq_lens=[5, 5])
    assert "it was called with txt_seq_lens" in caplog.text and not packed


def group(model, **how):
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **how)


def sequential(model):
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=CPU)


OFFLOADS = {
    "leaves to disk": lambda model, path: group(model, offload_type="leaf_level", offload_to_disk_path=str(path)),
    "blocks to disk": lambda model, path: group(
        model, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(path)
    ),
    "leaves": lambda model, path: group(model, offload_type="leaf_level"),
    "sequential": lambda model, path: sequential(model),
}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS.keys())
def test_offloading(theirs, fast, alone, offload, tmp_path, packed):
    for name, model in (("theirs", theirs), ("fast", fast), ("alone", alone)):
        offload(model, tmp_path / name)
    expected = run(theirs)
    assert_same(run(fast), expected)
    assert not packed
    assert_same(run(alone), expected)


def test_hooks_on_the_time_step_switch_tables_off(tiny_folder):
    pipe = qwen_image_fast.QwenImagePipeline.from_pretrained(tiny_folder, free_modulation_weights=True)
    call = {"height": 32, "width": 32, "num_inference_steps": 2, "seed": 0, "output_type": "latent", "progress": False}
    plain = pipe("a cat", **call).images
    for place in ("time_text_embed", "time_text_embed.timestep_embedder", "norm_out.linear"):
        module = pipe.transformer.get_submodule(place)
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            after = register == module.register_forward_hook
            handle = register((lambda m, a, o: o * 1.3) if after else (lambda m, a: (a[0] * 1.3, *a[1:])))
            changed = pipe("a cat", **call).images
            handle.remove()
            assert not torch.allclose(changed, plain, atol=1e-3), place
            assert torch.equal(pipe("a cat", **call).images, plain), place
