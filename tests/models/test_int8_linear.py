"""Transformers that compute in 8 bits: how far from float they are, files, adapters, what is refused."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from weights.writers import as_q8_0, write_gguf, write_safetensors

from qwen_image_fast import QwenImagePipeline
from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.models import precision, stream_linear
from qwen_image_fast.models.int8_linear import Int8Linear, quantised
from qwen_image_fast.models.lora import LoraInt8Linear, adapters_of
from qwen_image_fast.models.lora_kinds import Adapter, Pair
from qwen_image_fast.models.precision import check_precision, int8_layers
from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
from qwen_image_fast.models.vae import AutoencoderKLQwenImage
from qwen_image_fast.ops import _eight_bits, _library, eight_bits
from qwen_image_fast.tensor_files import read_header
from qwen_image_fast.weights.scales import rotate

LAYERS_OF_A_BLOCK = 12


@pytest.fixture(scope="module")
def trained():
    """The model of the package, which was trained: its weights and activations are no random numbers."""
    return QwenImageTransformer2DModel.from_pretrained(SHIPPED, subfolder="transformer", torch_dtype=torch.float32)


def in_int8(dtype=torch.float32):
    return QwenImageTransformer2DModel.from_pretrained(
        SHIPPED, subfolder="transformer", torch_dtype=dtype, precision="int8"
    )


def inputs(dtype=torch.float32, sigma=0.7, clean=None):
    """Two pictures at a noise level, of which `clean` are the latents, else some that fit no prompt."""
    g = torch.Generator().manual_seed(3)
    noise = torch.randn(2, 64, 64, generator=g)
    x = noise if clean is None else (1 - sigma) * clean + sigma * noise
    return {
        "hidden_states": x.to(dtype), "img_shapes": [[(1, 8, 8)]] * 2,
        "encoder_hidden_states": torch.randn(2, 7, 128, generator=g).to(dtype),
        "encoder_hidden_states_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
        "timestep": torch.tensor([sigma, sigma], dtype=dtype),
    }  # fmt: skip


def run(model, **changed):
    with torch.no_grad():
        return model(**inputs(**changed)).sample


def distance(a, b):
    a, b = a.double(), b.double()
    return ((a - b).pow(2).mean() / b.pow(2).mean()).sqrt().item()


def test_the_layers(trained):
    model = in_int8()
    made = {name for name, layer in model.named_modules() if isinstance(layer, Int8Linear)}
    assert len(made) == LAYERS_OF_A_BLOCK * model.config.num_layers and made == set(int8_layers(trained))
    for name in ("transformer_blocks.0.img_mod.1", "img_in", "txt_in", "proj_out", "norm_out.linear"):
        assert name not in made
    layer, weight = model.transformer_blocks[1].img_mlp.net[2], trained.transformer_blocks[1].img_mlp.net[2].weight
    assert layer.group == 256 and model.transformer_blocks[0].attn.to_q.group == 64
    # Rounding errs by half a step at most, and the rotation back leaves the sum of squares.
    assert distance(layer.dequantised(), weight) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_velocity(trained, dtype):
    """Of a picture of the model's own at four noise levels, and that of the same prompt."""
    pipe = QwenImagePipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)
    call = {"height": 128, "width": 128, "num_inference_steps": 4, "true_cfg_scale": 1.0, "output_type": "latent"}
    clean = torch.as_tensor(pipe("a red circle", seed=1, progress=False, **call).images).reshape(1, 64, 64)
    embeds = pipe.encode_prompt("a red circle")[0].expand(2, -1, -1)
    model = in_int8(dtype)
    errors = []
    for sigma in (0.95, 0.7, 0.4, 0.1):
        given = inputs(dtype, sigma, clean) | {
            "encoder_hidden_states": embeds.to(dtype),
            "encoder_hidden_states_mask": None,
        }
        exact = {n: t.float() if torch.is_tensor(t) else t for n, t in given.items()}
        with torch.no_grad():
            errors.append(distance(model(**given).sample, trained(**exact).sample))
    assert all(e < most for e, most in zip(errors, (0.02, 0.012, 0.016, 0.035))), errors


