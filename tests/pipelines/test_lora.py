"""LoRA on our pipelines against diffusers and PEFT with the same files, and swapping without leaks."""

import gc
import json

import pytest
import torch
import torch._dynamo.testing
from reference import reference, seeded
from safetensors.torch import save_file

from qwen_image_fast import QwenImagePipeline
from qwen_image_fast.models.lora import LoraLinear
from qwen_image_fast.schedulers import named_schedule

LAYERS = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_out.0", "transformer_blocks.4.img_mlp.net.2"]
MODULATION = [*LAYERS, "transformer_blocks.2.img_mod.1", "norm_out.linear"]
TIME_STEP = ["time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2"]
CALL = {"prompt": "a cat", "height": 32, "width": 48, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture
def pipe(tiny_folder):
    return QwenImagePipeline.from_pretrained(tiny_folder)


def draw(pipe, **call):
    return pipe(**{**CALL, **call}, seed=0, progress=False).images


def pairs(pipe, layers=LAYERS, rank=4, seed=0):
    """{layer: (A, B)} of an adapter that changes the image."""
    torch.manual_seed(seed)
    found = {name: pipe.transformer.get_submodule(name) for name in layers}
    return {
        name: (torch.randn(rank, m.in_features) / m.in_features**0.5, torch.randn(m.out_features, rank) / 2)
        for name, m in found.items()
    }


STYLES = {
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", None),
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", None),
    "peft in memory": ("{}.lora_A.default.weight", "{}.lora_B.default.weight", None),
    "comfy": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight", "diffusion_model.{}.alpha"),
    "comfy, A and B": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight", None),
    "lightning": ("{}.lora_down.weight", "{}.lora_up.weight", "{}.alpha"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha"),
    "old diffusers": ("transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight", None),
}


def state(adapter, style="diffusers", alpha=2.0):
    down, up, scale = STYLES[style]
    out = {}
    for name, (a, b) in adapter.items():
        flat = name.replace(".", "_") if style == "kohya" else name
        out |= {down.format(flat): a, up.format(flat): b}
        if scale is not None:
            out[scale.format(flat)] = torch.as_tensor(alpha)
    return {k: v.contiguous() for k, v in out.items()}


@pytest.mark.parametrize("style", [s for s in STYLES if s not in ("peft in memory", "old diffusers", "peft")])
def test_files_equal_diffusers(pipe, tiny_folder, tmp_path, style):
    before = draw(pipe)
    save_file(state(pairs(pipe), style), tmp_path / "x.safetensors")
    assert pipe.load_lora_weights(tmp_path / "x.safetensors") == "default_0"
    got = draw(pipe)
    theirs = reference("QwenImagePipeline", tiny_folder)
    theirs.load_lora_weights(tmp_path, weight_name="x.safetensors")
    expected = theirs(**CALL, generator=seeded(0)).images
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("style", STYLES)
def test_all_styles_are_one_adapter(pipe, style):
    adapter = pairs(pipe)
    alpha = 2.0 if STYLES[style][2] else 4.0
    pipe.load_lora_weights(state(adapter, style, alpha), adapter_name="a")
    scale = 1.0 if STYLES[style][2] is None else 0.5
    for name, (a, b) in adapter.items():
        layer = pipe.transformer.get_submodule(name)
        assert type(layer) is LoraLinear
        torch.testing.assert_close(layer.mix[1] @ layer.mix[0], scale * b @ a)


def test_alpha_of_peft_and_of_diffusers_metadata(pipe, tmp_path):
    adapter = pairs(pipe)
    save_file(state(adapter, "peft"), tmp_path / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn.to_q": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    pipe.load_lora_weights(tmp_path)
    for name, scale in zip(LAYERS, (0.5, 2.0, 2.0)):
        layer = pipe.transformer.get_submodule(name)
        torch.testing.assert_close(layer.mix[1] @ layer.mix[0], scale * adapter[name][1] @ adapter[name][0])
    pipe.unload_lora_weights()
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 12})}
    save_file(state(adapter), tmp_path / "m.safetensors", metadata=metadata)
    pipe.load_lora_weights(tmp_path, weight_name="m.safetensors")
    layer = pipe.transformer.get_submodule(LAYERS[1])
    torch.testing.assert_close(layer.mix[1] @ layer.mix[0], 3.0 * adapter[LAYERS[1]][1] @ adapter[LAYERS[1]][0])


