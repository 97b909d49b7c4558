"""The transformer against diffusers' own class with the same random weights."""

import copy

import pytest
import torch
from reference_transformer import CONFIG, Case, exact_diffusers, make_pair

from qwen_image_fast.models import stream_linear, transformer_block
from qwen_image_fast.models.transformer import QwenImageTransformer2DModel

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = {
    "square": Case(shapes=[[(1, 4, 4)]] * 2, text=5),
    "odd": Case(shapes=[[(1, 5, 3)]], text=7),
    "reference": Case(shapes=[[(1, 4, 6), (1, 3, 5)]] * 2, text=4),
    "mask": Case(shapes=[[(1, 4, 4)]] * 2, text=6, mask=[[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]),
    "mask with holes": Case(shapes=[[(1, 4, 4)]] * 2, text=6, mask=[[0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 1]]),
    "no text": Case(shapes=[[(1, 4, 4)]] * 2, text=3, mask=[[0, 0, 0], [1, 1, 0]]),
    "zero_cond_t": Case(shapes=[[(1, 4, 4), (1, 2, 4)]] * 2, text=5, config={"zero_cond_t": True}),
    "zero_cond_t without reference": Case(shapes=[[(1, 4, 4)]] * 2, text=5, config={"zero_cond_t": True}),
    "layered": Case(
        shapes=[[(1, 4, 4), (1, 4, 4), (1, 4, 4), (1, 4, 4)]] * 2, text=5, t_cond=[0, 1],
        config={"use_additional_t_cond": True, "use_layer3d_rope": True},
    ),
    "controlnet": Case(shapes=[[(1, 4, 4)]] * 2, text=5, controlnet=2),
    "guidance_embeds": Case(shapes=[[(1, 4, 4)]], text=5, config={"guidance_embeds": True}),
    "wide head": Case(shapes=[[(1, 4, 4)]], text=5, config={
        "attention_head_dim": 40, "axes_dims_rope": (8, 16, 16), "num_attention_heads": 3}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_float64(case):
    ours, theirs = make_pair(case, torch.float64)
    inputs = case.inputs(torch.float64)
    with exact_diffusers(), torch.no_grad():
        expected = theirs(**inputs, return_dict=False)[0]
    with torch.no_grad():
        got = ours(**inputs).sample
    assert (got - expected).abs().max() < 1e-9
    assert expected.std() > 0.05


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_twice_the_reference(case, dtype):
    ours, theirs = make_pair(case, dtype)
    exact = make_pair(case, torch.float64, like=dtype)[1]
    inputs = case.inputs(dtype)
    with torch.inference_mode():
        with exact_diffusers():
            truth = exact(**case.inputs(torch.float64, like=dtype), return_dict=False)[0]
        theirs_out, ours_out = theirs(**inputs, return_dict=False)[0], ours(**inputs, return_dict=False)[0]
    case.assert_twice(ours_out, theirs_out, truth)


@pytest.mark.parametrize("case", ["reference", "mask", "zero_cond_t", "controlnet"])
def test_gradients(case):
    case = CASES[case]
    ours, theirs = make_pair(case, torch.float64)
    inputs = case.inputs(torch.float64)
    seed = None
    grads = []
    for model in (ours, theirs):
        x = inputs["hidden_states"].clone().requires_grad_()
        txt = inputs["encoder_hidden_states"].clone().requires_grad_()
        with exact_diffusers():
            out = model(**{**inputs, "hidden_states": x, "encoder_hidden_states": txt}, return_dict=False)[0]
        seed = torch.randn_like(out) if seed is None else seed
        names, params = zip(*model.named_parameters())
        got = torch.autograd.grad(out, (x, txt, *params), seed, allow_unused=True)
        grads.append(dict(zip(("hidden_states", "encoder_hidden_states", *names), got)))
    for name, expected in grads[1].items():
        got = grads[0][name]
        if expected is None or got is None:
            assert got is None or not got.any(), name
            assert expected is None or not expected.any(), name
        else:
            torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9, msg=name)


def test_gradient_checkpointing_gives_the_same_gradients():
    case = CASES["reference"]
    ours, _ = make_pair(case, torch.float32)
    inputs = case.inputs(torch.float32)
    plain = torch.autograd.grad(ours(**inputs).sample.sum(), ours.img_in.weight)[0]
    ours.enable_gradient_checkpointing()
    torch.testing.assert_close(torch.autograd.grad(ours(**inputs).sample.sum(), ours.img_in.weight)[0], plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_of_different_sizes_equals_single_runs(dtype):
    shapes = [[(1, 4, 6)], [(1, 2, 3)], [(1, 5, 5), (1, 2, 2)]]
    case = Case(shapes=shapes, text=6, mask=[[1] * 6, [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 1, 0]])
    ours, _ = make_pair(case, dtype)
    inputs = case.inputs(dtype)
    with torch.inference_mode():
        batch = ours(**inputs, return_dict=False)[0]
        for b, sample in enumerate(shapes):
            rows = sum(f * h * w for f, h, w in sample)
            single = {k: v[b : b + 1] for k, v in inputs.items() if isinstance(v, torch.Tensor)}
            alone = ours(**{**single, "hidden_states": single["hidden_states"][:, :rows]}, img_shapes=[sample],
                         return_dict=False)[0]  # fmt: skip
            torch.testing.assert_close(batch[b, :rows], alone[0], rtol=0, atol=20 * torch.finfo(dtype).eps)
            assert not batch[b, rows:].any()


def test_neighbours_do_not_matter():
    """Other content beside a sample changes no bit of it."""
    case = Case(shapes=[[(1, 4, 4)], [(1, 4, 4)]], text=6, mask=[[1] * 4 + [0] * 2, [1] * 6])
    ours, _ = make_pair(case, torch.float32)
    inputs = case.inputs(torch.float32)
    with torch.inference_mode():
        one = ours(**inputs).sample[0]
        inputs["hidden_states"][1] += 1
        inputs["encoder_hidden_states"][1] *= 2
        inputs["encoder_hidden_states"][0, 4:] = float("nan")  # padding is never read
        assert torch.equal(one, ours(**inputs).sample[0])


def test_full_size_state_dict():
    """The released configuration has exactly diffusers' 1933 tensors and shapes."""
    from diffusers import QwenImageTransformer2DModel as Diffusers

    with torch.device("meta"):
        ours, theirs = QwenImageTransformer2DModel(), Diffusers()
    a, b = ({k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (ours, theirs))
    assert a == b and len(a) == 1933
    assert sum(p.numel() for p in ours.parameters()) == 20_430_401_088


def test_reads_and_writes_diffusers_folders(tmp_path):
    from diffusers import QwenImageTransformer2DModel as Diffusers

    ours, theirs = make_pair(CASES["square"], torch.float32)
    theirs.save_pretrained(tmp_path / "a", max_shard_size="1MB")
    again = QwenImageTransformer2DModel.from_pretrained(tmp_path / "a")
    ours.save_pretrained(tmp_path / "b", max_shard_size="1MB")
    back = Diffusers.from_pretrained(tmp_path / "b")
    for key, value in ours.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]) and torch.equal(value, back.state_dict()[key])


COMPILED = ("square", "mask with holes", "no text", "several sizes")


@pytest.mark.parametrize("name", COMPILED)
def test_compile(name):
    """The whole model is one graph, but for a mask beside pictures of several sizes, whose values decide shapes."""
    several = Case(shapes=[[(1, 4, 4)], [(1, 2, 4)]], text=6, mask=[[1] * 4 + [0] * 2, [1] * 6])
    case = {**CASES, "several sizes": several}[name]
    ours, _ = make_pair(case, torch.float32)
    inputs = case.inputs(torch.float32)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=case is not several)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).sample, ours(**inputs).sample)


