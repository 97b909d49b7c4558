"""`train` as a first-time user has it: options instead of YAML, refusals before anything is loaded, a LoRA."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from data_pictures import noise
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from qwen_image_fast import QwenImageTransformer2DModel
from qwen_image_fast.cli import app
from qwen_image_fast.models.lora_files import parse_lora
from qwen_image_fast.training.export import FORMATS
from qwen_image_fast.training.recipe.curriculum import build_curriculum
from qwen_image_fast.training.sources.examples import Examples
from qwen_image_fast.training.tasks.device import emulates
from qwen_image_fast.training.tasks.flow import FlowTask

TRANSFORMER = "diffusion_pytorch_model.safetensors"
SHORT = ["steps=4", "batch=2", "lora.rank=2", "log.sample_every=4", "log.validate_every=4", "log.sample_count=2",
         "log.validation_samples=2", "checkpoint.every=2", "log.every=1", "device=cpu"]  # fmt: skip


@pytest.fixture
def small(folder, tmp_path, monkeypatch):
    """The current folder has the small model as `small`, which says that its pictures are small, and `pictures`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    for part in folder.iterdir():
        (tmp_path / "small" / part.name).symlink_to(part)
    (tmp_path / "small" / "generation.json").write_text('{"width": 32, "height": 32, "steps": 2, "cfg": 2.0}')
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(noise(i))
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"picture {i}")
    return tmp_path


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def train(*words):
    return run("train", "lora", "--images", "pictures", "--model", "small", "--out", "run", *SHORT, *words)