def test_fused_as_by_modules(trained):
    """A hook on a layer makes all of a block's layers modules: the same products and roundings, but for GELU's."""
    model = in_int8()
    fused = run(model)
    for block in model.transformer_blocks:
        block.attn.to_q.register_forward_hook(lambda *_: None)
        block.attn.to_out[0].register_forward_hook(lambda *_: None)
        block.img_mlp.net[2].register_forward_hook(lambda *_: None)
    assert distance(run(model), fused) < 5e-3


def test_saved_and_read_again(tmp_path, trained):
    model = in_int8(torch.bfloat16)
    model.save_pretrained(tmp_path)
    entries = read_header(tmp_path / "diffusion_pytorch_model.safetensors")
    name = "transformer_blocks.0.attn.to_q"
    assert entries[f"{name}.weight"].dtype == torch.int8 and entries[f"{name}.weight_scale"].shape == (192, 1)
    config = json.loads(bytes(model.state_dict()[f"{name}.comfy_quant"].tolist()))
    assert config == {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
    again = QwenImageTransformer2DModel.from_pretrained(tmp_path, precision="int8")
    floats = QwenImageTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.float32)
    assert torch.equal(run(again, dtype=torch.bfloat16), run(model, dtype=torch.bfloat16))
    assert type(floats.transformer_blocks[0].attn.to_q) is torch.nn.Linear
    weight = model.transformer_blocks[0].attn.to_q.dequantised()
    torch.testing.assert_close(floats.transformer_blocks[0].attn.to_q.weight, weight, rtol=1e-5, atol=1e-6)
    other = in_int8(torch.bfloat16)
    other.transformer_blocks[0].attn.to_q.scale_bits.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other, dtype=torch.bfloat16), run(model, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="to_q.weight must be in 8 bits"):
        other.load_state_dict({**model.state_dict(), f"{name}.weight_scale": torch.zeros(1)} | trained.state_dict())


def test_a_file_of_another_tool_is_used_as_it_is(tmp_path, trained):
    """Its numbers, its scales and its rotation; layers that it left in floating point stay so."""
    name, left = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"
    tensors = {f"model.diffusion_model.{n}": t for n, t in trained.state_dict().items()}
    q = torch.randint(-128, 128, (192, 192), dtype=torch.int8)
    scale, config = torch.rand(192, 1) / 100, {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}
    text = torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
    tensors |= {f"model.diffusion_model.{name}.{n}": t for n, t in
                {"weight": q, "weight_scale": scale, "comfy_quant": text}.items()}  # fmt: skip
    path = write_safetensors(tmp_path / "model.safetensors", tensors)
    options = {"config": SHIPPED, "torch_dtype": torch.float32}
    model = QwenImageTransformer2DModel.from_single_file(path, precision="int8", **options)
    layer = model.get_submodule(name)
    assert torch.equal(layer.int8.values(), q) and torch.equal(layer.int8.scales, scale[:, 0]) and layer.group == 16
    assert type(model.get_submodule(left)) is torch.nn.Linear
    torch.testing.assert_close(layer.dequantised(), rotate(q * scale, 16))
    floats = QwenImageTransformer2DModel.from_single_file(path, **options)
    assert distance(run(model), run(floats)) < 0.02


def test_dtypes_and_devices(trained):
    """Scales stay float32 whatever the model becomes; another device is refused."""
    model = in_int8()
    scales = model.transformer_blocks[0].attn.to_q.int8.scales.clone()
    model.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(model.transformer_blocks[0].attn.to_q.int8.scales, scales)
    assert model.get_memory_footprint() < 0.6 * trained.get_memory_footprint()
    with pytest.raises(ValueError, match="to: a model in 8 bits computes on cpu and cuda, got xpu"):
        model.to("xpu")  # before any part of it is moved
    assert all(p.device.type == "cpu" for p in model.parameters())
    with pytest.raises(ValueError, match="to: a model in 8 bits computes on cpu and cuda, got xpu"):
        model.transformer_blocks[0].attn.to_q._apply(lambda t: SimpleNamespace(device=torch.device("xpu:0")))


def adapter(seed, rank=4):
    g = torch.Generator().manual_seed(seed)
    return Adapter(Pair(torch.randn(rank, 192, generator=g) / 14, torch.randn(192, rank, generator=g) / 4))