def test_layers_of_one_file_may_differ(pipe):
    """In style of their keys, rank, dtype and alpha."""
    adapter, ranks = {}, (1, 4, 7)
    for name, rank in zip(LAYERS, ranks):
        adapter |= pairs(pipe, [name], rank)
    first, second, third = ({name: adapter[name]} for name in LAYERS)
    half = {k: v.bfloat16() if v.dim() else v for k, v in state(second, "kohya", alpha=0.0).items()}
    third = {k: v.half() for k, v in state(third, "lightning", alpha=torch.tensor(14, dtype=torch.int64)).items()}
    pipe.load_lora_weights({**state(first), **half, **third})
    for name, scale, kind in zip(LAYERS, (1.0, 0.0, 2.0), (torch.float32, torch.bfloat16, torch.float16)):
        down, up = (t.to(kind).float() for t in adapter[name])
        layer = pipe.transformer.get_submodule(name)
        torch.testing.assert_close(layer.mix[1] @ layer.mix[0], scale * up @ down, rtol=0, atol=1e-5)


def test_several_with_weights_equal_diffusers(pipe, tiny_folder):
    theirs = reference("QwenImagePipeline", tiny_folder)
    for seed, name in enumerate("ab"):
        lora = state(pairs(pipe, MODULATION if name == "b" else LAYERS, seed=seed))
        theirs.load_lora_weights(dict(lora), adapter_name=name)
        pipe.load_lora_weights(lora, adapter_name=name)
    for names, weights in ((["a", "b"], [0.7, -0.3]), (["b"], [1.0]), (["a", "b"], [1.0, 1.0])):
        theirs.set_adapters(names, weights)
        pipe.set_adapters(names, weights)
        assert pipe.get_active_adapters() == names
        expected = theirs(**CALL, generator=seeded(0)).images
        torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=5e-5)


def test_fuse_and_unfuse(pipe):
    before = draw(pipe)
    for seed, name in enumerate("ab"):
        pipe.load_lora_weights(state(pairs(pipe, MODULATION, seed=seed)), adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.5, 0.25])
    expected = draw(pipe)
    pipe.fuse_lora()
    assert pipe.get_active_adapters() == [] and type(pipe.transformer.norm_out.linear) is torch.nn.Linear
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=5e-5)
    with pytest.raises(ValueError, match="adapters must not be fused, got a; unfuse them first"):
        pipe.set_adapters("a")
    pipe.unfuse_lora()
    assert pipe.get_active_adapters() == ["a", "b"]
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=5e-5)
    pipe.fuse_lora(lora_scale=2.0, adapter_names=["a"])
    pipe.unfuse_lora()
    pipe.disable_lora()
    torch.testing.assert_close(draw(pipe), before, rtol=0, atol=5e-5)


@pytest.mark.parametrize("layers", [MODULATION[-2:], TIME_STEP], ids=["modulation", "time step"])
def test_modulation_tables_follow_the_adapter(pipe, tiny_folder, layers):
    """Tables of a schedule are kept; a LoRA on what makes them must not meet those without it."""
    before = draw(pipe)
    pipe.load_lora_weights(state(pairs(pipe, layers)), adapter_name="a")
    theirs = reference("QwenImagePipeline", tiny_folder)
    theirs.load_lora_weights(state(pairs(pipe, layers)))
    torch.testing.assert_close(draw(pipe), theirs(**CALL, generator=seeded(0)).images, rtol=0, atol=5e-5)
    changed = draw(pipe)
    assert (changed - before).abs().max() > 1e-3 and torch.equal(draw(pipe), changed)
    pipe.set_adapters("a", 0.5)
    assert not torch.equal(draw(pipe), changed)
    pipe.fuse_lora(lora_scale=2.0)
    torch.testing.assert_close(draw(pipe), changed, rtol=0, atol=5e-5)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe), before, rtol=0, atol=5e-5)


@pytest.mark.parametrize("layers", [MODULATION, TIME_STEP], ids=["modulation", "time step"])
@pytest.mark.parametrize("change", ["fused", "fused and forgotten", "unfused", "active", "switched off"])
def test_adapters_on_released_modulation_weights(tiny_folder, pipe, layers, change):
    """What was fused is there again when another schedule, or saving, reads the weights from the folder."""
    freed = QwenImagePipeline.from_pretrained(tiny_folder, free_modulation_weights=True)
    for p in (freed, pipe):
        for seed, name in enumerate("ab"):
            p.load_lora_weights(state(pairs(pipe, layers, seed=seed)), adapter_name=name)
        if change != "active":
            draw(p)
        if "fused" in change:
            p.fuse_lora()
        draw(p)
        if change == "fused and forgotten":
            p.delete_adapters("a")
        elif change == "unfused":
            p.unfuse_lora()
        elif change == "switched off":
            p.disable_lora()
    for steps in (2, 3):
        expected = draw(pipe, num_inference_steps=steps)
        torch.testing.assert_close(draw(freed, num_inference_steps=steps), expected, rtol=0, atol=5e-5)
    assert freed.transformer.modulation_tables.freed
    saved = freed.transformer.state_dict()
    for name, value in pipe.transformer.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=1e-5)


