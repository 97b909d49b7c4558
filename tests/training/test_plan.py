"""The plan of a run on many GPUs: its counts against those of a model, its choice, and its refusals."""

import re

import pytest
from trainer_helpers import small_recipe
from typer.testing import CliRunner

from qwen_image_fast.cli import app
from qwen_image_fast.training.parallel.layout import Sizes, check_recipe_parallel
from qwen_image_fast.training.parallel.plan import choose, known_gpu, model_of, plan_of
from qwen_image_fast.training.parallel.preset import preset_changes
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.names import find_recipe
from qwen_image_fast.training.recipe.read import read_recipe
from qwen_image_fast.training.tasks.flops import peak_of


def full(*changes):
    return read_recipe(find_recipe("full/text-to-image"), changes)


@pytest.fixture(scope="module")
def released():
    return model_of(full())


def test_the_sizes_are_those_of_the_released_model(released):
    assert released.total == 20_430_401_088
    width = 3072
    assert released.modulation == 2 * (6 * width * width + 6 * width)
    # q, k, v with bias and both outputs of both streams; both MLPs, whose last bias and the outputs' are on every rank
    assert released.block_split == 2 * (4 * width**2 + 3 * width) + 2 * (8 * width**2 + 4 * width)
    assert released.block * 60 + released.root == released.total


def test_memory_and_communication_follow_the_layout(released):
    recipe, peak = full("batch=64", "accumulate=1"), 989e12
    layouts = {"fsdp": (1, 64, 1, 1), "hsdp": (8, 8, 1, 1), "tp": (1, 16, 1, 4), "ulysses": (1, 16, 4, 1)}
    plans = {name: plan_of(recipe, released, Sizes(*sizes), peak) for name, sizes in layouts.items()}
    assert plans["fsdp"].states == pytest.approx(20 * released.total / 64)
    assert plans["hsdp"].states == pytest.approx(20 * released.total / 8)
    assert plans["fsdp"].fsdp_bytes == pytest.approx(8 * released.total * 63 / 64)
    assert plans["ulysses"].states == plans["fsdp"].states
    assert plans["tp"].states < 20 * released.total / 16
    assert plans["tp"].tp_bytes > 0 and plans["ulysses"].cp_bytes > 0 and plans["fsdp"].tp_bytes == 0
    # Four ranks share a sample, each then has four times the samples: the same work for each.
    assert plans["tp"].compute_s == pytest.approx(plans["fsdp"].compute_s)
    assert plans["hsdp"].fsdp_s < plans["fsdp"].fsdp_s  # gathers within a machine


@pytest.mark.parametrize("gpus", [8, 16, 64, 256, 1024])
def test_the_choice_fits_and_uses_all_gpus(gpus):
    _, plans = choose(full(), gpus, 80, "H100")
    for plan in plans:
        assert plan.sizes.world == gpus and plan.memory <= 80e9
        assert 24 % (plan.sizes.tp * plan.sizes.cp) == 0 and plan.batch % plan.sizes.dp == 0
    assert any(plan.samples == 8 for plan in plans) == (plans[0].samples == 8)


def test_adapters_need_their_states_alone(released):
    recipe = full("lora.rank=32", "batch=8", "accumulate=1")
    model, (plan, *others) = choose(recipe, 8, 80, "H100")
    assert model.adapters == 60 * 4 * 32 * 2 * 3072  # to_q, to_k, to_v, to_out.0
    shards = plan.sizes.dp_shard * plan.sizes.cp
    assert plan.states == pytest.approx((2 * released.total + 20 * model.adapters) / shards)
    assert plan.fsdp_bytes < 0.6 * plan_of(full("batch=8"), released, plan.sizes, 989e12).fsdp_bytes
    assert all(p.sizes.tp == 1 for p in [plan, *others])


def test_edits_in_a_mixture_count(released):
    parts = ["{source: squares}", "{source: pairs, name: edits, tasks: {ti2i: 1.0}}"]
    plans = [plan_of(full(f"data.mixture=[{', '.join(parts[:n])}]"), released, Sizes(1, 8, 1, 1), 1e15) for n in (1, 2)]
    assert plans[1].activations > 1.5 * plans[0].activations