def test_compile_with_open_sizes():
    """`dynamic=True` is taken, with shapes as diffusers' tests give them; every size has a graph of its own."""
    ours, _ = make_pair(CASES["odd"], torch.float32)
    compiled = torch.compile(ours, backend="eager", fullgraph=True, dynamic=True)
    for shape in ((1, 4, 4), (1, 4, 6)):
        inputs = {**Case(shapes=[[shape]], text=5).inputs(torch.float32), "img_shapes": [shape]}
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).sample, ours(**inputs).sample)


def test_export_with_a_mask_of_any_values():
    """The program knows no value of the mask it was made with."""
    ours, _ = make_pair(CASES["mask"], torch.float32)
    inputs = CASES["mask"].inputs(torch.float32)
    mask = inputs["encoder_hidden_states_mask"]
    with torch.no_grad():
        program = torch.export.export(ours, (), inputs, strict=True).module()
        for values in (mask, 1 - mask):
            given = {**inputs, "encoder_hidden_states_mask": values}
            torch.testing.assert_close(program(**given).sample, ours(**given).sample)


def test_a_copy_remembers_no_masks():
    case = CASES["mask"]
    ours, _ = make_pair(case, torch.float32)
    inputs = case.inputs(torch.float32)
    with torch.no_grad():
        expected = ours(**inputs).sample
        copied = copy.deepcopy(ours)
        assert ours._layouts and not hasattr(copied, "_layouts")
        assert torch.equal(copied(**inputs).sample, expected)


