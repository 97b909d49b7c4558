"""Runs of several processes with gloo: the same losses under every layout, and what happens when a rank dies."""

import json
import os
import signal
import time

import pytest
import torch
from parallel_helpers import HERE, finish, launch, losses, run_jobs, write_recipe
from trainer_helpers import small_recipe, small_transformer, start

from qwen_image_fast import QwenImagePipeline
from qwen_image_fast.training import checkpoint as checkpoints
from qwen_image_fast.training.parallel.layout import Sizes, check_recipe_parallel, sizes_of
from qwen_image_fast.training.recipe import ParallelRecipe, RecipeError

LAYOUTS = {"fsdp": {}, "tp": {"tp": 2}, "ulysses": {"cp": 2}}
STEPS = 20
# Of weights, for an lr of 2e-3: Adam makes steps of rounding errors where a gradient is zero (the biases of keys).
TOLERANCE = 2e-4


def job(folder, path, steps=STEPS, layout=None, **changes):
    changes |= {f"parallel__{name}": value for name, value in (layout or {}).items()}
    recipe = small_recipe(folder, steps=steps, **{"checkpoint__every": 10, "optimizer__clip": 0.5, **changes})
    return {"recipe_path": write_recipe(recipe, path.with_suffix(f".{steps}.yaml")), "folder": str(path)}


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """20 steps of one process, of two under each layout, and of two that go from layout to layout."""
    base = tmp_path_factory.mktemp("parallel")
    recipe = small_recipe(folder, steps=STEPS, checkpoint__every=10, optimizer__clip=0.5)
    start(recipe, base / "single").run()
    jobs = [job(folder, base / name, layout=layout) for name, layout in LAYOUTS.items()]
    again = {"resume": True, "allow_changes": True}
    for steps, layout in ((4, LAYOUTS["fsdp"]), (7, LAYOUTS["tp"]), (10, LAYOUTS["ulysses"])):
        jobs.append(job(folder, base / "moved", steps, layout) | again)
    return base, run_jobs(jobs)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_losses_are_those_of_one_process(runs, name):
    base, _ = runs
    torch.testing.assert_close(losses(base / name), losses(base / "single"), rtol=1e-5, atol=0)
    one, other = (checkpoints.load(checkpoints.latest(base / n / "checkpoints")) for n in ("single", name))
    for part in ("weights", "ema", "optimizer"):
        torch.testing.assert_close(getattr(other, part), getattr(one, part), rtol=1e-2, atol=TOLERANCE)


def test_a_run_goes_on_under_any_other_layout(runs, folder):
    base, _ = runs
    recipe = small_recipe(folder, steps=STEPS, checkpoint__every=10, optimizer__clip=0.5)
    start(recipe, base / "moved", resume=True, allow_changes=True).run()  # from Ulysses to one process
    torch.testing.assert_close(losses(base / "moved"), losses(base / "single"), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_export_is_a_pipeline(runs, name):
    base, _ = runs
    one, other = (QwenImagePipeline.from_pretrained(base / n / "model") for n in ("single", name))
    torch.testing.assert_close(other.transformer.state_dict(), one.transformer.state_dict(), rtol=1e-2, atol=TOLERANCE)
    torch.testing.assert_close(
        other.text_encoder.state_dict(), one.text_encoder.state_dict(), rtol=1e-2, atol=TOLERANCE
    )


def test_a_rank_reads_and_holds_its_part_alone(runs):
    _, printed = runs
    total = sum(p.numel() * 4 for p in small_transformer().parameters())
    for rank in printed:
        fsdp, tp, ulysses = (found["bytes_read"] for found in rank[:3])
        assert fsdp == pytest.approx(total / 2, rel=0.02) and ulysses == fsdp
        assert total / 2 < tp < 0.8 * total  # modulation, norms and embeddings are on every rank
        for found in rank[:3]:
            assert found["bytes_held"] == found["bytes_read"]
            # The kernel's count of bytes read, beside that of the loader: nothing else of the file is touched.
            assert found["bytes_read"] <= found["process_read"] < found["bytes_read"] + 0.1 * total


def test_a_killed_trainer_loses_the_steps_since_its_checkpoint(runs, folder, tmp_path):
    """SIGKILL of one rank: the other stops with a sentence, and the run goes on to the same losses."""
    base, _ = runs
    work = job(folder, tmp_path / "killed", checkpoint__every=4)
    arguments = [str(HERE / "parallel_worker.py"), json.dumps([work])]
    processes = launch(arguments)
    log = tmp_path / "killed" / "log.jsonl"
    end = time.monotonic() + 90
    while not (log.exists() and len(log.read_text().splitlines()) >= 9):
        assert time.monotonic() < end and all(p.poll() is None for p in processes)
        time.sleep(0.02)
    os.kill(processes[1].pid, signal.SIGKILL)
    killed = time.monotonic()
    (code, _, errors), _ = finish(processes)
    assert code == 1 and time.monotonic() - killed < 60
    assert "train: a rank of this run stopped, so all do (" in errors
    assert "the last good checkpoint is " in errors and "--resume" in errors
    saved = checkpoints.latest(tmp_path / "killed" / "checkpoints")
    done = len(losses(tmp_path / "killed"))
    assert int(saved.name.removeprefix("step-")) >= (done // 4 - 1) * 4  # one may still have been in the making
    recipe = small_recipe(folder, steps=STEPS, checkpoint__every=4, optimizer__clip=0.5)
    start(recipe, tmp_path / "killed", resume=True).run()
    torch.testing.assert_close(losses(tmp_path / "killed"), losses(base / "single"), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "parallel, world, words",
    [
        ({"tp": 3}, 4, r"must be the number of processes, 4, got 1 x the rest x 1 x 3; change parallel"),
        ({"dp_shard": 8}, 1, r"must be the number of processes, 1, got 1 x 8 x 1 x 1; .* start 8 processes"),
        ({"dp_shard": 2, "dp_replicate": 2, "cp": 2}, 4, r"got 2 x 2 x 2 x 1; .* start 8 processes with torchrun"),
    ],
)
def test_a_product_that_is_not_the_number_of_processes_is_refused(parallel, world, words):
    with pytest.raises(RecipeError, match=words):
        sizes_of(ParallelRecipe(**parallel), world)


@pytest.mark.parametrize(
    "sizes, changes, words",
    [
        (Sizes(1, 1, 2, 4), {}, r"parallel must have a tp x cp that divides the 20 attention heads, got 8"),
        (Sizes(1, 3, 1, 1), {}, r"batch must be a multiple of dp_replicate x dp_shard, 3, .* got 4"),
        (Sizes(1, 2, 1, 1), {"lora__rank": 2, "model__train_text_encoder": False}, r"lora.rank must be 0 on several"),
        (Sizes(1, 2, 1, 1), {"optimizer__name": "muon"}, r"optimizer.name must be adamw on several processes"),
        (Sizes(1, 2, 1, 1), {"log__sample_every": 5}, r"log.sample_every must be 0 on several processes"),
        (Sizes(1, 2, 1, 1), {"model__compile": True}, r"model.compile must be false"),
    ],
)
def test_what_cannot_be_split_is_refused(sizes, changes, words):
    with pytest.raises(RecipeError, match=words):
        check_recipe_parallel(small_recipe("x", **changes), sizes, 20 if sizes.tp == 4 else 24)
