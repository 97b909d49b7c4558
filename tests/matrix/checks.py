"""What the installed package must do in an environment: `python checks.py RESULT.json`. Imports nothing of the tree.

Each check makes something with the model of the package and says in a few words what came of it, or raises.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

# What a user's environment decides; named in the results.
NAMED = (
    "torch", "transformers", "diffusers", "accelerate", "peft", "huggingface_hub", "safetensors", "numpy", "pillow",
    "pydantic", "typer",
)  # fmt: skip
PROMPT = '"HI" in red on a white ground'
SHORT = {"height": 128, "width": 128, "num_inference_steps": 4}
CLOSE = 2  # of 255: two roundings


def picture() -> str:
    """By the kernels, and by the references."""
    import torch

    from qwen_image_fast import QwenImagePipeline, reference
    from qwen_image_fast.folders import SHIPPED

    pipe = QwenImagePipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)
    made = pipe(PROMPT, **SHORT, true_cfg_scale=1.0, seed=0, progress=False).images[0]
    with reference():
        expected = pipe(PROMPT, **SHORT, true_cfg_scale=1.0, seed=0, progress=False).images[0]
    return _alike(made, expected)


def edit() -> str:
    import torch
    from PIL import Image

    from qwen_image_fast import QwenImageEditPlusPipeline, reference
    from qwen_image_fast.folders import SHIPPED

    pipe = QwenImageEditPlusPipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)
    given = Image.new("RGB", (128, 128), (250, 240, 60))
    call = {"num_inference_steps": 4, "true_cfg_scale": 1.0, "seed": 0, "progress": False}
    made = pipe(given, "make it blue", **call).images[0]
    with reference():
        expected = pipe(given, "make it blue", **call).images[0]
    return _alike(made, expected)


def drop_in() -> str:
    """A pipeline of diffusers before `accelerate`, with it, and after `restore`."""
    import diffusers
    import torch

    from qwen_image_fast import accelerate, restore
    from qwen_image_fast.folders import SHIPPED

    pipe = diffusers.QwenImagePipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> object:
        return pipe(PROMPT, negative_prompt=" ", **SHORT, generator=torch.Generator().manual_seed(0)).images[0]

    before = draw()
    replaced = {line.split(":")[0] for line in accelerate(pipe).replaced}
    if not {"transformer", "vae", "pipeline"} <= replaced:
        raise AssertionError(f"only {', '.join(sorted(replaced))} replaced")
    said = _alike(draw(), before)
    restore(pipe)
    _alike(draw(), before)
    return said


def training_step() -> str:
    from qwen_image_fast.folders import SHIPPED

    with tempfile.TemporaryDirectory() as folder:
        _command(
            "train", "tiny/1-shapes", "--out", f"{folder}/run", "steps=1", "batch=2", "device=cpu",
            f"model.folder={SHIPPED}", "data.source=squares", "data.options={size: 32}", "log.prompts=[]",
            "log.every=1", "log.validation_samples=1",
        )  # fmt: skip
        if not list(Path(folder).glob("run/model/transformer/*.safetensors")):
            raise AssertionError("no model was written")
        lines = [json.loads(line) for line in Path(folder, "run", "log.jsonl").read_text().splitlines()]
    return f"loss {next(line['loss'] for line in lines if 'loss' in line):.4f}"


def doctor() -> str:
    return _command("doctor").strip().splitlines()[-1]


CHECKS: dict[str, Callable[[], str]] = {
    "picture": picture, "edit": edit, "drop-in": drop_in, "training step": training_step, "doctor": doctor,
}  # fmt: skip


def _alike(made: object, expected: object) -> str:
    import numpy as np

    a, b = np.asarray(made, dtype=int), np.asarray(expected, dtype=int)
    if a.std() < 1:
        raise AssertionError("the picture is of one colour")
    difference = abs(a - b).max()
    if difference > CLOSE:
        raise AssertionError(f"differs by {difference} of 255")
    return f"differs by {difference} of 255"


def _command(*args: str) -> str:
    run = subprocess.run([sys.executable, "-m", "qwen_image_fast.cli", *args], capture_output=True, text=True)
    if run.returncode:
        raise AssertionError((run.stderr or run.stdout).strip().splitlines()[-1])
    return run.stdout


def main() -> None:
    found = {}
    for name, check in CHECKS.items():
        try:
            found[name] = {"passed": True, "said": check()}
        except Exception as error:  # whatever a version lacks
            found[name] = {"passed": False, "said": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        print(f"  {name}: {found[name]['said']}", flush=True)
    versions = {name: metadata.version(name) for name in NAMED}
    Path(sys.argv[1]).write_text(json.dumps({"versions": versions, "checks": found}))


if __name__ == "__main__":
    main()