ERRORS = {
    "hidden_states must have the shape": {"hidden_states": torch.randn(2, 16, 3)},
    "hidden_states must have a floating-point dtype, got torch.int64": {"hidden_states": torch.ones(2, 16, 64).long()},
    "encoder_hidden_states must be given": {"encoder_hidden_states": None},
    "timestep must be given": {"timestep": None},
    "img_shapes must name": {"img_shapes": []},
    "img_shapes must have one entry per sample, 2, got 3": {"img_shapes": [[(1, 4, 4)], [(1, 4, 4)], [(1, 2, 8)]]},
    "hidden_states must hold the 20 image tokens": {"img_shapes": [[(1, 4, 5)]]},
    "hidden_states must hold the 8 image tokens": {"img_shapes": [[(1, 4, 2)]]},
    "must have one batch size, or one sample for all, got 2, 3 and 2": {"encoder_hidden_states": torch.randn(3, 5, 48)},
    "encoder_hidden_states_mask must have the shape": {"encoder_hidden_states_mask": torch.ones(2, 9)},
    "guidance must be None": {"guidance": torch.ones(2)},
}


@pytest.mark.parametrize(("text", "change"), ERRORS.items(), ids=ERRORS.keys())
def test_errors(text, change):
    case = CASES["square"]
    ours, _ = make_pair(case, torch.float32)
    with pytest.raises((ValueError, TypeError), match=text):
        ours(**{**case.inputs(torch.float32), **change})


def test_axes_must_add_up():
    with pytest.raises(ValueError, match="axes_dims_rope must be even and add up to attention_head_dim, 32"):
        QwenImageTransformer2DModel(**{**CONFIG, "axes_dims_rope": (8, 8, 8)})


# ---- both streams in one launch -------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """Every layer that may be launched with others is, through the ops on the CPU; yields what was launched."""
    seen = []

    def in_one_launch(op, layers, x):
        if all(map(stream_linear._plain, layers, x)):
            seen.append((op, len(layers)))
            return True
        return False

    monkeypatch.setattr(stream_linear, "in_one_launch", in_one_launch)
    return seen