def test_pictures_become_a_lora_that_generate_uses(small):
    result = train()
    assert result.exit_code == 0, result.output
    assert result.stdout == "run/model\n"
    said = result.stderr.splitlines()
    stages = [line for line in said if line.startswith("lora: ") and "steps of" not in line]
    assert stages == ["lora: looking at pictures", "lora: loading torch", "lora: loading small"]
    assert said[0] == stages[0] and "memory about" in result.stderr and "all weights" not in result.stderr
    assert any(re.match(r"step 1 of 4", line) for line in said)
    loras = sorted(path.name for path in (small / "run" / "loras").iterdir())
    assert loras == ["step-00000002.safetensors", "step-00000004.safetensors"]
    last = small / "run" / "model" / "pytorch_lora_weights.safetensors"
    assert (small / "run" / "loras" / loras[-1]).stat().st_size >= last.stat().st_size - 1000
    lines = [json.loads(line) for line in (small / "run" / "samples" / "samples.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {0, 4}
    assert {line["title"] for line in lines} <= {f"picture {i}" for i in range(4)}
    made = run("generate", "picture 1", "--model", "small", "--lora", f"run/loras/{loras[0]}", "--output", "x.png")
    assert made.exit_code == 0 and (small / "x.png").is_file(), made.output
    assert "trained on" not in made.stderr


@pytest.mark.parametrize("unit", [False, True])
def test_bfloat16_where_the_processor_has_no_unit_for_it(small, monkeypatch, unit):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: unit)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    result = train("model.dtype=bfloat16", "steps=1", "log.sample_every=0", "log.validate_every=0")
    assert result.exit_code == 0, result.output
    remark = "lora: this processor has no unit for bfloat16; model.dtype=float32 is likely faster here"
    assert (remark in result.stderr.splitlines()) is not unit
    assert not emulates(torch.float32, torch.device("cpu")) and not emulates(torch.bfloat16, torch.device("cuda"))


def test_what_a_run_made_is_exported_and_compared(small):
    assert train().exit_code == 0
    written = {style: run("train", "export", "run", "--step", 2, "--format", style) for style in FORMATS}
    places = {style: small / result.stdout.strip() for style, result in written.items()}
    ours = load_file(small / "run" / "loras" / "step-00000002.safetensors")
    assert all(torch.equal(ours[name], tensor) for name, tensor in load_file(places["diffusers"]).items())
    model = QwenImageTransformer2DModel.from_pretrained(small / "small" / "transformer")
    adapters = [parse_lora(load_file(place), model, {}) for place in places.values()]
    assert adapters[0].keys() == adapters[1].keys() and len(adapters[0]) == 16
    for layer, one in adapters[0].items():
        w = model.get_submodule(layer).weight
        torch.testing.assert_close(one.delta(w), adapters[1][layer].delta(w))
    assert all(name.startswith("diffusion_model.") for name in load_file(places["comfyui"]))
    for words, text in (
        (["--step", 3], "run has no checkpoint of step 3; there are 2, 4"),
        (["--format", "webui"], "--format must be one of diffusers, comfyui"),
        (["--step", 2], "step-00000002-diffusers.safetensors is already there; choose another name (--out)"),
    ):
        refused = run("train", "export", "run", *words)
        assert refused.exit_code == 2 and text in " ".join(refused.stderr.split()), refused.output
    page = (small / run("train", "compare", "run").stdout.strip()).read_text()
    assert page.count("data:image/png;base64,") == len(list((small / "run" / "samples").glob("*.png"))) > 2
    assert all(word in page for word in ("<th>before</th><th>step 4</th>", "<th>picture ", "Loss of training by noise"))
    assert run("train", "compare", "pictures").exit_code == 2


def test_whole_weights_are_exported_from_a_checkpoint(small):
    words = ["lora.rank=0", "checkpoint.keep=5", "log.sample_every=0", "log.validate_every=0"]
    trained = train(*words)
    assert trained.exit_code == 0
    assert "all weights of the transformer learn, no LoRA is made: lora.rank is 0; lora.rank=16 is a" in trained.stderr
    for step in (2, 4):
        assert run("train", "export", "run", "--step", step, "--out", f"out{step}").exit_code == 0
    files = [load_file(small / name / "transformer" / TRANSFORMER) for name in ("out2", "out4", "run/model")]
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[2].items())
    assert any(not torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    assert run("generate", "x", "--model", "out2", "--output", "x.png").exit_code == 0


def test_pairs_become_an_edit_lora(small):
    (small / "pairs").mkdir()
    for i in range(2):
        for side in ("before", "after"):
            (small / "pairs" / f"{i}.{side}.png").write_bytes(noise(i if side == "after" else 7))
        (small / "pairs" / f"{i}.txt").write_text("make it noisy")
    words = ["train", "edit-lora", "--pairs", "pairs", "--model", "small", "--out", "run", *SHORT]
    result = run(*words)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (small / "run" / "samples" / "samples.jsonl").read_text().splitlines()]
    assert {line["title"] for line in lines} == {"make it noisy"}
    doubt = "was trained on edits alone, and here the model sees no picture to change: it may do little"
    for name in ("model", "loras/step-00000002.safetensors"):
        made = run("generate", "x", "--model", "small", "--lora", f"run/{name}", "-o", "x.png", "--overwrite")
        said = " ".join(made.stderr.split())
        assert made.exit_code == 0 and doubt in said, made.output
    given = ["--image", "pairs/0.before.png", "--model", "small", "--lora", "run/model", "-o", "y.png"]
    made = run("edit", "make it noisy", *given)
    assert made.exit_code == 0 and "trained on" not in made.stderr, made.output
    exported = run("train", "export", "run", "--format", "comfyui").stdout.strip()
    assert "trained on" in run("inspect", exported).stdout and "edits" in run("inspect", exported).stdout
    refused = run(*words[:-1])
    assert refused.exit_code == 2 and "already has step-00000004; resume it (--resume)" in refused.stderr
    about = "lora: pairs teach edits: what is trained changes a picture by an instruction"
    other = run("train", "lora", "--pairs", "pairs", "--model", "small", "--out", "other", *SHORT, "steps=1")
    assert other.exit_code == 0 and about in other.stderr and "pairs teach" not in result.stderr, other.output


