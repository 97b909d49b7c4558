"""A transformer without modulation weights: the pictures of its schedules have their bits, the rest is refused."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qwen_image_fast import FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline, QwenImagePipeline
from qwen_image_fast import inspect_model as im
from qwen_image_fast.cli import app
from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.models.lora import adapters_of
from qwen_image_fast.models.lora_kinds import Adapter, Pair
from qwen_image_fast.models.modulation import free_modulation_weights
from qwen_image_fast.models.stored_modulation import SCHEDULES, refuse_training
from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
from qwen_image_fast.pipelines import residence
from qwen_image_fast.quantize import quantize
from qwen_image_fast.quantize_modulation import schedules_for
from qwen_image_fast.request_fields import tokens_of
from qwen_image_fast.sampling import noise_levels, schedule_shift
from qwen_image_fast.weights.formats import open_weights, parts_in

WEIGHTS = SHIPPED / "transformer" / "diffusion_pytorch_model.safetensors"
SCHEDULER = FlowMatchEulerDiscreteScheduler.from_pretrained(SHIPPED, subfolder="scheduler")
BFLOAT16 = {"torch_dtype": torch.bfloat16}
CALL = {"prompt": "a red square", "seed": 1, "output_type": "latent", "progress": False, "true_cfg_scale": 4.0,
        "negative_prompt": " "}  # fmt: skip


def adapter(path):
    layer = QwenImageTransformer2DModel.empty(json.loads((SHIPPED / "transformer/config.json").read_text()))
    layer, g = layer.get_submodule(path), torch.Generator().manual_seed(0)
    down, up = torch.randn(2, layer.in_features, generator=g), torch.randn(layer.out_features, 2, generator=g)
    return {path: Adapter(Pair(down / 14, up / 50))}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same transformer with a LoRA on its modulation merged: with the weights, and with vectors."""
    folder = tmp_path_factory.mktemp("vectors")
    loras = [(adapter("transformer_blocks.1.img_mod.1") | adapter("norm_out.linear"), 1.0)]
    schedules = schedules_for(SCHEDULER, [4, 6], [(64, 64), (1024, 512)], [4])
    found = []
    for name, own in (("whole", ()), ("vectors", schedules)):
        found.append(folder / f"{name}.safetensors")
        quantize(open_weights([WEIGHTS], "transformer"), found[-1], loras, schedules=own)
    return found


def load(file, cls=QwenImagePipeline, **options):
    return cls.from_pretrained("tiny", transformer=file, **{**BFLOAT16, **options})


def levels_of_both():
    found = []
    for width, height in ((64, 64), (1024, 512)):
        found += noise_levels(SCHEDULER, schedule_shift(SCHEDULER, tokens_of(width, height)), 4)[:-1].tolist()
    return found


def latents(pipe, steps=4, size=(64, 64), **more):
    call = {**CALL, "num_inference_steps": steps, "width": size[0], "height": size[1], **more}
    return torch.as_tensor(pipe(**call).images[0])


@pytest.fixture(scope="module")
def pipes(files):
    return [load(file, precision="int8") for file in files]


@pytest.mark.parametrize("options", [{}, {"precision": "int8"}], ids=["decoded", "int8"])
def test_pictures_have_the_bits_of_the_weights(files, options):
    whole = load(files[0], free_modulation_weights=True, **options)
    pipe = load(files[1], **options)
    for steps, size in ((4, (64, 64)), (6, (1024, 512))):
        assert torch.equal(latents(pipe, steps, size), latents(whole, steps, size))
    for each in (whole, pipe):
        each.use_schedule("lightning-4")
    for size in ((64, 64), (96, 160)):
        assert torch.equal(latents(pipe, size=size), latents(whole, size=size))


def test_what_the_file_holds(files, pipes):
    sizes = [file.stat().st_size for file in files]
    rows = sum(len(s["timesteps"]) for s in json.loads(load_file(files[1])[SCHEDULES].numpy().tobytes()))
    modulation = 5 * 2 * 193 * 6 * 192 + 193 * 2 * 192
    # All bfloat16; the headers, and the json of the schedules, differ by less than a hundredth of that.
    assert abs(sizes[0] - sizes[1] - 2 * modulation + 2 * rows * 62 * 192) < 0.01 * 2 * modulation
    assert parts_in(files[1]) == ["transformer"]
    state, stored = pipes[1].transformer.state_dict(), load_file(files[1])
    assert state.keys() == stored.keys() and not any("mod.1" in name for name in state)
    assert all(torch.equal(state[n], t.to(state[n].dtype)) for n, t in stored.items())


def test_a_copy_and_a_saved_folder(files, pipes, tmp_path):
    wanted = latents(pipes[0])
    assert torch.equal(latents(pipes[1]), wanted)
    assert torch.equal(latents(QwenImagePipeline(**copy.deepcopy(pipes[1].components))), wanted)
    pipes[1].save_pretrained(tmp_path / "saved")
    assert torch.equal(latents(QwenImagePipeline.from_pretrained(tmp_path / "saved", precision="int8")), wanted)
    assert free_modulation_weights(pipes[1].transformer, None) == 0


def test_mixed_sizes_and_edits(files, pipes):
    """Noise levels of several schedules in one call, whose vectors stand apart in the file."""
    from PIL import Image

    assert torch.equal(*(latents(pipe, num_images_per_prompt=2) for pipe in pipes))
    # In one call of both sizes nothing stands in a row.
    tables = [pipe.transformer.modulation_tables.get(pipe.transformer, levels_of_both()) for pipe in pipes]
    for a, b in zip((*tables[0].img, tables[0].final), (*tables[1].img, tables[1].final)):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
    picture, call = Image.new("RGB", (64, 64), "red"), {**CALL, "num_inference_steps": 4, "width": 64, "height": 64}
    found = [
        load(file, QwenImageEditPlusPipeline, precision="int8")(image=[picture], **call).images[0] for file in files
    ]
    assert torch.equal(*map(torch.as_tensor, found))