@pytest.mark.parametrize("case", ["mask", "no text", "zero_cond_t", "controlnet"])
def test_launching_both_streams_together(case, launched):
    case = CASES[case]
    ours, theirs = make_pair(case, torch.float64)
    inputs = case.inputs(torch.float64)
    with exact_diffusers(), torch.no_grad():
        expected = theirs(**inputs, return_dict=False)[0]
        got = ours(**inputs).sample
    assert (got - expected).abs().max() < 1e-9
    gate, layers = "linear_gate_residual", ours.config.num_layers
    block = [("linear_qkv", 6), (gate, 2), ("linear_gelu", 2), (gate, 2)]
    assert launched == block * (layers - 1) + [("linear_qkv", 5), (gate, 1), ("linear_gelu", 1), (gate, 1)]


def test_gradients_through_joint_launches(launched, monkeypatch):
    ours, _ = make_pair(CASES["mask"], torch.float64)
    inputs = CASES["mask"].inputs(torch.float64)
    weights = list(ours.parameters())

    def gradients():
        return torch.autograd.grad(ours(**inputs).sample.square().mean(), weights, allow_unused=True)

    fused = gradients()
    assert launched
    monkeypatch.undo()
    for a, b in zip(fused, gradients()):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-9, atol=1e-12))


def test_layers_that_are_more_than_a_product_stay_modules(launched):
    """A hook, another class, another dtype, autocast."""
    ours, _ = make_pair(CASES["odd"], torch.float32)
    attn, x = ours.transformer_blocks[0].attn, torch.randn(3, ours.inner_dim)
    calls = []
    attn.to_q.register_forward_hook(lambda *_: calls.append("hook"))
    assert not stream_linear._plain(attn.to_q, x) and stream_linear._plain(attn.to_k, x)
    with torch.no_grad():
        ours(**CASES["odd"].inputs(torch.float32))
    assert calls == ["hook"] and ("linear_qkv", 6) not in launched[:1]
    assert not stream_linear._plain(torch.nn.Identity(), x)
    assert not stream_linear._plain(attn.to_k, x.bfloat16())
    with torch.autocast("cpu"):
        assert not stream_linear._plain(attn.to_k, x)


def test_streams_apart(monkeypatch):
    """As on CUDA, the text's work apart and rows multiplied where they lie, in several sizes: the same result."""
    case = Case(shapes=[[(1, 4, 4)], [(1, 6, 4)]], text=6, mask=[[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    ours, _ = make_pair(case, torch.float64)
    inputs = case.inputs(torch.float64)
    with torch.no_grad():
        expected = ours(**inputs).sample
        calls = []
        monkeypatch.setattr(stream_linear, "_alone_on_cuda", lambda x: True)
        monkeypatch.setattr(stream_linear, "LARGE_PART", 3)
        of_parts = stream_linear.of_parts
        monkeypatch.setattr(stream_linear, "of_parts", lambda *args: calls.append(args) or of_parts(*args))
        monkeypatch.setattr(transformer_block.side_stream, "both", lambda main, beside, on: (main(), beside()))
        got = ours(**inputs).sample
    assert calls
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_configuration(tmp_path, caplog):
    model = QwenImageTransformer2DModel(**CONFIG)
    model.register_to_config(patch_size=3, own=5)
    assert model.config.own == 5 and model.config.patch_size == 3
    for change in (lambda: model.config.update(own=6), lambda: model.config.pop("own"), lambda: model.config.clear()):
        with pytest.raises(TypeError, match="config is read-only: register_to_config changes what is saved"):
            change()
    with pytest.raises(TypeError, match=r"config is read-only: register_to_config\(own=\) changes what is saved"):
        model.config["own"] = 6
    assert copy.deepcopy(model.config) == model.config and type(copy.deepcopy(model.config)) is type(model.config)
    with pytest.warns(FutureWarning, match="own is a field of the configuration: model.config.own"):
        assert model.own == 5
    model.register_to_config(patch_size=2)
    model.save_pretrained(tmp_path)
    assert "left out of config.json, as the model takes no own" in caplog.text
    assert "own" not in QwenImageTransformer2DModel.from_pretrained(tmp_path).config