def test_adapters_beside(trained):
    """The low-rank branch is computed of the input as it came; swapped, switched off and on as on any model."""
    model, name = in_int8(), "transformer_blocks.1.attn.to_out.0"
    plain, layer, x = run(model), model.get_submodule(name), torch.randn(5, 192)
    adapters = adapters_of(model)
    adapters.add("one", {name: adapter(0)})
    assert type(layer) is LoraInt8Linear
    expected = torch.nn.functional.linear(x, adapter(0).delta(torch.empty(0)))
    torch.testing.assert_close(layer(x) - layer.product(x, layer.bias), expected, rtol=1e-5, atol=1e-5)
    changed = run(model)
    adapters.replace("one", {name: adapter(1)})
    assert not torch.equal(run(model), changed) and not torch.equal(changed, plain)
    adapters.replace("one", {name: adapter(0)})
    assert torch.equal(run(model), changed)
    with pytest.raises(ValueError, match=r"to_out.0 is in 8 bits, .* rounded away: rounding=\"stochastic\" keeps it"):
        adapters.fuse()
    adapters.disable()
    assert torch.equal(run(model), plain) and type(layer) is Int8Linear
    own = adapters_of(trained)
    own.add("one", {name: adapter(0)})
    adapters.enable()
    assert distance(run(model), run(trained)) < 0.03
    own.remove(["one"])


@pytest.mark.parametrize("size", [1.0, 0.02])
def test_stochastic_rounding_keeps_an_adapter_in_the_mean(size):
    """Of the change, as it was asked for, about all is there, also where it is far below a step of the numbers; what
    is added besides is noise. Fused, the adapter is no branch any more."""
    model, name = in_int8(), "transformer_blocks.1.attn.to_out.0"
    layer, adapters = model.get_submodule(name), adapters_of(model)
    before, change = layer.dequantised(), size * adapter(0).delta(torch.empty(0))
    assert size == 1.0 or change.abs().mean() < 0.3 * layer.int8.scales.mean()  # most of it would be rounded away
    adapters.add("one", {name: adapter(0)})
    beside = run(model)
    adapters.fuse(size, rounding="stochastic")
    assert type(layer) is Int8Linear and set(adapters.fused) == {"one"} and not adapters.weights
    added = layer.dequantised() - before
    share = (added * change).sum() / change.pow(2).sum()
    noise = (added - change).pow(2).mean().sqrt() / layer.int8.scales.mean()
    assert share == pytest.approx(1, abs=0.15) and noise < 0.6
    if size == 1.0:
        assert distance(run(model), beside) < 0.05
    with pytest.raises(ValueError, match="unfuse_lora: what was fused into 8 bits is rounded there"):
        adapters.unfuse()
    again = in_int8()
    adapters_of(again).add("one", {name: adapter(0)})
    adapters_of(again).fuse(size, rounding="stochastic")
    assert torch.equal(again.get_submodule(name).packed, layer.packed)  # what is drawn is always the same


def test_what_stochastic_rounding_is_not_for():
    model, name = in_int8(), "transformer_blocks.1.attn.to_out.0"
    layer = model.get_submodule(name)
    packed, scales = layer.packed.clone(), layer.int8.scales.clone()
    layer.replace(layer.dequantised(), torch.Generator().manual_seed(0))
    assert torch.equal(layer.packed, packed) and torch.equal(layer.int8.scales, scales)  # nothing changed
    layer.replace(2 * layer.dequantised(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer.int8.scales, 2 * scales, rtol=0.02, atol=0)  # of a row that needs the room
    adapters = adapters_of(model)
    adapters.add("one", {name: adapter(0)})
    with pytest.raises(ValueError, match="rounding must be nearest or stochastic, got 'up'"):
        adapters.fuse(rounding="up")
    four = QwenImageTransformer2DModel.from_pretrained(SHIPPED, subfolder="transformer", precision="int4")
    adapters_of(four).add("one", {name: adapter(0)})
    with pytest.raises(ValueError, match="to_out.0 is in 4 bits, in which an adapter would be rounded away: leave it"):
        adapters_of(four).fuse(rounding="stochastic")


def test_dora_reads_the_weight():
    model, name = in_int8(), "transformer_blocks.1.attn.to_out.0"
    layer = model.get_submodule(name)
    weight = layer.dequantised()
    dora = adapter(0)._replace(magnitude=weight.norm(dim=1, keepdim=True) * 1.5)
    x = torch.randn(5, 192)
    y = layer(x)
    adapters_of(model).add("one", {name: dora})
    expected = y - layer.bias + torch.nn.functional.linear(x, dora.delta(weight, dora.rescaling(weight))) + layer.bias
    assert distance(layer(x), expected) < 0.02


def test_a_pipeline(trained):
    pipes = [QwenImagePipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32, precision=p) for p in (None, "int8")]
    call = {"height": 128, "width": 128, "num_inference_steps": 2, "true_cfg_scale": 1.0, "output_type": "latent"}
    exact, small = (torch.as_tensor(pipe("a red circle", seed=1, progress=False, **call).images) for pipe in pipes)
    assert 0 < distance(small, exact) < 0.05


