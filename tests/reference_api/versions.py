"""`accelerate` with old and new diffusers and transformers: python -m tests.reference_api versions.

Each row's packages are installed alone into a folder that comes first on the path of a process, which runs this file.
`python -m tests.matrix` makes whole environments, with other versions of torch too (docs/versions.md).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
VERSIONS = ("0.36.0", "0.37.0", "0.37.1", "0.38.0", "0.39.0", "0.40.0", "0.41.0", "0.42.0", "0.42.1")
# The oldest transformers that pyproject.toml allows, and what it needs that the newest does not take. diffusers 0.42
# takes a newer huggingface_hub only.
OLD = {"transformers": "4.52.1", "tokenizers": "0.21.4", "huggingface_hub": "0.34.4"}
ROWS = {
    **{version: {"diffusers": version} for version in VERSIONS},
    "0.37.0 with the oldest transformers": {"diffusers": "0.37.0", **OLD},
}
SIZE = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np"}


def pipeline(cls: str) -> Any:
    import diffusers
    import torch
    from tests.pipelines.reference import Processor

    from qwen_image_fast.folders import SHIPPED

    diffusers.utils.logging.set_verbosity_error()
    if "Edit" in cls:  # whose processor's class in transformers needs torchvision
        parts = diffusers.QwenImagePipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32).components
        pipe = getattr(diffusers, cls)(**parts, processor=Processor(parts["tokenizer"], SHIPPED / "processor"))
    else:
        pipe = getattr(diffusers, cls).from_pretrained(SHIPPED, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, **given: Any) -> Any:
    import torch

    call = {"negative_prompt": " ", "generator": torch.Generator().manual_seed(0), **SIZE, **given}
    return torch.from_numpy(pipe(prompt='"HI" in red', **call).images)


def pictures() -> str:
    """Text to image, image to image and an edit, by the fast forward and, with a hook in its way, by diffusers' own."""
    import pytest
    from PIL import Image
    from tests.pipelines.reference import smaller_sizes

    from qwen_image_fast import accelerate

    said = []
    image = {"image": Image.new("RGB", (64, 64), (250, 40, 60))}
    calls: dict[str, dict[str, Any]] = {
        "QwenImagePipeline": {}, "QwenImageImg2ImgPipeline": {**image, "strength": 0.9, "num_inference_steps": 3},
        "QwenImageEditPipeline": image,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for cls, more in calls.items():
            if "Edit" in cls:
                smaller_sizes(patch)
            pipe = pipeline(cls)
            plain = draw(pipe, **more)
            replaced = {line.split(":")[0] for line in accelerate(pipe).replaced}
            assert {"transformer", "vae", "pipeline"} <= replaced, replaced
            said += [float((draw(pipe, **more) - plain).abs().max())]
            pipe.transformer.transformer_blocks[0].attn.norm_q.register_forward_hook(lambda module, args, output: None)
            said += [float((draw(pipe, **more) - plain).abs().max())]
    assert max(said) < 2 / 255, said
    return f"differ by {max(said):.1e} of 1"


def training_step() -> str:
    """Gradients of a LoRA, before and after `accelerate`."""
    import torch
    from peft import LoraConfig

    from qwen_image_fast import accelerate

    model = pipeline("QwenImagePipeline").transformer.requires_grad_(False)
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "add_q_proj", "img_mod.1"], init_lora_weights=False))
    text = torch.randn(1, 5, model.config.joint_attention_dim)
    picture = torch.randn(1, 16, model.config.in_channels)
    call = {"encoder_hidden_states": text, "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.long)}
    call |= {"timestep": torch.tensor([0.5]), "img_shapes": [[(1, 4, 4)]]}
    found = []
    for step in (lambda: None, lambda: accelerate(model)):
        step()
        model.zero_grad()
        model(picture, **call).sample.square().mean().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        missing = [name for name, grad in grads.items() if grad is None]
        assert not missing, missing
        found.append(torch.cat([grad.flatten() for grad in grads.values()]))
    difference = float((found[1] - found[0]).abs().max() / found[0].abs().max())
    assert difference < 1e-3, difference
    return f"gradients differ by {difference:.1e}"


def try_row(pins: dict[str, str]) -> dict[str, Any]:
    """What came of it: {"versions": ..., "passed": ..., "said": ...}."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-compile"]
        named = [f"{package}=={version}" for package, version in pins.items()]
        subprocess.run([*pip, "--target", folder, *named], check=True)
        path = os.pathsep.join([folder, str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        run = subprocess.run(
            [sys.executable, __file__], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
        )
    lines = (run.stdout if run.returncode == 0 else run.stderr).strip().splitlines()
    versions = {package: metadata.version(package) for package in ("diffusers", "transformers", "torch")} | {
        package: version for package, version in pins.items() if package in ("diffusers", "transformers")
    }
    return {"versions": versions, "passed": run.returncode == 0, "said": lines[-1]}


if __name__ == "__main__":
    print("; ".join(check() for check in (pictures, training_step)))
