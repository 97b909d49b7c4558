"""The public calls that diffusers' tests make of the Qwen-Image pipelines and models, on its objects and both of ours.

Each call has the name under which a script writes it, what diffusers returns, and is run on an object of diffusers, on
one after `accelerate`, and on the stand-alone one of the same weights. It is the same where type, shape and values are.
Offloading goes from the CPU to the CPU. Several processes and accelerators are not needed for any of them.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from accelerate_harness import CONFIG, small_transformer
from PIL import Image
from tests.pipelines.reference import reference, smaller_sizes
from tests.reference_api.model_calls import CONTROLNET, TRANSFORMER, VAE
from tests.reference_api.pipeline_calls import PIPELINES, TEXT
from tests.reference_api.ways import Row

import qwen_image_fast

# Of this tree, whichever package is counted.
SHIPPED = Path(__file__).parents[2] / "python" / "qwen_image_fast" / "checkpoints" / "tiny"
KINDS = {"accelerated": "after `accelerate`", "stand-alone": "stand-alone"}


class Call(NamedTuple):
    """of: "transformer", "controlnet", "vae" or a pipeline's class. row: its name, the type that diffusers returns,
    and the call itself."""

    of: str
    row: Row

    @property
    def different(self) -> str | None:
        """How the fault of the stand-alone object begins, where it differs on purpose."""
        return DIFFERENT.get(self.name) or DIFFERENT.get(self.row[0])

    @property
    def name(self) -> str:
        """Of its class too where it is not text to image's."""
        return self.row[0] if self.of in (TEXT, "transformer", "controlnet", "vae") else f"{self.of}: {self.row[0]}"


ROWS = {**PIPELINES, "transformer": TRANSFORMER, "controlnet": CONTROLNET, "vae": VAE}
CALLS = [Call(of, row) for of, rows in ROWS.items() for row in rows]

_ELSEWHERE = "AttributeError: "
# Rows, or calls of one pipeline, that differ on purpose with stand-alone objects, and how the fault begins. After
# `accelerate` none does.
DIFFERENT = {"pipe.enable_sequential_cpu_offload()": "ValueError: enable_sequential_cpu_offload: "}
DIFFERENT |= dict.fromkeys((
        "pipe.image_processor.postprocess(tensor, output_type=)", "pipe.prepare_latents(...)", "pipe.check_inputs(...)",
        "model.set_attention_backend(name), reset_attention_backend()",
    ), _ELSEWHERE)  # fmt: skip
# Every image of a prompt draws its picture's latents from its own generator; diffusers draws them once.
DIFFERENT |= {
    f"{name}: pipe(num_images_per_prompt=2, generator=[...])": "differs by "
    for name in ("QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline", "QwenImageEditInpaintPipeline")
}
# A picture of diffusers depends on the prompt beside it, which is longer or shorter; alone it is ours, to 7e-6. How
# much, is a matter of the weights: 3e-3 and 3e-2 of the deviation were seen. They are counted as different.
BY_WEIGHTS = [
    f"{name}: pipe(prompt=[...], image=[...], generator=[...])"
    for name in ("QwenImageEditPipeline", "QwenImageEditInpaintPipeline")
]
DIFFERENT |= dict.fromkeys(BY_WEIGHTS, "differs by ")
# A processor that names no mask sees the padding of texts in diffusers; here there is none.
DIFFERENT |= dict.fromkeys(
    ("model.attn_processors, set_attn_processor(processor)", "model.set_attn_processor({...})"), "differs by "
)
# diffusers gives layers of one picture to another where there are several.
DIFFERENT |= {
    f"QwenImageLayeredPipeline: pipe({given})": "shapes "
    for given in ("prompt=[...], image=[...], generator=[...]", "num_images_per_prompt=2, generator=[...]")
}


# ---- on whom ---------------------------------------------------------------------------------------------------------


@cache
def folder() -> Path:
    """The shipped model in float32 with two of its blocks, as diffusers writes it, and its processor."""
    diffusers.utils.logging.set_verbosity_error()
    made = folder.made = tempfile.TemporaryDirectory()  # type: ignore[attr-defined]
    path = Path(made.name)
    pipe = diffusers.QwenImagePipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)
    del pipe.transformer.transformer_blocks[2:]
    pipe.transformer.register_to_config(num_layers=2)
    pipe.save_pretrained(path)
    shutil.copytree(SHIPPED / "processor", path / "processor")
    return path


def random_weights(model: Any) -> Any:
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.dim() < 2 else p[0].numel() ** -0.5)
    return model.eval()


@cache
def own_parts(name: str) -> dict[str, Any]:
    """diffusers' models of a pipeline that the folder has not: with random weights."""
    of = {part: json.loads((folder() / part / "config.json").read_text()) for part in ("transformer", "vae")}
    if "Control" in name:
        taken = ("attention_head_dim", "axes_dims_rope", "in_channels", "joint_attention_dim", "num_attention_heads")
        sizes = {field: of["transformer"][field] for field in (*taken, "out_channels", "patch_size")}
        extra = {"num_layers": 1, "extra_condition_channels": 4 if "Inpaint" in name else 0}
        return {"controlnet": random_weights(diffusers.QwenImageControlNetModel(**sizes, **extra))}
    if "Layered" in name:
        flags = {"use_additional_t_cond": True, "use_layer3d_rope": True}
        transformer = diffusers.QwenImageTransformer2DModel.from_config({**of["transformer"], **flags})
        vae = diffusers.AutoencoderKLQwenImage.from_config({**of["vae"], "input_channels": 4})
        return {"transformer": random_weights(transformer), "vae": random_weights(vae)}
    return {}