@pytest.mark.parametrize(
    "precision, scale",
    [("int8", "weight_scale"), ("int4", "weight_s_channel"), ("int4", "weight_s_rel"), ("int4", "weight_codebook")],
)
def test_scales_of_a_file_that_are_not_numbers(tmp_path, precision, scale):
    """With a precision its numbers are taken as they are, not decoded, where scales are looked at."""
    load, layer = QwenImageTransformer2DModel.from_pretrained, "transformer_blocks.0.attn.to_q"
    state = load(SHIPPED, subfolder="transformer", precision=precision).state_dict()
    state[f"{layer}.{scale}"].view(-1)[5] = float("nan")
    path = write_safetensors(tmp_path / "model.safetensors", state)
    with pytest.raises(ValueError, match=f"{layer}.weight must hold finite numbers, .*: {path} is damaged"):
        QwenImageTransformer2DModel.from_single_file(path, config=SHIPPED, precision=precision)


@pytest.mark.parametrize(
    "capability, number, words",
    [
        ((8, 0), "int8", "int8 at 2 times the peak of bfloat16 on sm_80"),
        ((8, 6), "int8", "int8 at 4 times"),
        ((8, 9), "int8", "int8 at 4 times"),
        ((9, 0), "int8", "int8 at 2 times"),
        ((10, 0), "int8", "int8 at 2 times"),
        (
            (10, 3),
            "float8",
            "float8 at 2 times the peak of bfloat16 on sm_103, int8 at 0.067 times the peak of bfloat16",
        ),
        ((12, 0), "int8", "int8 at 4 times"),
        ((12, 1), "int8", "int8; no figures of sm_121"),
    ],
)
def test_the_numbers_that_a_gpu_prefers(capability, number, words, monkeypatch, caplog):
    """One table says it; where it is not integers, whoever asks for 8 or 4 bits is told what that means."""
    assert _eight_bits.preferred(capability) == number and _eight_bits.describe(capability).startswith(words)
    asked = []
    monkeypatch.setattr(_eight_bits, "capability_of", lambda index: asked.append(index) or capability)
    monkeypatch.setattr(_library, "_has_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for device in ("cpu", "cuda", "cuda:3"):
        check_precision("from_pretrained", "int8", device)
    assert set(asked) == {1, 3}
    warnings = caplog.text.count("layers in 8 bits compute in float8, further from the model")
    assert warnings == (2 if number == "float8" else 0) == len(caplog.records)
    check_precision("from_pretrained", "int4", "cuda")
    assert caplog.text.count("weights in 4 bits become integers: they save memory alone") == (number == "float8")
    caplog.clear()
    with eight_bits("int8"):
        check_precision("from_pretrained", "int8", "cuda")
    assert not caplog.records
    with eight_bits("float8"):
        if capability < (8, 9):
            with pytest.raises(ValueError, match="eight_bits: choice must be best or int8 on sm_8"):
                check_precision("from_pretrained", "int8", "cuda")
        else:
            check_precision("from_pretrained", "int8", "cuda")


def test_a_layer_in_float8():
    """Its numbers outlive a change of the model's type; it is copied, but not written: its integers are gone."""
    weight, bias = torch.randn(40, 192, generator=torch.Generator().manual_seed(1)), torch.nn.Parameter(torch.ones(40))
    exact = Int8Linear(quantised(weight), bias)
    layer = Int8Linear(exact.int8.in_float8(), bias)
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, near = layer(x), exact(x)
        assert 0.005 < (expected - near).norm() / near.norm() < 0.1
        moved = copy.deepcopy(layer).to(torch.bfloat16).to("cpu")
        assert moved.float8 and torch.equal(moved.int8.values().float(), layer.int8.values().float())
        rounded = x.bfloat16()
        torch.testing.assert_close(moved(rounded).float(), layer(rounded.float()), rtol=2**-8, atol=1e-3)
        torch.testing.assert_close(layer.in_floats(x, bias), expected, rtol=0, atol=0.05 * expected.abs().max().item())
        torch.testing.assert_close(layer.dequantised(), weight, rtol=0, atol=0.2)
    with pytest.raises(ValueError, match="state_dict: weight must be in int8 or int4 to be saved, got float8"):
        layer.state_dict()
    given = torch.randn(3, 192, requires_grad=True)
    layer(given).sum().backward()
    torch.testing.assert_close(given.grad, layer.dequantised().sum(0).expand(3, 192), rtol=1e-3, atol=1e-3)


def test_streams_share_rows_of_one_kind(monkeypatch):
    """Layers in float8 and in integers take rows of their own; several of one kind share them."""
    calls = []
    rows = stream_linear.int8_rows
    monkeypatch.setattr(stream_linear, "int8_rows", lambda *args: calls.append(args[1:]) or rows(*args))
    layer = Int8Linear(quantised(torch.randn(16, 64)), None)
    float8, x = Int8Linear(layer.int8.in_float8(), None), torch.randn(3, 64)
    with torch.no_grad():
        a, b, c = stream_linear.each([layer, float8, float8], [x] * 3)
    assert calls == [(64, False, False), (64, False, True)] and torch.equal(b, c) and not torch.equal(a, b)


def test_what_is_refused(tmp_path, trained, monkeypatch):
    load = QwenImageTransformer2DModel.from_pretrained
    with pytest.raises(ValueError, match="from_pretrained: precision must be None or one of int8, int4, got 'int3'"):
        load(tmp_path / "nowhere", precision="int3")  # before anything is looked for
    with pytest.raises(ValueError, match="precision must be None on xpu: layers in 8 bits compute on cpu and cuda"):
        check_precision("from_pretrained", "int8", "xpu")
    with monkeypatch.context() as patch:
        patch.setattr(precision, "UNITS", precision.UNITS[:1])
        with pytest.raises(
            ValueError, match="precision must be None on this CPU, which has none of the instructions for"
        ):
            load(SHIPPED, subfolder="transformer", precision="int8")
    with pytest.raises(ValueError, match="precision must be None for a AutoencoderKLQwenImage, got 'int8'"):
        AutoencoderKLQwenImage.from_pretrained(SHIPPED, subfolder="vae", precision="int8")
    with pytest.raises(ValueError, match="precision must be None with a transformer that is loaded already"):
        QwenImagePipeline.from_pretrained(SHIPPED, transformer=trained, precision="int8")
    tensors, _ = as_q8_0(trained.state_dict(), "")
    path = write_gguf(tmp_path / "model.gguf", tensors, {"general.architecture": "qwen_image"})
    with pytest.raises(
        ValueError, match=r"is quantised already, .* as .*Q8_0: load it without precision, or take a file in"
    ):
        QwenImageTransformer2DModel.from_single_file(path, config=SHIPPED, precision="int8")
    damaged = {n: t.clone() for n, t in trained.state_dict().items()}
    damaged["transformer_blocks.0.attn.to_q.weight"][3, 4] = float("nan")
    path = write_safetensors(tmp_path / "model.safetensors", damaged)
    with pytest.raises(ValueError, match=r"transformer_blocks.0.attn.to_q.weight must hold finite numbers"):
        QwenImageTransformer2DModel.from_single_file(path, config=SHIPPED, precision="int8")
    weight = in_int8().transformer_blocks[0].attn.to_q.weight
    assert (weight.dtype, weight.device.type, tuple(weight.shape)) == (torch.float32, "cpu", (192, 192))
    for change in (lambda: weight.data.add_(1), lambda: weight + 1, lambda: weight.copy_(weight)):
        with pytest.raises(RuntimeError, match="a layer in 8 bits has no weight to be read or changed"):
            change()
    monkeypatch.setattr(precision, "UNITS", ("plain",))
    with pytest.raises(ValueError, match="precision must be None on this CPU"):
        check_precision("from_pretrained", "int8", "cpu")
