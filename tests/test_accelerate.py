"""The drop-in against the same diffusers pipeline without it: images, other pipelines, the modulation table."""

import copy
import importlib
import inspect

import numpy as np
import pytest
import torch
from PIL import Image

diffusers = pytest.importorskip("diffusers")

from qwen_image_fast import accelerate, restore  # noqa: E402
from qwen_image_fast.drop_in.transformer import FastTransformer  # noqa: E402

SHORT, LONG = "a cat", "a red bicycle leaning on a wall"
CFG = {"negative_prompt": " ", "true_cfg_scale": 4.0}


@pytest.fixture(scope="module")
def plain(tiny_folder):
    """diffusers' own pipeline; tests do not change it."""
    pipe = diffusers.QwenImagePipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def copy_of(pipe, cls=diffusers.QwenImagePipeline, dtype=None, **extra):
    """A pipeline of another class with copies of the models."""
    components = {k: copy.deepcopy(v) for k, v in pipe.components.items() if k != "tokenizer"}
    if "processor" in inspect.signature(cls).parameters:
        components["processor"] = None
    made = cls(tokenizer=pipe.tokenizer, **components | copy.deepcopy(extra))
    made.set_progress_bar_config(disable=True)
    return made if dtype is None else made.to(dtype)


@pytest.fixture
def fast(plain):
    pipe = copy_of(plain)
    report = accelerate(pipe)
    assert not report.left_alone
    return pipe


@pytest.fixture
def computed(monkeypatch):
    """The noise levels that modulation vectors are computed for."""
    seen = []
    original = FastTransformer.modulation

    def modulation(self, timestep, additional_t_cond=None):
        seen.append(timestep.tolist())
        return original(self, timestep, additional_t_cond)

    monkeypatch.setattr(FastTransformer, "modulation", modulation)
    return seen


def draw(pipe, prompt=SHORT, seed=0, steps=3, output_type="latent", **kwargs):
    size = {"height": 64, "width": 48} if "image" not in kwargs and "control_image" not in kwargs else {}
    kwargs = {"prompt": prompt, **size, **kwargs}
    generator = torch.Generator().manual_seed(seed)
    output = pipe(num_inference_steps=steps, generator=generator, output_type=output_type, **kwargs).images
    return torch.stack([torch.as_tensor(image) for image in output])


def assert_same(got, expected):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert expected.std() > 0.05
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=5e-5)


# ---- images ----------------------------------------------------------------------------------------------------------

CALLS = {
    "one": {},
    "guidance": CFG,
    "prompts of two lengths": {"prompt": [SHORT, LONG], "negative_prompt": [LONG, " "], "true_cfg_scale": 4.0},
    "two images": {"num_images_per_prompt": 2},
}


@pytest.mark.parametrize("kwargs", CALLS.values(), ids=CALLS.keys())
def test_float32(plain, fast, kwargs):
    kwargs = {"output_type": "pt" if "negative_prompt" in kwargs else "latent", **kwargs}
    assert_same(draw(fast, **kwargs), draw(plain, **kwargs))


def test_bfloat16(plain):
    """At most twice the error that diffusers has against float64, from the same rounded weights and inputs."""
    rounded = copy_of(plain, dtype=torch.bfloat16)
    exact, ours = copy_of(rounded, dtype=torch.float64), copy_of(rounded)
    accelerate(ours)
    with torch.no_grad():
        embeds = [rounded.encode_prompt([text])[0] for text in (LONG, " ")]
    latents = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(0)).bfloat16()

    def images(pipe):
        dtype = pipe.transformer.dtype
        names = ("prompt_embeds", "negative_prompt_embeds")
        given = {name: embed.to(dtype) for name, embed in zip(names, embeds)}
        return draw(pipe, None, output_type="pt", latents=latents.to(dtype), true_cfg_scale=4.0, **given).double()

    truth, theirs, got = images(exact), images(rounded), images(ours)
    for measure in (torch.amax, lambda t: t.pow(2).mean().sqrt()):
        allowed = 2 * measure((theirs - truth).abs())
        assert 0 < measure((got - truth).abs()) <= allowed