def test_freed_modulation_weights_come_back_for_an_adapter(tiny_folder, pipe):
    freed = QwenImagePipeline.from_pretrained(tiny_folder, free_modulation_weights=True)
    draw(freed)
    freed.load_lora_weights(state(pairs(pipe)))
    assert freed.transformer.modulation_tables.freed  # an adapter elsewhere does not need them
    freed.unload_lora_weights()
    lora = state(pairs(pipe, MODULATION))
    for p in (freed, pipe):
        p.load_lora_weights(lora)
        p.fuse_lora()
    assert torch.equal(draw(freed), draw(pipe))


def test_swapping_leaves_nothing(pipe):
    before, keys = draw(pipe), list(pipe.transformer.state_dict())
    every = [n for n, m in pipe.transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    loras = [state(pairs(pipe, every, rank=8, seed=seed)) for seed in range(2)]
    for k in range(2):
        pipe.load_lora_weights(loras[k], adapter_name=str(k))
    pipe.set_adapters("0")
    expected = draw(pipe)

    def tensors():
        gc.collect()
        return sum(t.numel() for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))

    before_swaps = tensors()
    for k in range(100):
        pipe.set_adapters(str((k + 1) % 2))
    assert tensors() == before_swaps and torch.equal(draw(pipe), expected)
    counts = []
    for k in range(1, 21):  # from new tensors each time
        pipe.load_lora_weights({key: t.clone() for key, t in loras[k % 2].items()}, "0", hotswap=True)
        counts.append(tensors())
    assert len(set(counts)) == 1 and pipe.get_active_adapters() == ["0"] and torch.equal(draw(pipe), expected)
    assert list(pipe.transformer.state_dict()) == keys
    pipe.delete_adapters("1")
    assert pipe.get_list_adapters() == {"transformer": ["0"]}
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), before)
    assert not any(type(m) is LoraLinear for m in pipe.transformer.modules())


def test_switching_off_and_on_and_another_file_in_its_place(pipe):
    before, (a, b) = draw(pipe), (state(pairs(pipe, seed=seed)) for seed in range(2))
    pipe.load_lora_weights(a, "x")
    pipe.set_adapters("x", 0.5)
    half = draw(pipe)
    pipe.disable_lora()
    pipe.disable_lora()
    assert torch.equal(draw(pipe), before) and pipe.get_active_adapters() == []
    pipe.enable_lora()
    assert torch.equal(draw(pipe), half)
    pipe.load_lora_weights(b, "x", hotswap=True)
    other = draw(pipe)
    assert not torch.equal(other, half)
    pipe.disable_lora()
    pipe.load_lora_weights(a, "x", hotswap=True)
    assert torch.equal(draw(pipe), before)
    pipe.enable_lora()
    assert torch.equal(draw(pipe), half)
    pipe.disable_lora()
    pipe.delete_adapters("x")
    pipe.enable_lora()
    assert torch.equal(draw(pipe), before)


def test_swapping_recompiles_nothing(pipe):
    """Adapters of one rank on one set of layers are inputs of the compiled code."""
    for seed, name in enumerate("ab"):
        pipe.load_lora_weights(state(pairs(pipe, seed=seed)), adapter_name=name)
    expected = []
    for name in "ab":
        pipe.set_adapters(name)
        expected.append(draw(pipe))
    counter = torch._dynamo.testing.CompileCounter()
    pipe.transformer.forward_packed = torch.compile(pipe.transformer.forward_packed, backend=counter)
    compiled = []
    for k in (0, 1, 0):
        pipe.set_adapters("ab"[k])
        torch.testing.assert_close(draw(pipe), expected[k], rtol=0, atol=1e-5)
        compiled.append(counter.frame_count)
    assert compiled[0] > 0 and len(set(compiled)) == 1


def test_moving_and_casting_take_the_adapter_along(pipe):
    pipe.load_lora_weights(state(pairs(pipe)))
    pipe.to(torch.bfloat16)
    assert pipe.transformer.get_submodule(LAYERS[0]).mix[0].dtype == torch.bfloat16
    assert draw(pipe).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "steps"), [("lightning-4", 4), ("lightning-8", 8)])
def test_lightning_by_name(pipe, name, steps):
    arguments = pipe.use_schedule(name)
    assert arguments == {"num_inference_steps": steps, "true_cfg_scale": 1.0} == named_schedule(name)[1]
    pipe(**{**CALL, **arguments, "height": 64}, progress=False)
    expected = {4: [1, 0.9, 0.75, 0.5, 0], 8: [1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0]}
    torch.testing.assert_close(pipe.scheduler.sigmas, torch.tensor(expected[steps]), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="name must be one of lightning-4, lightning-8, got 'turbo'"):
        pipe.use_schedule("turbo")


