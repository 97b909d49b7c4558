"""The drop-in on one model: what stays as it is, reports, copies, the VAE, adapters, gradients."""

import copy
import io
import pickle

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from accelerate_harness import CONFIG, assert_same, count_fast_forwards, inputs, run, small_transformer  # noqa: E402

from qwen_image_fast import accelerate, restore  # noqa: E402
from qwen_image_fast.drop_in.transformer import FastTransformer  # noqa: E402
from qwen_image_fast.drop_in.vae_flops import decoding_flops  # noqa: E402
from qwen_image_fast.models.modulation import checksum  # noqa: E402


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


def restored_copy(model):
    other = copy.deepcopy(model)
    restore(other)
    return other


# ---- what stays ------------------------------------------------------------------------------------------------------


def test_bare_transformer(theirs, ours, packed):
    assert_same(run(ours), run(theirs))
    assert len(packed) == 1
    output = ours(**inputs())
    assert type(output) is type(theirs(**inputs()))
    assert torch.equal(ours(**inputs(return_dict=False))[0], output.sample)


def test_text_of_another_type(theirs, ours, packed):
    given = inputs(torch.bfloat16)
    for model in (theirs, ours):
        half = copy.deepcopy(model).bfloat16()
        with torch.no_grad():
            expected = half(**given).sample
            got = half(**{**given, "encoder_hidden_states": given["encoder_hidden_states"].float()}).sample
        assert torch.equal(got, expected) and got.dtype == torch.bfloat16
    assert len(packed) == 2


def test_one_graph(theirs, ours):
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert_same(run(compiled, encoder_hidden_states_mask=None), run(theirs, encoder_hidden_states_mask=None))


def test_identity(theirs, ours, tmp_path):
    """Class checks, keys, memory and files are those of diffusers."""
    model = copy.deepcopy(theirs)
    before = {k: v.data_ptr() for k, v in model.state_dict().items()}
    expected = run(model)
    report = accelerate(model)
    assert report.replaced and not report.left_alone and report.memory_freed == 0
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == before
    assert isinstance(model, diffusers.QwenImageTransformer2DModel) and type(model) == type(theirs)  # noqa: E721
    assert not torch.equal(run(model), expected)  # it is another computation
    model.save_pretrained(tmp_path)
    assert '"_class_name": "QwenImageTransformer2DModel"' in (tmp_path / "config.json").read_text()
    loaded = diffusers.QwenImageTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(run(loaded), expected)
    restore(model)
    assert torch.equal(run(model), expected)
    assert vars(model).keys() == vars(theirs).keys()


def test_restored_pipeline(tiny_folder, caplog):
    pipe = diffusers.QwenImagePipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)

    def draw():
        generator = torch.Generator().manual_seed(0)
        kwargs = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt"}
        return pipe("a cat", generator=generator, **kwargs).images

    plain = draw()
    report = accelerate(pipe)
    assert len(report.replaced) == 4 and str(report) == str(accelerate(copy.deepcopy(restored_copy(pipe))))
    again = accelerate(pipe)
    assert again.replaced == [] and [what for what, _ in again.left_alone] == ["transformer", "vae", "pipeline"]
    assert not torch.equal(draw(), plain)
    restore(pipe)
    assert torch.equal(draw(), plain)
    caplog.clear()  # of what diffusers says of the calls
    for part in (pipe, pipe.vae):
        restore(part)
    assert [r.getMessage() for r in caplog.records] == [
        f"restore: nothing to undo, this {name} is not accelerated"
        for name in ("QwenImagePipeline", "AutoencoderKLQwenImage")
    ]
    assert torch.equal(draw(), plain)


def test_the_last_call_decides_how_the_vae_convolves(tiny_folder):
    vae = diffusers.AutoencoderKLQwenImage.from_pretrained(tiny_folder, subfolder="vae")
    z = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def decoded(convolution):
        accelerate(vae, convolution=convolution)
        with torch.no_grad():
            return vae.decode(z).sample

    auto, exact = decoded("auto"), decoded("exact")
    assert not torch.equal(auto, exact) and torch.equal(decoded("auto"), auto) and torch.equal(decoded("exact"), exact)


def test_arguments():
    with pytest.raises(TypeError, match="accelerate: pipe must be a diffusers Qwen-Image pipeline, .* got .*Linear"):
        accelerate(torch.nn.Linear(1, 1))


def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"accelerate needs the package diffusers: pip install .\.\[diffusers\]"):
        accelerate(object())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(ours, packed, way):
    expected = run(ours)
    if way == "deepcopy":
        other = copy.deepcopy(ours)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(ours))
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert type(other) is type(ours) and "_layouts" not in vars(other)
    assert torch.equal(run(other), expected) and packed[-1] is other
    restore(other)
    assert isinstance(ours, FastTransformer) and not isinstance(other, FastTransformer)