def ours(model: Any) -> Any:
    """The stand-alone model with the weights of diffusers'."""
    made = getattr(qwen_image_fast, type(model).__name__).from_config(dict(model.config)).eval()
    made.load_state_dict(model.state_dict())
    return made


def pipeline(name: str, kind: str | None) -> Any:
    parts = copy.deepcopy(own_parts(name))
    if kind == "stand-alone":
        given = {part: ours(model) for part, model in parts.items()}
        pipe = getattr(qwen_image_fast, name).from_pretrained(folder(), **given)
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(disable=True)
        return pipe
    pipe = reference(name, folder(), **parts)
    if kind is not None:
        qwen_image_fast.accelerate(pipe)
    return pipe


def subject(of: str, kind: str | None) -> Any:
    """What is called; kind None: diffusers' own."""
    if of == "transformer":
        theirs = small_transformer()
    elif of == "controlnet":
        sizes = {name: value for name, value in CONFIG.items() if name != "guidance_embeds"}
        theirs = random_weights(diffusers.QwenImageControlNetModel(**sizes))
    elif of == "vae":
        theirs = diffusers.AutoencoderKLQwenImage.from_pretrained(folder(), subfolder="vae")
    else:
        return pipeline(of, kind)
    if kind == "stand-alone":
        return ours(theirs)
    if kind is not None and of != "controlnet":  # of which the drop-in has none
        qwen_image_fast.accelerate(theirs)
    return theirs


def results(kind: str | None, of: Iterable[str] = ROWS) -> Iterable[tuple[Call, Any]]:
    """Every call with what it returned or raised; after an error the object is made anew."""
    subjects: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        smaller_sizes(patch)
        for call in CALLS:
            if call.of not in of:
                continue
            try:
                if call.of not in subjects:
                    subjects = {call.of: subject(call.of, kind)}
                result = call.row[2](subjects[call.of])
            except Exception as error:  # whatever a tree lacks
                result = error
                subjects = {}
            yield call, result


@cache
def expected(of: str) -> dict[str, Any]:
    """What diffusers returns, or the error where it raises."""
    return {call.name: result for call, result in results(None, [of])}


def numbers(value: Any) -> list[np.ndarray]:
    """All tensors, arrays and pictures in a result."""
    if isinstance(value, Image.Image):
        return [np.asarray(value)]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return [np.asarray(value.detach() if isinstance(value, torch.Tensor) else value, dtype=float)]
    if isinstance(value, (list, tuple)):
        return [array for part in value for array in numbers(part)]
    names = ("images", "sample", "controlnet_block_samples")
    parts = [getattr(value, name) for name in names if hasattr(value, name)]
    return numbers(parts) if parts else []


def words(value: Any) -> Any:
    """What is not numbers in a result."""
    if isinstance(value, (list, tuple)):
        return [words(part) for part in value if not numbers(part)]
    return None if numbers(value) else value


def difference(got: Any, wanted: Any) -> str | None:
    """How a result differs from that of diffusers, in a few words."""
    if isinstance(got, Exception):
        return f"{type(got).__name__}: {str(got).splitlines()[0][:160]}" if str(got) else type(got).__name__
    if type(got).__name__ != type(wanted).__name__:
        return f"returns {type(got).__name__}, not {type(wanted).__name__}"
    if words(got) != words(wanted):
        return f"returns {words(got)!r}, not {words(wanted)!r}"
    ours, arrays = numbers(got), numbers(wanted)
    if [a.shape for a in ours] != [a.shape for a in arrays]:
        return f"shapes {[a.shape for a in ours]}, not {[a.shape for a in arrays]}"
    worst = max(map(distance, ours, arrays), default=0.0)
    return None if worst < 2e-2 else f"differs by {worst:.1e} of the deviation"


def share_of_deviation(fault: str | None) -> float:
    """Of a fault that `difference` found in numbers; infinite for every other."""
    if fault is None:
        return 0.0
    return float(fault.split()[2]) if fault.startswith("differs by ") else float("inf")


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, but for one step of 8 bits, in standard deviations of `b`."""
    steps = abs(a.astype(float) - b) - (b.dtype == np.uint8)
    return float(steps.max() / max(b.std(), 1e-3))


def faults(kind: str, of: Iterable[str] = ROWS) -> dict[str, str]:
    """What differs from diffusers, by call; or how diffusers differs from the list."""
    wanted = {name: result for part in of for name, result in expected(part).items()}
    found: dict[str, str | None] = {}
    for call, result in results(kind, of):
        found[call.name] = difference(result, wanted[call.name])
        if type(wanted[call.name]).__name__ != call.row[1]:
            found[call.name] = f"the list has {call.row[1]}, but diffusers returns {wanted[call.name]!r:.200}"
    return {name: fault for name, fault in found.items() if fault}