def test_samples_have_the_models_own_guidance(small):
    recipe = build_curriculum({"model": {"folder": "small"}, "data": {"source": "pictures"}}).stages[0].recipe
    task = FlowTask(recipe, small / "run")
    call = task._sampling()
    assert (call["true_cfg_scale"], call["num_inference_steps"], call["negative_prompt"]) == (2.0, 2, " ")
    task.recipe.log.guidance, task.recipe.log.sample_steps = 1.0, 3
    assert task._sampling()["true_cfg_scale"] == 1.0 and "negative_prompt" not in task._sampling()
    assert task._sampling()["num_inference_steps"] == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on(small, monkeypatch, number):
    sample, count = Examples.sample, iter(range(10**6))

    def interrupting(self, *args):
        if next(count) == 9:
            os.kill(os.getpid(), number)
        return sample(self, *args)

    monkeypatch.setattr(Examples, "sample", interrupting)
    result = train("log.sample_every=0", "log.validate_every=0", "steps=30")
    monkeypatch.undo()
    monkeypatch.chdir(small)
    assert result.exit_code == 128 + number, result.output
    kept = re.search(r"stopped after step (\d+) of 30; kept: (\S+), (\S+)\n", result.stderr)
    assert (small / kept[2]).is_dir() and (small / kept[3]).is_file() and int(kept[1]) < 30
    command = shlex.split(re.search(r"go on with: (.*)", result.stderr)[1])
    assert command[0] == "qwen-image-fast" and command[-1] == "--resume"
    again = run(*command[1:])
    assert again.exit_code == 0 and f"goes on after step {kept[1]}" in again.stderr, again.output


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("lora.rank=4", "lora.rank must stay 2, got 4"),
        ("lora.ranks={to_q: 1}", "lora.ranks.to_q must stay None, got 1"),
        ("lora.kind=dora", "lora.kind must stay 'lora', got 'dora'"),
        ("lora.targets=[to_q]", "lora.targets must stay ['to_q', 'to_k', 'to_v', 'to_out.0', 'add_q_proj',"),
        ("optimizer.name=muon", "optimizer.name must stay 'adamw', got 'muon'"),
    ],
)
def test_what_a_checkpoint_cannot_go_on_with_is_refused_by_its_field(small, monkeypatch, field, text):
    """No shape of a tensor, and before anything is loaded."""
    quick = ["log.sample_every=0", "log.validate_every=0", "steps=1", "checkpoint.every=1"]
    assert train(*quick).exit_code == 0
    monkeypatch.setattr(FlowTask, "__init__", lambda *args, **kwargs: pytest.fail("loads a model"))
    for words, end in (([], "--allow-changes goes on so"), (["--allow-changes"], "begin a new run in another folder")):
        result = train(*quick, field, "--resume", *words)
        last = result.stderr.splitlines()[-1]
        assert result.exit_code == 2 and last.startswith("error: resume: ") and end in last, result.output
        assert len(result.stderr.splitlines()) == 1 and (text if words else field.partition("=")[0]) in last
    monkeypatch.undo()
    monkeypatch.chdir(small)
    more = train(*quick, "steps=2", "optimizer.lr=1e-4", "lora.alpha=3", "--resume", "--allow-changes")
    assert more.exit_code == 0 and "goes on after step 1" in more.stderr, more.output


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "no recipe is named: lora and edit-lora begin your own work, --list prints all"),
        (["lora"], "no model is named: give --model (model.folder), which is tiny, a folder or a hub name"),
        (["lora", "--model", "tiny"], "no data are named: give --images, a folder of pictures with captions, --pairs,"),
        (["lora", "--model", "tiny", "--images", "picture"],
         "--images must be a folder of pictures with captions, a table or shards, there is no picture; did you mean"),
        (["edit-lora", "--model", "tiny", "--pairs", "picture"],
         "--pairs must be a folder of pictures before and after, a table or shards, there is no picture; did you mean"),
        (["lora", "--stepz", "4"], "no option --stepz of train; steps is a field of the recipe, changed by steps="),
        (["lora", "--lr", "4"], "no option --lr of train; optimizer.lr is a field of the recipe, changed by"),
        (["lora", "--frobnicate"], "there is no option --frobnicate of train; --help shows those that there are"),
        (["pictures"], "pictures is a folder, not a recipe; `train lora --images pictures` trains on its pictures"),
        (["lora", "--model", "tny", "--images", "pictures"], "--model: there is no folder tny, and it is not a"),
        (["lora", "--model", "small", "--images", "pictures", "--preset", "32gb"], "--preset must be one of 12gb,"),
        (["lora", "--model", "other", "--images", "pictures"], "a Qwen-Image pipeline, other holds a FluxPipeline"),
        (["lora", "--model", "small", "--images", "pictures", "--out", "other/model_index.json"],
         "--out must be a folder, other/model_index.json is a file"),
        (["lora", "--model", "small", "--images", "pictures", "--out", "pictures/run"],
         "--out must not be inside of the data, got pictures/run in pictures: pictures of the run would be taken for"),
        (["lora", "--model", "small", "--images", "."], "--out must not be inside of the data, got outputs/run in .:"),
        (["lora", "--model", "small", "--pairs", "empty"],
         "--pairs must be a folder of pictures before and after, a table or shards, empty is empty"),
        (["lora", "--model", "small", "--pairs", "pictures"],
         "and pictures has no pairs of pictures: they are NAME.before.png and NAME.after.png, folders before and"),
        (["lora", "--images", "a", "--pairs", "b"], "give either --images or --pairs"),
        (["edit-lora", "--images", "pictures"], "edit-lora learns from pairs: give --pairs instead of --images"),
        (["curriculum/tiny", "--images", "pictures"], "--images has no effect on curriculum/tiny: its"),
        (["lora", "--model", "small", "--images", "empty"],
         "--images must be a folder of pictures with captions, a table or shards, empty is empty"),
        (["lora", "--model", "small", "--images", "small"], "--images must be a folder of images, got small,"),
        (["lora", "--model", "small", "data.source=small"], "recipe: data.source must be a folder of images, got"),
        (["lora", "--model", "small", "--images", "specks"],
         "--images specks has no picture that can be used: specks/1.png: it is 1 x 1 pixels, less than 16 on a side;"),
        (["lora", "--model", "small", "--images", "pictures", "lora.targets=[to_x]"],
         "ends of names of linear layers, with * for any letters, got 'to_x'; there are add_k_proj, add_q_proj,"),
        (["lora", "--model", "small", "--images", "pictures", "lora.rank=33"], "lora.rank must be at most 32, the"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_a_model_is_loaded(small, monkeypatch, words, text):
    from qwen_image_fast.pipelines.text_to_image import QwenImagePipeline

    (small / "empty").mkdir()
    (small / "specks").mkdir()
    Image.new("RGB", (1, 1)).save(small / "specks" / "1.png")
    (small / "specks" / "1.txt").write_text("a speck")
    (small / "other").mkdir()
    (small / "other" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    monkeypatch.setattr(QwenImagePipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("loads a model"))
    result = run("train", *words)
    last = result.stderr.splitlines()[-1]
    assert result.exit_code == 2 and last.startswith("error: ") and text in last, result.output
    assert "loading small" not in result.stderr


def test_recipes_are_listed_and_shown(small):
    names = [line.split()[0] for line in run("train", "--list").stdout.splitlines()]
    assert {"lora", "edit-lora", "tiny/vae"} <= set(names)
    shown = run("train", "lora", "--model", "small", "--images", "pictures", "--show", "steps=7").stdout
    assert "\n# updates.\nsteps: 7\n" in shown
    tree = yaml.safe_load(shown)
    assert tree["model"]["folder"] == "small" and tree["data"]["buckets"] == [[32, 32]]
    (small / "mine.yaml").write_text(shown)
    assert run("train", "mine.yaml", "--show").stdout == shown


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["train", "lora", "--model", "small", "--images", "pictures", "--preset", "32gb"], "must be one of 12gb,"),
        (["train", "lora", "--model", "small", "--images", "picture", "--preset", "24gb"], "did you mean pictures?"),
        (["train", "export", "picture"], "picture must be the folder of a run of `train`, it has no checkpoints; did"),
        (["train", "compare", "pictures"], "pictures must be the folder of a run of `train`, it has no log.jsonl"),
        (["train", "lora", "--model", "small", "--images", "bare"], "every picture needs its caption, bare/1.png has"),
        (["cache-latents", "lora", "model.folder=small", "data.source=bare"], "every picture needs its caption, bare/"),
    ],
)
def test_what_needs_no_torch_to_be_refused_does_not_load_it(small, words, text):
    (small / "bare").mkdir()
    (small / "bare" / "1.png").write_bytes(noise(1))
    code = "import sys; from qwen_image_fast.__main__ import main; sys.modules['torch'] = None; main()"
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env={**os.environ, **path}
    )
    assert found.returncode == 2 and text in found.stderr.splitlines()[-1], found.stderr
    assert "loading torch" not in found.stderr or "--preset" in words


def test_a_missing_package_is_said_before_anything_is_read(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    found = run("train", "lora", "--images", "pictures", "--model", "tiny", "--out", tmp_path / "out")
    assert found.exit_code and "training needs the package tensorboard" in " ".join(found.output.split())
    assert "looking at" not in found.output and not (tmp_path / "out").exists()


def test_an_interrupted_cache_says_that_it_is_kept(tmp_path, monkeypatch):
    from qwen_image_fast.training.batches import latents

    encode, done = latents._encode_span, []

    def second_is_interrupted(*given):
        done.append(given)
        if len(done) == 2:
            raise KeyboardInterrupt
        return encode(*given)

    monkeypatch.setattr(latents, "_encode_span", second_is_interrupted)
    command = ["cache-latents", "tiny/1-shapes", "model.folder=tiny", "--count", "80", "--out", str(tmp_path / "cache")]
    stopped = CliRunner().invoke(app, command)
    assert stopped.exit_code == 130 and "the same command goes on" in " ".join(stopped.stderr.split()), stopped.output
    monkeypatch.undo()
    assert CliRunner().invoke(app, command).exit_code == 0
