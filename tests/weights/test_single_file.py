"""`from_single_file`: the tiny model as other tools write it, against the model of the dequantised numbers."""

import json
import re

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from huggingface_hub import errors
from torch.utils._python_dispatch import TorchDispatchMode
from weights.writers import as_nunchaku, as_q8_0, q8_0, text_bytes, write_gguf, write_safetensors

from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
from qwen_image_fast.models.vae import AutoencoderKLQwenImage
from qwen_image_fast.weights import reading, scales
from qwen_image_fast.weights.formats import open_weights

GGUF = {"general.architecture": "qwen_image"}


@pytest.fixture(scope="module")
def transformer(tiny_folder):
    return QwenImageTransformer2DModel.from_pretrained(tiny_folder, subfolder="transformer")


@pytest.fixture(scope="module")
def vae(tiny_folder):
    return AutoencoderKLQwenImage.from_pretrained(tiny_folder, subfolder="vae")


def as_int8(state, prefix="", size=64):
    """ComfyUI's int8 with rotation, of what can be rotated by 64 values."""
    h4 = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    h = torch.kron(torch.kron(h4, h4), h4) / 8
    tensors, expected = {}, {}
    config = text_bytes({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": size})
    for name, tensor in state.items():
        if tensor.ndim == 2 and tensor.shape[1] % size == 0:
            turned = (tensor.view(len(tensor), -1, size) @ h).view(tensor.shape)
            scale = turned.abs().amax(1, keepdim=True) / 127
            q = (turned / scale).round().to(torch.int8)
            layer = prefix + name.removesuffix(".weight")
            tensors |= {f"{layer}.weight": q, f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": config}
            expected[name] = ((q * scale).view(len(q), -1, size) @ h).view(q.shape)
        else:
            tensors[prefix + name] = expected[name] = tensor
    return tensors, expected


def assert_state(model, expected, dtype=torch.float32, close=False):
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == dtype
        wanted = expected[name].to(dtype)
        same = torch.allclose(tensor, wanted, rtol=1e-5, atol=1e-7) if close else torch.equal(tensor, wanted)
        assert same, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_gguf(tiny_folder, tmp_path, transformer, dtype, prefix):
    tensors, expected = as_q8_0(transformer.state_dict(), prefix)
    path = write_gguf(tmp_path / "model.gguf", tensors, GGUF)
    for config in (tiny_folder, tiny_folder / "transformer", tiny_folder / "transformer" / "config.json"):
        model = QwenImageTransformer2DModel.from_single_file(path, config=config, torch_dtype=dtype)
    assert_state(model, expected, dtype or torch.bfloat16)
    assert model.config == transformer.config and not model.training


def test_comfyui(tiny_folder, tmp_path, transformer):
    """Products with the rotation are sums whose order is the machine's: equal up to rounding."""
    tensors, expected = as_int8(transformer.state_dict(), "model.diffusion_model.")
    path = write_safetensors(tmp_path / "model.safetensors", tensors)
    config = dict(transformer.config)
    model = QwenImageTransformer2DModel.from_single_file(str(path), config=config, torch_dtype=torch.float32)
    assert_state(model, expected, close=True)


def test_nunchaku(tmp_path):
    """Its heads and sizes are known by the shapes, as those of other files; the branch is a sum of products."""
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 64, "in_channels": 16, "out_channels": 4}
    model = QwenImageTransformer2DModel(**sizes)
    tensors, expected = as_nunchaku(model.state_dict())
    path = write_safetensors(tmp_path / "svdq-int4.safetensors", tensors)
    found = QwenImageTransformer2DModel.from_single_file(path, torch_dtype=torch.float32)
    assert found.config == model.config
    for config, told in ({"zero_cond_t": True}, True), ({"zero_cond_t": False}, False), (3, False):
        other = write_safetensors(tmp_path / "2511.safetensors", tensors, {"config": json.dumps(config)})
        assert QwenImageTransformer2DModel.from_single_file(other).config.zero_cond_t is told
    assert_state(found, expected, close=True)
    for name, tensor in model.state_dict().items():  # the numbers are the model's, to 4 bits
        error = (expected[name].float() - tensor).norm() / tensor.norm().clamp(min=1e-6)
        assert error < 0.3, (name, error)


def test_devices_and_modes_around_do_not_matter(tiny_folder, tmp_path, transformer):
    tensors, expected = as_int8(transformer.state_dict())
    path = write_safetensors(tmp_path / "model.safetensors", tensors)
    for around in (torch.device("meta"), torch.inference_mode(), torch.no_grad()):
        scales.rotation.cache_clear()
        with around:
            model = QwenImageTransformer2DModel.from_single_file(path, config=tiny_folder, torch_dtype=torch.float32)
        assert_state(model, expected, close=True)
        assert not any(parameter.is_inference() for parameter in model.parameters())


def test_no_word_about_the_type_keeps_plain_files(tiny_folder, tmp_path, transformer):
    path = write_safetensors(tmp_path / "model.safetensors", dict(transformer.state_dict()))
    model = QwenImageTransformer2DModel.from_single_file(path, config=tiny_folder)
    assert_state(model, transformer.state_dict())


def test_the_subfolder_of_the_configuration(tiny_folder, tmp_path, transformer):
    """As diffusers' own examples say it."""
    path = write_safetensors(tmp_path / "model.safetensors", dict(transformer.state_dict()))
    load = QwenImageTransformer2DModel.from_single_file
    assert load(path, config=tiny_folder, subfolder="transformer").config == transformer.config
    with pytest.raises(FileNotFoundError, match="has no subfolder 'transformers'"):
        load(path, config=tiny_folder, subfolder="transformers")
    for config in (None, dict(transformer.config), tiny_folder / "transformer" / "config.json"):
        with pytest.raises(ValueError, match="subfolder has no effect without config, a folder or hub name"):
            load(path, config=config, subfolder="transformer")


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_the_marker_of_edit_2511(tiny_folder, tmp_path, transformer, kind):
    tensors = {**transformer.state_dict(), "__index_timestep_zero__": torch.zeros(1)}
    path = tmp_path / "model"
    path = write_gguf(path, tensors, GGUF) if kind == "gguf" else write_safetensors(path, tensors)
    model = QwenImageTransformer2DModel.from_single_file(path, config=tiny_folder)
    assert model.config.zero_cond_t and not transformer.config.zero_cond_t


@pytest.mark.parametrize("layered", [False, True])
def test_the_configuration_of_the_shapes(tmp_path, layered):
    sizes = {"num_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 24, "in_channels": 8, "out_channels": 4}
    flags = {"use_additional_t_cond": layered, "use_layer3d_rope": layered}
    model = QwenImageTransformer2DModel(**sizes, **flags)
    path = write_safetensors(tmp_path / "model.safetensors", dict(model.state_dict()))
    found = QwenImageTransformer2DModel.from_single_file(path)
    assert found.config == model.config
    assert_state(found, model.state_dict())


def test_a_configuration_that_the_shapes_do_not_tell(tmp_path, transformer):
    path = write_safetensors(tmp_path / "model.safetensors", dict(transformer.state_dict()))
    with pytest.raises(ValueError, match="config must be given for heads of 32"):
        QwenImageTransformer2DModel.from_single_file(path)


def wan_names(state):
    """A VAE's tensors as Wan calls them; diffusers' own converter takes them back."""
    inverse = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    ups = [m for name in state if (m := re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)", name))]
    order = sorted({(int(m[1]), m[2] == "upsamplers", int(m[3])) for m in ups})
    places = {place: f"decoder.upsamples.{i}" for i, place in enumerate(order)}
    renamed = {}
    for name, tensor in state.items():
        if match := re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)", name):
            name = places[int(match[1]), match[2] == "upsamplers", int(match[3])] + name[match.end() :]
        name = name.replace("encoder.down_blocks.", "encoder.downsamples.")
        for side in ("encoder", "decoder"):
            for i, part in enumerate(("resnets.0", "attentions.0", "resnets.1")):
                name = name.replace(f"{side}.mid_block.{part}.", f"{side}.middle.{i}.")
            name = name.replace(f"{side}.conv_in.", f"{side}.conv1.").replace(f"{side}.norm_out.", f"{side}.head.0.")
            name = name.replace(f"{side}.conv_out.", f"{side}.head.2.")
        if not name.startswith(("encoder.conv1", "decoder.conv1")):
            for ours, theirs in inverse.items():
                name = name.replace(f".{ours}.", f".{theirs}.")
        name = name.replace(".conv_shortcut.", ".shortcut.").replace("post_quant_conv.", "conv2.")
        renamed[name.replace("quant_conv.", "conv1.")] = tensor
    return renamed


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_a_vae_under_the_names_of_wan(tmp_path, vae, prefix):
    theirs = wan_names(vae.state_dict())
    back = convert_wan_vae_to_diffusers(dict(theirs))
    assert back.keys() == vae.state_dict().keys() and theirs.keys() != back.keys()  # the names of the test are right
    tensors = {prefix + name: tensor.to(torch.float16) for name, tensor in theirs.items()}
    path = write_safetensors(tmp_path / "vae.safetensors", tensors)
    found = AutoencoderKLQwenImage.from_single_file(path, torch_dtype=torch.float32)
    assert_state(found, {name: tensor.half() for name, tensor in vae.state_dict().items()})
    assert found.config == vae.config


def test_a_vae_as_gguf(tmp_path, vae):
    tensors = wan_names(vae.state_dict())
    flat = {n: t.flatten(0, 1) if t.ndim == 5 else t for n, t in tensors.items()}  # ggml has four axes
    shapes = {f"comfy.gguf.orig_shape.{n}": list(t.shape) for n, t in tensors.items() if t.ndim == 5}
    path = write_gguf(tmp_path / "vae.gguf", flat, {"general.architecture": "pig", **shapes})
    assert_state(AutoencoderKLQwenImage.from_single_file(path), vae.state_dict())


def test_one_file_with_all_parts(tiny_folder, tmp_path, transformer, vae):
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in transformer.state_dict().items()}
    tensors |= {f"vae.{name}": tensor for name, tensor in wan_names(vae.state_dict()).items()}
    tensors |= {"text_encoders.qwen25_7b.transformer.model.norm.weight": torch.ones(4)}
    path = write_safetensors(tmp_path / "all.safetensors", tensors)
    assert_state(QwenImageTransformer2DModel.from_single_file(path, config=tiny_folder), transformer.state_dict())
    assert_state(AutoencoderKLQwenImage.from_single_file(path), vae.state_dict())


def test_modulation_weights_come_back_from_the_file(tiny_folder, tmp_path, transformer):
    from qwen_image_fast.models.modulation import free_modulation_weights, restore_modulation_weights

    tensors, expected = as_q8_0(transformer.state_dict(), "model.diffusion_model.")
    path = write_gguf(tmp_path / "model.gguf", tensors, GGUF)
    model = QwenImageTransformer2DModel.from_single_file(path, config=tiny_folder, torch_dtype=torch.float32)
    assert free_modulation_weights(model, model.modulation_tables.get(model, [0.5])) > 0
    restore_modulation_weights(model)
    assert_state(model, expected)


class Made(TorchDispatchMode):
    """The largest memory, in bytes, that an operation takes besides that of its arguments."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def leaves(tree):
            return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]

        known = {t.untyped_storage().data_ptr() for t in leaves((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in leaves(out):
            if tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("kind", ["gguf", "int8"])
def test_decoding_holds_a_chunk_at_a_time(tmp_path, kind, monkeypatch):
    """A weight of 64 chunks: nothing that is made on the way is larger than the numbers of a chunk, twice."""
    monkeypatch.setattr(reading, "CHUNK", 1 << 12)
    weight = torch.randn(1024, 256)
    if kind == "gguf":
        path = write_gguf(tmp_path / "a.gguf", {"w": ("Q8_0", q8_0(weight), (1024, 256))}, {})
    else:
        path = write_safetensors(tmp_path / "a.safetensors", as_int8({"w.weight": weight})[0])
    (stored,) = open_weights([path]).weights.values()
    out = torch.full((1024, 256), torch.nan)
    with Made() as made:
        reading.decode_into("w", stored, out)
    assert (out - weight).abs().max() < 0.1
    assert 4 * reading.CHUNK <= made.largest <= 8 * reading.CHUNK


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_what_is_not_a_file_of_the_part(tiny_folder, tmp_path, transformer, vae, monkeypatch):
    path = write_safetensors(tmp_path / "vae.safetensors", dict(vae.state_dict()))
    with pytest.raises(
        ValueError, match=r"vae.safetensors: these are not the weights of a Qwen-Image transformer: \w+"
    ):
        QwenImageTransformer2DModel.from_single_file(path, config=tiny_folder)
    path = write_gguf(tmp_path / "a.gguf", {"a": torch.zeros(2)}, {"general.architecture": "wan"})
    with pytest.raises(ValueError, match="of the architecture wan, not of a Qwen-Image transformer"):
        QwenImageTransformer2DModel.from_single_file(path)
    with pytest.raises(FileNotFoundError, match="there is no file .*vea.safetensors; did you mean .*vae.safetensors"):
        AutoencoderKLQwenImage.from_single_file(tmp_path / "vea.safetensors")
    with pytest.raises(IsADirectoryError, match="is a folder; name one of its files, or use it as the model"):
        AutoencoderKLQwenImage.from_single_file(tiny_folder)
    with pytest.raises(TypeError, match="torch_dtyp is not an argument; did you mean torch_dtype"):
        AutoencoderKLQwenImage.from_single_file(path, torch_dtyp=torch.float32)
    tensors = dict(transformer.state_dict())
    tensors["proj_out.weight"] = tensors["proj_out.weight"][:1]
    path = write_safetensors(tmp_path / "short.safetensors", tensors)
    with pytest.raises(ValueError, match=r"1 different: proj_out.weight \[64, 192\] is \[1, 192\] in the file"):
        QwenImageTransformer2DModel.from_single_file(path, config=tiny_folder)


def test_a_name_twice_under_two_prefixes(tmp_path, transformer):
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in transformer.state_dict().items()}
    tensors["diffusion_model.img_in.bias"] = transformer.img_in.bias + 1
    path = write_safetensors(tmp_path / "model.safetensors", {n: t.detach() for n, t in tensors.items()})
    with pytest.raises(
        ValueError, match=r"holds img_in.bias twice, as \S*img_in.bias and as \S*img_in.bias; remove one"
    ):
        open_weights([path], "transformer")


@pytest.mark.parametrize(
    "name",
    ["some-owner/some-model/deep/file.gguf", "https://hub.example/some-owner/some-model/blob/v2/deep/file.gguf"],
)
def test_files_of_the_hub(tmp_path, monkeypatch, vae, name):
    asked = {}

    def download(repository, allow_patterns, revision, **hub):
        asked.update(repository=repository, patterns=allow_patterns, revision=revision)
        (tmp_path / "deep").mkdir(exist_ok=True)
        write_safetensors(tmp_path / "deep" / "file.gguf", dict(vae.state_dict()))  # content decides, not the name
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert_state(AutoencoderKLQwenImage.from_single_file(name), vae.state_dict())
    revision = "v2" if name.startswith("https") else None
    assert asked == {"repository": "some-owner/some-model", "patterns": ["deep/file.gguf"], "revision": revision}

    def fail(*args, **kwargs):
        raise errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match="some-owner/some-model .* the hub was not reached"):
        AutoencoderKLQwenImage.from_single_file(name)