def test_callback(plain, fast, computed):
    """A callback may change latents, and call the transformer at a time step that is not the pipeline's."""

    def run(pipe):
        seen = []

        def callback(pipe, i, t, values):
            inputs = torch.ones(1, 12, 64), torch.ones(1, 2, 128), None, torch.tensor([0.123])
            with torch.no_grad():
                seen.append(pipe.transformer(*inputs, [[(1, 4, 3)]]).sample)
            return {"latents": values["latents"] * 0.9}

        return draw(pipe, callback_on_step_end=callback, **CFG), torch.cat(seen)

    for got, expected in zip(run(fast), run(plain)):
        assert_same(got, expected)
    assert len(computed) == 3 + 3


def test_inputs_of_the_text_encoder_are_untouched(plain, fast):
    ids = plain.tokenizer(LONG, return_tensors="pt").input_ids
    with torch.no_grad():
        theirs, ours = plain.text_encoder(ids).logits, fast.text_encoder(ids).logits
        assert torch.equal(ours, theirs) and ours.shape[1] == ids.shape[1]
        generated = [p.text_encoder.generate(ids, max_new_tokens=4, do_sample=False) for p in (plain, fast)]
    assert torch.equal(*generated)


def test_logits_of_one_position(fast):
    rows = []
    fast.text_encoder.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    draw(fast, LONG, steps=2)
    assert rows == [1]


# ---- other pipelines -------------------------------------------------------------------------------------------------


def picture(width=48, height=64):
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def controlnet(plain, extra=0):
    torch.manual_seed(0)
    net = diffusers.QwenImageControlNetModel.from_config(
        plain.transformer.config, num_layers=2, extra_condition_channels=extra
    )
    for block in net.controlnet_blocks:
        torch.nn.init.normal_(block.weight, std=0.05)
    return {"controlnet": net.eval()}