def test_references_at_noise_level_0(files, tmp_path):
    """`zero_cond_t`: one more vector in each schedule."""
    from PIL import Image

    marker = {"__index_timestep_zero__": torch.zeros(0)}
    save_file(load_file(WEIGHTS) | marker, tmp_path / "zero.safetensors")
    schedules = schedules_for(SCHEDULER, [4], [(64, 64)], at_zero=True)
    for name, given in (("whole", ()), ("vectors", schedules)):
        path = tmp_path / f"{name}.safetensors"
        quantize(open_weights([tmp_path / "zero.safetensors"], "transformer"), path, schedules=given)
        save_file(load_file(path) | marker, path)
    call = {"prompt": "a red square", "image": [Image.new("RGB", (64, 64), "red")], "seed": 1, "output_type": "latent"}
    call |= {"num_inference_steps": 4, "width": 64, "height": 64, "progress": False}
    found = []
    for name in ("whole", "vectors"):
        pipe = load(tmp_path / f"{name}.safetensors", QwenImageEditPlusPipeline, precision="int8")
        assert pipe.transformer.config.zero_cond_t
        found.append(torch.as_tensor(pipe(**call).images[0]))
    assert torch.equal(*found)


def test_under_a_memory_limit(files, pipes, monkeypatch):
    """The vectors always stay and are counted; there is no modulation to stream."""
    monkeypatch.setattr(residence, "resident_bytes", lambda: 0)
    pipe = load(files[1], precision="int8", memory_limit="600MB")
    assert torch.equal(latents(pipe), latents(pipes[0]))
    plans = [im.inspect_model(file).plan(10**9, torch.bfloat16, "int8").parts[0] for file in files]
    rows = pipes[1].transformer.norm_out.vectors.shape[0]
    assert "modulation" in plans[0].units and "modulation" not in plans[1].units
    kept = plans[1].kept - plans[0].kept
    # Besides: biases of modulation and the output norm's weights, which always stay.
    lost = 2 * (5 * 2 * 6 * 192 + 193 * 2 * 192)
    assert kept == 2 * rows * 62 * 192 + len(pipes[1].transformer.modulation_schedules) - lost


def test_inspect_says_it(files):
    for words in ((), ("--json",)):
        found = CliRunner().invoke(app, ["inspect", str(files[1]), *words])
        text = " ".join(found.stdout.replace("│", " ").split())
        assert found.exit_code == 0 and "4 steps of 64x64" in text and "modulation" in text
    model = im.inspect_model(files[1])
    assert model.parts[0].groups[im.KEPT] > 0 and im.MODULATION not in model.parts[0].groups
    assert model.needs()["all"] == model.needs()["all_freed"]
    assert "modulation_vectors_for" not in im.as_json(im.inspect_model(files[0]))["parts"][0]


LEFT_OUT = "the modulation weights were left out of this transformer"


def test_what_is_refused(files, tmp_path):
    pipe = load(files[1], precision="int8")
    known = "4 steps of 64x64; 4 steps of 1024x512; 6 steps of 64x64; 6 steps of 1024x512; 4 steps of any size with"
    with pytest.raises(ValueError, match=f"{LEFT_OUT}, and its vectors are for {known} Lightning; 3 of 5 noise levels"):
        latents(pipe, 5)
    with pytest.raises(ValueError, match="dtype must be bfloat16, .* got torch.float32: load it with"):
        load(files[1], torch_dtype=torch.float32)
    for path in ("transformer_blocks.2.txt_mod.1", "norm_out.linear", "time_text_embed.timestep_embedder.linear_1"):
        with pytest.raises(ValueError, match=f"load_lora_weights: {path} cannot be changed, since the modulation"):
            adapters_of(pipe.transformer).add("a", adapter(path))
    assert not adapters_of(pipe.transformer).loaded
    before = latents(pipe)
    adapters_of(pipe.transformer).add("a", adapter("transformer_blocks.2.attn.to_q"))
    with pytest.raises(ValueError, match="load_lora_weights: norm_out.linear cannot be changed"):
        adapters_of(pipe.transformer).replace("a", adapter("norm_out.linear"))
    assert not torch.equal(latents(pipe), before)
    hook = pipe.transformer.norm_out.linear.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="a hook on the modulation layers would see no call"):
        latents(pipe)
    hook.remove()
    decoded = load(files[1])
    with pytest.raises(ValueError, match="modulation weights must be there, and were left out"):
        decoded.transformer.add_adapter(None)
    decoded.transformer.to(torch.float32)
    with pytest.raises(ValueError, match="dtype must be bfloat16"):
        decoded.transformer.modulation(torch.tensor([1.0]))
    with pytest.raises(ValueError, match="model.start=x: the modulation weights must be there, which training needs"):
        refuse_training(open_weights([files[1]], "transformer").weights, "model.start=x")
    state = load_file(files[1])
    for name, damaged, sentence in (
        ("json", {SCHEDULES: torch.zeros(3, dtype=torch.uint8)}, f"{SCHEDULES} must be the bytes of a json"),
        ("rows", {"norm_out.vectors": state["norm_out.vectors"][1:]}, "1 different: norm_out.vectors"),
        ("none", {"norm_out.vectors": None}, "1 missing: norm_out.vectors"),
    ):
        bad = {n: t for n, t in (state | damaged).items() if t is not None}
        save_file(bad, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=sentence):
            load(tmp_path / f"{name}.safetensors", precision="int8")
