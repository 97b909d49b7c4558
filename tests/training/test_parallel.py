"""Runs of several processes with gloo: the same losses under every layout, and what happens when a rank dies."""

import json
import os
import signal
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from data_pictures import noise
from parallel_helpers import HERE, losses, run_jobs, write_recipe
from PIL import Image
from safetensors.torch import load_file
from several_processes import finish, launch
from torch.distributed.run import get_args_parser
from trainer_helpers import small_recipe, small_transformer, small_tree, start

from qwen_image_fast import QwenImagePipeline
from qwen_image_fast.training.engine import checkpoint as checkpoints
from qwen_image_fast.training.engine.trainer import Trainer
from qwen_image_fast.training.parallel.layout import Sizes, check_recipe_parallel, sizes_of
from qwen_image_fast.training.recipe.curriculum import build_curriculum
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.names import find_recipe
from qwen_image_fast.training.recipe.read import read_recipe
from qwen_image_fast.training.recipe.run import ParallelRecipe
from qwen_image_fast.training.run import make_task

EXAMPLES = Path(__file__).parents[2] / "examples" / "distributed"
LAYOUTS = {"fsdp": {}, "tp": {"tp": 2}, "ulysses": {"cp": 2}}
STEPS = 20
# Of weights, for an lr of 2e-3: Adam makes steps of rounding errors where a gradient is zero (the biases of keys).
TOLERANCE = 2e-4


def job(folder, path, steps=STEPS, layout=None, **changes):
    changes |= {f"parallel__{name}": value for name, value in (layout or {}).items()}
    recipe = small_recipe(folder, steps=steps, **{"checkpoint__every": 10, "optimizer__clip": 0.5, **changes})
    return {"recipe_path": write_recipe(asdict(recipe), path.with_suffix(f".{steps}.yaml")), "folder": str(path)}


ADAPTERS = {"lora__rank": 4, "lora__targets": ["to_q", "to_add_out", "img_mod.1"], "model__train_text_encoder": False}
CHANGE = (3, "{large: 0}")


def stages(folder):
    """Squares, then squares and edits of two sizes, with pictures and validation at the end of each stage."""
    tree = small_tree(folder) | {"producers": {"backend": "processes", "ahead": 1}}
    tree["model"] |= {"train_text_encoder": False}
    tree["log"] |= {"sample_every": 100, "validate_every": 100, "prompts": ["red square, top left"]}
    tree["stages"] = [
        {"name": "small", "steps": 2},
        {
            "name": "mixed", "steps": 5, "optimizer": {"lr": 1e-3}, "carry": {"optimizer": False},
            "data": {
                "mixture": [
                    {"name": "edits", "source": "squares", "options": {"size": 32},
                     "tasks": {"ti2i": 0.6, "recon": 0.4}},
                    {"name": "large", "source": "squares", "options": {"size": 48}},
                ],
                "buckets": [[32, 32], [48, 48]],
            },
        },
    ]  # fmt: skip
    return tree


def pictures(root):
    """The changes for a folder of pictures, half of which are empty."""
    root.mkdir(exist_ok=True)
    for i in range(8):
        (root / f"{i}.png").write_bytes(noise(i) if i % 2 else b"")
        (root / f"{i}.txt").write_text(f"picture {i}")
    return {"data__source": str(root), "data__options": {}}


def alone(trainer):
    """A run of one process that asks for another mixture as those of two do."""
    step, folder = trainer.train_step, trainer.folder

    def train_step(batches):
        if trainer.step == CHANGE[0]:
            (folder / "mixture.yaml").write_text(CHANGE[1])
        return step(batches)

    trainer.train_step = train_step
    trainer.run()


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
    adapters = small_recipe(folder, steps=4, **ADAPTERS)
    start(adapters, base / "adapters-1").run()
    jobs.append(job(folder, base / "adapters-2", 2, LAYOUTS["fsdp"], optimizer__clip=1.0, **ADAPTERS))
    jobs.append(job(folder, base / "adapters-2", 4, LAYOUTS["ulysses"], optimizer__clip=1.0, **ADAPTERS) | again)
    staged = build_curriculum(stages(folder))
    alone(Trainer(staged, make_task(staged, base / "stages-1"), base / "stages-1"))
    path = write_recipe(stages(folder), base / "stages.yaml")
    mixture = (CHANGE[0], str(base / "stages-2"), CHANGE[1])
    jobs.append({"recipe_path": path, "folder": str(base / "stages-2"), "mixture": mixture})
    damaged = small_recipe(folder, steps=4, **pictures(base / "pictures"))
    start(damaged, base / "damaged-1").run()
    jobs.append(job(folder, base / "damaged-2", 4, LAYOUTS["fsdp"], optimizer__clip=1.0, **pictures(base / "pictures")))
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


def test_adapters_learn_on_several_processes_as_on_one(runs):
    """Two steps of FSDP2, then two of Ulysses from its checkpoint."""
    base, _ = runs
    torch.testing.assert_close(losses(base / "adapters-2"), losses(base / "adapters-1"), rtol=1e-5, atol=0)
    for name in ("pytorch_lora_weights", "adapter_model"):
        one, two = (load_file(base / f"adapters-{n}" / "model" / f"{name}.safetensors") for n in (1, 2))
        torch.testing.assert_close(two, one, rtol=1e-2, atol=TOLERANCE)