SIZE = {"height": 64, "width": 48}
OTHERS = {
    "Img2Img": lambda p: ({}, {"image": picture(), "strength": 0.6, **SIZE}),
    "Inpaint": lambda p: ({}, {"image": picture(), "mask_image": picture().convert("L"), "strength": 0.6, **SIZE}),
    "ControlNet": lambda p: (controlnet(p), {"control_image": picture(), **SIZE}),
    "ControlNetInpaint": lambda p: (
        controlnet(p, 4),
        {"control_image": picture(), "control_mask": picture().convert("L"), **SIZE},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_pipelines(plain, name, computed):
    cls = getattr(diffusers, f"QwenImage{name}Pipeline")
    extra, kwargs = OTHERS[name](plain)
    theirs, ours = copy_of(plain, cls, **extra), copy_of(plain, cls, **extra)
    report = accelerate(ours)
    assert [what for what, _ in report.left_alone] == ["controlnet"] * name.startswith("ControlNet")
    assert [text.split(":")[0] for text in report.replaced] == ["transformer", "vae", "pipeline", "text_encoder"]
    for _ in range(2):
        images = []
        for pipe in (ours, theirs):
            torch.manual_seed(1)  # ControlNet inpainting draws from the global generator
            images.append(draw(pipe, output_type="pt", **kwargs, **CFG))
        assert_same(*images)
    assert len(computed) == (3 if name.startswith("ControlNet") else 2)


EDITING = ("Edit", "EditPlus", "EditInpaint", "Layered")


def test_every_pipeline_of_diffusers_is_tested():
    """But for those of modules, and of Qwen-Image-2.1, another model, of which the VAE is replaced."""
    found = {n for n in dir(diffusers) if n.startswith("QwenImage") and n.endswith("Pipeline") and "Modular" not in n}
    assert found - {"QwenImage21Pipeline"} == {f"QwenImage{name}Pipeline" for name in ("", *OTHERS, *EDITING)}


@pytest.mark.parametrize("name", EDITING)
def test_edit_pipelines(plain, name, monkeypatch, computed):
    """Prompts are given as embeddings: the tiny model has no processor. Sizes are made small."""
    cls = getattr(diffusers, f"QwenImage{name}Pipeline")
    module = importlib.import_module(cls.__module__)
    dimensions = module.calculate_dimensions
    monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: dimensions(64 * 64, ratio))
    torch.manual_seed(0)
    layered = name == "Layered"
    flags = {"use_additional_t_cond": True, "use_layer3d_rope": True} if layered else {"zero_cond_t": True}
    transformer = diffusers.QwenImageTransformer2DModel.from_config(plain.transformer.config, **flags)
    missing, _ = transformer.load_state_dict(plain.transformer.state_dict(), strict=False)
    assert all("addition_t_embedding" in key for key in missing)
    extra = {"transformer": transformer.eval()}
    kwargs = {"image": picture(), "true_cfg_scale": 4.0, "num_images_per_prompt": 2}
    kwargs |= {"strength": 0.6, "mask_image": picture().convert("L")} if name == "EditInpaint" else {}
    if layered:
        vae = diffusers.AutoencoderKLQwenImage.from_config(plain.vae.config, input_channels=4)
        extra["vae"] = vae.eval()
        kwargs |= {"image": picture().convert("RGBA"), "layers": 2, "num_images_per_prompt": 1}
    else:
        kwargs |= SIZE
    kwargs |= {"prompt_embeds": torch.randn(1, 5, 128), "negative_prompt_embeds": torch.randn(1, 3, 128)}
    theirs, ours = copy_of(plain, cls, **extra), copy_of(plain, cls, **extra)
    assert any(text.startswith("vae: ") for text in accelerate(ours).replaced)
    rows = []  # the last block and the output head compute what the pipeline reads, and not the reference
    for module in (ours.transformer.transformer_blocks[-1].img_mlp.net[2], ours.transformer.proj_out):
        module.register_forward_hook(lambda module, args, output: rows.append(output.shape[0]))
    if layered:  # without a prompt it would generate a caption
        kwargs = {k: v for k, v in kwargs.items() if "embeds" not in k} | CFG | {"prompt": SHORT, "output_type": "pt"}
    for _ in range(2):
        assert_same(draw(ours, **{"prompt": None, **kwargs}), draw(theirs, **{"prompt": None, **kwargs}))
    assert set(rows) == {{"EditInpaint": 2 * 16, "Layered": 3 * 16}.get(name, 2 * 12)}
    steps = {"EditInpaint": 2, "Layered": 6}.get(name, 3)
    assert len(computed) == steps and all(len(levels) == (1 if layered else 2) for levels in computed)


# ---- the modulation table --------------------------------------------------------------------------------------------


def test_once_per_step(fast, computed):
    draw(fast, [SHORT, LONG], negative_prompt=[" ", " "], true_cfg_scale=4.0)
    assert len(computed) == 3 and all(len(levels) == 1 for levels in computed)
    draw(fast, LONG, seed=1)
    assert len(computed) == 3


def test_another_schedule(plain, fast, computed):
    for steps in (3, 4, 3):
        assert_same(draw(fast, steps=steps), draw(plain, steps=steps))
    assert_same(draw(fast, height=128), draw(plain, height=128))  # more tokens shift the schedule
    assert_same(draw(fast, sigmas=[0.9, 0.5, 0.2]), draw(plain, sigmas=[0.9, 0.5, 0.2]))
    assert len(computed) == 3 + 4 + 3 + 3 + 3
    assert len(fast.transformer._modulation_table.rows) == 3


@pytest.mark.parametrize("scheduler", ["FlowMatchHeunDiscreteScheduler", "UniPCMultistepScheduler"])
def test_another_scheduler(plain, fast, scheduler):
    draw(fast)
    pipe = copy_of(plain)
    for p in (pipe, fast):
        if scheduler == "UniPCMultistepScheduler":
            p.scheduler = diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            )
        else:
            p.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
            p.scheduler.set_timesteps = without_sigmas(p.scheduler)
    for _ in range(2):
        assert_same(draw(fast, **CFG), draw(pipe, **CFG))


def without_sigmas(scheduler):
    """Heun's scheduler with the arguments that the pipeline passes; every step but the first comes twice."""
    original = scheduler.set_timesteps

    def set_timesteps(num_inference_steps=None, device=None, sigmas=None, mu=None):
        original(len(sigmas), device)

    scheduler.set_begin_index = lambda index: None
    return set_timesteps


def change_by_optimizer(linear):
    linear.weight.grad = torch.full_like(linear.weight, 0.5)
    torch.optim.SGD([linear.weight], lr=1.0).step()


def change_by_loading(linear):
    linear.load_state_dict({"weight": linear.weight * 2, "bias": linear.bias + 1})


def change_by_data(linear):
    linear.weight.data.mul_(-1)


