"""Noise levels of a request, before a model is loaded: those that the pipeline of its kind asks the transformer for."""

import pytest
import torch
from PIL import Image

import qwen_image_fast as q
from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.models.modulation import ModulationTables, model_timesteps
from qwen_image_fast.request import make
from qwen_image_fast.request_schedule import StoredLevels, timesteps_of
from qwen_image_fast.schedulers import FlowMatchEulerDiscreteScheduler
from qwen_image_fast.weights.formats import open_weights

PICTURE, OTHER = Image.new("RGB", (90, 61), "red"), Image.new("RGB", (64, 48), "blue")
MASK = Image.new("RGB", PICTURE.size, "white")
STEPS = {"steps": 3, "seed": 0, "model": "tiny", "prompt": "a red circle"}
KINDS = {
    "text": ("text", {"width": 96, "height": 64}, {}),
    "lightning": ("text", {"width": 96, "height": 64, "lightning": 4, "cfg": 1.0}, {}),
    "image": ("image_to_image", {"strength": 0.5}, {"image": PICTURE}),
    "inpaint": ("inpaint", {"strength": 0.5}, {"image": PICTURE, "mask": MASK}),
    "edit": ("edit", {}, {"image": [PICTURE]}),
    "references": ("edit", {"width": 33}, {"image": [PICTURE, OTHER]}),
    "megapixel": ("edit", {"megapixel": True}, {"image": [PICTURE, OTHER]}),
    "megapixel of a width": ("edit", {"megapixel": True, "width": 64, "height": 80}, {"image": [PICTURE]}),
    "mask": ("edit", {}, {"image": [PICTURE], "mask": MASK}),
}


class Asked(Exception):
    """The noise levels that a table was asked for."""


@pytest.fixture(scope="module")
def pipe():
    return q.QwenImageEditPlusPipeline.from_pretrained("tiny", torch_dtype=torch.float32)


@pytest.mark.parametrize(("name", "at_zero"), [*((name, False) for name in KINDS), ("text", True), ("edit", True)])
def test_they_are_what_the_pipeline_asks_for(pipe, name, at_zero, monkeypatch):
    kind, values, opened = KINDS[name]

    def get(self, model, noise, *_):
        raise Asked(list(noise))

    monkeypatch.setattr(ModulationTables, "get", get)
    pipe.transformer.register_to_config(zero_cond_t=at_zero)
    places = {n: [{"path": "-"}] * len(v) if isinstance(v, list) else {"path": "-"} for n, v in opened.items()}
    given = {**STEPS, **values, **places}
    if "lightning" in values:
        del given["steps"]
    request = make(kind, given)
    own = getattr(q, request.pipeline("QwenImageEditPlusPipeline")).from_pipe(pipe)
    usual = own.scheduler
    if "lightning" in values:
        own.use_schedule("lightning-4")
    with pytest.raises(Asked) as asked:
        own(**request.call(opened), progress=False)
    wanted = model_timesteps(asked.value.args[0], torch.bfloat16, torch.device("cpu"))
    got = timesteps_of(request, opened, usual, at_zero)
    assert got == tuple(wanted.tolist()) and len(got) == request.steps + at_zero


def test_weights_have_every_schedule(pipe):
    file = SHIPPED / "transformer" / "diffusion_pytorch_model.safetensors"
    assert StoredLevels.of_file(open_weights([file], "transformer"), {}) is None
    assert StoredLevels.of_model(pipe.transformer) is None


def test_the_scheduler_stays_as_it_is():
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(SHIPPED, subfolder="scheduler")
    before = scheduler.sigmas.clone(), dict(scheduler.config)
    timesteps_of(make("text", {**STEPS, "size": "64x64"}), {}, scheduler, False)
    assert torch.equal(scheduler.sigmas, before[0]) and dict(scheduler.config) == before[1]