def test_report():
    from rich.console import Console

    torch.manual_seed(0)
    report = accelerate(diffusers.QwenImageTransformer2DModel(**CONFIG))
    assert report.kept_per_step == 4 * 32 * (2 * 12 + 2)
    console = Console(file=io.StringIO(), width=200)
    console.print(report)
    for text in (str(report), console.file.getvalue()):
        assert "fused forward" in text and "none is copied" in text and "3328 bytes" in text


# ---- VAE -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames, setting", [(1, ""), (1, "tiling"), (1, "slicing"), (5, ""), (5, "tiling")])
def test_vae(frames, setting):
    torch.manual_seed(0)
    sizes = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1}
    theirs = diffusers.AutoencoderKLQwenImage(**sizes, temperal_downsample=[False, True]).eval()
    ours = copy.deepcopy(theirs)
    keys = {k: v.data_ptr() for k, v in ours.state_dict().items()}
    accelerate(ours)
    assert {k: v.data_ptr() for k, v in ours.state_dict().items()} == keys
    for vae in (theirs, ours):
        if setting == "tiling":
            vae.enable_tiling(16, 16, 12, 12)
        elif setting == "slicing":
            vae.enable_slicing()
    x = torch.rand(2, 3, frames, 16, 20) * 2 - 1
    with torch.no_grad():
        z, expected = (vae.encode(x).latent_dist.mode() for vae in (ours, theirs))
        assert_same(z, expected)
        assert_same(ours.decode(z).sample, theirs.decode(z).sample)
        assert ours.decode(z, return_dict=False)[0].is_contiguous()
        conv3d = torch.nn.Conv3d._conv_forward
        calls, remembers = [], []
        ours.decoder.register_forward_pre_hook(
            lambda module, args, kwargs: remembers.append(kwargs["feat_cache"] is not None), with_kwargs=True
        )
        torch.nn.Conv3d._conv_forward = lambda self, *args: (calls.append(self), conv3d(self, *args))[1]
        try:
            ours.decode(z)
        finally:
            torch.nn.Conv3d._conv_forward = conv3d
    assert bool(calls) == all(remembers) == any(remembers) == (frames > 1)
    ours.decoder._forward_pre_hooks.clear()
    restore(ours)
    assert vars(ours).keys() - vars(theirs).keys() == set()
    with torch.no_grad():
        assert torch.equal(ours.decode(z).sample, theirs.decode(z).sample)


def small_vae(**changes):
    torch.manual_seed(0)
    sizes = {
        "base_dim": 20,
        "z_dim": 4,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True],
    }
    return diffusers.AutoencoderKLQwenImage(**{**sizes, **changes}).eval().requires_grad_(False)


def images(vae):
    x, z = torch.rand(2, 3, 1, 24, 20) * 2 - 1, torch.randn(2, 4, 1, 6, 5)
    return lambda model=vae: (model.encode(x).latent_dist.parameters, model.decode(z).sample)


@pytest.mark.parametrize("convolution", ["auto", "exact"])
def test_vae_convolution(convolution, monkeypatch):
    from qwen_image_fast.models import vae_conv

    calls, conv3x3 = [], vae_conv.conv3x3
    monkeypatch.setattr(vae_conv, "conv3x3", lambda *args: calls.append(args) or conv3x3(*args))
    theirs = small_vae()
    ours = copy.deepcopy(theirs)
    report = accelerate(ours, convolution=convolution)
    assert ("90%" if convolution == "auto" else "61%") in str(report), report
    run_images = images(ours)
    for a, b in zip(run_images(), run_images(theirs)):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
    assert (len(calls) > 20) == (convolution == "auto")
    again = pickle.loads(pickle.dumps(ours))
    assert all(torch.equal(a, b) for a, b in zip(run_images(), run_images(again)))
    restore(ours)
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(ours.modules(), theirs.modules()))
    assert all(torch.equal(a, b) for a, b in zip(run_images(), run_images(theirs)))


@pytest.mark.parametrize("setting", ["", "tiling"])
def test_vae_of_qwen_image_21(setting):
    if not hasattr(diffusers, "AutoencoderKLQwenImage21"):
        pytest.skip("this diffusers has no Qwen-Image-2.1")
    torch.manual_seed(0)
    sizes = {"base_dim": 20, "decoder_base_dim": 24, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1}
    theirs = diffusers.AutoencoderKLQwenImage21(
        **sizes, temperal_downsample=[False, True], scale_factor_spatial=4, in_channels=4, out_channels=4
    ).eval()
    ours = copy.deepcopy(theirs).requires_grad_(False)
    (replaced,) = accelerate(ours).replaced
    theirs_flops, flops = decoding_flops(ours)
    assert "instead of" in replaced and 3 < theirs_flops / flops < 4.5
    for vae in (theirs, ours):
        if setting:
            vae.enable_tiling(16, 16, 12, 12)
    x, z = torch.rand(2, 4, 1, 24, 20) * 2 - 1, torch.randn(2, 4, 1, 6, 5)
    with torch.no_grad():
        for vae in (ours, restored_copy(ours)):
            assert_same(vae.encode(x).latent_dist.parameters, theirs.encode(x).latent_dist.parameters)
            assert_same(vae.decode(z).sample, theirs.decode(z).sample)
        assert not torch.equal(ours.decode(z).sample, theirs.decode(z).sample)
        assert torch.equal(vae.decode(z).sample, theirs.decode(z).sample)