def change_by_replacing(linear):
    linear.weight = torch.nn.Parameter(linear.weight.detach() * 2)


CHANGES = [change_by_optimizer, change_by_loading, change_by_data, change_by_replacing]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_never_stale(plain, fast, change):
    pipe, before = copy_of(plain), draw(fast)
    for p in (pipe, fast):
        change(p.transformer.transformer_blocks[1].img_mod[1])
        change(p.transformer.norm_out.linear)
    expected = draw(pipe)
    assert not torch.allclose(expected, before, atol=1e-3)
    assert_same(draw(fast), expected)


def test_weights_changed_by_a_callback(plain, fast):
    def run(pipe, factor):
        def callback(pipe, i, t, values):
            with torch.no_grad():
                pipe.transformer.transformer_blocks[0].img_mod[1].weight.mul_(factor)
            return {}

        return draw(pipe, callback_on_step_end=callback)

    pipe = copy_of(plain)
    draw(fast)
    for factor in (1.5, 1 / 1.5):
        assert_same(run(fast, factor), run(pipe, factor))


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa", "LoKr"])
def test_adapters_on_the_modulation(plain, fast, kind):
    import peft

    pipe, before = copy_of(plain), draw(fast)
    targets = {"r": 2, "target_modules": ["img_mod.1", "to_q"]}
    if kind in ("LoHa", "LoKr"):
        config = getattr(peft, f"{kind}Config")(alpha=60, init_weights=False, **targets)
    else:
        config = peft.LoraConfig(use_dora=kind == "DoRA", init_lora_weights=False, **targets)
    for p in (pipe, fast):
        torch.manual_seed(0)
        p.transformer.add_adapter(config, "one")
    for change in (
        lambda transformer: transformer.set_adapters("one", 2.0),
        lambda transformer: transformer.set_adapters("one", 0.5),
        lambda transformer: transformer.disable_adapters(),
        lambda transformer: transformer.enable_adapters(),
        lambda transformer: transformer.fuse_lora(),
        lambda transformer: transformer.unload_lora(),
    ):
        change(pipe.transformer)
        change(fast.transformer)
        expected = draw(pipe)
        assert_same(draw(fast), expected)
    assert not torch.allclose(expected, before, atol=1e-3)  # the merged weights stay


def test_an_older_diffusers_is_named(plain, monkeypatch):
    """It was an ImportError about a name inside of diffusers."""
    for version in ("0.36.0", "0.36.2.dev0"):
        monkeypatch.setattr(diffusers, "__version__", version)
        with pytest.raises(ImportError, match=f"^accelerate: diffusers must be 0.37 or newer, got {version}$"):
            accelerate(copy_of(plain))
    for version in ("0.37.0", "0.99.0.dev0", "1.0"):
        monkeypatch.setattr(diffusers, "__version__", version)
        assert accelerate(copy_of(plain)).replaced


def test_a_text_encoder_that_computes_all_logits(plain, monkeypatch):
    """As transformers before 4.53 has it: the pipeline runs, and the report says what stays."""
    pipe, kind = copy_of(plain), type(plain.text_encoder)
    forward = kind.forward

    def of_before(self, input_ids=None, attention_mask=None, output_hidden_states=None):
        return forward(self, input_ids, attention_mask, output_hidden_states=output_hidden_states)

    monkeypatch.setattr(kind, "forward", of_before)
    report = accelerate(pipe)
    assert report.left_alone == [("text_encoder", "this transformers computes the logits of all positions")]
    assert_same(draw(pipe), draw(plain))
    restore(pipe)


def test_shared_transformer(plain, fast):
    """Another pipeline class over the same models, with a scheduler and loop of its own."""
    other = diffusers.QwenImageImg2ImgPipeline.from_pipe(fast)
    other.set_progress_bar_config(disable=True)
    report = accelerate(other)
    assert [what for what, why in report.left_alone if "already" in why] == ["transformer", "vae", "text_encoder"]
    theirs = copy_of(plain, diffusers.QwenImageImg2ImgPipeline)
    kwargs = {"image": picture(), "strength": 0.6, **SIZE, **CFG}
    for _ in range(2):
        assert_same(draw(other, **kwargs), draw(theirs, **kwargs))
        assert_same(draw(fast), draw(plain))
    restore(other)
    assert_same(draw(fast), draw(plain))