@pytest.mark.parametrize("named", ["in the source", "by weight_name"])
def test_one_file_of_a_hub_repository_is_downloaded(pipe, tmp_path, monkeypatch, named):
    """Repositories of LoRAs hold many, of gigabytes each."""
    asked = []
    monkeypatch.setattr(
        "qwen_image_fast.pipelines.lora.resolve_folder",
        lambda name, allow_patterns, **hub: asked.append((name, allow_patterns, hub)) or tmp_path,
    )
    (tmp_path / "v1").mkdir()
    for name in ("v1/4-steps.safetensors", "other.safetensors"):
        save_file(state(pairs(pipe)), tmp_path / name)
    if named == "in the source":
        pipe.load_lora_weights("owner/Lightning/v1/4-steps.safetensors", revision="main")
    else:
        pipe.load_lora_weights("owner/Lightning", weight_name="v1/4-steps.safetensors", revision="main")
    patterns = ["v1/4-steps.safetensors", "*adapter_config.json"]
    assert asked == [("owner/Lightning", patterns, {"revision": "main"})]
    with pytest.raises(FileNotFoundError, match="there is no folder ./x.safetensors, and it is not a hub name"):
        monkeypatch.undo()
        pipe.load_lora_weights("./x.safetensors")


def test_errors(pipe, tmp_path):
    good = state(pairs(pipe))
    first = next(iter(good))
    cases = {
        "keys must be LoRA pairs of layers of QwenImageTransformer2DModel, got double_blocks.0.lora_A.weight": {
            "double_blocks.0.lora_A.weight": torch.ones(2, 2)
        },
        r"got transformer.x.dora_scale \(DoRA: not supported\)": {**good, "transformer.x.dora_scale": torch.ones(3)},
        r"to_q.hada_w1_a, x.lokr_w1 \(LoHa, LoKr: not supported\)": {
            f"{LAYERS[0]}.hada_w1_a": torch.ones(3, 3), "x.lokr_w1": torch.ones(3, 3)
        },
        "attn.to_q must have one adapter, got a second one with diffusion_model.transformer_blocks.0.attn.to_q": {
            **good, **state(pairs(pipe), "comfy")
        },
        r"got \[0, 192\] and": {k: v[:0] if "_A" in k else v[:, :0] for k, v in good.items()},
        "attn.to_q must hold finite numbers, got NaN or infinity": {**good, first: good[first] * float("nan")},
        "attn.to_q must hold floating-point numbers, got torch.int8": {**good, first: good[first].to(torch.int8)},
        "alpha of transformer_blocks.0.attn.to_q must be one number, got 2": {
            **good, f"{LAYERS[0]}.alpha": torch.ones(2)
        },
        "got none at all": {},
        r"transformer_blocks.0.attn.to_q must be \[rank, 192\] and \[192, rank\], got \[4, 3072\] and": {
            **good, first: torch.ones(4, 3072)
        },
        "transformer_blocks.0.attn.to_q must have both matrices of its pair, got no down": {
            k: v for k, v in good.items() if k != first
        },
    }  # fmt: skip
    for text, lora in cases.items():
        with pytest.raises(ValueError, match=text):
            pipe.load_lora_weights(lora)
    pipe.load_lora_weights(good, adapter_name="a")
    with pytest.raises(ValueError, match="adapter_name must be new, got 'a', which is loaded"):
        pipe.load_lora_weights(good, adapter_name="a")
    with pytest.raises(ValueError, match=r"adapters must be of those that are there \(a\), got b"):
        pipe.set_adapters(["a", "b"])
    with pytest.raises(ValueError, match="adapter_weights must be one for all or one for each of 1, got 2"):
        pipe.set_adapters(["a"], [1.0, 2.0])
    with pytest.raises(ValueError, match="adapter_weights must be finite, got {'a': nan}"):
        pipe.set_adapters(["a"], float("nan"))
    with pytest.raises(ValueError, match="adapter_name must be loaded to be swapped, got 'b'"):
        pipe.load_lora_weights(good, "b", hotswap=True)
    with pytest.raises(ValueError, match=r"components must be \['transformer'\], which alone has adapters, got "):
        pipe.fuse_lora(["text_encoder"])
    with pytest.raises(FileNotFoundError, match="must hold one safetensors file, or pass weight_name: none"):
        pipe.load_lora_weights(tmp_path)
    save_file(good, tmp_path / "m.safetensors", metadata={"lora_adapter_metadata": "{nothing"})
    with pytest.raises(ValueError, match="lora_adapter_metadata of .*m.safetensors must be a JSON object"):
        pipe.load_lora_weights(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is truncated or not safetensors"):
        pipe.load_lora_weights(tmp_path / "x.safetensors")