def test_a_named_layout_is_checked_alone():
    changes = ("batch=16", "parallel.tp=4", "parallel.dp_replicate=2", "parallel.dp_shard=8")
    _, plans = choose(full(*changes), 64, 80, "H100")
    assert [plan.sizes for plan in plans] == [Sizes(2, 8, 1, 4)]


@pytest.mark.parametrize("gpus", [8, 1024])
def test_the_command_prints_a_plan(gpus):
    result = CliRunner().invoke(app, ["train", "full/text-to-image", "--plan", "--gpus", str(gpus)])
    assert result.exit_code == 0
    assert f"{gpus} x H100, 80 GB each; transformer of 20.43 B parameters in 60 blocks" in result.output
    for words in (
        "GB a GPU",
        "sent by a GPU in a step, GB: FSDP",
        "seconds of a step: compute",
        "assumed, not measured",
    ):
        assert words in result.output
    assert ("samples, not the recipe's" in result.output) == (gpus == 1024)


def test_a_released_model_is_planned_before_it_is_downloaded(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["train", "lora", "--model", "Qwen/Qwen-Image-2512", "--plan", "--gpus", "1", "--memory", "24"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "20.43 B parameters in 60 blocks, those of Qwen/Qwen-Image-2512 as released" in result.output
    assert "model.precision=int8 model.memory=24GB" in result.output


def test_every_stage_of_a_curriculum_has_a_plan():
    result = CliRunner().invoke(app, ["train", "curriculum/report", "--plan", "--gpus", "64", "--memory", "141"])
    assert result.exit_code == 0
    for stage in ("256 px, without text, 200000 steps", "1328 px, balanced, with editing, 40000 steps"):
        assert stage in result.output
    assert result.output.count("use it: parallel.dp_replicate=") == 5


@pytest.mark.parametrize(
    "recipe, gpus, memory, gpu, words",
    [
        (full, 4, 80, "H100", r"plan: no layout fits into 4 x 80 GB: the least is \d+\.\d GB a GPU with .* \(states "),
        (full, 8, 80, "H1000", r"plan: --gpu must be one of .*H100.*, got 'H1000'"),
        (full, 8, 0, "H100", r"plan: --gpus and --memory must be above 0, got 8 and 0"),
        (lambda: full("parallel.tp=3"), 64, 80, "H100", r"recipe: parallel: .* must be the number of processes, 64"),
        (lambda: small_recipe("x", kind="vae", model=None), 8, 80, "H100", r"plan: kind must be flow, got 'vae'"),
    ],
)
def test_what_cannot_be_planned_is_refused(recipe, gpus, memory, gpu, words):
    with pytest.raises(RecipeError, match=words):
        choose(recipe(), gpus, memory, gpu)


@pytest.mark.parametrize("name", ["RTX4090", "rtx 4090", "NVIDIA GeForce RTX-4090"])
def test_a_gpu_by_any_spelling(name):
    assert known_gpu(name) == "RTX 4090"


@pytest.mark.parametrize(
    ("changes", "memory", "advice"),
    [
        (["lora.rank=8"], 12, "use more GPUs"),
        (["lora.rank=8", "lora.kind=dora"], 24, "use more GPUs"),
        (["lora.rank=8", "lora.kind=dora", "model.gradient_checkpointing=false"], 64,
         "use more GPUs, smaller data.buckets or model.gradient_checkpointing"),
        ([], 24, r"use more GPUs or adapters \(lora.rank\)"),
    ],
)  # fmt: skip
def test_advice_is_what_the_recipe_does_not_do(changes, memory, advice):
    with pytest.raises(RecipeError, match="; " + advice + "$"):
        choose(full(*changes, "batch=1"), 1, memory, "RTX 4090")


def test_a_base_on_one_gpu_is_gathered_from_nobody(released):
    recipe = full("lora.rank=8", "batch=1")
    alone, two = (plan_of(recipe, model_of(recipe), Sizes(1, n, 1, 1), 1e15) for n in (1, 2))
    assert alone.gathered == 0 < two.gathered


def test_a_card_of_24_gb_gets_a_base_in_8_bits():
    """The one byte of each weight, what comes and goes left out; and the words that do it."""
    recipe = read_recipe(find_recipe("lora"), ["batch=2"])
    model, (plan,) = choose(recipe, 1, 24, "RTX 4090")
    linear = 60 * (2 * 4 * 3072**2 + 2 * 8 * 3072**2)  # q, k, v and the output of both streams, and both MLPs
    assert model.small == linear
    modulation = 60 * model.modulation
    rest = 2 * (model.total - linear - modulation)
    assert plan.states == pytest.approx(linear + rest + 20 * model.adapters)
    assert 20e9 < plan.memory <= 24e9 and plan.streamed > 2 * modulation
    assert plan.samples == recipe.batch * recipe.accumulate and plan.batch == 1
    words = " ".join(plan.changes)
    assert "model.precision=int8 model.memory=24GB" in words and "gradient_checkpointing=true" in words
    assert plan_of(read_recipe(find_recipe("lora"), plan.changes), model, Sizes(1, 1, 1, 1), 1e15).memory <= 24e9
    result = CliRunner().invoke(app, ["train", "lora", "--plan", "--gpus", "1", "--memory", "24", "--gpu", "RTX 4090"])
    for words in (
        "from the machine's memory for every micro-batch, GB: 27.9",
        "batch=1 accumulate=4 model.precision=int8",
    ):
        assert words in result.output
    eight = read_recipe(find_recipe("lora"), ["model.precision=int8"])
    with pytest.raises(RecipeError, match="--gpus must be 1 with model.precision, got 2"):
        choose(eight, 2, 80, "H100")
    with pytest.raises(RecipeError, match="model.precision must be left out on several processes, got 'int8'"):
        check_recipe_parallel(eight, Sizes(1, 1, 1, 1), 24)


def test_peaks_of_gpus_by_their_names():
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12 and peak_of("NVIDIA H100 PCIe") == 756e12
    assert peak_of("NVIDIA A100-SXM4-80GB") == 312e12 and peak_of("NVIDIA L40S") == 362e12
    assert peak_of("Tesla V100-SXM2-16GB") is None


@pytest.mark.parametrize(
    ("name", "model", "wasteful", "words"),
    [
        ("12gb", "tiny", False, "12gb: the recipe as it is; about 3"),
        ("80gb", "", False, "80gb: the recipe as it is; about 6"),
        (
            "24gb",
            "",
            False,
            "24gb: model.gradient_checkpointing=true, .*model.precision=int8, model.memory=24GB, .*; about 22",
        ),
        (
            "16gb",
            "",
            False,
            "16gb: model.gradient_checkpointing=true, .*model.precision=int4, model.memory=16GB, .*; about 15",
        ),
        ("80gb", "", True, r"80gb: model.gradient_checkpointing=true, batch=1, accumulate=16; about 6\d"),
    ],
)
def test_a_preset_changes_what_it_must(tmp_path, name, model, wasteful, words):
    text = find_recipe("lora").read_text()
    if wasteful:
        text = text.replace("batch: 1\n", "batch: 4\n").replace("gradient_checkpointing: true", "compile: false")
    (tmp_path / "recipe.yaml").write_text(text)
    found, sentence = preset_changes(tmp_path / "recipe.yaml", [f"model.folder={model}"], name)
    assert re.match(words, sentence) and bool(found) == (wasteful or "precision" in words)


def test_a_preset_that_cannot_hold_a_run_names_one_that_can():
    with pytest.raises(RecipeError, match="12gb cannot hold .* needs 14.* GB at least .*: --preset 16gb would"):
        preset_changes(find_recipe("lora"), [], "12gb")
    with pytest.raises(RecipeError, match="--preset must be one of 12gb, .*, got '24'"):
        preset_changes(find_recipe("lora"), [], "24")
    with pytest.raises(RecipeError, match="--preset is for kind flow"):
        preset_changes(find_recipe("tiny/vae"), [], "24gb")