def test_stages_edits_pictures_and_a_new_mixture_are_those_of_one_process(runs):
    base, _ = runs
    one, two = base / "stages-1", base / "stages-2"
    assert (two / "mixture.jsonl").read_text() == (one / "mixture.jsonl").read_text()
    for key in ("loss", "validation_loss", "stage"):
        assert len(losses(one, key)) == {"validation_loss": 2}.get(key, 7)
        torch.testing.assert_close(losses(two, key), losses(one, key), rtol=1e-5, atol=0)
    for path in (one, two):  # 7 steps, and 5 since the optimiser began anew
        state = checkpoints.load(checkpoints.latest(path / "checkpoints"))
        assert state.step == 7 and {float(t) for n, t in state.optimizer.items() if n.endswith("/step")} == {5.0}
    pictures, others = (sorted(path.name for path in (run / "samples").glob("*.png")) for run in (one, two))
    # Before the first step a single process alone draws.
    assert len(others) >= 2 and [name for name in pictures if "step-00000000" not in name] == others
    for name in others:
        a, b = (np.asarray(Image.open(path / "samples" / name), int) for path in (one, two))
        assert abs(a - b).max() <= 1


def test_damaged_files_are_left_out_on_several_processes_as_on_one(runs):
    base, _ = runs
    one, two = base / "damaged-1", base / "damaged-2"
    torch.testing.assert_close(losses(two), losses(one), rtol=1e-5, atol=0)
    assert losses(two, "rejected") == losses(one, "rejected") and sum(losses(one, "rejected")) > 4
    assert (two / "rejected.jsonl").read_text() == (one / "rejected.jsonl").read_text()


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
    work = job(folder, tmp_path / "killed", checkpoint__every=4) | {"killed": (1, 9)}
    processes = launch([str(HERE / "parallel_worker.py"), json.dumps([work])])
    (code, _, errors), (killed, *_) = finish(processes)
    assert code == 1 and killed == -signal.SIGKILL
    assert "train: a rank of this run stopped, so all do (" in errors
    assert "the last good checkpoint is " in errors and "--resume" in errors
    saved = checkpoints.latest(tmp_path / "killed" / "checkpoints")
    done = len(losses(tmp_path / "killed"))
    assert int(saved.name.removeprefix("step-")) >= (done // 4 - 1) * 4  # one may still have been in the making
    recipe = small_recipe(folder, steps=STEPS, checkpoint__every=4, optimizer__clip=0.5)
    start(recipe, tmp_path / "killed", resume=True).run()
    torch.testing.assert_close(losses(tmp_path / "killed"), losses(base / "single"), rtol=1e-5, atol=0)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(runs, folder, tmp_path):
    """SIGTERM of rank 1 alone: both finish the step, and what they keep goes on to the same losses."""
    base, _ = runs
    work = job(folder, tmp_path / "stopped", checkpoint__every=100) | {"killed": (1, 9, signal.SIGTERM)}
    for _, _, errors in finish(launch([str(HERE / "parallel_worker.py"), json.dumps([work])])):
        assert f"Interrupted: stopped after step 10 of {STEPS}; kept: " in errors
    assert checkpoints.latest(tmp_path / "stopped" / "checkpoints").name == "step-00000010"
    recipe = small_recipe(folder, steps=STEPS, checkpoint__every=100, optimizer__clip=0.5)
    start(recipe, tmp_path / "stopped", resume=True).run()
    torch.testing.assert_close(losses(tmp_path / "stopped"), losses(base / "single"), rtol=1e-5, atol=0)


SRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$ASKED"
"""


def test_the_slurm_example_starts_what_it_names(tmp_path):
    """With stand-ins for Slurm's commands: the processes that torchrun is asked for are those of the layout."""
    for name, script in (("srun", SRUN), ("scontrol", "#!/bin/bash\nprintf 'node1\\nnode2\\n'\n")):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ASKED": str(tmp_path / "asked"), "MODEL": "model",
             "DATA": "data", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]"}  # fmt: skip
    subprocess.run(["bash", EXAMPLES / "slurm.sh"], env=os.environ | given, check=True)
    program, *asked = (tmp_path / "asked").read_text().splitlines()
    options = get_args_parser().parse_args(asked)
    assert program == "torchrun" and options.module and options.training_script == "qwen_image_fast.training"
    assert options.rdzv_endpoint == "node1:29500" and options.rdzv_id == "7"
    name, *changes = options.training_script_args
    recipe = read_recipe(find_recipe(name), changes[: changes.index("--out")])
    sizes = sizes_of(recipe.parallel, int(options.nnodes) * int(options.nproc_per_node))
    check_recipe_parallel(recipe, sizes, 24)
    assert sizes == Sizes(2, 8, 1, 1) and changes[-1] == "--resume"


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
        (
            Sizes(1, 1, 1, 2),
            {"lora__rank": 2, "model__train_text_encoder": False},
            r"lora.rank must be 0 where parallel.tp",
        ),
        (Sizes(1, 2, 1, 1), {"optimizer__name": "muon"}, r"optimizer.name must be adamw on several processes"),
        (Sizes(1, 2, 1, 1), {"model__compile": True}, r"model.compile must be false"),
        (
            Sizes(1, 2, 1, 1),
            {"data__tasks": {"ti2i": 1.0}},
            r"model.train_text_encoder must be false where",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(sizes, changes, words):
    with pytest.raises(RecipeError, match=words):
        check_recipe_parallel(small_recipe("x", **changes), sizes, 20 if sizes.tp == 4 else 24)