def test_vae_convolution_knows_two_words():
    with pytest.raises(ValueError, match="accelerate: convolution must be 'auto' or 'exact', got 'fast'"):
        accelerate(small_vae(), convolution="fast")


def test_vae_training_hooks_and_adapters():
    from peft import LoraConfig, inject_adapter_in_model

    theirs = small_vae()
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    for model in (theirs, ours):
        torch.manual_seed(1)
        inject_adapter_in_model(
            LoraConfig(r=2, target_modules=["to_qkv", "resample.1"], init_lora_weights=False), model
        )
        model.decoder.up_blocks[0].resnets[0].norm2.register_forward_hook(lambda _, args, out: out * 1.5)
        model.decoder.requires_grad_(True)
    z, found = torch.randn(1, 4, 1, 6, 5), []
    for model in (theirs, ours):
        model.decode(z).sample.square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any("lora" in name for name in found[0])
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=0, atol=1e-4 * grad.abs().max().item() + 1e-9, msg=name)
    with torch.no_grad():
        for model in (theirs, ours):
            for p in model.decoder.parameters():
                p.mul_(0.9)
    torch.testing.assert_close(ours.decode(z).sample, theirs.decode(z).sample, rtol=0, atol=2e-5)


def test_flops_of_the_released_vae():
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLQwenImage()
    accelerate(vae)
    theirs, ours = decoding_flops(vae, 256)
    assert 6.5e11 < theirs < 8e11 and 6e10 < ours < 8e10
    assert decoding_flops(vae, 256, "exact") == (theirs, decoding_flops(vae.double(), 256)[1])
    assert 2.6e11 < decoding_flops(vae, 256, "exact")[1] < 2.8e11


# ---- adapters --------------------------------------------------------------------------------------------------------


def add_adapters(model):
    from peft import LoraConfig

    targets = ["to_q", "to_k", "to_v", "add_q_proj", "to_out.0", "to_add_out", "img_mod.1", "txt_mod.1", "net.2",
               "img_in", "proj_out", "linear_1"]  # fmt: skip
    for name in ("one", "two"):
        model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False), name)
    generator = torch.Generator().manual_seed(3)
    for name, p in sorted(model.named_parameters()):
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.2, generator=generator)


UNFUSE = 6  # of the changes below: computes the same as the fused weights


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora(theirs, order, packed):
    ours = copy.deepcopy(theirs)
    plain = run(theirs)
    if order == "after":
        accelerate(ours)
    for model in (theirs, ours):
        add_adapters(model)
    if order == "before":
        accelerate(ours)
    changes = [
        lambda m: m.set_adapter("one"),
        lambda m: m.set_adapters(["one", "two"], weights=[0.5, 1.5]),
        lambda m: m.disable_adapters(),
        lambda m: m.enable_adapters(),
        lambda m: m.delete_adapters("one"),
        lambda m: m.fuse_lora(lora_scale=0.7),
        lambda m: m.unfuse_lora(),
        lambda m: m.unload_lora(),
    ]
    before = plain
    for i, change in enumerate(changes):
        change(theirs)
        change(ours)
        expected = run(theirs)
        assert i == UNFUSE or not torch.allclose(expected, before, atol=1e-5)
        before = expected
        assert_same(run(ours), expected)
        scaled = run(theirs, attention_kwargs={"scale": 0.3})
        assert_same(run(ours, attention_kwargs={"scale": 0.3}), scaled)
    assert len(packed) == 2 * len(changes)


def test_gradients(theirs, ours, packed):
    for checkpointing in (False, True):
        for model in (theirs, ours):
            if checkpointing:
                model.enable_gradient_checkpointing()
            model.train().zero_grad()
            model(**inputs()).sample.square().sum().backward()
        for (name, p), q in zip(theirs.named_parameters(), ours.parameters()):
            if p.grad is not None and p.grad.abs().max() > 0:
                scale = p.grad.abs().max()
                assert (p.grad - q.grad).abs().max() < 2e-4 * scale, name
    assert len(packed) == 2
    ours.enable_gradient_checkpointing(lambda module, *args: module(*args))
    ours(**inputs())
    assert len(packed) == 2


def test_checksum():
    weight = torch.randn(3, 5).bfloat16()
    base = checksum([weight, weight[1:2, :3]])
    assert base == checksum([weight.clone(), weight[1:2, :3].clone()])
    weight[1, 1] += 1
    assert all(a != b for a, b in zip(base, checksum([weight, weight[1:2, :3]])))
